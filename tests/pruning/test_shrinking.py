"""`shrink`: prune, repair and compact in one call."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlean
from fxlean.pruning import shrinking
from tests.support.blocks import conv_bn, conv_bn_relu, residual

pytestmark = pytest.mark.filterwarnings(
    "ignore::fxlean.PruneWarning",
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning",
)


def network():
    """A residual network, every channel of a layer smaller by a factor, so that much can go."""
    torch.manual_seed(0)
    body = [nn.Sequential(conv_bn_relu(16, 16), conv_bn(16, 16))]
    model = nn.Sequential(
        conv_bn_relu(3, 16),
        *map(residual, body),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= 0.6 ** torch.arange(len(module.weight))[:, None, None, None]
        model.train()
        for batch in images():
            model(batch)
    return model.eval()


def images():
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(64, 3, 8, 8, generator=generator).split(16))


def error(small, model):
    """The relative error of the outputs on samples that nobody has seen."""
    x = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(x)
        return float((small(x) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


@pytest.mark.parametrize("batches", [images(), None], ids=["batches", "noise"])
def test_a_copy_becomes_smaller_and_computes_nearly_the_same(batches, capsys):
    model = network()
    before = copy.deepcopy(model.state_dict())
    small = fxlean.shrink(model, 0.4, batches, example_inputs=images()[0][:2])
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    printed = capsys.readouterr().out
    assert "% of the MACs" in printed
    assert "relative error of the outputs on held-out samples: 0." in printed
    macs = [fxlean.report(m, images()[0]).macs for m in (small, model)]
    assert 0.35 < macs[0] / macs[1] <= 0.4
    assert not any(name.endswith("_mask") for name in small.state_dict())
    pruned = copy.deepcopy(model)
    fxlean.prune(pruned, 0.4, images()[0], granularity="channel", of="macs", method="relevance")
    assert error(small, model) < 0.5 * error(pruned, model)


def test_a_network_shrinks_as_far_as_the_tolerance_allows(capsys):
    model, sizes = network(), []
    for tolerance in (0.02, 0.2):
        small = fxlean.shrink(model, None, images(), tolerance=tolerance)
        printed = capsys.readouterr().out
        assert float(printed.rsplit(":", 1)[1]) <= tolerance + 1e-3
        sizes.append(fxlean.report(small, images()[0]).macs)
    assert sizes[1] < sizes[0] < fxlean.report(model, images()[0]).macs


def test_a_tolerance_goes_as_far_as_layers_may_shrink():
    model = network()
    with pytest.raises(fxlean.ArgumentError) as refused:
        fxlean.shrink(model, 0.01, images(), rounds=1, at_least=0.77)
    reachable = float(re.search(r"a ratio of at least ([\d.]+)", str(refused.value))[1])
    small = fxlean.shrink(model, None, images(), tolerance=100, at_least=0.77, progress=False)
    macs = [fxlean.report(m, images()[0]).macs for m in (small, model)]
    assert reachable - 1e-3 <= macs[0] / macs[1] < 1.05 * reachable
    with pytest.raises(fxlean.ArgumentError, match=r"whatever the tolerance: .* of the macs stay"):
        fxlean.shrink(model, None, images(), tolerance=100, at_least=1.0)


@pytest.mark.parametrize(("count", "size"), [(8, 1), (8, 8), (4, 1), (4, 2), (4, 4)])
def test_few_images_of_a_classifier_tell_an_error(count, size, capsys):
    model = nn.Sequential(conv_bn_relu(3, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.append(nn.Linear(16, 4)).eval()
    fxlean.shrink(model, 0.6, list(images()[0][:count].split(size)), rounds=1)
    assert 0 < float(capsys.readouterr().out.rsplit(":", 1)[1]) < 100


def test_distillation_that_makes_it_worse_is_dropped_and_silence_is_kept(capsys):
    model = network()
    once = fxlean.shrink(model, 0.2, images(), rounds=1, progress=False)
    more = fxlean.shrink(model, 0.2, images(), rounds=1, distill=60, progress=False)
    assert torch.equal(more(images()[0]), once(images()[0]))
    assert capsys.readouterr().out == ""


def test_a_frozen_network_shrinks_and_loses_its_batch_norms():
    model = network().requires_grad_(False)
    small = fxlean.shrink(model, 0.4, images(), distill=1, progress=False)
    assert not any(p.requires_grad for m in (small, model) for p in m.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    assert error(small, model) < 0.5


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"tolerance": 0.9}])
def test_iterations_that_share_one_network_shrink(options):
    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.Sequential(conv_bn_relu(3, 24), nn.Conv2d(24, 3, 3, padding=1))

        def forward(self, x):
            y = x
            for _ in range(3):
                y = y - 0.1 * (y - x) + self.step(y)
            return y

    torch.manual_seed(0)
    model = Unrolled().eval()
    small = fxlean.shrink(model, batches=images(), progress=False, **options)
    macs = [fxlean.report(m, images()[0]).macs for m in (small, model)]
    assert macs[0] <= (0.5 if "ratio" in options else 0.9) * macs[1]
    assert error(small, model) < 1


def test_a_network_that_cannot_be_repaired_shrinks_with_a_warning():
    class Dilated(nn.Module):
        """The same weights, more and more dilated."""

        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 24, 3, bias=False), nn.Conv2d(24, 3, 3)

        def forward(self, x):
            y = x
            for size in (1, 2, 3):
                wide = F.conv2d(y, self.wide.weight, padding=size, dilation=size)
                y = y + F.conv2d(wide.relu(), self.narrow.weight, padding=size, dilation=size)
            return y

    torch.manual_seed(0)
    model = Dilated().eval()
    for options in ({"ratio": 0.5}, {"tolerance": 0.9}):
        with pytest.warns(fxlean.PruneWarning, match=r"without repair: .*used in several ways"):
            small = fxlean.shrink(
                model, batches=images(), progress=False, granularity="kernel", **options
            )
        (wide,) = (weight for weight in small.parameters() if weight.shape[:2] == (24, 3))
        assert wide.flatten(2).any(2).sum() <= (0.5 if "ratio" in options else 0.9) * 24 * 3
        assert error(small, model) < 1


def test_inference_mode_makes_no_difference():
    model, data = network(), images()
    expected = fxlean.shrink(model, 0.5, data, rounds=1, progress=False)
    with torch.inference_mode():
        small = fxlean.shrink(model, 0.5, data, rounds=1, progress=False)
    assert torch.equal(small(images()[0]), expected(images()[0]))
    small(images()[0]).sum().backward()


def test_a_round_that_cannot_be_reached_names_the_ratio_that_was_asked_for():
    with pytest.raises(fxlean.ArgumentError, match=r"^on the way to 0.2: ratio is 0.447.*at least"):
        fxlean.shrink(network(), 0.2, images(), rounds=2, at_least=1.0)


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"tolerance": 0.1}])
def test_an_error_of_repair_is_told_as_it_is(options, monkeypatch):
    def refuse(*_, **__):
        raise fxlean.ArgumentError("no repair")

    monkeypatch.setattr(shrinking, "repair_towards", refuse)
    with pytest.raises(fxlean.ArgumentError, match=r"^no repair$"):
        fxlean.shrink(network(), batches=images(), progress=False, **options)


def test_options_are_those_of_prune():
    model = network()
    small = fxlean.shrink(
        model, 0.6, images(), of="parameters", method="l1", at_least={"0": 1.0}, progress=False
    )
    assert small[0][0].out_channels == 16
    count = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert count[0] <= 0.6 * count[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "ratio is None and tolerance is None. Pass one of them"),
        ({"ratio": 0.5, "tolerance": 0.1}, "ratio is 0.5 and tolerance is 0.1. Pass one"),
        ({"ratio": 2}, "ratio is 2. Pass the fraction to keep, above 0"),
        ({"tolerance": -1}, "tolerance is -1. Pass a number above 0"),
        ({"tolerance": 1e-12}, "tolerance is 1e-12, but the outputs change by more"),
        ({"ratio": 0.5, "rounds": 0}, "rounds is 0. Pass a whole number of at least 1"),
        ({"ratio": 0.5, "distill": 1.5}, "distill is 1.5. Pass a whole number of at least 0"),
        ({"ratio": 0.5, "metod": "l1"}, "metod is no option. Did you mean method?"),
        ({"ratio": 0.5, "batches": torch.zeros(1, 3, 8, 8)}, "batches hold 1 sample. Pass at"),
        ({"ratio": 0.5, "batches": torch.zeros(3, 3, 8, 8)}, "batches hold 3 samples"),
        ({"ratio": 0.5, "calibration": images()}, "calibration is no option of shrink. Pass the"),
        ({"ratio": 0.5, "batches": list(torch.zeros(2, 1, 3, 8, 8))}, "batches hold 2 samples"),
        ({"ratio": 1e-4}, "of the macs stay when all channels are gone that may go"),
    ],
)
def test_bad_arguments(arguments, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.shrink(model, **{"batches": images(), **arguments})
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
