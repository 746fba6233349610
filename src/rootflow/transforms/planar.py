"""Planar flows: each layer bends space along one direction, across parallel planes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ridge
from .base import Transform

__all__ = ["Planar", "planar"]


class Planar(Transform):
    r"""x = z + u tanh(w.z + b), from latent to data, invertible for every value of its numbers.

    Rezende and Mohamed 2015 (arXiv:1505.05770), equation 10, with the direction in which they draw.
    Their appendix A.1 makes w.u > -1 by a shift of u along w; here the shift is
    :math:`u = v + w\, (w.v) \tanh(a / 2) / |w|^2` with a = asinh(w.v), so that
    1 + w.u = exp(a), which is small only as 1 / |w.v|, never zero, and u = v to first order.

    to_data is a formula. to_latent solves one scalar equation per sample,
    p + (w.u) tanh(p) = w.x + b, and z = x - u tanh(p). Both log_dets are exact, in nats.
    Starts as the identity (v = 0) with a random w of length about 2. ``hidden``, ``activation``: of
    the network that makes w, v and b from a context.
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
    ) -> None:
        super().__init__((features,), context)
        start = [2 * ridge.drawn(features), torch.zeros(features), torch.randn(1)]
        self.numbers = ridge.Numbers(torch.cat(start), context, hidden, activation)

    def _parts(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Directions w and u ``(1 | n, d)``, b and log(1 + w.u) ``(1 | n)``."""
        d = self.event[0]
        w, v, b = numbers[:, :d], numbers[:, d : 2 * d], numbers[:, -1]
        t = (w * v).sum(-1)
        log_gain, factor = ridge.gained(t)
        square = w.square().sum(-1).clamp_min(1e-30)  # a w of zero leaves u = v
        return w, torch.addcmul(v, w, (t * factor / square)[:, None]), b, log_gain

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        w, u, b, log_gain = self._parts(self.numbers(context))
        p = ridge.times(z, w[..., None])[:, 0] + b
        return z + torch.tanh(p)[:, None] * u, ridge.log_slope(p, log_gain)

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        w, u, b, log_gain = self._parts(self.numbers(context))
        p = ridge.root(ridge.times(x, w[..., None])[:, 0] + b, log_gain)
        return x - torch.tanh(p)[:, None] * u, -ridge.log_slope(p, log_gain)

    def certificate(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """Bound on the distance of z from the exact image of x; residual taken in float64.

        All rounding counts but that of a context's network in float64.
        """
        w, u, b, log_gain = self._parts(self.numbers.precise(context))
        return ridge.error_bound(
            x, z, u[..., None], w[..., None], b[:, None], log_gain.exp()[:, None]
        )


def planar(
    features: int,
    context: int = 0,
    *,
    blocks: int = 16,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    actnorm: bool = True,
    linear: str | None = "lu",
) -> list[Transform]:
    """A planar flow; ``hidden`` and ``activation`` are those of the networks for a context."""
    return ridge.stacked(
        lambda: Planar(features, context, hidden, activation), features, blocks, actnorm, linear
    )
