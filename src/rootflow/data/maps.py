"""Maps from one column of a table to what a flow can see, their Jacobian or bound counted.

A flow models a density on R^d. A column that is no free real number gets there by one of three
maps: ``Line`` undoes bounds and cuts a cell into the line for every point of mass; ``Levels`` gives
every level a cell under a normal curve, as wide as its share; ``Circle`` lays an angle around the
origin of a plane. ``encode`` returns y and a weight such that, over the noise u,

    log p(x) >= E (log p(y) + weight),

by Jensen's inequality, with equality where a map draws no noise: the weight is the log-Jacobian
then. (Uniform and variational dequantisation: Theis et al. 2016, arXiv:1511.01844; Ho et al. 2019,
arXiv:1902.00275.) p(x) is a density in the unit of the column where x is continuous, and the
probability of the value where it is discrete, a point of mass, or missing.

All tensors are float64; a missing value is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.special import ndtr, ndtri

__all__ = ["Circle", "Levels", "Line", "Map"]

EPSILON = 1e-6  # logit(EPSILON + (1 - 2 EPSILON) share): finite also on the bounds
TINY = 1e-12  # uniform noise stays so far from 0 and 1
SPREAD = 0.25  # of the log-radius of a circle
REACH = 3.0  # which stays within so many spreads
HOLE = 0.4  # radius of the disk of missing angles, less than exp(-REACH SPREAD)
LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


class Map:
    """One column ``(n,)`` to ``width`` numbers ``(n, width)`` for the flow, and back."""

    width = 1

    @property
    def noise(self) -> int:
        """How many uniform numbers per row ``encode`` takes."""
        return 1

    def encode(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Y ``(n, width)``, always finite, and weight ``(n,)``: -inf for x outside the support."""
        raise NotImplementedError

    def decode(self, y: Tensor) -> Tensor:
        """X ``(n,)`` of y ``(n, width)``; every y gives a value of the support."""
        raise NotImplementedError


def snap(x: Tensor, digits: int | None) -> Tensor:
    """Round x to the decimals that the levels of its column have."""
    return x if digits is None else torch.round(x, decimals=digits)


@dataclass(frozen=True)
class Line(Map):
    """A real number, or a level of a grid, with bounds, points of mass and missing values.

    Without grid, an open bound is undone: t = lower + scale log(exp(a) - 1) with a = (x - lower) /
    scale, mirrored for an upper one, and a logit between two. With a grid of spacing ``gap`` and a
    level at ``origin``, t = (x - origin) / gap + u; its outermost cells reach to infinity. Then
    each value of ``atoms`` is cut out of the line: what lies above moves up by ``cell``, and the
    value itself becomes its place + cell u. ``absent`` is the place of the cell of missing values.
    A bound that is an atom needs no map: its cell reaches to infinity too. Without grid ``origin``
    is subtracted at last, so that single precision suffices behind the map. ``digits``: decimals
    of the levels.
    """

    lower: float | None = None
    upper: float | None = None
    atoms: tuple[float, ...] = ()
    absent: float | None = None
    gap: float = 0.0
    origin: float = 0.0
    digits: int | None = None
    scale: float = 1.0
    cell: float = 1.0

    @property
    def noise(self) -> int:
        return int(self.gap > 0 or len(self.atoms) > 0 or self.absent is not None)

    def place(self, x: Tensor) -> Tensor:
        """Where x lies on the line before anything is cut out of it."""
        return (x - self.origin) / self.gap if self.gap else self._unbind(x)[0]

    def _open(self) -> tuple[float | None, float | None]:
        """The bounds that are not points of mass: values come near them only."""
        closed = self.atoms if not self.gap else (self.lower, self.upper)
        return (None if self.lower in closed else self.lower,
                None if self.upper in closed else self.upper)  # fmt: skip

    def _unbind(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Undo the bounds: t of x without grid, and log dt/dx."""
        lower, upper = self._open()
        if lower is not None and upper is not None:
            inner = (1 - 2 * EPSILON) / (upper - lower)
            share = EPSILON + inner * (x - lower)
            return share.logit(), math.log(inner) - share.log() - (1 - share).log()
        if lower is None and upper is None:
            return x, torch.zeros_like(x)
        bound, sign = (lower, 1.0) if lower is not None else (upper, -1.0)
        above = (sign * (x - bound) / self.scale).clamp_min(1e-300)  # type: ignore[operator]
        log_slope = -(-torch.expm1(-above)).log()
        return x - sign * self.scale * log_slope, log_slope

    def _bind(self, t: Tensor) -> Tensor:
        """The inverse of ``_unbind``."""
        lower, upper = self._open()
        if lower is not None and upper is not None:
            share = (t.sigmoid() - EPSILON) / (1 - 2 * EPSILON)
            return lower + (upper - lower) * share
        if lower is None and upper is None:
            return t
        bound, sign = (lower, 1.0) if lower is not None else (upper, -1.0)
        near = math.nextafter(bound, sign * math.inf)  # type: ignore[arg-type]
        above = F.softplus(sign * (t - bound) / self.scale, threshold=50.0)  # type: ignore[operator]
        x = bound + sign * self.scale * above  # type: ignore[operator]
        return x.clamp_min(near) if sign > 0 else x.clamp_max(near)

    def _cuts(self) -> tuple[list[float], Tensor]:
        """The values cut out, NaN for missing, and their places on the line, ascending."""
        atoms = torch.tensor(self.atoms, dtype=torch.float64)
        cuts = list(zip(self.atoms, self.place(atoms).tolist(), strict=True))
        cuts += [] if self.absent is None else [(math.nan, self.absent)]
        cuts.sort(key=lambda cut: cut[1])
        return [a for a, _ in cuts], torch.tensor([p for _, p in cuts], dtype=torch.float64)

    def encode(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        missing, inside = x.isnan(), x.isfinite()
        if self.lower is not None:
            inside &= x >= self.lower
        if self.upper is not None:
            inside &= x <= self.upper
        if None in (bounds := self._open()):  # a logit is finite on its bounds, a softplus is not
            for bound in bounds:
                inside &= x != (math.inf if bound is None else bound)
        somewhere = next((b for b in (self.lower, self.upper) if b is not None), self.origin)
        known = torch.where(inside, x, somewhere)
        if self.gap:
            steps = (known - self.origin) / self.gap
            inside &= (steps - steps.round()).abs() < 0.01
            t, weight = steps.round() + u[:, 0], torch.zeros_like(steps)
        else:
            t, weight = self._unbind(known)
        values, places = self._cuts()
        y = t + self.cell * (t[:, None] > places).sum(1)
        for k, value in enumerate(values):
            at = inside & ~missing & ((known - value).abs() <= 1e-6 * self.gap)
            here = missing if math.isnan(value) else at
            inside = inside | here
            y = torch.where(here, places[k] + self.cell * (k + u[:, 0]), y)
            weight = torch.where(here, math.log(self.cell), weight)
        shift = 0.0 if self.gap else self.origin
        return y[:, None] - shift, torch.where(inside, weight, -math.inf)

    def decode(self, y: Tensor) -> Tensor:
        values, places = self._cuts()
        y = y if self.gap else y + self.origin
        tops = places + self.cell * torch.arange(1, len(places) + 1, dtype=y.dtype)
        above = (y >= tops).sum(1)  # cells below y
        t = y[:, 0] - self.cell * above
        x = self._bind(t)
        if self.gap:
            x = self.origin + self.gap * t.floor()
        x = x if self.lower is None else x.clamp_min(self.lower)
        x = snap(x if self.upper is None else x.clamp_max(self.upper), self.digits)
        in_cell = (y >= tops - self.cell) & (y < tops)
        for k, value in enumerate(values):
            x = torch.where(in_cell[:, k], value, x)
        return x


@dataclass(frozen=True)
class Levels(Map):
    """One of K values, ascending, or missing, which comes last: the cells tile a normal curve.

    Level k is y = Phi^-1(F_k + share_k u), F_k the shares below it: y is standard normal if the
    shares are those of the data. Phi is the normal distribution function.
    """

    values: tuple[float, ...]
    shares: tuple[float, ...]  # K of them, or K + 1 with that of missing values; their sum is 1

    def encode(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.tensor(self.values, dtype=x.dtype)
        shares = torch.tensor(self.shares, dtype=x.dtype)
        middles = (values[1:] + values[:-1]) / 2
        level = torch.bucketize(torch.where(x.isfinite(), x, values[0]), middles)
        close = 1e-2 * (values.diff().min() if len(values) > 1 else values.abs())
        inside = (x - values[level]).abs() <= close.clamp(1e-300)
        if len(shares) > len(values):
            level = torch.where(x.isnan(), len(values), level)
            inside |= x.isnan()
        p = (shares.cumsum(0) - shares)[level] + shares[level] * u[:, 0]
        y = ndtri(p.clamp(TINY, 1 - TINY))
        weight = shares[level].log() + y.square() / 2 + LOG_ROOT_2PI
        return y[:, None], torch.where(inside, weight, -math.inf)

    def decode(self, y: Tensor) -> Tensor:
        shares = torch.tensor(self.shares, dtype=y.dtype)
        level = torch.bucketize(ndtr(y[:, 0]), shares.cumsum(0)[:-1], right=True)
        missing = [math.nan] * (len(self.shares) - len(self.values))
        return torch.tensor([*self.values, *missing], dtype=y.dtype)[level]


@dataclass(frozen=True)
class Circle(Map):
    """An angle: x and x + ``period`` are the same point. Values come back in start + [0, period).

    y = r (cos, sin) of the angle, where log r is normal noise of spread SPREAD, cut at REACH
    spreads; so neighbours across the seam stay neighbours, and a flow on the plane has no seam to
    learn. A ``gap`` spreads each level over its cell, x + gap (u - 1/2). Missing values fill the
    disk of radius HOLE.
    """

    start: float
    period: float
    gap: float = 0.0
    digits: int | None = None
    missing: bool = False
    width = 2

    @property
    def noise(self) -> int:
        return 2

    def encode(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        known = torch.where(x.isfinite(), x, self.start)
        inside = x.isfinite()
        turns = known - self.start
        weight = torch.zeros_like(x)
        if self.gap:
            levels = turns / self.gap
            inside &= (levels - levels.round()).abs() < 0.01
            turns = self.gap * (levels.round() + u[:, 0] - 0.5)
            weight = weight + math.log(self.gap)
        angle = turns * (2 * math.pi / self.period)
        edge = ndtr(torch.tensor(REACH, dtype=x.dtype))
        e = ndtri(1 - edge + (2 * edge - 1) * u[:, 1])
        r = (SPREAD * e).exp()
        # log r + log dangle/dx - log q(r), with q(r) = normal(e) / (SPREAD r (2 edge - 1))
        weight = weight + 2 * SPREAD * e + e.square() / 2 + LOG_ROOT_2PI + float(
            (SPREAD * (2 * edge - 1) * 2 * math.pi / self.period).log()
        )
        if self.missing:
            hole = x.isnan()
            angle = torch.where(hole, 2 * math.pi * u[:, 0], angle)
            r = torch.where(hole, HOLE * u[:, 1].sqrt(), r)
            weight = torch.where(hole, math.log(math.pi * HOLE**2), weight)
            inside |= hole
        y = torch.stack([r * angle.cos(), r * angle.sin()], 1)
        return y, torch.where(inside, weight, -math.inf)

    def decode(self, y: Tensor) -> Tensor:
        turns = torch.atan2(y[:, 1], y[:, 0]) * (self.period / (2 * math.pi))
        if self.gap:
            turns = self.gap * (turns / self.gap).round()
        turns = turns.remainder(self.period)
        turns = torch.where(turns < self.period, turns, 0.0)  # -1e-300 has remainder period
        x = snap(self.start + turns, self.digits)
        return torch.where(y.norm(dim=1) < HOLE, math.nan, x) if self.missing else x
