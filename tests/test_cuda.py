"""On a GPU everything gives what it gives on the CPU. Skipped where there is none."""

import copy

import pytest
import torch

import fxlean
from tests.support.zoo import ZOO, make

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings(
        "ignore::fxlean.PruneWarning",
        "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning",
    ),
]


def on_gpu(inputs):
    return tuple(x.cuda() for x in inputs)


def close(found, expected):
    """Whether both networks' states agree, masks exactly."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].is_cuda, key
        torch.testing.assert_close(found[key].cpu(), tensor, rtol=1e-3, atol=1e-4, msg=key)


@pytest.fixture(autouse=True)
def _full_precision():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("granularity", ["kernel", "channel"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_masks_and_compacted_networks_are_the_same(name, granularity):
    model, inputs = make(name)
    twin = copy.deepcopy(model).cuda()
    options = {"method": "l1", "granularity": granularity}
    try:
        expected = fxlean.prune(model, 0.5, inputs, **options)
    except ValueError as err:
        with pytest.raises(type(err)):
            fxlean.prune(twin, 0.5, on_gpu(inputs), **options)
        return
    assert fxlean.prune(twin, 0.5, on_gpu(inputs), **options).kept == expected.kept
    close(twin.state_dict(), model.state_dict())
    small = fxlean.compact(twin, on_gpu(inputs))
    close(small.state_dict(), fxlean.compact(model, inputs).state_dict())


@pytest.mark.parametrize("method", ["lean", "path", "spectral", "relevance"])
def test_methods_choose_the_same(method):
    model, inputs = make("residual_downsample")
    twin = copy.deepcopy(model).cuda()
    batches = [torch.randn(8, *inputs[0].shape[1:]) for _ in range(2)]
    fxlean.prune(model, 0.3, method=method, calibration=batches)
    fxlean.prune(twin, 0.3, method=method, calibration=list(on_gpu(batches)))
    close(twin.state_dict(), model.state_dict())


def test_repair_takes_errors_as_low():
    model, inputs = make("residual_downsample")
    batches = [torch.randn(16, *inputs[0].shape[1:]) for _ in range(2)]
    fxlean.prune(model, 0.5, method="relevance", calibration=batches)
    twin = copy.deepcopy(model).cuda()
    expected = fxlean.repair(model, batches, progress=False)
    found = fxlean.repair(twin, list(on_gpu(batches)), progress=False)
    assert found.before == pytest.approx(expected.before, rel=1e-3)
    assert found.after == pytest.approx(expected.after, rel=0.05)


@pytest.mark.parametrize(
    ("dtype", "steps"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.float16, 0)]
)
def test_shrink_and_distill(dtype, steps):
    model, inputs = make("residual_downsample")
    model = model.to("cuda", dtype)
    batches = [torch.randn(16, *inputs[0].shape[1:]).to("cuda", dtype) for _ in range(2)]
    small = fxlean.shrink(model, 0.5, batches, distill=steps, progress=False)
    parameters = list(small.parameters())
    assert all(parameter.is_cuda and parameter.dtype == dtype for parameter in parameters)
    assert small(batches[0]).isfinite().all()
    assert fxlean.report(small, batches[0]).macs <= 0.5 * fxlean.report(model, batches[0]).macs
