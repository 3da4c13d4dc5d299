"""Prune any convolutional network with one call: `fxlean.prune(model, ratio)`."""

from .compaction import CompactionWarning, compact
from .costs import Report, report
from .errors import ArgumentError, CompactionError, FxleanError, TraceError
from .graph import ChannelGraph
from .norms import operator_norms
from .pruning import PruneWarning, iterate, prune, trace
from .report import PruneResult
from .rules import register

__all__ = [
    "ArgumentError",
    "ChannelGraph",
    "CompactionError",
    "CompactionWarning",
    "FxleanError",
    "PruneResult",
    "PruneWarning",
    "Report",
    "TraceError",
    "compact",
    "iterate",
    "operator_norms",
    "prune",
    "register",
    "report",
    "trace",
]
