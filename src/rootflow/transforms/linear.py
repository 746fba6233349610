"""Invertible linear maps whose log-determinants cost nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Transform, event_of

__all__ = ["LULinear", "Scale"]


class LULinear(Transform):
    r"""z = P L U x + b with unit lower L and upper U of positive diagonal, L = U = I at the start.

    P is the identity, or with ``permute`` a fixed random permutation, drawn like a weight and
    saved. In images ``(c, h, w)`` it acts on the channels of each pixel, an invertible 1 x 1
    convolution. log_det is the sum of the logarithms of U's diagonal, once for each pixel, exact.
    Source: Kingma and Dhariwal 2018 (arXiv:1807.03039), section 3.2, equation 10, with positive s.
    """

    order: Tensor | None

    def __init__(self, event: int | Sequence[int], *, permute: bool = False) -> None:
        super().__init__(event_of(event))
        features = self.event[0]
        self.entries = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("order", torch.randperm(features) if permute else None)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """L without its unit diagonal, and U."""
        return self.entries.tril(-1), self.entries.triu(1) + self.log_diagonal.exp().diag()

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        strict, upper = self._factors()
        weight = torch.addmm(upper, strict, upper)
        if self.order is not None:
            weight = weight[self.order]
        if x.dim() == 2:
            z = torch.addmm(self.bias, x, weight.mT)
        else:
            z = F.conv2d(x, weight[:, :, None, None], self.bias)
        return z, self._log_det().expand(x.shape[0])

    def _log_det(self) -> Tensor:
        return self.log_diagonal.sum() * math.prod(self.event[1:])

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        strict, upper = self._factors()
        b = z.transpose(0, 1).flatten(1) - self.bias[:, None]
        if self.order is not None:
            b = b[self.order.argsort()]
        y = torch.linalg.solve_triangular(strict, b, upper=False, unitriangular=True)
        x = torch.linalg.solve_triangular(upper, y, upper=True)
        x = x.view(self.event[0], z.shape[0], *self.event[1:]).transpose(0, 1)
        return x, (-self._log_det()).expand(z.shape[0])


class Scale(Transform):
    """z = x exp(s) with one learned s for each column; Dinh et al. 2015, section 3.3."""

    def __init__(self, features: int) -> None:
        super().__init__((features,))
        self.log_scale = nn.Parameter(torch.zeros(features))

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(x.shape[0])

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp(), (-self.log_scale.sum()).expand(z.shape[0])
