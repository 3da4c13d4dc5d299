"""Random networks with random features: pruned, compacted and compared.

`python -m tests.fuzz` runs them by hand, and `tests/test_fuzz.py` a few.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_leaves

import fxlean
from fxlean.selection.methods import METHODS
from tests.support.compare import parameters
from tests.support.strategies import LAYERS, RandomNet, networks

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
# What a model may have or do beside computing.
FEATURES = (
    "cache",
    "changing hook",
    "double",
    "draws numbers",
    "frozen",
    "group norm",
    "interrupted",
    "keywords",
    "looking hook",
    "looks at its data",
    "masks",
    "prelu",
    "scale",
    "training",
    "weight norm",
    "writes a buffer",
)


@dataclass
class Output:
    """What a model returns."""

    result: Tensor
    features: list[Tensor]


class Named(NamedTuple):
    """What a model returns."""

    result: Tensor
    features: list[Tensor]


WRAPPED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda result, early: result,
    "tuple": lambda result, early: (result, early),
    "mapping": lambda result, early: {"result": result, "early": [early]},
    "named tuple": lambda result, early: Named(result, [early]),
    "dataclass": lambda result, early: Output(result, [early]),
}


@functools.lru_cache
def ramp(side: int, dtype: torch.dtype) -> Tensor:
    """A constant that is made once for every size."""
    return torch.linspace(0, 1, side, dtype=dtype).expand(side, side).clone()


class Interruption(BaseException):
    """Stands for a KeyboardInterrupt."""


class Countdown:
    """Interrupts a call of the model; outside of it, where nobody puts it back."""

    left = 0

    @classmethod
    def tick(cls) -> None:
        """Count one call, and interrupt the last one."""
        cls.left -= 1
        if cls.left == 0:
            raise Interruption


class Featured(nn.Module):
    """A random network with features, and a result of some type."""

    count: Tensor

    def __init__(self, net: RandomNet, features: frozenset[str], result: str) -> None:
        super().__init__()
        self.net, self.features, self.wrapped = net, features, WRAPPED[result]
        self.stem: nn.Module = nn.Conv2d(net.inputs, 4, 3, padding=1)
        self.act: nn.Module = nn.PReLU(4) if "prelu" in features else nn.ReLU()
        self.norm: nn.Module = nn.GroupNorm(2, 4) if "group norm" in features else nn.Identity()
        self.head: nn.Module = nn.Conv2d(4, net.inputs, 1)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 4)) if "scale" in features else None
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[float] = []
        self.to(net.dtype).eval()

    def forward(self, x: Tensor) -> Any:
        if "interrupted" in self.features:
            Countdown.tick()
        if "draws numbers" in self.features:
            x = x + 0 * (torch.rand(()) + random.random() + np.random.rand())  # noqa: NPY002
        if "looks at its data" in self.features and bool(x.abs().max() > 1e9):
            x = x / 2
        if "cache" in self.features:
            x = x + ramp(x.shape[-1], x.dtype)
        if "writes a buffer" in self.features:
            self.count += 1
        early = self.act(self.norm(self.stem(x)))
        if self.gamma is not None:
            early = early * self.gamma.view(-1, 1, 1)
        return self.wrapped(self.net(self.head(early)), early)


@dataclass(frozen=True)
class Case:
    """A model, how it is called, which call is interrupted, and how it is pruned."""

    model: Featured
    inputs: Any
    wider: Any
    calls: int
    options: dict[str, Any]

    def __repr__(self) -> str:
        model, options = self.model, self.options
        return f"{sorted(model.features)}, {options}, calls={self.calls}, {model.net!r}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Models with their inputs at two sizes, and options of `prune`."""
    features = draw(st.frozensets(st.sampled_from(FEATURES), max_size=4))
    dtype = torch.float64 if "double" in features else torch.float32
    drawn = draw(networks(max_steps=5, ops=(*LAYERS, "add", "cat", "conv"), dtype=dtype))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(drawn.model.seed)
        model = Featured(drawn.model, features, draw(st.sampled_from(sorted(WRAPPED))))
        _change(model, draw(st.integers(0, 99)))
        (x,) = drawn.inputs
        wider = torch.randn(*x.shape[:-2], 10, 10, dtype=dtype)
    options = {
        "ratio": draw(st.sampled_from([0.02, 0.1, 0.3, 0.6, 1.0])),
        "method": draw(st.sampled_from(sorted(METHODS))),
        "redundancy": draw(st.booleans()),
        "prune_outputs": draw(st.booleans()),
        "ignore": draw(st.sampled_from([(), ("stem",), ("net.*",)])),
    }
    inputs, wide = ({"x": data} if "keywords" in features else (data,) for data in (x, wider))
    return Case(model, inputs, wide, draw(st.integers(1, 12)), options)


def _change(model: Featured, number: int) -> None:
    """Give a model the features that are not in its code."""
    features = model.features
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    chosen = layers[number % len(layers)]
    if "weight norm" in features:
        weight_norm(chosen)
    elif "masks" in features:
        torch_prune.random_unstructured(chosen, "weight", 0.4)
    if "looking hook" in features:
        chosen.register_forward_hook(lambda _, __, out: model.seen.append(float(out.mean())))
    if "changing hook" in features:
        chosen.register_forward_hook(lambda _, __, out: out * 0.5)
    model.requires_grad_("frozen" not in features)
    model.train("training" in features and "frozen" not in features)


def run(case: Case) -> str:
    """Prune, compact and compare; what came of it, in a word or two."""
    model = case.model
    options = {key: value for key, value in case.options.items() if key != "ratio"}
    before = _state(model)
    Countdown.left = case.calls
    try:
        result = fxlean.prune(model, case.options["ratio"], case.inputs, **options)
    except (fxlean.FxleanError, Interruption) as err:
        _assert_same(before, _state(model))
        return type(err).__name__
    assert 0 <= result.kept <= result.total
    masked = _state(model)
    _assert_only_masked(before, masked)
    if options["method"] != "random":
        _assert_same(_random_of(before), _random_of(masked))
    try:
        small = fxlean.compact(model, case.inputs)
    except (fxlean.FxleanError, Interruption) as err:
        _assert_same(masked, _state(model))
        return f"compact: {type(err).__name__}"
    _assert_same(masked, _state(model))
    for arguments in (case.inputs, case.wider):
        _assert_agree(small, model, arguments)
    return "smaller" if parameters(small) < parameters(model) else "as large"


def _state(model: Featured) -> dict[str, Any]:
    """All that a call must leave alone."""
    state = {f"state {key}": value.clone() for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._backward_hooks)
        state[f"{name}: training"] = module.training
        state[f"{name}: hooks"] = [list(each.values()) for each in hooks]
    for name, parameter in model.named_parameters():
        state[f"{name}: trained"] = parameter.requires_grad
    numpy: Any = np.random.get_state()  # noqa: NPY002 - the one of models
    state["random torch"], state["random numpy"] = torch.get_rng_state(), numpy[1].tolist()
    state["random Python"] = random.getstate()
    return state


def _random_of(state: dict[str, Any]) -> dict[str, Any]:
    """The random states alone."""
    return {name: value for name, value in state.items() if name.startswith("random")}


def _assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    for name, value in before.items():
        pairs = zip(tree_leaves(value), tree_leaves(after[name]), strict=True)
        for left, right in pairs:
            same = torch.equal(left, right) if isinstance(left, Tensor) else left == right
            assert same, f"{name} has changed"


def _assert_only_masked(before: dict[str, Any], masked: dict[str, Any]) -> None:
    """All that is still there is as it was, but for masks, which only shrink."""
    for name in before.keys() & masked.keys() - _random_of(before).keys():
        if name.endswith("_mask"):
            assert (masked[name] <= before[name]).all(), f"{name} has grown"
        else:
            _assert_same({name: before[name]}, {name: masked[name]})


@torch.no_grad()
def _assert_agree(small: nn.Module, model: nn.Module, arguments: Any) -> None:
    Countdown.left = 0
    results = []
    for one in (copy.deepcopy(small).eval(), model.eval()):
        found = one(**arguments) if isinstance(arguments, dict) else one(*arguments)
        results.append(_tensors(found))
    for left, right in zip(*results, strict=True):
        assert type(left) is type(right) is Tensor
        assert left.shape == right.shape
        scale = right.abs().max().clamp_min(1e-30)
        assert (left - right).abs().max() <= TOLERANCE[left.dtype] * scale


def _tensors(found: Any) -> list[Any]:
    if isinstance(found, Output):
        found = [getattr(found, field.name) for field in fields(found)]
    return tree_leaves(found)


@contextmanager
def strict():
    """Every warning is an error but those that we give of a result that is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", fxlean.PruneWarning)
        warnings.simplefilter("ignore", fxlean.CompactionWarning)
        yield


def fuzz(number: int, examples: int, outcomes: Counter[str]) -> None:
    """Run networks of a seed, and count what came of them; raises at the first that falls."""

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def test(case: Case) -> None:
        with strict():
            outcomes[run(case)] += 1

    test()
