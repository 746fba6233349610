"""Densities with a known formula, so that a fit can be compared with the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from ..data.toys import TOYS
from .parts import Positive, Strict

__all__ = ["Density", "Mixture", "toy"]


@dataclass(frozen=True)
class Density:
    """Samples (n, features) float32, exact log-densities (n,) float64 in nats, and the entropy."""

    name: str
    features: int
    sample: Callable[[int, torch.Generator], Tensor]
    log_prob: Callable[[Tensor], Tensor]
    entropy: float


class Mixture(Strict):
    """Round Gaussians: ``weights`` (k,) adding up to one, ``means`` (k, features), ``sds`` (k,)."""

    weights: tuple[Positive, ...]
    means: tuple[tuple[float, ...], ...]
    sds: tuple[Positive, ...]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not len(self.weights) == len(self.means) == len(self.sds) > 0:
            raise ValueError("weights, means and sds must have one entry for each Gaussian")
        if len({len(mean) for mean in self.means}) != 1 or len(self.means[0]) not in (1, 2):
            raise ValueError("means must all have one number, or all have two")
        if abs(sum(self.weights) - 1) > 1e-9:
            raise ValueError("weights must add up to one")
        return self

    @property
    def features(self) -> int:
        """One or two."""
        return len(self.means[0])

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, (n, features) to (n,), in float64."""
        means = torch.tensor(self.means, dtype=torch.float64)
        sds = torch.tensor(self.sds, dtype=torch.float64)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        squared = (x.double().unsqueeze(-2) - means).square().sum(-1) / sds.square()
        constants = weights.log() - self.features * (sds.log() + 0.5 * math.log(2 * math.pi))
        return (constants - squared / 2).logsumexp(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Fresh draws (n, features) in float32."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        which = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.features, dtype=torch.float64, generator=generator)
        means = torch.tensor(self.means, dtype=torch.float64)[which]
        sds = torch.tensor(self.sds, dtype=torch.float64)[which]
        return (means + sds.unsqueeze(-1) * noise).float()

    def entropy(self) -> float:
        """In nats, by the rectangle rule, which on smooth densities errs far below 1e-6."""
        step = min(self.sds) / 4
        axes = []
        for centres in zip(*self.means, strict=True):
            ends = [
                [m + side * 9 * s for m, s in zip(centres, self.sds, strict=True)]
                for side in (-1, 1)
            ]
            count = math.ceil((max(ends[1]) - min(ends[0])) / step)
            axes.append(min(ends[0]) + step * torch.arange(count + 1, dtype=torch.float64))
        grid = torch.cartesian_prod(*axes).reshape(-1, self.features)
        log_p = torch.cat([self.log_prob(rows) for rows in torch.split(grid, 65_536)])
        return float(-(log_p.exp() * log_p).sum()) * step**self.features

    def density(self, name: str) -> Density:
        """This mixture under a name."""
        return Density(name, self.features, self.sample, self.log_prob, self.entropy())


def toy(name: str) -> Density:
    """A toy of ``rootflow.data`` under the same interface."""
    found = TOYS[name]
    return Density(name, 2, found.sample, found.log_prob, found.entropy())
