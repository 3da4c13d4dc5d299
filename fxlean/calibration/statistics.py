"""Batch norm statistics measured anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..tracing.inputs import Arguments, call


def measure_statistics(model: nn.Module, batches: Iterable[Arguments]) -> None:
    """Measure the running statistics of all batch norms anew, in place: the mean over batches.

    Everything else runs as in eval mode. Training flags, momenta and the counts of batches are
    put back. Each batch must hold more than one value for every channel.
    """
    with batch_norms_training(model) as norms, torch.no_grad():
        kept = [(norm, norm.momentum, norm.state_dict()) for norm in norms]
        counts = [state["num_batches_tracked"].clone() for _, _, state in kept]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            for arguments in batches:
                call(model, arguments)
        finally:
            for (norm, momentum, state), count in zip(kept, counts, strict=True):
                norm.momentum = momentum
                state["num_batches_tracked"].copy_(count)


@contextmanager
def batch_norms_training(model: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Batch norms that keep statistics in training mode, everything else in eval mode."""
    flags = {module: module.training for module in model.modules()}
    modules = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [module for module in modules if module.running_mean is not None]
    try:
        model.eval()
        for norm in norms:
            norm.train()
        yield norms
    finally:
        for module, training in flags.items():
            module.training = training
