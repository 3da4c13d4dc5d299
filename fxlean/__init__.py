"""Prune any convolutional network with one call: `fxlean.prune(model, ratio)`."""

from .errors import ArgumentError, FxleanError, TraceError
from .graph import ChannelGraph
from .norms import operator_norms
from .pruning import PruneWarning, iterate, prune, trace
from .report import PruneResult
from .rules import register

__all__ = [
    "ArgumentError",
    "ChannelGraph",
    "FxleanError",
    "PruneResult",
    "PruneWarning",
    "TraceError",
    "iterate",
    "operator_norms",
    "prune",
    "register",
    "trace",
]
