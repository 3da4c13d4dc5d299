"""Running means and covariances of many small vectors at once, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ranks import alone, summed


class Moments:
    """Mean and covariance of c vectors of t entries each, over all positions added so far.

    Each addition is centred at its own mean before it is squared, and additions are put together
    in float64, so a mean much larger than the deviations costs no digits.

    Source: Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance",
    equation 1.5, for covariances.

    Attributes:
        count: number of positions.
        mean: of every entry, shape (c, t), float64.
    """

    def __init__(self, vectors: int, entries: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(vectors, entries, dtype=torch.float64, device=device)
        self._scatter = self.mean.new_zeros(vectors, entries, entries)

    def add(self, values: Tensor) -> None:
        """Take in more positions: values of shape (c, t, positions), any floating dtype."""
        count = values.shape[-1]
        if count == 0:
            return
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        offset = values.mean(-1, keepdim=True)
        values = values - offset
        mean = offset[..., 0] + values.mean(-1).double()  # which rounding had left
        scatter = (values @ values.mT).double()
        total = self.count + count
        delta = mean - self.mean
        self._scatter += scatter + (self.count * count / total) * _squares(delta)
        self.mean += delta * (count / total)
        self.count = total

    def reduce(self) -> None:
        """Take in what the other ranks have added; every rank must call it."""
        if alone():
            return
        total = int(summed(torch.tensor(self.count)))
        mean = summed(self.count * self.mean) / max(1, total)
        self._scatter = summed(self._scatter + self.count * _squares(self.mean - mean))
        self.count, self.mean = total, mean

    @property
    def covariance(self) -> Tensor:
        """Covariance of the entries of every vector, shape (c, t, t), float64; 0 of nothing."""
        return self._scatter / max(1, self.count)


def _squares(values: Tensor) -> Tensor:
    """Products of the entries of every vector with each other, shape (c, t, t)."""
    return values[..., :, None] * values[..., None, :]
