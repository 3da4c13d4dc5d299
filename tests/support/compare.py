"""Whether two models are the same, or compute the same."""

import io

import torch
from torch.utils._pytree import tree_leaves

from fxlean.compaction.verify import relative_error


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def worst_error(found, expected):
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return max(relative_error(a.detach(), b.detach()) for a, b in pairs)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def load_trained_state(source, target):
    """Change the parameters of a network, and load its saved state into another."""
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))


def same_state(left, right):
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)
