"""What a call of `repair` did: `RepairResult`, as a table and as a dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import by_reason, counted
from ..pictures import html_table
from .corrections import LayerError


@dataclass(frozen=True)
class RepairResult:
    """What a call of `repair` did; printing it shows a table.

    All errors are on held-out samples, against the reference: the root mean square of the
    difference, relative to the standard deviation of what the reference gives.

    Attributes:
        layers: each corrected layer's error with what the repaired layers before it feed it, before
            and after its own correction; of the channels that have kernels left.
        before, after: the error of the model's outputs without and with all corrections; infinite
            where the reference gives one value only, as a classifier does for one sample, and NaN
            where it gives no floating-point tensor of the same shape.
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

    def __repr__(self) -> str:
        return (
            f"RepairResult({len(self.layers)} layers; error of the outputs "
            f"{self.before:.2g} -> {self.after:.2g} on {counted(self.held, 'held-out sample')})"
        )

    def _repr_html_(self) -> str:
        return html_table(("layer", "before", "after"), self._rows(), self._notes())

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _, _ in rows)
        heading, *others, total = (
            f"{name:<{width}}  {before:>8}  {after:>8}"
            for name, before, after in [("layer", "before", "after"), *rows]
        )
        rule = "-" * len(heading)
        return "\n".join([heading, *others, rule, total, "", *self._notes()])

    def _rows(self) -> list[tuple[str, str, str]]:
        """Name and errors of every layer, and of the outputs."""
        rows = [(layer.name, layer.before, layer.after) for layer in self.layers]
        rows.append(("outputs", self.before, self.after))
        return [(name, f"{before:.4f}", f"{after:.4f}") for name, before, after in rows]

    def _notes(self) -> list[str]:
        """What is below the table."""
        return [
            f"relative errors on {counted(self.held, 'held-out sample')}, "
            f"repaired on {self.samples:,} ({self.seconds:.2f} s)",
            *(f"skipped: {line}" for line in by_reason(self.skipped)),
        ]
