"""What a call of `repair` did: `RepairResult`, as a table and as a dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import some
from .corrections import LayerError


@dataclass(frozen=True)
class RepairResult:
    """What a call of `repair` did; printing it shows a table.

    All errors are on held-out samples, against the reference: the root mean square of the
    difference, relative to the standard deviation of what the reference gives.

    Attributes:
        layers: each corrected layer's error with what the repaired layers before it feed it, before
            and after its own correction.
        before, after: the error of the model's outputs without and with all corrections.
        samples, held: number of samples that were solved for, and held out.
        skipped: layers that were left alone, and why.
        seconds: how long it took.
    """

    layers: tuple[LayerError, ...]
    before: float
    after: float
    samples: int
    held: int
    skipped: Mapping[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for `json.dumps`."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        width = max(len("outputs"), *(len(layer.name) for layer in self.layers), 0)
        lines = [f"{'layer':<{width}}  {'before':>8}  {'after':>8}"]
        lines += [_row(layer.name, layer.before, layer.after, width) for layer in self.layers]
        lines.append("-" * len(lines[0]))
        lines += [_row("outputs", self.before, self.after, width), ""]
        lines.append(
            f"relative errors on {self.held:,} held-out samples, repaired on {self.samples:,} "
            f"({self.seconds:.2f} s)"
        )
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"skipped: {some(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)


def _row(name: str, before: float, after: float, width: int) -> str:
    return f"{name:<{width}}  {before:>8.4f}  {after:>8.4f}"
