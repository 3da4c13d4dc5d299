"""What a call of `prune` did: `PruneResult`, as a table and as a dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..calibration.repair_result import RepairResult
from ..costs import COUNTS
from ..errors import by_reason
from ..pictures import bars, html_table


@dataclass(frozen=True)
class LayerCount:
    """Kernels of one layer: `kept` of `total` are alive."""

    name: str
    kept: int
    total: int


@dataclass(frozen=True)
class PruneResult:
    """What a call of `prune` did; printing it shows a table.

    Attributes:
        method: how kernels were chosen.
        kept: prunable kernels alive after the call, redundancy included.
        total: prunable kernels in all.
        selected: kernels that the method chose to keep, before redundant ones were removed.
        chains: how many chains were extracted; 0 for methods that rank kernels one by one.
        layers: kept and total of every prunable layer, in the order of the network.
        share: fraction of the elements of all parameters that prunable kernels hold.
        opaque_ops: operators without a rule, with how often they occurred.
        skipped: layers and parts that were left alone, and why.
        timings: seconds spent in each stage: trace, norms, select, masks.
        calibration: "batches" or "noise", what a method that asks for data was given; else "".
        left: what `compact` leaves of whole channels, and what there was: pairs of numbers for
            "parameters" and "macs"; empty where single kernels are pruned.
        pinned: layers all of whose channels had to stay, and the operator that needs all of them.
        repair: what `iterate(..., repair=True)` repaired after this step.
    """

    method: str
    kept: int
    total: int
    selected: int
    chains: int
    layers: tuple[LayerCount, ...]
    share: float
    opaque_ops: Mapping[str, int]
    skipped: Mapping[str, str]
    timings: Mapping[str, float]
    calibration: str = ""
    left: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    pinned: Mapping[str, str] = field(default_factory=dict)
    repair: RepairResult | None = None

    @property
    def ratio(self) -> float:
        """The fraction of the prunable kernels that is kept."""
        return self.kept / self.total

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for `json.dumps`."""
        fields = asdict(self)
        fields["layers"] = [asdict(layer) for layer in self.layers]
        fields["repair"] = None if self.repair is None else self.repair.to_dict()
        return fields | {"ratio": self.ratio}

    def __repr__(self) -> str:
        return (
            f"PruneResult({self.method}: {self.kept:,} of {self.total:,} kernels kept in "
            f"{len(self.layers)} layers)"
        )

    def plot(self) -> Any:
        """A matplotlib figure: the kernels of each layer, and those that are kept."""
        before, after = zip(*((row.total, row.kept) for row in self.layers), strict=True)
        return bars([row.name for row in self.layers], {"kernels": (before, after)})

    def _repr_html_(self) -> str:
        rows = [(row.name, row.kept, row.total) for row in self.layers]
        rows.append(("all", self.kept, self.total))
        cells = [
            (name, f"{kept:,}", f"{total:,}", f"{kept / total:.2%}") for name, kept, total in rows
        ]
        return html_table(("layer", "kept", "total", "ratio"), cells, self._notes())

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':<{width}}  {'kept':>10}  {'total':>10}  {'ratio':>7}"]
        lines += [_row(row.name, row.kept, row.total, width) for row in self.layers]
        lines.append("-" * len(lines[0]))
        lines.append(_row("all", self.kept, self.total, width))
        return "\n".join(lines + self._notes())

    def _notes(self) -> list[str]:
        """What is below the table."""
        lines = [f"These kernels hold {self.share:.1%} of all parameters.", "", self._summary()]
        if self.left:
            parts = [
                f"{now:,} of {before:,} {COUNTS[name]} ({now / before:.1%})"
                for name, (now, before) in self.left.items()
            ]
            lines.append(f"whole channels: compact leaves {' and '.join(parts)}")
        if self.repair is not None:
            before, after = self.repair.before, self.repair.after
            lines.append(f"repaired: relative error of the outputs {before:.4f} -> {after:.4f}")
        for op, count in self.opaque_ops.items():
            lines.append(
                f"opaque: {op} ({times(count)}), treated as reading and writing everything"
            )
        lines += [f"skipped: {line}" for line in by_reason(self.skipped)]
        return lines + [f"all channels stay: {line}" for line in by_reason(self.pinned)]

    def _summary(self) -> str:
        chains = f" in {self.chains:,} chains" if self.chains else ""
        redundant = self.selected - self.kept
        seconds = ", ".join(f"{name} {value:.2f} s" for name, value in self.timings.items())
        method = f"{self.method}, on {self.calibration}," if self.calibration else self.method
        return (
            f"{method} selected {self.selected:,} kernels{chains}; "
            f"{redundant:,} redundant ones removed ({seconds})"
        )


def _row(name: str, kept: int, total: int, width: int) -> str:
    return f"{name:<{width}}  {kept:>10,}  {total:>10,}  {kept / total:>7.2%}"


def times(count: int) -> str:
    """How often, in words: "once" or "3 times"."""
    return "once" if count == 1 else f"{count} times"
