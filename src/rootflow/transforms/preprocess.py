"""Fixed maps from raw data to what a flow likes to see, their Jacobian counted."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Transform

__all__ = ["Standardise"]


class Standardise(Transform):
    """z = (x - mean) W^T with fixed mean and matrix: standardises or whitens the training data.

    The identity until ``set`` is called. log_det is that of W, exact, so likelihoods stay in units
    of x.
    """

    mean: Tensor
    matrix: Tensor
    known: Tensor

    def __init__(self, features: int) -> None:
        super().__init__((features,))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("matrix", torch.eye(features))
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))

    def set(self, x: Tensor, whiten: bool) -> None:
        """Take mean and scales from the rows ``x`` ``(n, features)``, in float64.

        ``whiten``: take the whole covariance instead of scales, given more than two rows a column.
        """
        x = x.detach().double()
        mean = x.mean(0)
        covariance = x.T.cov(correction=0).reshape(x.shape[1], x.shape[1])
        self.place(mean, covariance, whiten and x.shape[0] > 2 * x.shape[1])

    def place(self, mean: Tensor, covariance: Tensor, whiten: bool = True) -> None:
        """Take mean ``(features,)`` and covariance ``(features, features)``, in float64.

        ``whiten``: undo correlations too, in the symmetric way that turns axes least.
        """
        mean, covariance = mean.detach().double(), covariance.detach().double()
        scale = covariance.diagonal().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        matrix = torch.diag(1 / scale)
        if whiten:
            correlation = covariance / scale / scale[:, None]
            values, vectors = torch.linalg.eigh((correlation + correlation.T) / 2)
            values = values.clamp_min(1e-6 * float(values[-1]))
            matrix = (vectors * values**-0.5) @ vectors.T / scale
        self.mean.copy_(mean)
        self.matrix.copy_(matrix)
        self.known.fill_(True)

    def _log_det(self, rows: int) -> Tensor:
        log_det: Tensor = torch.linalg.slogdet(self.matrix.double())[1]
        return log_det.to(self.matrix.dtype).expand(rows)

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return (x - self.mean) @ self.matrix.T, self._log_det(x.shape[0])

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.linalg.solve(self.matrix, z.T).T + self.mean, -self._log_det(z.shape[0])
