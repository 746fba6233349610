"""Base distributions on the latent side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Normal"]


class Normal(nn.Module):
    """Standard normal over ``event``."""

    def __init__(self, event: Sequence[int]) -> None:
        super().__init__()
        self.event = tuple(event)
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    anchor: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats: ``(..., *event)`` to ``(...)``."""
        squared = z.square().flatten(z.dim() - len(self.event)).sum(-1)
        return -0.5 * squared - 0.5 * math.prod(self.event) * math.log(2 * math.pi)

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Draws ``(*shape, *event)`` in the dtype and on the device of the module."""
        like = self.anchor
        return torch.randn(
            *shape, *self.event, generator=generator, dtype=like.dtype, device=like.device
        )
