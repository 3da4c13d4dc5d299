"""Whether a candidate computes what the pruned model does."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..tracing.inputs import Arguments, batch_size, call, in_parts
from ..tracing.leaves import as_real, replaced, tensors_in
from ..tracing.sandbox import copied, running

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
STEP = 32  # what strides divide


class Check:
    """What candidates are held against: the outputs of a model, and whether it can be trained."""

    def __init__(
        self, masked: nn.Module, bare: nn.Module, given: Arguments, *, noise: bool = True
    ) -> None:
        """Run the model on what is given, and with `noise` on some of another size if it can.

        Noise of the size that was given follows where it cannot, or where what was given is
        constant, as zeros are, and tells little. Raises whatever the model raises.
        """
        self.arguments, self._masked, self._bare = given, masked, bare
        self._inputs, self._expected = [given], outputs(masked, [given])
        self._trains: bool | None = None
        if not noise:
            return
        for width in (_half, _wider):
            if self._takes(_noise(given, width)):
                break
        if len(self._inputs) == 1 or _is_constant(given):
            self._takes(_noise(given))

    def _takes(self, other: Arguments) -> bool:
        """Hold candidates against the outputs on these as well, if the model takes them.

        Many are made for one size, and some look at what they are given.
        """
        with contextlib.suppress(Exception):  # whatever the code of the model raises
            self._expected += outputs(self._masked, [other])
            self._inputs.append(other)
            return True
        return False

    def difference(self, candidate: nn.Module) -> str:
        """By what the outputs of a candidate differ, but for rounding, or an empty string."""
        found = difference(candidate, self._inputs, self._expected)
        return "" if found and self._is_rounding(candidate) else found

    def problem(self, candidate: nn.Module) -> str:
        """What is wrong with a candidate, or an empty string."""
        problem = self.difference(candidate)
        if not problem and not trains(candidate, self.arguments):
            if self._trains is None:
                self._trains = trains(self._bare, self.arguments)
            problem = "it cannot be trained" if self._trains else ""
        return problem

    def _is_rounding(self, candidate: nn.Module) -> bool:
        """Whether a candidate that differs does not in double precision.

        Rounding alone changes what a network chooses: the largest scores, say.
        """
        wide = [_double(arguments) for arguments in self._inputs]
        try:
            expected = outputs(_double(copied(self._masked)), wide)
            return not difference(_double(copied(candidate)), wide, expected)
        except Exception:  # a model that has its type written into its code
            return False


def _is_constant(given: Arguments) -> bool:
    """Whether a tensor of what is given holds one number everywhere."""
    tensors = [leaf for leaf in tensors_in(given) if leaf.is_floating_point()]
    return any(bool((leaf == leaf.flatten()[:1]).all()) for leaf in tensors)


def _noise(given: Arguments, width: Callable[[int], int] = int) -> Arguments:
    """Noise in place of what is given; `width` says how long the last dimension is instead.

    Tables beside images, such as boxes, stay as they are.
    """
    generator = torch.Generator().manual_seed(0)
    most = max((leaf.dim() for leaf in tensors_in(given)), default=0)

    def noise(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point() or leaf.dim() < min(most, 3):
            return leaf
        shape = [*leaf.shape]
        if leaf.dim() >= 3:
            shape[-1] = width(shape[-1])
        return torch.randn(shape, generator=generator, device="cpu").to(leaf)

    result: Arguments = replaced(given, noise)
    return result


def _half(width: int) -> int:
    """About half of a large width, which is quicker; a small one is made wider."""
    return _wider(width) if width < 4 * STEP else width - width // (2 * STEP) * STEP


def _wider(width: int) -> int:
    return width + STEP


def _double(thing: Any) -> Any:
    """A model, or arguments, in double precision."""
    if isinstance(thing, nn.Module):
        return thing.double()
    return replaced(thing, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf)


def outputs(model: nn.Module, inputs: Sequence[Arguments]) -> list[list[Tensor]]:
    """The tensors that the model returns for each of the inputs, every time from where it is now.

    Some models count their calls, or draw numbers.
    """
    results = []
    for arguments in inputs:
        with running(model):
            found = tensors_in(call(model, copy.deepcopy(arguments)))
            results.append([as_real(tensor) for tensor in found])
    return results


def difference(
    model: nn.Module,
    inputs: Sequence[Arguments],
    expected: Sequence[Sequence[Tensor]],
) -> str:
    """What is wrong with a candidate, or an empty string."""
    try:
        found = outputs(model, inputs)
    except Exception as err:  # whatever the code of the model raises on fewer channels
        return f"{type(err).__name__}: {err}"
    for results, references in zip(found, expected, strict=True):
        for result, reference in zip(results, references, strict=True):
            error = relative_error(result, reference)
            if not error <= TOLERANCE.get(reference.dtype, 0.0):
                return f"outputs differ by {error:.1e} of the largest"
    return ""


def relative_error(result: Tensor, reference: Tensor) -> float:
    """The largest difference over the largest absolute value of the reference; NaN equals NaN."""
    if result.shape != reference.shape:
        return float("inf")
    wide = torch.float64 if reference.is_floating_point() else reference.dtype
    result, reference = result.to(wide).nan_to_num(), reference.to(wide).nan_to_num()
    if torch.equal(result, reference):
        return 0.0
    if not reference.is_floating_point():
        return float("inf")
    return ((result - reference).abs().max() / reference.abs().max()).item()


def trains(model: nn.Module, arguments: Arguments) -> bool:
    """Whether the model runs in training mode, on the arguments or on all of their samples twice.

    Batch norms refuse a single value.
    """
    with running(model):
        model.train()
        for given in (arguments, *in_parts(arguments, 2 * batch_size(arguments))):
            with contextlib.suppress(Exception):  # whatever the code of the model raises
                call(model, copy.deepcopy(given))
                return True
    return False
