"""Coupling flows: one part of the columns sets an elementwise map of the other part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .actnorm import ActNorm
from .base import Transform
from .conditioned import Conditioned
from .conditioners import dense
from .linear import LULinear, Scale
from .mixing import alternating, check_mixing, mixing
from .spline import Spline
from .univariate import Affine, Shift, Univariate

__all__ = ["Coupling", "glow", "nice", "nsf_coupling", "realnvp"]


class Coupling(Conditioned):
    r"""z_a = x_a and z_b = f(x_b; theta) with theta = net(x_a, context).

    a is the first half of the columns (features // 2 of them) and b the rest; ``flip`` exchanges
    their roles. A single column is always in b, set by the context or by constants alone. Columns
    that live on an interval enter the network in units of it, angles as cosine and sine.

    Both directions are closed and evaluate the network once; log_det is exact.
    Source: Dinh et al. 2015 (arXiv:1410.8516), section 3.2. Raises ValueError for wrong widths.
    """

    def __init__(
        self,
        features: int,
        univariate: Univariate,
        context: int = 0,
        *,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        residual: bool = False,
        flip: bool = False,
    ) -> None:
        parts = slice(0, features // 2), slice(features // 2, None)
        super().__init__(
            features, univariate, context, *(parts[::-1] if flip and features > 1 else parts)
        )
        drivers, driven = (len(range(features)[part]) for part in (self.drivers, self.driven))
        self.tails, self.edge = "linear", math.inf
        if isinstance(univariate, Spline):
            self.tails, self.edge = univariate.tails, univariate.interval
        self.alone = context == 0 and self.tails == "linear"
        inputs = drivers * (2 if self.tails == "circular" else 1) + context
        self.net = dense(inputs, driven, univariate.initial(), hidden, activation, residual)

    def given(self, x: Tensor, context: Tensor | None) -> Tensor:
        parts = [x[self.drivers]]
        if self.tails != "linear":
            # outside there is no density, yet nothing here may become NaN
            unit = parts[0].clamp(-self.edge, self.edge) / self.edge
            angle = math.pi * unit
            parts = [angle.cos(), angle.sin()] if self.tails == "circular" else [unit]
        return torch.cat(parts if context is None else [*parts, context])

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.move(x, context, inverse=False)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.move(z, context, inverse=True)


def _chain(
    features: int,
    context: int,
    univariate: Univariate,
    blocks: int,
    between: Callable[[int], list[Transform]],
    **net: Any,
) -> list[Transform]:
    """Couplings of alternating halves, before the k-th (and at the end) what ``between(k)`` is."""

    def layer(k: int) -> Transform:
        return Coupling(features, univariate, context, flip=k % 2 == 1, **net)

    return alternating(layer, between, blocks)


def _mixed(
    features: int, blocks: int, actnorm: bool, linear: str | None
) -> Callable[[int], list[Transform]]:
    """Where ``linear`` stands: an LU map everywhere, one that only reorders before every second.

    Between two reorderings both halves have their turn, so that every pair of couplings transforms
    each column, whatever the order.
    """

    def between(k: int) -> list[Transform]:
        stands = linear == "lu" or (k % 2 == 0 and k < blocks)
        return mixing(features, actnorm, linear if stands else None)

    return between


def _plain(univariate: Univariate, scaled: bool) -> Callable[..., list[Transform]]:
    def build(
        features: int,
        context: int = 0,
        *,
        blocks: int = 8,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        residual: bool = False,
        actnorm: bool = False,
        linear: str | None = "lu",
    ) -> list[Transform]:
        net = {"hidden": hidden, "activation": activation, "residual": residual}
        between = _mixed(features, blocks, actnorm, linear)
        chain = _chain(features, context, univariate, blocks, between, **net)
        return [*chain, Scale(features)] if scaled else chain

    return build


# Dinh et al. 2015 (arXiv:1410.8516) and 2017 (arXiv:1605.08803); the papers' are ``linear=None``.
nice = _plain(Shift(), scaled=True)
realnvp = _plain(Affine(), scaled=False)


def glow(
    features: int,
    context: int = 0,
    *,
    blocks: int = 8,
    hidden: Sequence[int] = (128, 128),
    activation: str = "relu",
    residual: bool = False,
) -> list[Transform]:
    """Steps of ActNorm, a permuted LU map and an affine coupling; Kingma and Dhariwal 2018, 3.

    (arXiv:1807.03039.) The permutation is drawn for every second step and the halves alternate, so
    that already at the start, with L = U = I, each pair of steps transforms every column.
    """
    net = {"hidden": hidden, "activation": activation, "residual": residual}

    def between(k: int) -> list[Transform]:
        maps = [LULinear(features, permute=k % 2 == 0)] if features > 1 else []
        return [ActNorm(features), *maps]

    return _chain(features, context, Affine(), blocks, between, **net)


def nsf_coupling(
    features: int,
    context: int = 0,
    *,
    blocks: int = 6,
    hidden: Sequence[int] = (128, 128),
    activation: str = "relu",
    residual: bool = False,
    bins: int = 8,
    interval: float = 5.0,
    tails: str = "linear",
    actnorm: bool = False,
    linear: str | None = "auto",
) -> list[Transform]:
    """Rational-quadratic spline couplings; Durkan et al. 2019 (arXiv:1906.04032).

    ``linear="auto"`` is "lu", or "permute" where the tails keep an interval. Raises ValueError for
    maps between the blocks that would leave it.
    """
    linear = check_mixing(tails, actnorm, linear)
    net = {"hidden": hidden, "activation": activation, "residual": residual}
    spline = Spline(bins=bins, interval=interval, tails=tails)
    between = _mixed(features, blocks, actnorm, linear)
    return _chain(features, context, spline, blocks, between, **net)
