"""Radial flows: each layer stretches or squeezes space around one centre."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ridge
from .base import Transform

__all__ = ["Radial", "radial"]


class Radial(Transform):
    r"""x = z + beta (z - c) / (alpha + |z - c|), from latent to data.

    Rezende and Mohamed 2015 (arXiv:1505.05770), equation 14, with alpha > 0 and beta > -alpha
    for every value of the numbers: alpha and 1 + beta / alpha, the stretch gamma at the centre,
    are both of the form t + sqrt(1 + t^2).

    Both directions are formulas: with rho = |z - c| / alpha and R = |x - c| / alpha the radius
    solves rho^2 + (gamma - R) rho - R = 0. log_dets exact, in nats. Starts as the identity
    (gamma = 1) with a random centre. ``hidden``, ``activation``: of the network that makes the
    numbers from a context.
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
    ) -> None:
        super().__init__((features,), context)
        start = torch.cat([torch.randn(features), torch.zeros(2)])
        self.numbers = ridge.Numbers(start, context, hidden, activation)

    def _ray(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Centre, ray from it ``(n, d)``, its length in units of alpha, gamma (columns)."""
        numbers = self.numbers(context)
        centre, sizes = numbers[:, :-2], ridge.gained(numbers[:, -2:])[0]
        ray = x - centre
        length = torch.linalg.vector_norm(ray, dim=-1, keepdim=True) * (-sizes[:, :1]).exp()
        return centre, ray, length, sizes[:, 1:].exp()

    def _stretch(self, rho: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Factor ``(n, 1)`` of the ray at latent radius rho, and log_det ``(n,)``."""
        near = 1 / (1 + rho)
        far = rho * near
        factor = far + gamma * near
        along = far * (1 + near) + gamma * near.square()  # 1 + (gamma - 1) / (1 + rho)^2
        return factor, ((self.event[0] - 1) * factor.log() + along.log())[:, 0]

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        centre, ray, rho, gamma = self._ray(z, context)
        factor, log_det = self._stretch(rho, gamma)
        return torch.addcmul(centre, ray, factor), log_det

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        centre, ray, reach, gamma = self._ray(x, context)
        gap = reach - gamma
        size = torch.where(gap > 0, gap, -gap)  # abs would have no derivative at a gap of zero
        larger = (size + torch.sqrt(gap.square() + 4 * reach)) / 2  # root in absolute value
        rho = torch.where(gap > 0, larger, reach / larger)  # the roots' product is -reach
        factor, log_det = self._stretch(rho, gamma)
        return centre + ray / factor, -log_det


def radial(
    features: int,
    context: int = 0,
    *,
    blocks: int = 16,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    actnorm: bool = True,
    linear: str | None = "lu",
) -> list[Transform]:
    """A radial flow; ``hidden`` and ``activation`` are those of the networks for a context."""
    return ridge.stacked(
        lambda: Radial(features, context, hidden, activation), features, blocks, actnorm, linear
    )
