"""What is saved and loaded into a newly built dense model computes the same, bit for bit."""

import copy
import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

import fxlean
from fxlean.checkpoint.packing import packed, unpacked
from fxlean.masking import masked
from fxlean.nn import Selected
from tests.support.blocks import conv, conv_bn_relu, residual
from tests.support.compare import load_trained_state, same_state, state
from tests.support.strategies import networks
from tests.support.zoo import ZOO, make

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning",
    "ignore::fxlean.PruneWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
)
every_network = pytest.mark.parametrize("name", sorted(ZOO))
REWRITTEN = {"functional", "stacked_weights", "weight_norm", "dense_in_place"}  # by compact
IMAGE = torch.zeros(2, 3, 8, 8)
WRAPPERS = {
    "data_parallel": "module.",
    "compiled": "_orig_mod.",
    "both": "_orig_mod.module.",
    "lightning": "model.net.",
}


@torch.no_grad()
def run(model, inputs):
    return tree_leaves(model(*inputs))


def assert_same(left, right, inputs):
    for a, b in zip(run(left, inputs), run(right, inputs), strict=True):
        assert torch.equal(a, b)


def pruned(name, ratio=0.3, **options):
    model, inputs = make(name)
    torch.manual_seed(0)
    fxlean.prune(model, ratio, inputs, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    run(model, inputs)
    return model, inputs


def fresh(name):
    """The dense model with other weights."""
    model, _ = make(name)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(0.5)
    return model


def net(width=8, classes=4):
    torch.manual_seed(0)
    layers = [conv_bn_relu(3, width), conv(width, 6, bias=True), nn.ReLU(), conv(6, 6), nn.ReLU()]
    return nn.Sequential(*layers, conv(6, classes, 1, bias=True)).eval()


@every_network
def test_a_masked_network_comes_back_bit_for_bit(name, tmp_path):
    model, inputs = pruned(name)
    before = state(model)
    fxlean.save(model, tmp_path / "model")
    assert same_state(before, model.state_dict())
    other = fxlean.load(fresh(name), tmp_path / "model")
    assert_same(model, other, inputs)
    assert list(other.state_dict()) == list(before)
    for key, value in other.state_dict().items():
        mask = before.get(f"{key.removesuffix('_orig')}_mask") if key.endswith("_orig") else None
        assert torch.equal(value, before[key] if mask is None else before[key] * mask)
    assert not (tmp_path / "model.part").exists()


@every_network
@pytest.mark.parametrize("frozen", [False, True])
def test_a_compacted_network_comes_back_bit_for_bit(name, frozen, tmp_path):
    model, inputs = pruned(name, 0.15)
    if frozen:
        model.eval().requires_grad_(False)
    small = fxlean.compact(model, inputs)
    if name in REWRITTEN:
        with pytest.raises(fxlean.ArgumentError, match="Save the model before it is compacted"):
            fxlean.save(small, tmp_path / "small")
        assert not list(tmp_path.iterdir())
        return
    fxlean.save(small, tmp_path / "small")
    other = fxlean.load(fresh(name), tmp_path / "small")
    assert_same(small, other, inputs)
    assert same_state(small.state_dict(), other.state_dict())
    assert str(other) == str(small)
    again = fxlean.load(copy.deepcopy(other), tmp_path / "small")  # one that is cut already
    assert_same(small, again, inputs)


@settings(max_examples=40)
@given(networks(), st.sampled_from([0.5, 0.2, 0.05]), st.booleans(), st.booleans())
def test_random_networks_come_back_bit_for_bit(tmp_path_factory, drawn, ratio, frozen, further):
    model, inputs = drawn
    dense = copy.deepcopy(model)
    path = tmp_path_factory.mktemp("saved") / "model"
    fxlean.prune(model, ratio, inputs, method="l1")
    if frozen:
        model.eval().requires_grad_(False)
    small = fxlean.compact(model, inputs)
    if further and not frozen:
        try:
            fxlean.prune(small, 0.7, inputs, method="l1")
        except fxlean.ArgumentError:
            further = False  # nothing is left to prune
    for saved in (model, small):
        fxlean.save(saved, path)
        assert_same(saved, fxlean.load(copy.deepcopy(dense), path), inputs)


def test_training_goes_on_as_it_would_have(tmp_path):
    model, images = net(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fxlean.prune(model, 0.4, images)
    fxlean.save(model, tmp_path / "model")
    other = fxlean.load(net(), tmp_path / "model")
    for each in (model, other):
        optimizer = torch.optim.SGD(each.train().parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            each(images).square().mean().backward()
            optimizer.step()
    assert_same(model.eval(), other.eval(), (images,))


@pytest.mark.parametrize("name", ["plain", "shared_sequence", "weight_norm", "pre_pruned"])
@pytest.mark.parametrize("kind", ["torch", "safetensors", "mapping", *WRAPPERS])
def test_states_saved_by_plain_torch(name, kind, tmp_path):
    model, inputs = pruned(name)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "state"
    if kind == "mapping":
        path = saved
    elif kind == "safetensors":
        save_file(saved, path)
    else:
        prefix = WRAPPERS.get(kind, "")
        torch.save({f"{prefix}{key}": value for key, value in saved.items()}, path)
    other = fxlean.load(fresh(name), path)
    assert_same(model, other, inputs)
    assert same_state(model.state_dict(), other.state_dict())


def feature_extractor(layers):
    features = pytest.importorskip("torchvision.models.feature_extraction")
    return features.create_feature_extractor(layers, {"2": "out"})


@pytest.mark.parametrize("traced", [fx.symbolic_trace, feature_extractor])
def test_networks_that_are_graph_modules(traced, tmp_path):
    def build():
        return traced(nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 4, 1))).eval()

    model, x = build(), torch.randn(2, 3, 8, 8)
    fxlean.prune(model, 0.5, x, method="l1", granularity="channel", of="macs")
    small = fxlean.compact(model, x)
    assert getattr(small, "0").out_channels < 16
    for number, network in enumerate((model, small)):
        fxlean.save(network, tmp_path / str(number))
        assert_same(fxlean.load(build(), tmp_path / str(number)), network, (x,))


def test_averages_and_parts_that_are_compiled(tmp_path):
    model, path = net(), tmp_path / "model"
    fxlean.prune(model, 0.4, IMAGE)
    part = copy.deepcopy(model)
    part[0] = torch.compile(part[0])
    assert any("_orig_mod" in name for name in part.state_dict())
    fxlean.save(part, path)
    for source in (path, part.state_dict(), AveragedModel(model).state_dict()):
        assert_same(fxlean.load(net(), source).eval(), model, (IMAGE,))
    for source in (path, part.state_dict()):
        assert_same(fxlean.load(copy.copy(part), source).eval(), model, (IMAGE,))


def test_a_state_of_several_modules_is_no_wrapped_one():
    saved = {
        f"{part}.{key}": t
        for part in ("student", "teacher")
        for key, t in net().state_dict().items()
    }
    refused(net(), saved, r"only there: student\.0\.0\.weight, ")
    saved = {f"student.{key}": t for key, t in nn.Conv2d(3, 4, 3).state_dict().items()}
    refused(net(), saved, r"only there: student\.weight, student\.bias; only in the model")


def test_masks_of_parameters_that_no_module_is_called_for_stay_up_to_date():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(5, n, 3, 3) for n in (3, 5))
            self.last = conv(5, 2, 1)

        def forward(self, x):
            for weight in self.weights:
                x = torch.conv2d(x, weight, padding=1).relu()
            return self.last(x)

    torch.manual_seed(0)
    model, other = Listed(), Listed()
    fxlean.prune(model, 0.4, IMAGE)
    fxlean.load(other, model.state_dict())
    load_trained_state(model, other)
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(model(image), other(image))


def test_masks_that_the_model_has_are_replaced(tmp_path):
    model, other = net(), net()
    fxlean.prune(model, 0.5, IMAGE)
    fxlean.prune(other, 0.3, IMAGE, method="random")
    torch_prune.random_unstructured(other[-1], "weight", 0.5)
    fxlean.save(model, tmp_path / "model")
    fxlean.load(other, tmp_path / "model")
    assert_same(model, other, (torch.randn(2, 3, 8, 8),))
    assert other.state_dict().keys() == model.state_dict().keys()


def test_ties_between_parameters_are_those_of_the_file(tmp_path):
    def tied():
        model = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 2, 1))
        model[2].weight = model[1].weight
        return model

    torch.manual_seed(0)
    model = tied()
    fxlean.save(model, tmp_path / "tied")
    assert len(load_file(tmp_path / "tied")) == 3
    other = fxlean.load(tied(), tmp_path / "tied")
    assert other[2].weight is other[1].weight
    model[2].weight = nn.Parameter(model[1].weight.detach() + 1)
    fxlean.save(model, tmp_path / "untied")
    assert_same(model, fxlean.load(tied(), tmp_path / "untied"), (IMAGE + 1,))


@given(
    st.integers(1, 300),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_packed_weight_takes_no_more_room_and_comes_back(size, dtype, kept, broken):
    generator = torch.Generator().manual_seed(size)
    mask = torch.rand(size, generator=generator) < kept
    values = torch.randn(size, generator=generator).to(dtype)
    if broken:
        values[0] = float("nan")
    stored = packed("w", values, mask)
    found, again = unpacked("w", stored, values.shape)
    assert torch.equal(again, mask)
    assert torch.equal(found.nan_to_num(7.0), values.where(mask, 0).nan_to_num(7.0))
    if not (broken and mask[0]):
        assert sum(tensor.nbytes for tensor in stored.values()) <= values.nbytes


@pytest.mark.parametrize("ratio", [0.02, 0.5, 1.0])
def test_a_masked_network_is_stored_no_larger_than_a_dense_one(ratio, tmp_path):
    model = nn.Sequential(conv_bn_relu(3, 64), conv_bn_relu(64, 128), conv(128, 4, 1))
    save_file(model.state_dict(), tmp_path / "dense")
    fxlean.prune(model, ratio, IMAGE, method="l1")
    fxlean.save(model, tmp_path / "masked")
    dense, found = ((tmp_path / name).stat().st_size for name in ("dense", "masked"))
    assert found < dense * (0.12 if ratio == 0.02 else 1.01)


def refused(model, source, message):
    before, hooks = state(model), [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.load(model, source)
    assert same_state(before, model.state_dict())
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("compacted", [False, True])
def test_errors_say_which_layer_differs(compacted, tmp_path):
    model, path = net(), tmp_path / "model"
    fxlean.prune(model, 0.2, IMAGE)
    fxlean.save(fxlean.compact(model, IMAGE) if compacted else model, path)
    refused(net(width=9), path, r"0\.0\.weight is \(8, 3, 3, 3\) there and \(9, 3, 3, 3\) in the")
    refused(net(classes=5), path, r"5\.weight is \(4, 6, 1, 1\) there and \(5, 6, 1, 1\) in the")
    refused(net()[:-1], path, r"only there: 5\.weight, 5\.bias")
    longer = nn.Sequential(*net(), nn.BatchNorm2d(4))
    refused(longer, path, r"only in the model: 6\.weight, 6\.bias, 6\.running_mean and 2 more")


def test_a_model_that_is_cut_otherwise_is_refused(tmp_path):
    small = []
    for ratio in (0.2, 0.1):
        model = net()
        fxlean.prune(model, ratio, IMAGE)
        small.append(fxlean.compact(model, IMAGE))
    fxlean.save(small[0], tmp_path / "small")
    refused(small[1], tmp_path / "small", "is compacted already, and not as in .*: 0.0, 0.1, 1")
    refused(net(), small[0].state_dict(), r"or save compacted models with fxlean\.save")
    assert_same(fxlean.load(copy.deepcopy(small[0]), small[0].state_dict()), small[0], (IMAGE,))


def test_files_that_are_none_of_ours(tmp_path):
    (tmp_path / "text").write_text("weights")
    refused(net(), tmp_path / "text", "text cannot be read .*Pass a file of fxlean.save")
    torch.save({"epoch": 3, "state_dict": net().state_dict()}, tmp_path / "trainer")
    refused(net(), tmp_path / "trainer", r"no tensor: epoch, state_dict\. Pass the state_dict")
    torch.save([1], tmp_path / "list")
    refused(net(), tmp_path / "list", "holds a list")
    refused(net(), 3, "source is a int")
    fxlean.save(net(), tmp_path / "model")
    tensors = load_file(tmp_path / "model")
    header = '{"format": 9, "fxlean": "9.0", "torch": "3.0", "model": "Sequential"}'
    save_file(tensors, tmp_path / "newer", {"fxlean": header})
    refused(net(), tmp_path / "newer", r"fxlean 9\.0, torch 3\.0.* format 9.*newer fxlean")
    with pytest.raises(FileNotFoundError):
        fxlean.load(net(), tmp_path / "nothing")
    torch.save(net(), tmp_path / "whole")
    refused(net(), tmp_path / "whole", r"of a whole model .*weights_only=False\)\.state_dict\(\)")
    with pytest.raises(FileNotFoundError, match=r"no folder .*none\. Make it"):
        fxlean.save(net(), tmp_path / "none" / "model")
    with pytest.raises(IsADirectoryError, match="Pass the path of a file in it"):
        fxlean.save(net(), tmp_path)


def test_places_that_are_none(tmp_path, monkeypatch):
    for place in (None, io.BytesIO()):
        with pytest.raises(fxlean.ArgumentError, match=r"path is a .*Pass the path of a file"):
            fxlean.save(net(), place)

    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("fxlean.checkpoint.files.save_file", full)
    with pytest.raises(OSError, match=r"model cannot be written: .*No space left"):
        fxlean.save(net(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compacted", [False, True])
def test_files_that_were_changed(compacted, tmp_path):
    model = net()
    fxlean.prune(model, 0.2, IMAGE)
    fxlean.save(fxlean.compact(model, IMAGE) if compacted else model, tmp_path / "model")
    with safe_open(tmp_path / "model", "pt") as opened:
        header = json.loads(opened.metadata()["fxlean"])
    tensors = load_file(tmp_path / "model")
    changed = tmp_path / "changed"
    for key in header:
        less = {name: value for name, value in header.items() if name != key}
        save_file(tensors, changed, {"fxlean": json.dumps(less)})
        refused(net(), changed, "changed is not as fxlean.save wrote it .*Save the model anew")
    save_file(tensors, changed, {"fxlean": "{"})
    refused(net(), changed, "changed is not as fxlean.save wrote it .*JSONDecodeError")
    tensors.pop("5.weight")
    save_file(tensors, changed, {"fxlean": json.dumps(header)})
    refused(net(), changed, r"KeyError: '5\.weight'")


def test_masks_that_are_none(tmp_path):
    model = net()
    fxlean.prune(model, 0.2, IMAGE)
    saved = model.state_dict()
    refused(
        net(), saved | {"1.weight_mask": torch.ones(1)}, r"a mask of shape \(1,\) for 1\.weight, "
    )
    model.get_submodule("1").weight_mask.mul_(0.9)
    with pytest.raises(fxlean.ArgumentError, match=r"1\.weight_mask holds other numbers"):
        fxlean.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Counting(nn.Conv2d):
        def get_extra_state(self):
            return {"calls": 3}

    model = nn.Sequential(Counting(3, 4, 1))
    with pytest.raises(fxlean.ArgumentError, match="0: Counting keeps state that is no tensor"):
        fxlean.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_was_compacted_is_known_after_copies_and_pickles(tmp_path):
    model = net()
    fxlean.prune(model, 0.2, IMAGE)
    small = fxlean.compact(model, IMAGE)
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    for each in (copy.deepcopy(small), again):
        fxlean.save(each, tmp_path / "small")
        assert_same(fxlean.load(net(), tmp_path / "small"), small, (IMAGE + 1,))


def test_a_compacted_backbone_in_a_larger_model(tmp_path):
    def whole(backbone):
        torch.manual_seed(1)
        return nn.ModuleDict({"backbone": backbone, "head": conv(4, 2, 1)})

    model = net()
    fxlean.prune(model, 0.2, IMAGE)
    small = fxlean.compact(model, IMAGE)
    fxlean.save(whole(small), tmp_path / "whole")
    found = fxlean.load(whole(net()), tmp_path / "whole")
    assert_same(found["backbone"], small, (IMAGE + 1,))
    assert not [name for _, _, name in masked(found)]


class Normalised(nn.BatchNorm2d):
    """A norm that has layers of its own, as timm's have."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Named(nn.Module):
    """Knows the widths of the layer in it, and cannot be told any."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = conv(inputs, outputs)

    @property
    def in_channels(self):
        return self.conv.in_channels

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("norm", [lambda width: nn.GroupNorm(8, width), Normalised])
def test_layers_that_know_more_come_back(norm, frozen, tmp_path):
    def build():
        body = nn.Sequential(norm(32), Named(32, 32), norm(32), conv(32, 32))
        return nn.Sequential(conv(3, 32), body, conv(32, 2)).eval()

    torch.manual_seed(0)
    model = build().requires_grad_(not frozen)
    fxlean.prune(model, 0.4, IMAGE, method="l1", granularity="channel", of="parameters")
    small = fxlean.compact(model, IMAGE)
    assert small[1][1].in_channels < 32
    fxlean.save(small, tmp_path / "small")
    other = fxlean.load(build(), tmp_path / "small")
    assert same_state(small.state_dict(), other.state_dict())
    assert_same(small, other, [torch.randn(2, 3, 8, 8)])


def test_the_number_of_slopes_comes_back(tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 2, 1))

    torch.manual_seed(0)
    model, x = build(), torch.randn(1, 3, 8, 8)
    fxlean.prune(model, 0.5, x, granularity="channel", of="macs", method="l1")
    small = fxlean.compact(model, x)
    fxlean.save(small, tmp_path / "small")
    again = fxlean.load(build(), tmp_path / "small")
    assert str(again) == str(small)


def test_a_norm_with_layers_of_its_own_can_select(tmp_path):
    def build():
        body = nn.Sequential(Normalised(32), conv(32, 32))
        return nn.Sequential(conv(3, 32), residual(body), conv(32, 2)).eval()

    model, wide = build(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for parameter in model[1].branches[0][0].parameters():
            parameter[:24] = 0
    small = fxlean.compact(model, wide)
    assert isinstance(small[1].branches[0][0], Selected)
    fxlean.save(small, tmp_path / "small")
    assert_same(small, fxlean.load(build(), tmp_path / "small"), [wide])
