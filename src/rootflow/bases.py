"""Base distributions on the latent side.

A base is a module with ``log_prob(z)`` and ``sample(shape, generator)``. Bi-Lipschitz maps cannot
change how fast tails fall, nor tear a density apart; data with heavy tails or separate pieces may
want another base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

__all__ = ["BASES", "Mixture", "Normal", "StudentT", "Uniform"]


class _Base(nn.Module):
    """Event shape, and a tensor that says in which dtype and on which device to draw."""

    anchor: Tensor

    def __init__(self, event: Sequence[int]) -> None:
        super().__init__()
        self.event = tuple(event)
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    @property
    def support(self) -> constraints.Constraint:
        """Where the density is positive: all of R^n unless a class says otherwise."""
        return constraints.independent(  # type: ignore[no-untyped-call]
            constraints.real, len(self.event)
        )

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats: ``(..., *event)`` to ``(...)``."""
        raise NotImplementedError

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Draws ``(*shape, *event)`` in the dtype and on the device of the module."""
        raise NotImplementedError

    def _sum(self, terms: Tensor) -> Tensor:
        return terms.flatten(terms.dim() - len(self.event)).sum(-1)

    def _normal(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        like = self.anchor
        full = (*shape, *self.event)
        return torch.randn(full, generator=generator, dtype=like.dtype, device=like.device)

    def _uniform(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        like = self.anchor
        return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


class Normal(_Base):
    """Standard normal."""

    def log_prob(self, z: Tensor) -> Tensor:
        return self._sum(-0.5 * (z.square() + math.log(2 * math.pi)))

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        return self._normal(shape, generator)


class Uniform(_Base):
    """Uniform on [-interval, interval] in each dimension, the latent side of maps that keep it."""

    def __init__(self, event: Sequence[int], interval: float) -> None:
        super().__init__(event)
        if not 0 < interval < math.inf:
            raise ValueError(f"interval={interval!r} must be positive and finite")
        self.interval = float(interval)

    @property
    def support(self) -> constraints.Constraint:
        edge, independent = self.interval, constraints.independent
        return independent(constraints.interval(-edge, edge), len(self.event))  # type: ignore[no-untyped-call]

    def log_prob(self, z: Tensor) -> Tensor:
        """Constant inside, -inf outside, NaN for NaN; its gradient is zero everywhere."""
        level = z * 0 - math.log(2 * self.interval)
        return self._sum(torch.where(z.abs() > self.interval, -math.inf, level))

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        return (2 * self._uniform((*shape, *self.event), generator) - 1) * self.interval


class StudentT(_Base):
    """Independent Student t in each dimension, with learned degrees of freedom.

    They are above 1, and 5 at the start.
    Draws by Bailey's polar method (1994), differentiable in the degrees of freedom.
    """

    def __init__(self, event: Sequence[int]) -> None:
        super().__init__(event)
        self.raw_df = nn.Parameter(torch.full(self.event, math.log(math.expm1(4.0))))

    def _df(self) -> Tensor:
        return 1 + F.softplus(self.raw_df)

    def log_prob(self, z: Tensor) -> Tensor:
        df = self._df()
        constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * torch.log(math.pi * df)
        return self._sum(constant - (df + 1) / 2 * torch.log1p(z.square() / df))

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        df, full = self._df(), (*shape, *self.event)
        u = self._uniform(full, generator).clamp_min(torch.finfo(self.anchor.dtype).tiny)
        angle = 2 * math.pi * self._uniform(full, generator)
        return torch.sqrt(df * torch.expm1(-2 / df * u.log())) * torch.cos(angle)


class Mixture(_Base):
    """Gaussians with learned weights, means and scales; started on a small ring around the origin.

    Draws are differentiable in means and scales, not in the weights (a choice of component has no
    derivative); ``log_prob`` is differentiable in all of them.
    """

    def __init__(self, event: Sequence[int], components: int = 8) -> None:
        super().__init__(event)
        d = math.prod(self.event)
        angle = torch.arange(components)[:, None] * (2 * math.pi / components) + torch.arange(d)
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.cos(angle).reshape(components, *self.event))
        self.log_scales = nn.Parameter(torch.zeros(components, *self.event))

    def log_prob(self, z: Tensor) -> Tensor:
        z = z.unsqueeze(z.dim() - len(self.event))
        scaled = (z - self.means) * (-self.log_scales).exp()
        parts = self._sum(-0.5 * (scaled.square() + math.log(2 * math.pi)) - self.log_scales)
        return torch.logsumexp(parts + self.logits.log_softmax(0), -1)

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        edges = self.logits.detach().softmax(0).cumsum(0)[:-1]
        which = torch.searchsorted(edges, self._uniform(tuple(shape), generator))
        return self.means[which] + self.log_scales[which].exp() * self._normal(shape, generator)


BASES = {"normal": Normal, "student": StudentT, "mixture": Mixture}
