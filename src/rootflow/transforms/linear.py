"""An invertible linear map in LU form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Transform

__all__ = ["LULinear"]


class LULinear(Transform):
    r"""z = L U x + b with unit lower L and upper U of positive diagonal, started at the identity.

    log_det is the sum of the logarithms of U's diagonal, exact. Source: Kingma and Dhariwal 2018
    (arXiv:1807.03039), section 3.2, without the permutation.
    """

    def __init__(self, features: int) -> None:
        super().__init__((features,))
        self.entries = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def _factors(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.event[0], dtype=self.bias.dtype, device=self.bias.device)
        diagonal = torch.diag(self.log_diagonal.exp())
        return self.entries.tril(-1) + eye, self.entries.triu(1) + diagonal

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        z = torch.addmm(self.bias, x, (lower @ upper).mT)
        return z, self.log_diagonal.sum().expand(x.shape[0])

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        b = (z - self.bias).mT
        y = torch.linalg.solve_triangular(lower, b, upper=False, unitriangular=True)
        x = torch.linalg.solve_triangular(upper, y, upper=True).mT
        return x, (-self.log_diagonal.sum()).expand(z.shape[0])
