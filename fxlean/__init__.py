"""Prune any convolutional network with one call: `fxlean.prune(model, ratio)`."""

import sys

from .calibration.distillation import distill
from .calibration.repair_model import repair
from .calibration.repair_result import RepairResult
from .channels import rules
from .channels.graph import ChannelGraph
from .channels.rules import register
from .checkpoint.files import load, save
from .compaction.attempts import compact
from .costs import Report, report
from .errors import (
    ArgumentError,
    CompactionError,
    CompactionWarning,
    FxleanError,
    PruneWarning,
    TraceError,
)
from .norms.operator import operator_norms
from .pruning.networks import trace
from .pruning.prune_model import prune
from .pruning.result import PruneResult
from .pruning.rounds import iterate
from .pruning.schedules import schedule
from .pruning.shrinking import shrink
from .version import __version__

# The path that `register` documents, wherever the rules lie.
sys.modules[f"{__name__}.rules"] = rules

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
