"""Running means and covariances of many small vectors at once, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of c vectors of t entries each, over all positions added so far.

    Each addition is centred at its own mean before it is squared, and additions are put together
    in float64, so a mean much larger than the deviations costs no digits.

    Source: Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance",
    equation 1.5, for covariances.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Take in more positions: values of shape (c, t, positions), any floating dtype."""
        count = values.shape[-1]
        if count == 0:
            return
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        mean = values.mean(-1, dtype=torch.float64)
        values = values - mean.to(values.dtype)[..., None]
        scatter = (values @ values.mT).double()
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean, scatter
            return
        total = self.count + count
        delta = mean - self._mean
        self._scatter += scatter
        self._scatter += (self.count * count / total) * delta[..., :, None] * delta[..., None, :]
        self._mean += delta * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Mean of every entry, shape (c, t), float64."""
        assert self._mean is not None
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """Covariance of the entries of every vector, shape (c, t, t), float64."""
        assert self._scatter is not None
        return self._scatter / self.count
