"""Batch norm statistics measured anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..tracing.inputs import Arguments, call_on_copies
from .elements import put_back


def measure_statistics(model: nn.Module, batches: Iterable[Arguments]) -> None:
    """Measure the running statistics of batch norms anew, in place: the mean over batches.

    Everything else runs as in eval mode. Training flags, momenta and the counts of batches are
    put back, and after an error or an interruption the statistics as well. Each batch must hold
    more than one value for every channel.
    """
    with batch_norms_training(model) as norms, torch.no_grad():
        momenta = [norm.momentum for norm in norms]
        before = {buffer: buffer.clone() for norm in norms for buffer in norm.buffers()}
        counts = [norm.num_batches_tracked for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            for arguments in batches:
                call_on_copies(model, arguments)
        except BaseException:
            put_back(before)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            put_back({count: before[count] for count in counts if count is not None})


def is_frozen(norm: nn.Module) -> bool:
    """Whether a norm is not to change: its scale and shift are buffers, or need no gradients."""
    own = list(norm.parameters(recurse=False))
    has_scale = bool(own) or norm._buffers.get("weight") is not None
    return has_scale and not any(parameter.requires_grad for parameter in own)


def is_frozen_mean(model: nn.Module, name: str) -> bool:
    """Whether a running mean, named as a buffer of a model, belongs to a frozen norm."""
    return is_frozen(model.get_submodule(name.rpartition(".")[0]))


@contextmanager
def batch_norms_training(model: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Batch norms that keep statistics in training mode, everything else in eval mode.

    Frozen ones are left out.
    """
    flags = {module: module.training for module in model.modules()}
    modules = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [norm for norm in modules if norm.running_mean is not None and not is_frozen(norm)]
    try:
        model.eval()
        for norm in norms:
            norm.train()
        yield norms
    finally:
        for module, training in flags.items():
            module.training = training
