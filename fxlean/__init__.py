"""Prune any convolutional network with one call: `fxlean.prune(model, ratio)`."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import nn as nn  # where pickles of compacted models look
from .channels import rules
from .channels.rules import register
from .errors import (
    ArgumentError,
    CompactionError,
    CompactionWarning,
    FxleanError,
    PruneWarning,
    TraceError,
)
from .version import __version__

if TYPE_CHECKING:
    from .calibration.distillation import distill
    from .calibration.repair_model import repair
    from .calibration.repair_result import RepairResult
    from .channels.graph import ChannelGraph
    from .checkpoint.files import load, save
    from .compaction.attempts import compact
    from .costs import Report, report
    from .norms.operator import operator_norms
    from .pruning.networks import trace
    from .pruning.prune_model import prune
    from .pruning.result import PruneResult
    from .pruning.rounds import iterate
    from .pruning.schedules import schedule
    from .pruning.shrinking import shrink

# The path that `register` documents, wherever the rules lie.
sys.modules[f"{__name__}.rules"] = rules

# Where the names are that are imported when they are first asked for.
_LATER = {
    "ChannelGraph": "channels.graph",
    "PruneResult": "pruning.result",
    "RepairResult": "calibration.repair_result",
    "Report": "costs",
    "compact": "compaction.attempts",
    "distill": "calibration.distillation",
    "iterate": "pruning.rounds",
    "load": "checkpoint.files",
    "operator_norms": "norms.operator",
    "prune": "pruning.prune_model",
    "repair": "calibration.repair_model",
    "report": "costs",
    "save": "checkpoint.files",
    "schedule": "pruning.schedules",
    "shrink": "pruning.shrinking",
    "trace": "pruning.networks",
}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in _LATER:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=sys.modules[__name__])
    value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether they are imported yet or not."""
    return __all__


__all__ = [
    "ArgumentError",
    "ChannelGraph",
    "CompactionError",
    "CompactionWarning",
    "FxleanError",
    "PruneResult",
    "PruneWarning",
    "RepairResult",
    "Report",
    "TraceError",
    "__version__",
    "compact",
    "distill",
    "iterate",
    "load",
    "operator_norms",
    "prune",
    "register",
    "repair",
    "report",
    "rules",
    "save",
    "schedule",
    "shrink",
    "trace",
]
