"""The automatic graphs against those that `adapters/` writes down by hand."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck
from torchvision.models.segmentation.fcn import FCN, FCNHead

import fxlean
from adapters.draft import ByHand
from adapters.msd import MSD, msd_graph
from adapters.resnet50 import fcn_graph, resnet_graph
from adapters.unet4 import UNet4, unet4_graph
from fxlean.channels.graph import ChannelGraph
from fxlean.pruning.prune_model import _generator
from fxlean.selection.liveness import used_kernels, zero_channels
from fxlean.selection.methods import METHODS, SHARE
from tests.support.zoo import randomise_norms

# Ratio, and whether redundant kernels go.
RUNS = ((0.5, True), (0.2, False), (0.05, True))


class Thin(Bottleneck):  # type: ignore[misc]
    """A bottleneck that does not widen, which makes a small network."""

    expansion = 1


def resnet(pool: nn.Module, **options: Any) -> nn.Module:
    model = ResNet(Thin, [2, 1, 1, 2], num_classes=7, width_per_group=8, **options)
    model.maxpool = pool
    return model


def fcn(pool: nn.Module) -> nn.Module:
    backbone = resnet(pool, replace_stride_with_dilation=[False, True, True])
    return FCN(IntermediateLayerGetter(backbone, {"layer4": "out"}), FCNHead(512, 5))


MAX_POOL, AVERAGE_POOL = nn.MaxPool2d(3, 2, padding=1), nn.AvgPool2d(3, 2, padding=1)


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    by_hand: Callable[..., ByHand]
    shape: tuple[int, ...]


CASES = {
    "msd": Case(lambda: MSD(1, 5, 30), msd_graph, (1, 1, 16, 16)),
    "msd_wide": Case(lambda: MSD(2, 3, 8, width=4, dilations=(1, 2)), msd_graph, (1, 2, 8, 8)),
    "msd_3d": Case(lambda: MSD(1, 2, 9, width=2, dims=3), msd_graph, (1, 1, 12, 12, 12)),
    "resnet": Case(lambda: resnet(MAX_POOL), resnet_graph, (1, 3, 64, 64)),
    "resnet_average": Case(lambda: resnet(AVERAGE_POOL), resnet_graph, (1, 3, 64, 64)),
    "fcn": Case(lambda: fcn(MAX_POOL), fcn_graph, (1, 3, 64, 64)),
    "fcn_average": Case(lambda: fcn(AVERAGE_POOL), fcn_graph, (1, 3, 64, 64)),
    "unet4": Case(lambda: UNet4(1, 5, width=6), unet4_graph, (1, 1, 32, 32)),
}


PRUNED = ("msd", "msd_wide", "msd_3d", "resnet_average", "fcn", "unet4")
# Few kernels chosen without regard to each other may connect no input to an output.
# Shares of variance are of a model and its data, not of a graph written by hand.
BY_NORM = [name for name, method in METHODS.items() if method.norm != SHARE]
may_disconnect = pytest.mark.filterwarnings("ignore::fxlean.PruneWarning")


@torch.no_grad()
def perturb(model: nn.Module, seed: int) -> None:
    """Stands in for training: moves all weights, some of them to both sides of length 1."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        scale = 1.0 if parameter.dim() < 2 else 2.5 * parameter[0].numel() ** -0.5
        parameter.mul_(0.7).add_(0.5 * scale * torch.randn_like(parameter))
    randomise_norms(model)


def make(name: str) -> tuple[nn.Module, Case, Tensor]:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()
    perturb(model, 1)
    return model, case, torch.zeros(case.shape)


@dataclass
class Namer:
    """Numbers channels by what feeds them, the same in every graph: names of layers and rows."""

    numbers: dict[Any, int] = field(default_factory=dict)

    def names(self, graph: ChannelGraph, reserved: int = 0) -> np.ndarray:
        """A number for every channel; the first `reserved` ones are there for nobody to compare."""
        starts = [layer.start for layer in graph.layers]
        names = np.zeros(graph.num_channels, dtype=np.int64)
        seen: Counter[Any] = Counter()
        for channel, kernel in enumerate(graph.kernel_start.tolist()):
            row = slice(*(graph.source_start[channel] + [0, graph.sizes[channel]]))
            if channel < reserved:
                key: Any = ("reserved", channel)
            elif kernel >= 0:
                layer = graph.layers[int(np.searchsorted(starts, kernel, side="right")) - 1]
                key = (layer.name, (kernel - layer.start) // layer.columns)
            else:
                key = ("fixed", *sorted(names[graph.sources[row]].tolist()))
            seen[key] += 1
            names[channel] = self.numbers.setdefault((key, seen[key]), len(self.numbers))
        return names


def rows(graph: ChannelGraph, names: np.ndarray) -> Iterator[tuple[int, Any, np.ndarray]]:
    """Name, properties, and edge lengths of every channel, in an order that names decide.

    Without those that nothing reads, such as the indices of a max pool: they change nothing.
    """
    matters = graph.outputs | (graph.kernel_start >= 0) | (graph.sizes == 0)
    matters[graph.sources] = True
    for channel in np.argsort(names):
        if not matters[channel]:
            continue
        size, prunable = graph.sizes[channel], graph.kernel_start[channel] >= 0
        sources = names[graph.sources[graph.source_start[channel] :][:size]]
        lengths = graph.lengths[graph.length_start[channel] :][:size]
        order = np.arange(size) if prunable else np.argsort(sources)
        properties = (
            int(graph.kinds[channel]),
            bool(graph.outputs[channel]),
            bool(graph.opaque[channel]),
            bool(prunable),
            int(names[graph.ties[channel]]),
            sources[order].tobytes(),
        )
        yield int(names[channel]), properties, lengths[order]


def assert_same_graph(automatic: ChannelGraph, by_hand: ChannelGraph) -> None:
    namer = Namer()
    # The automatic graph begins with a zero channel and a constant channel.
    ours = list(rows(automatic, namer.names(automatic, reserved=2)))[2:]
    theirs = list(rows(by_hand, namer.names(by_hand)))
    assert [name for name, _, _ in ours] == [name for name, _, _ in theirs]
    assert [properties for _, properties, _ in ours] == [properties for _, properties, _ in theirs]
    our_lengths, their_lengths = (
        np.concatenate([row[2] for row in side]) for side in (ours, theirs)
    )
    np.testing.assert_allclose(our_lengths, their_lengths, rtol=1e-6)
    assert automatic.layers == by_hand.layers
    np.testing.assert_array_equal(automatic.alive, by_hand.alive)


def select(
    by_hand: ByHand, method: str, ratio: float, redundancy: bool
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What pruning the graph by hand keeps: kernels, and elements of biases and batch norms."""
    graph = by_hand.graph
    budget = int(ratio * graph.num_kernels)
    keep, _ = METHODS[method].select(graph, budget, _generator(method))
    keep = used_kernels(graph, keep) if redundancy else keep
    zero = zero_channels(graph, keep, redundancy=redundancy)
    return keep, {name: ~zero[channels] for name, channels in by_hand.constants.items()}


def drawn_for(model: nn.Module, case: Case, method: str) -> ByHand:
    """The graph by hand, with the lengths that a method wants."""
    chosen = METHODS[method]
    return case.by_hand(model, chosen.norm or "spectral", fold=chosen.gains)


def assert_pruned_as(
    model: nn.Module, case: Case, keep: np.ndarray, constants: dict[str, np.ndarray]
) -> None:
    np.testing.assert_array_equal(case.by_hand(model, "l1").graph.alive, keep)
    masks = dict(model.named_buffers())
    for name, survives in constants.items():
        mask = masks.get(f"{name}_mask", torch.ones(len(survives)))
        np.testing.assert_array_equal(mask.numpy() != 0, survives, err_msg=name)
    kernels = [mask for key, mask in masks.items() if key.endswith("_mask") and mask.dim() > 2]
    for mask in kernels:
        assert torch.equal(mask.flatten(2).amin(2), mask.flatten(2).amax(2))


@pytest.mark.parametrize("name", CASES)
def test_automatic_graph_is_the_one_written_by_hand(name):
    model, case, inputs = make(name)
    assert_same_graph(fxlean.trace(model, inputs), case.by_hand(model).graph)


@pytest.mark.parametrize("norm", ["frobenius", "l1"])
def test_lengths_agree_for_other_norms(norm):
    model, case, inputs = make("unet4")
    assert_same_graph(fxlean.trace(model, inputs, norm=norm), case.by_hand(model, norm).graph)


@may_disconnect
@pytest.mark.parametrize("name", PRUNED)
@pytest.mark.parametrize("method", BY_NORM)
def test_masks_agree(name, method):
    model, case, inputs = make(name)
    by_hand = drawn_for(model, case, method)
    for ratio, redundancy in RUNS:
        torch.manual_seed(5)
        keep, constants = select(by_hand, method, ratio, redundancy)
        torch.manual_seed(5)
        pruned = copy.deepcopy(model)
        fxlean.prune(pruned, ratio, inputs, method=method, redundancy=redundancy)
        assert_pruned_as(pruned, case, keep, constants)


@may_disconnect
@pytest.mark.parametrize("name", ["msd", "resnet_average", "unet4"])
@pytest.mark.parametrize("method", BY_NORM)
def test_masks_agree_along_an_iterated_schedule(name, method):
    model, case, inputs = make(name)
    steps = fxlean.iterate(model, 0.05, 3, inputs, method=method)
    for step in (1, 2, 3):
        perturb(model, step)
        by_hand = drawn_for(model, case, method)
        torch.manual_seed(step)
        keep, constants = select(by_hand, method, 0.05 ** (step / 3), True)
        torch.manual_seed(step)
        next(steps)
        assert_pruned_as(model, case, keep, constants)


def test_batch_norms_of_constants_are_dead_in_both_graphs():
    model, case, inputs = make("resnet")
    for norm in (model.bn1, model.layer2[0].bn2, model.layer2[0].downsample[1]):
        norm.running_var[:3] = 0
    assert_same_graph(fxlean.trace(model, inputs), case.by_hand(model).graph)
    for redundancy in (False, True):
        keep, constants = select(drawn_for(model, case, "l1"), "l1", 0.5, redundancy)
        pruned = copy.deepcopy(model)
        fxlean.prune(pruned, 0.5, inputs, method="l1", redundancy=redundancy)
        assert_pruned_as(pruned, case, keep, constants)


def test_resnet50_at_full_size():
    torch.manual_seed(0)
    model, inputs = resnet50().eval(), torch.zeros(1, 3, 64, 64)
    randomise_norms(model)
    case = Case(resnet50, resnet_graph, (1, 3, 64, 64))
    by_hand = drawn_for(model, case, "lean")
    assert_same_graph(fxlean.trace(model, inputs), by_hand.graph)
    keep, constants = select(by_hand, "lean", 0.1, True)
    fxlean.prune(model, 0.1, inputs)
    assert_pruned_as(model, case, keep, constants)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("width", "batch"), [(1, 1), (3, 2)])
def test_fast_training_of_msd_is_the_convolutions_that_it_stands_for(dims, width, batch):
    torch.manual_seed(0)
    model = MSD(2, 3, 5, width, (1, 2, 3), dims).double()
    nn.init.uniform_(model.bias, -0.1, 0.1)
    inputs = torch.randn(batch, 2, *[9, 8, 7][:dims], dtype=torch.float64, requires_grad=True)
    wanted = [inputs, *model.parameters()]
    found = []
    for training in (True, False):
        outputs = model.train(training)(inputs)
        found.append([outputs, *torch.autograd.grad(outputs.sin().sum(), wanted)])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain)


def test_unet4_refuses_sizes_that_it_cannot_halve():
    with pytest.raises(ValueError, match="multiples of 16"):
        UNet4(1, 2, width=2)(torch.zeros(1, 1, 40, 32))
