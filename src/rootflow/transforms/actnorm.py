"""A scale and shift for each column or channel, set from the first training batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Transform, event_of, over_channels

__all__ = ["ActNorm"]


class ActNorm(Transform):
    """z = (x - shift) exp(-log_scale); Kingma and Dhariwal 2018 (arXiv:1807.03039), section 3.1.

    The first batch of two rows or more seen in training mode by ``forward`` sets both so that z is
    standardised; evaluation never does, nor does compiled code (a flag read from a tensor would
    break its graph), so let the first step run eagerly. A column that is constant up to rounding
    keeps the scale 1. Images ``(c, h, w)`` have one scale and shift for each channel, set from all
    its pixels. log_det exact, both directions closed.
    """

    initialised: Tensor

    def __init__(self, event: int | Sequence[int]) -> None:
        super().__init__(event_of(event))
        self.places = math.prod(self.event[1:])
        self.shift = nn.Parameter(torch.zeros(self.event[0]))
        self.log_scale = nn.Parameter(torch.zeros(self.event[0]))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        if x.shape[0] < 2 or bool(self.initialised):
            return
        x = x.transpose(0, 1).flatten(1)
        spread = x.std(1)
        rounding = 16 * torch.finfo(x.dtype).eps * x.abs().amax(1)
        self.shift.copy_(x.mean(1))
        self.log_scale.copy_(torch.where(spread > rounding, spread, 1).clamp_min(1e-6).log())
        self.initialised.fill_(True)

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.training and not torch.compiler.is_compiling():
            self._initialise(x)
        log_det = -self.places * self.log_scale.sum()
        shift, scale = (over_channels(v, x) for v in (self.shift, (-self.log_scale).exp()))
        return (x - shift) * scale, log_det.expand(x.shape[0])

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_det = self.places * self.log_scale.sum()
        shift, scale = (over_channels(v, z) for v in (self.shift, self.log_scale.exp()))
        return z * scale + shift, log_det.expand(z.shape[0])
