"""A device written in Python, in place of a GPU: `python -m tests.support.toy_device` checks.

Its tensors keep their numbers on the CPU, refuse to meet tensors of the CPU as those of a GPU do,
and tell what is copied from them. Importing this registers the device with torch for good.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import fxlean
from fxlean.compaction import attempts
from fxlean.pruning import prune_model
from fxlean.tracing import tracer
from tests.support.zoo import ZOO, make

_setup_privateuseone_for_python_backend("toy")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}

copied: list[Tensor] = []  # to the CPU


class Toy(Tensor):
    """A tensor of the device; `on_host` holds its numbers."""

    @staticmethod
    def __new__(cls, on_host: Tensor) -> Toy:
        place = torch.device("toy:0")
        return Tensor._make_wrapper_subclass(
            cls, on_host.shape, on_host.stride(), dtype=on_host.dtype, device=place
        )

    def __init__(self, on_host: Tensor) -> None:
        self.on_host = on_host

    def data_ptr(self) -> int:
        return self.on_host.data_ptr()

    @property  # type: ignore[override]
    def data(self) -> Toy:
        return Toy(self.on_host.detach())

    @data.setter
    def data(self, value: Toy) -> None:
        self.on_host = value.on_host

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        result: Tensor = Toy(self.on_host.clone())
        if isinstance(self, nn.Parameter):
            result = nn.Parameter(result, self.requires_grad)
        memo[id(self)] = result
        return result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While active, tensors can be made on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator on tensors of either device."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    toys = [tensor for tensor in tensors if isinstance(tensor, Toy)]
    others = [tensor for tensor in tensors if not isinstance(tensor, Toy) and tensor.dim()]
    allowed = func in COPIES or (func in INDEXING and isinstance(args[0], Toy))
    assert not (toys and others) or allowed, f"{func} of tensors on two devices"
    wanted = kwargs.get("device")
    result_is_toy = bool(toys) if wanted is None else torch.device(wanted).type == "toy"
    if func in COPIES and toys and not (result_is_toy and isinstance(args[0], Toy)):
        copied.append(toys[-1].on_host)
    values, options = pytree.tree_map_only(Toy, on_host, (args, kwargs))
    if wanted is not None:
        options["device"] = torch.device("cpu")
    known = {id(toy.on_host): toy for toy in toys}
    result = func(*values, **options)
    if not result_is_toy:
        return result
    return pytree.tree_map_only(
        Tensor, lambda out: known[id(out)] if id(out) in known else Toy(out), result
    )


def on_host(tensor: Tensor) -> Tensor:
    """The numbers of a tensor of either device."""
    return tensor.on_host if isinstance(tensor, Toy) else tensor


def moved(model: nn.Module, *, to_toy: bool) -> nn.Module:
    """A copy of a model on the device, or of a model on the device on the CPU."""
    result, done = copy.deepcopy(model), {}

    def other(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            value = on_host(tensor.detach()).clone()
            value = Toy(value) if to_toy else value
            trained = isinstance(tensor, nn.Parameter)
            done[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if trained else value
        return done[id(tensor)]

    for module in result.modules():
        held: list[dict[str, Any]] = [module._parameters, module._buffers, vars(module)]
        for tensors in held:
            for name, tensor in list(tensors.items()):
                if isinstance(tensor, Tensor):
                    tensors[name] = other(tensor)
    return result


def trace_on_cpu(model: nn.Module, example_inputs: Any = None) -> tracer.Trace:
    """The trace of a copy: fake tensors cannot stand for those of the device."""
    inputs = pytree.tree_map_only(Toy, on_host, example_inputs)
    trace = tracer.trace_model(moved(model, to_toy=False), inputs)
    return dataclasses.replace(trace, arguments=example_inputs)


def check(name: str) -> None:
    """Masks and compacted model of a network are the same on the device as on the CPU."""
    model, inputs = make(name)
    on_toy, toy_inputs = moved(model, to_toy=True), tuple(map(Toy, inputs))
    result = fxlean.prune(model, 0.5, inputs)
    copied.clear()
    with Device():
        assert fxlean.prune(on_toy, 0.5, toy_inputs).kept == result.kept
    weights = {on_host(p).untyped_storage().data_ptr() for p in on_toy.parameters() if p.dim() > 1}
    seen = {tensor.untyped_storage().data_ptr() for tensor in copied}
    assert not weights & seen, "weights are copied to the CPU"
    found = moved(on_toy, to_toy=False).state_dict()
    for key, expected in model.state_dict().items():
        assert torch.equal(found[key], expected), key
    small = fxlean.compact(model, inputs)
    with Device():
        small_on_toy = fxlean.compact(on_toy, toy_inputs)
    for tensor, expected in zip(
        small_on_toy.state_dict().values(), small.state_dict().values(), strict=True
    ):
        assert isinstance(tensor, Toy)
        assert torch.equal(tensor.on_host, expected)


def main() -> None:
    """Check every network of the zoo."""
    for module in (prune_model, attempts):
        vars(module)["trace_model"] = trace_on_cpu
    for name in sys.argv[1:] or sorted(ZOO):
        try:
            check(name)
        except Exception as err:
            print(f"{name}: {type(err).__name__}: {err}")
        else:
            print(f"{name}: same")


if __name__ == "__main__":
    main()
