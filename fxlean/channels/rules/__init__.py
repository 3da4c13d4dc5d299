"""The rules: how each operator moves channels. `fxlean.rules` is this package."""

from . import movements, positions, weighted
from .table import (
    RULES,
    Rule,
    embedding,
    first,
    gated_half,
    joined,
    opaque,
    pointwise,
    register,
    rule_for,
    unary,
)

__all__ = [
    "RULES",
    "Rule",
    "embedding",
    "first",
    "gated_half",
    "joined",
    "movements",
    "opaque",
    "pointwise",
    "positions",
    "register",
    "rule_for",
    "unary",
    "weighted",
]
