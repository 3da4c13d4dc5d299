"""Overlaps: how far the channels that a layer reads vary together."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..channels.weights import Weight
from .contributions import feature_table, some_places
from .moments import Moments


class Overlap:
    """Collects what a layer without groups reads, batch by batch, at some positions of each.

    Attributes:
        moments: of its channels.
    """

    def __init__(self, weight: Weight) -> None:
        kernels = weight.kernels(weight.value.detach())
        self._features: Tensor | None = None
        channels = kernels.shape[1]
        if weight.columns is not None:
            self._features = feature_table(weight.columns).to(kernels.device)
            channels = len(self._features)
        self._generator = torch.Generator().manual_seed(0)
        self.moments = Moments(1, channels, kernels.device)

    def add(self, x: Tensor) -> None:
        """Take in the input of one call, of shape (n, channels, *size) or (n, features)."""
        if self._features is not None:
            x = F.pad(x, (0, 1))[:, self._features]
        places = x.movedim(1, -1)
        index = some_places(places.shape[:-1], self._generator, x.device)
        self.moments.add(places[tuple(index)].T[None])

    def correlations(self) -> NDArray[np.float64]:
        """Of every two channels, shape (channels, channels); 0 where one does not vary."""
        covariance: NDArray[np.float64] = self.moments.covariance[0].cpu().numpy()
        deviations = np.sqrt(covariance.diagonal())
        scale = np.divide(1, deviations, out=np.zeros_like(deviations), where=deviations > 0)
        return covariance * scale[:, None] * scale
