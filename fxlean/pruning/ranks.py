"""Several processes that train one model: the choice of one is the choice of all."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

Choice = TypeVar("Choice")


def agreed(choice: Choice) -> Choice:
    """What the first rank has chosen, on every rank; without a process group, one's own.

    Ranks differ: their batch norms have seen other data, and their random numbers are others. Every
    rank must call it, so all must prune.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return choice
    choices = [choice]
    dist.broadcast_object_list(choices, src=0)
    return choices[0]
