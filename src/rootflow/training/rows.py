"""Minibatches: of rows in memory with the noise that belongs to a step, or of a feed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..transforms import Pixels
from .config import FitConfig

__all__ = ["Batch", "Feed", "Rows"]


class Feed(Protocol):
    """Training rows that are not a tensor: batches by step, and their first two moments."""

    def __len__(self) -> int: ...

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """The rows ``(size, features)`` of one step, which seed and step alone determine."""

    def moments(self, seed: int) -> tuple[Tensor, Tensor]:
        """Mean ``(features,)`` and covariance ``(features, features)`` of all rows."""


@dataclass
class Batch:
    """Rows of one step, and what their weights (or their number) add up to over all processes."""

    x: Tensor
    context: Tensor | None
    weight: Tensor | None
    total: Tensor | float


class Rows:
    """Shuffled minibatches; seed and epoch alone give the order, so a resumed fit sees the same."""

    def __init__(
        self,
        x: Tensor | Feed,
        context: Tensor | None,
        weight: Tensor | None,
        gaps: Tensor | None,
        pixels: Pixels | None,
        like: Tensor,
        config: FitConfig,
    ) -> None:
        self.x, self.context, self.weight, self.gaps = x, context, weight, gaps
        self.pixels, self.like, self.flip = pixels, like, config.flip
        self.size = min(config.batch_size, len(x))
        self.per_epoch = len(x) // self.size
        self.seed, self.epoch = config.seed, -1

    def batch(self, step: int, share: Callable[[Tensor], Tensor] = lambda rows: rows) -> Batch:
        """The rows of this step, of which ``share`` keeps those of this process."""
        if not isinstance(self.x, Tensor):
            x = self.x.batch(step, self.size, self.seed)
            return Batch(share(x), None, None, float(len(x)))
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = torch.randperm(len(self.x), generator=generator).to(self.x.device)
        rows = self.order[at * self.size : (at + 1) * self.size]
        x = self.x[rows]  # and noise for all processes, so that their number changes nothing
        noise = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 2 + 1)
        if self.gaps is not None:
            x = x + self.gaps * torch.rand(x.shape, generator=noise, dtype=x.dtype).to(x.device)
        if self.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, generator=noise).to(x.device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        if self.pixels is not None:
            x = self.pixels.dequantise(x, noise, self.like.dtype).to(self.like.device)
        context = None if self.context is None else share(self.context[rows])
        weight = None if self.weight is None else self.weight[rows]
        total = float(len(rows)) if weight is None else weight.sum()
        return Batch(share(x), context, None if weight is None else share(weight), total)
