"""One rank of several: `torchrun --nproc-per-node=2 tests/support/rank.py`."""

import copy
import hashlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxlean
from fxlean.calibration import systems
from tests.support.zoo import make

NETWORKS = ("residual_downsample", "transposed", "classifier")
WAYS = ("covariance", "convolution")  # to the equations of repair


def network(rank: int) -> nn.Sequential:
    """The same weights on every rank, and batch norms that have seen other data."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    torch.manual_seed(rank)
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(4, 3, 12, 12) * (rank + 1))
    return model


def digest(model: nn.Module) -> str:
    """A fingerprint of names, masks and parameters, in their order, without statistics."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "running" not in name and "tracked" not in name:
            found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def everywhere(value: str) -> set[str]:
    """The values of all ranks."""
    values: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return {str(found) for found in values}


def check_masks(rank: int, method: str, wrapped: bool, broadcast: bool) -> None:
    """All ranks have the same masks, and still have them after a step of training."""
    model = network(rank)
    whole: nn.Module = model
    if wrapped:
        whole = DistributedDataParallel(model, broadcast_buffers=broadcast)
    result = fxlean.prune(whole, 0.4, torch.zeros(1, 3, 12, 12), method=method)
    if not wrapped:
        whole = DistributedDataParallel(model, broadcast_buffers=broadcast)
    case = (method, wrapped, broadcast)
    assert len(everywhere(str(result.layers))) == 1, case
    assert len(everywhere(digest(model))) == 1, case
    masks = {name: mask.clone() for name, mask in model.named_buffers() if "mask" in name}
    assert masks, case
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    train(whole, optimizer)
    assert len(everywhere(digest(model))) == 1, case
    for name, mask in model.named_buffers():
        assert name not in masks or torch.equal(mask, masks[name]), (case, name)
    fxlean.prune(whole, 0.3, torch.zeros(1, 3, 12, 12), method=method)
    train(whole, optimizer)  # wrapped as it was
    assert len(everywhere(digest(model))) == 1, case


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Two steps on data that differ from rank to rank."""
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 12, 12)).square().mean().backward()
        optimizer.step()


def check_repair(rank: int) -> None:
    """What is repaired and distilled is the same on all ranks, whose statistics were not."""
    model = network(rank)
    reference, own = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(rank)
    batches = [torch.randn(16, 3, 12, 12) for _ in range(2)]
    fxlean.prune(model, 0.5, batches[0], granularity="channel", of="macs", method="l1")
    for step in (
        lambda: fxlean.repair(model, batches, reference),
        lambda: fxlean.distill(model, batches, network(0), 60, rate=0.01),
    ):
        before = digest(model)
        step()
        assert digest(model) != before
        assert len(everywhere(digest(model))) == 1
        assert len(everywhere(str(model[1].running_mean))) == 1
    torch.testing.assert_close(reference.state_dict(), own.state_dict(), rtol=0, atol=0)


def check_distillation(rank: int) -> None:
    """A step takes a batch of every rank: the mean of their gradients."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 2, 3)).double()
    model = copy.deepcopy(reference)
    fxlean.prune(model, 0.6, torch.zeros(1, 3, 9, 9, dtype=torch.double), method="l1")
    alone = copy.deepcopy(model)
    world, steps, rate = dist.get_world_size(), 5, 0.01
    inputs = [[torch.randn(4, 3, 9, 9).double() for _ in range(r + 2)] for r in range(world)]
    fxlean.distill(model, inputs[rank], reference, steps, rate=rate)
    with torch.no_grad():
        variance = torch.cat([reference(x) for own in inputs for x in own]).var(correction=0)
    optimizer = torch.optim.Adam(alone.parameters(), rate)
    for step in range(steps):
        optimizer.zero_grad()
        for own in inputs:
            x = own[step % len(own)]
            with torch.no_grad():
                wanted = reference(x)
            error = (alone(x) - wanted).square().mean() / variance
            (error / world).backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(alone.named_parameters()))


def batches_of(shape: torch.Size) -> list[Tensor]:
    """Four batches of other sizes, scales and means each."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(size, *shape[1:]) for size in (8, 12, 5, 16)]
    draws = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return [(number + 1) * draw + number for number, draw in enumerate(draws)]


def calibrated(name: str, way: str, which: slice) -> tuple[Any, ...]:
    """Shares, masks, repaired state and errors of a network, on some of the batches."""
    model, (x,) = make(name, torch.float64)
    batches, reference = batches_of(x.shape)[which], copy.deepcopy(model)
    options: dict[str, Any] = {"calibration": batches, "include_linear": True}
    shares = fxlean.trace(model, x, norm="share", **options).lengths
    fxlean.prune(model, 0.5, x, method="relevance", **options)
    masks = {name: mask.clone() for name, mask in model.named_buffers() if "mask" in name}
    with pytest.MonkeyPatch.context() as patch:
        for other in WAYS:
            patch.setattr(systems, f"_{other}", getattr(systems, f"_{way}"))
        result = fxlean.repair(model, batches, reference)
    assert result.after < result.before, name
    errors = [(layer.before, layer.after) for layer in result.layers]
    totals = (result.before, result.after, result.samples, result.held)
    return torch.from_numpy(shares), masks, model.state_dict(), torch.tensor(errors), totals


def check_sums(rank: int, expected: Sequence[tuple[Any, ...]]) -> None:
    """Ranks with one and three batches find what one process finds on all four."""
    cases = itertools.product(NETWORKS, WAYS)
    for (name, way), wanted in zip(cases, expected, strict=True):
        found = calibrated(name, way, slice(0, 1) if rank == 0 else slice(1, None))
        try:
            torch.testing.assert_close(found, wanted)
        except AssertionError as err:
            raise AssertionError(f"{name}, {way}") from err


def check_refusals(rank: int) -> None:
    """Sharded models are refused, and still work."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for shard in (
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        lambda model: fully_shard(model, mesh=mesh),
    ):
        model: Any = shard(copy.deepcopy(network(rank)))
        with pytest.raises(fxlean.ArgumentError, match="Prune the model before it is sharded"):
            fxlean.prune(model, 0.5, torch.zeros(1, 3, 12, 12))
        model(torch.randn(2, 3, 12, 12)).sum().backward()


def main() -> None:
    """Check all combinations."""
    expected = [calibrated(*case, slice(None)) for case in itertools.product(NETWORKS, WAYS)]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for wrapped, broadcast in itertools.product((True, False), (True, False)):
        for method in ("lean", "random"):
            check_masks(rank, method, wrapped, broadcast)
    check_repair(rank)
    check_sums(rank, expected)
    check_distillation(rank)
    check_refusals(rank)
    # One write of the whole line: both ranks share the pipe, and print writes the line's end apart.
    sys.stdout.write(f"rank {rank}: same\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
