"""Per-dimension scale and shift, set from the first training batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Transform

__all__ = ["ActNorm"]


class ActNorm(Transform):
    """z = (x - shift) exp(-log_scale); Kingma and Dhariwal 2018 (arXiv:1807.03039), section 3.1.

    The first batch of two rows or more seen in training mode by ``forward`` sets both so that z is
    standardised; evaluation never does, nor does compiled code (a flag read from a tensor would
    break its graph), so let the first step run eagerly. A column that is constant up to rounding
    keeps the scale 1. log_det exact, both directions closed.
    """

    initialised: Tensor

    def __init__(self, features: int) -> None:
        super().__init__((features,))
        self.shift = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        if x.shape[0] < 2 or bool(self.initialised):
            return
        spread = x.std(0)
        rounding = 16 * torch.finfo(x.dtype).eps * x.abs().amax(0)
        self.shift.copy_(x.mean(0))
        self.log_scale.copy_(torch.where(spread > rounding, spread, 1).clamp_min(1e-6).log())
        self.initialised.fill_(True)

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.training and not torch.compiler.is_compiling():
            self._initialise(x)
        log_det = -self.log_scale.sum()
        return (x - self.shift) * (-self.log_scale).exp(), log_det.expand(x.shape[0])

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z * self.log_scale.exp() + self.shift, self.log_scale.sum().expand(z.shape[0])
