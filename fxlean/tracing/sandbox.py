"""Blocks of code that leave a model as they found it, or ignore the default device."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module, *, always: bool = True) -> Iterator[None]:
    """Put back attributes, parameters, buffers, hooks, training flags and RNG state on leaving.

    With `always=False` only if the block raises. Values that the block writes into tensors in
    place are put back for buffers, not for parameters and masks, which no forward pass writes.
    """
    modules = [(module, _shallow(module.__dict__)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for module, _ in modules for buffer in _written(module)]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    done = False
    with torch.random.fork_rng(list(devices), enabled=always):
        try:
            yield
            done = not always
        finally:
            if not done:
                for module, saved in modules:
                    _restore(module.__dict__, saved)
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.data.copy_(value)


def _written(module: nn.Module) -> list[Tensor]:
    """The module's own buffers that a forward pass may write."""
    masked = [key.removesuffix("_orig") for key in module._parameters if key.endswith("_orig")]
    masks = {f"{name}_mask" for name in masked}
    named = module.named_buffers(recurse=False)
    return [buffer for name, buffer in named if not buffer.is_meta and name not in masks]


def _shallow(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every attribute with, for containers, a copy of what it holds."""
    return {
        key: (value, value.copy() if isinstance(value, dict | list | set) else None)
        for key, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], saved: dict[str, tuple[Any, Any]]) -> None:
    attributes.clear()
    for key, (value, content) in saved.items():
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, dict | set):
            value.clear()
            value.update(content)
        attributes[key] = value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode without gradients, silent, and everything as before afterwards."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints whatever does not fit
    silent = log.disabled
    with untouched(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in model.modules():
            module.training = False
        log.disabled = True
        try:
            yield
        finally:
            log.disabled = silent


@contextmanager
def on_cpu() -> Iterator[None]:
    """New tensors on the CPU, where our own numbers are, whatever the default device is."""
    if torch.empty(0).device.type == "cpu":
        yield  # a device context costs time at every call of torch
    else:
        with torch.device("cpu"):
            yield
