"""Sylvester flows: each layer bends space along several directions that act on one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..solvers import Problem, attach
from . import ridge
from .base import Transform

__all__ = ["Sylvester", "sylvester"]


class Sylvester(Transform):
    r"""x = z + Q R tanh(R~ Q^T z + b), from latent to data, invertible for all numbers.

    van den Berg et al. 2018 (arXiv:1803.05649), equations 8 and 13. Q ``(d, rank)`` has orthonormal
    columns, the first of a product of ``rank`` Householder reflections; R and R~ are upper
    triangular, and r_ii grows from its raw value as a planar layer's u does, so that
    1 + r_ii r~_ii > 0 for all raw values.

    to_data is a formula. to_latent solves ``rank`` scalar equations per sample, one after another:
    y + R tanh(R~ y + b) = Q^T x is triangular. Both log_dets are exact, in nats. Starts as
    the identity (R = 0, R~ = I) with random Q and b. ``hidden``, ``activation``: of the network
    that makes the numbers from a context.
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        rank: int | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
    ) -> None:
        super().__init__((features,), context)
        m = self.rank = min(features, 8) if rank is None else rank
        if not 1 <= m <= features:
            raise ValueError(f"rank={rank} must be from 1 to features={features}")
        start = [torch.randn(features * m), torch.zeros(m * m), torch.ones(m), torch.randn(m)]
        self.sizes = [len(part) for part in start]
        self.numbers = ridge.Numbers(torch.cat(start), context, hidden, activation)

    def _parts(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Q ``(1 | n, d, m)``, R, R~ ``(1 | n, m, m)``, b and log(1 + r_ii r~_ii) ``(1 | n, m)``.

        Raw R lies in the upper half of one square, R~ transposed strictly below its diagonal.
        """
        d, m = self.event[0], self.rank
        vectors, square, diagonal, b = torch.split(numbers, self.sizes, -1)
        square = square.view(-1, m, m)
        raw = square.diagonal(dim1=-2, dim2=-1)
        log_gain, factor = ridge.gained(raw * diagonal)
        right = square.triu() + torch.diag_embed(raw * factor)
        left = square.tril(-1).mT + torch.diag_embed(diagonal)
        return self._frame(vectors.view(-1, d, m)), right, left, b, log_gain

    @staticmethod
    def _frame(vectors: Tensor) -> Tensor:
        """First columns of the product of the reflections, as I - V T V^T (Puglisi 1992)."""
        v = ridge.unit(vectors)
        d, m = v.shape[-2:]
        half = 0.5 * torch.eye(m, dtype=v.dtype, device=v.device)
        top = v[..., :m, :].mT
        product: Tensor = torch.linalg.solve_triangular((v.mT @ v).triu(1) + half, top, upper=True)
        return torch.eye(d, m, dtype=v.dtype, device=v.device) - v @ product

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        q, right, left, b, log_gain = self._parts(self.numbers(context))
        p = ridge.times(ridge.times(z, q), left.mT) + b
        moved = ridge.times(ridge.times(torch.tanh(p), right.mT), q.mT)
        return z + moved, ridge.log_slope(p, log_gain).sum(-1)

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        q, right, left, b, log_gain = self._parts(self.numbers(context))
        c = ridge.times(x, q)
        with torch.no_grad():
            y = self._substitute(c, right, left, b, log_gain)
        if torch.is_grad_enabled():
            y = attach(Problem(_residual, (c, right, left, b), jacobian=_jacobian), y)
        p = ridge.times(y, left.mT) + b
        moved = ridge.times(ridge.times(torch.tanh(p), right.mT), q.mT)
        return x - moved, -ridge.log_slope(p, log_gain).sum(-1)

    def _substitute(
        self, c: Tensor, right: Tensor, left: Tensor, b: Tensor, log_gain: Tensor
    ) -> Tensor:
        """The y with y + R tanh(R~ y + b) = c, its last column first."""
        c, inner = c.mT.contiguous(), b.mT.expand(self.rank, len(c)).clone()
        right, left, log_gain = right.permute(1, 2, 0), left.permute(1, 2, 0), log_gain.mT
        for i in reversed(range(self.rank)):
            s = torch.addcmul(inner[i], left[i, i], c[i])
            t = torch.tanh(ridge.root(s, log_gain[i]))
            c[: i + 1] -= right[: i + 1, i] * t  # row i now holds y_i
            inner[:i] += left[:i, i] * c[i]
        return c.mT

    def certificate(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """Bound on the distance of z from the exact image of x; residual taken in float64.

        All rounding counts but that of a context's network in float64.
        """
        q, right, left, b, log_gain = self._parts(self.numbers.precise(context))
        return ridge.error_bound(x, z, q @ right, q @ left.mT, b, log_gain.exp())


def _residual(y: Tensor, c: Tensor, right: Tensor, left: Tensor, b: Tensor) -> Tensor:
    return y - c + ridge.times(torch.tanh(ridge.times(y, left.mT) + b), right.mT)


def _jacobian(y: Tensor, c: Tensor, right: Tensor, left: Tensor, b: Tensor) -> Tensor:
    slopes = 1 - torch.tanh(ridge.times(y, left.mT) + b).square()
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    return eye + (right * slopes[:, None]) @ left


def sylvester(
    features: int,
    context: int = 0,
    *,
    blocks: int = 8,
    rank: int | None = None,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    actnorm: bool = True,
    linear: str | None = "lu",
) -> list[Transform]:
    """A Sylvester flow; ``hidden`` and ``activation`` are those of the networks for a context.

    ``rank``: directions in each layer, by default all up to eight.
    """
    return ridge.stacked(
        lambda: Sylvester(features, context, rank, hidden, activation),
        features, blocks, actnorm, linear,
    )  # fmt: skip
