"""Between whole-numbered pixels and what a flow sees: dequantisation, bits per dimension, logit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from .base import Transform

__all__ = ["Logit", "Pixels"]


@dataclass(frozen=True)
class Pixels:
    """Pixels k = 0, 1, ..., ``levels`` - 1 and the reals x = (k + u) / levels in [0, 1).

    With u uniform on [0, 1) (dequantisation), log P(k) >= E log p(x) - D log levels for images of
    D values; the last term is the logarithm of the volume of a pixel's cell, the Jacobian of k + u
    to x. Sources: Uria et al. 2013 (arXiv:1306.0186); Theis et al. 2016 (arXiv:1511.01844), 3.1.
    """

    levels: int = 256

    def __post_init__(self) -> None:
        """Check the number of levels."""
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels={self.levels} must lie between 2 and 256")

    def dequantise(
        self, k: Tensor, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Whole numbers of any shape to x with fresh noise; rounding never reaches the next k."""
        noise = torch.rand(k.shape, generator=generator, dtype=dtype, device=generator.device)
        x = (k.to(dtype) + noise.to(k.device)) / self.levels
        return torch.minimum(x, torch.nextafter((k + 1.0).to(dtype) / self.levels, x.new_zeros(())))

    def quantise(self, x: Tensor) -> Tensor:
        """Numbers to the uint8 pixel in whose cell they lie, at most the nearest end."""
        return (x * self.levels).floor().clamp(0, self.levels - 1).to(torch.uint8)

    def log_volume(self, event: Sequence[int]) -> float:
        """Of the cell of one image of shape ``event``, in nats: -D log levels."""
        return -math.prod(event) * math.log(self.levels)

    def bits_per_dim(self, log_prob: float, event: Sequence[int]) -> float:
        """Bits per dimension of a log-density of x in nats: -(log p - D log levels) / (D log 2)."""
        return -(log_prob + self.log_volume(event)) * self.bits(event)

    @staticmethod
    def bits(event: Sequence[int]) -> float:
        """Bits per dimension in one nat per image, the factor for differences and errors."""
        return 1 / (math.prod(event) * math.log(2))


class Logit(Transform):
    r"""z = logit(alpha + (1 - 2 alpha) x), from images in [0, 1] to all reals.

    Dinh et al. 2017 (arXiv:1605.08803), section 4.1. Its domain exceeds [0, 1] by
    alpha / (1 - 2 alpha) at both ends. log_det exact. Raises ValueError for an ``alpha`` outside
    (0, 1/2), and for x outside [0, 1], which are most often pixels not divided by their levels.
    """

    def __init__(self, event: Sequence[int], alpha: float = 0.05) -> None:
        super().__init__(event)
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha={alpha} must lie strictly between 0 and 0.5")
        self.alpha = alpha
        self.log_slope = math.log1p(-2 * alpha)

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling() and x.numel():
            low, high = (float(v) for v in x.detach().aminmax())
            slack = 4 * torch.finfo(x.dtype).eps  # so much draws from far tails may be rounded
            if low < self.lowest - slack or high > 1 - self.lowest + slack:
                raise ValueError(
                    f"x holds values from {low:.4g} to {high:.4g}; images must lie in [0, 1]: "
                    "divide (pixel + noise) by the number of levels"
                )
        tiny = torch.finfo(x.dtype).tiny  # draws from far tails meet the very ends
        # from both ends, because 1 - s would lose the digits of white pixels
        log_s, log_rest = (
            (self.alpha + (1 - 2 * self.alpha) * v).clamp_min(tiny).log() for v in (x, 1 - x)
        )
        log_det = (self.log_slope - log_s - log_rest).flatten(1).sum(1)
        return log_s - log_rest, log_det

    @property
    def lowest(self) -> float:
        """Left end of the domain, -alpha / (1 - 2 alpha); the right end is 1 minus it."""
        return -self.alpha / (1 - 2 * self.alpha)

    def image(self, support: constraints.Constraint) -> constraints.Constraint:
        span = constraints.interval(  # type: ignore[no-untyped-call]
            self.lowest, 1 - self.lowest
        )
        return constraints.independent(span, len(self.event))  # type: ignore[no-untyped-call]

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha)
        log_det = (-F.softplus(z) - F.softplus(-z) - self.log_slope).flatten(1).sum(1)
        return x, log_det
