r"""Monotone rational-quadratic splines: value, log-slope and gradient in one pass each.

Durkan et al. 2019 (arXiv:1906.04032). Within a bin of width w and height h, with mean slope
s = h / w, knot slopes d0 and d1 and xi in [0, 1] the relative place:

.. math::
    A = s \xi + d_0 (1 - \xi), \quad B = d_1 \xi + s (1 - \xi), \quad
    D = \xi A + (1 - \xi) B, \quad N = \xi B + (1 - \xi) A, \quad
    f = y_0 + h \xi A / D, \quad f' = s^2 N / D^2

(equations 4 and 5, written without differences of like terms). For the inverse let eta be the
relative height and 2 v = d0 (1 - eta) - d1 eta. A quarter of the discriminant of the quadratic for
xi (equations 6 to 8) is v^2 + s^2 eta (1 - eta), a sum of two terms that cannot be negative, so no
rounding can make its root NaN. Of the two equal forms of the root of the equation,
xi = s eta / (v + sqrt(.) + s eta) and the one with both ends exchanged, the one is taken that adds
only positive terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .univariate import Kept, Written, recorded, room

__all__ = ["Spline"]

TAILS = ("linear", "bounded", "circular")
# Least width and height of a bin, as a part of the whole interval (of many bins: a fifth of their
# mean). Peers take 1e-3. Each rounding of x comes back in z multiplied by the steepest slope, about
# 2 / SHARE, and one of z in x by the inverse of the flattest, about 2 SHARE^2 / d for slopes d at
# the knots: 5e-3 gains 5 and 25 times in float32, and still lets one map stretch by 190 to 380.
SHARE = 5e-3
LEAST = 1e-3  # least slope at a knot
STEEPEST = 1e3  # largest slope at a knot; keeps all powers within float32's range
FEW = 2048  # points
LOG2E = 1 / math.log(2)
SHIFT = math.log(math.expm1(1 - LEAST))  # softplus(SHIFT) + LEAST = 1


class _Bin(NamedTuple):
    """Where each of the n points fell, all that its gradient needs."""

    inside: Tensor  # (n,) 1 or 0, as all that compares: floating point is quicker than bool
    weights: Tensor  # (2, bins, n): exponentials of the raw widths and heights
    passed: Tensor  # (bins - 1, n): 1 for each bin to the left of the point, else 0
    number: Tensor  # (n,) number of the bin
    scale: Tensor  # (2, n): size of a bin = least + scale * weight
    start: Tensor  # (2, n): x0 and y0
    span: Tensor  # (2, n): w and h
    slopes: Tensor  # (2, n): d0 and d1
    s: Tensor
    xi: Tensor
    a: Tensor
    b: Tensor
    d: Tensor
    n: Tensor


class Spline(Written):
    """Monotone rational-quadratic spline with ``bins`` bins on [-interval, interval].

    The interval is mapped onto itself, and outside of it the map is the identity. ``tails``:

    - ``"linear"``: slope 1 at both ends, so the map is smooth everywhere;
    - ``"bounded"``: free slopes at the ends, for data that end there;
    - ``"circular"``: the interval is a circle. Both ends share one slope, and a learned rotation
      follows, so that no point is fixed; images leave in [-interval, interval] (Rezende et al.
      2020, arXiv:2002.02428, section 2.1.2).

    theta holds ``bins`` raw widths, ``bins`` raw heights, the raw slopes at the knots from left to
    right, ``bins - 1``, ``bins + 1`` or ``bins`` of them, then for circles the rotation in units of
    ``interval``. Widths and heights are softmax shares, each at least 0.005 of the whole (beyond 40
    bins 0.2 / bins); slopes are softplus, within 1e-3 and 1e3. Every real theta gives a valid map.

    Shapes: x ``s``, theta ``(size, *s)``, results ``s`` in the dtype of x. Units: interval in the
    unit of x, log-slopes in nats. Both directions are closed formulas of equal cost. Gradients are
    written by hand; a second derivative or a compiled program uses the same formulas by autograd.
    Raises: ValueError for fewer than 2 bins or more than 500, an interval that is not positive,
    unknown tails, or a theta of another shape.
    """

    def __init__(self, bins: int = 8, interval: float = 5.0, tails: str = "linear") -> None:
        if not 2 <= bins <= 500:
            raise ValueError(f"bins={bins} must be between 2 and 500")
        if not (interval > 0 and math.isfinite(interval)):
            raise ValueError(f"interval={interval} must be positive and finite")
        if tails not in TAILS:
            raise ValueError(f"tails={tails!r} is unknown; choose one of {', '.join(TAILS)}")
        self.bins, self.interval, self.tails = bins, float(interval), tails
        self.size = 3 * bins + {"linear": -1, "bounded": 1, "circular": 1}[tails]
        self.least = 2 * self.interval * min(SHARE, 0.2 / bins)
        self.free = 2 * self.interval - bins * self.least  # length that the softmax shares out

    def __repr__(self) -> str:
        return f"Spline(bins={self.bins}, interval={self.interval:g}, tails={self.tails!r})"

    def _call(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if theta.shape != (self.size, *x.shape):
            raise ValueError(
                f"theta has shape {tuple(theta.shape)}, but {self!r} of x with shape "
                f"{tuple(x.shape)} needs {(self.size, *x.shape)}"
            )
        if x.numel() <= FEW and not recorded(x, theta):  # dispatch is what costs
            return self.plain(x, theta.to(x.dtype), inverse)
        return super()._call(x, theta.to(x.dtype), inverse)

    def plain(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        edge = self.interval
        inside = x.abs() <= edge
        y = torch.where(inside, x, 0.0)  # outside and NaN: any point with finite gradients
        turn = self._turn(theta)
        if turn is not None and inverse:
            y = self._wrap(y - turn)
        shares = self._raw(theta).softmax(1).cumsum(1)[:, :-1]
        inner = torch.add(self._shift(shares), shares, alpha=self.free)
        end = torch.full_like(inner[:, :1], edge)
        knots = torch.cat([-end, inner, end], 1)
        below = (inner[int(inverse)] <= y).sum(0)
        ends = torch.stack([below, below + 1])
        start, stop = knots.gather(1, ends.expand(2, *ends.shape)).unbind(1)
        slopes = F.softplus(self._knot_slopes(theta).gather(0, ends) + SHIFT, threshold=40.0)
        slopes = (slopes + LEAST).clamp(max=STEEPEST)
        out, log_slope, *_ = _rational(y, start, stop - start, slopes, inverse)
        held = out.clamp(-edge, edge)  # rounding must not carry a point across the edge
        out = out + (held - out).detach() if out.requires_grad else held  # nor stop its gradient
        if turn is not None and not inverse:
            out = self._wrap(out + turn)
        return torch.where(inside, out, x), log_slope * inside

    def run(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Kept]:
        """``plain`` in fewer passes over memory, written into buffers."""
        edge, shape, x = self.interval, x.shape, x.reshape(-1)
        inside = torch.le(x.abs(), edge, out=torch.empty_like(x))
        y = x.clamp(-edge, edge).nan_to_num_()
        turn = self._turn(theta)
        turn = None if turn is None else turn.reshape(-1)
        if turn is not None and inverse:
            y = self._wrap(y - turn)
        knots, weights, scale = self._knots(self._raw(theta))
        interior = knots[int(inverse), 1:-1]
        passed = torch.ge(y, interior, out=torch.empty_like(interior))
        number = passed.sum(0)
        place, count = _place(number), len(x)
        (start, span, slopes), raw = x.new_empty(3, 2, count), self._knot_slopes(theta).reshape(-1)
        for axis in (0, 1):
            column = knots[axis].view(-1)
            torch.index_select(column, 0, place, out=start[axis])
            torch.index_select(column[count:], 0, place, out=span[axis])
            torch.index_select(raw[axis * count :], 0, place, out=slopes[axis])
        span.sub_(start)
        slopes = F.softplus(slopes.add_(SHIFT), threshold=40.0).add_(LEAST).clamp_(max=STEEPEST)
        out, log_slope, *rest = _rational(y, start, span, slopes, inverse)
        out.clamp_(-edge, edge)
        if turn is not None and not inverse:
            out = self._wrap(out + turn)
        out = torch.addcmul(F.hardshrink(x, edge), out, inside)  # as it was where outside
        found = _Bin(inside, weights, passed, number, scale, start, span, slopes, *rest)
        return out.view(shape), log_slope.mul_(inside).view(shape), found

    def pull(
        self, kept: Kept, inverse: bool, g_out: Tensor, g_log: Tensor, needs: Sequence[bool] = ()
    ) -> tuple[Tensor, ...]:
        at = _Bin(*kept)
        theta = room(g_out, self.size)
        g_x = _gradient(self, inverse, g_out.reshape(-1), g_log.reshape(-1), at, theta)
        return g_x.view(g_out.shape), theta

    def _raw(self, theta: Tensor) -> Tensor:
        """Raw widths and heights ``(2, bins, *s)``."""
        return theta[: 2 * self.bins].view(2, self.bins, *theta.shape[1:])

    def _turn(self, theta: Tensor) -> Tensor | None:
        """The rotation of a circle."""
        return self._wrap(self.interval * theta[-1].fmod(2)) if self.tails == "circular" else None

    def _wrap(self, x: Tensor) -> Tensor:
        turns = (x.detach() / (2 * self.interval)).round()
        return torch.sub(x, turns, alpha=2 * self.interval)

    def _knots(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Knots ``(2, bins + 1, n)`` of raw widths and heights ``(2, bins, *s)``.

        Also the unnormalised softmax weights and the length of a unit of weight. The running sum
        goes row by row because torch's own is slow across rows, and a triangular matrix product
        would follow the user's settings for reduced precision.
        """
        weights = torch.sub(raw, raw.amax(1, keepdim=True), out=raw.new_empty(raw.shape))
        weights = weights.mul_(LOG2E).exp2_().view(2, self.bins, -1)  # 3 times as fast as exp
        knots = raw.new_empty(2, self.bins + 1, weights.shape[2])
        parts, (start, *sums) = weights.unbind(1), knots.unbind(1)
        torch.add(parts[0], parts[1], out=sums[1])
        for k in range(2, self.bins):
            torch.add(sums[k - 1], parts[k], out=sums[k])
        sums[0].copy_(parts[0])
        scale = self.free / sums[-1]
        inner = knots[:, 1:-1]
        torch.addcmul(self._shift(inner), inner, scale[:, None], out=inner)
        start.fill_(-self.interval)
        sums[-1].fill_(self.interval)
        return knots, weights, scale

    def _shift(self, like: Tensor) -> Tensor:
        """Inner knots ``(bins - 1, 1 ...)`` as they would be if all bins had their least size."""
        low, high = self.least - self.interval, (self.bins - 1) * self.least - self.interval
        steps = torch.linspace(low, high, self.bins - 1, dtype=like.dtype, device=like.device)
        return steps.view(-1, *[1] * (like.dim() - 2))

    def _knot_slopes(self, theta: Tensor) -> Tensor:
        """Raw slopes ``(bins + 1, *s)`` at all knots; raw zero is slope 1."""
        raw = theta[2 * self.bins :]
        if self.tails == "linear":
            end = torch.zeros_like(raw[:1])
            return torch.cat([end, raw, end])
        return raw if self.tails == "bounded" else torch.cat([raw[:-1], raw[:1]])


def _place(number: Tensor) -> Tensor:
    """Of rows ``number`` ``(n,)`` the places in a flattened ``(rows, n)``."""
    n = len(number)
    kind = torch.int32 if n < 2**20 else torch.int64  # the shorter is quicker
    return torch.arange(n, dtype=kind, device=number.device).add_(number.to(kind), alpha=n)


def _rational(
    y: Tensor, start: Tensor, span: Tensor, slopes: Tensor, inverse: bool
) -> tuple[Tensor, ...]:
    """Image of y, log-slope there, and s, xi, A, B, D, N of the formulas above, each ``(n,)``."""
    (x0, y0), (w, h), (d0, d1) = start.unbind(), span.unbind(), slopes.unbind()
    s = h / w
    if inverse:
        eta = (y - y0) / h
        above = 1 - eta
        up, down = s * eta, s * above
        v = torch.addcmul(d0 * above, d1, eta, value=-1) / 2
        product = up * down
        far = torch.addcmul(product, v, v).sqrt().add(v.abs())
        near = torch.where(v >= 0, far, product / far)  # v + sqrt(.), without a difference
        total = near + up
        xi, rest = up / total, near / total
    else:
        xi = (y - x0) / w
        rest = 1 - xi
    a, b = torch.addcmul(s * xi, d0, rest), torch.addcmul(s * rest, d1, xi)
    up = xi * a
    d, n = torch.addcmul(up, rest, b), torch.addcmul(xi * b, rest, a)
    ratio = d / s if inverse else s / d
    log_slope = (ratio * ratio / n if inverse else ratio * ratio * n).log()
    out = torch.addcmul(x0, w, xi) if inverse else torch.addcmul(y0, h, up / d)
    return out, log_slope, s, xi, a, b, d, n


def _gradient(
    spline: Spline, inverse: bool, g_out: Tensor, g_log: Tensor, at: _Bin, theta: Tensor
) -> Tensor:
    """Gradients for x ``(n,)``, returned, and for ``theta`` ``(size, *s)``, into it.

    Of f and l = log f' for fixed x, with a and b the gradients for f and l. The inverse has the
    slope 1 / f', and moving theta moves it by -df / f', so both directions share all but a and b.
    """
    xi, rest, s, (w, h) = at.xi, 1 - at.xi, at.s, at.span.unbind()
    d0, d1 = at.slopes.unbind()
    over_d, over_n, over_w = at.d.reciprocal(), at.n.reciprocal(), w.reciprocal()
    slope = (s * over_d).square_().mul_(at.n)
    bend = (d0 + d1).sub_(s, alpha=2).mul_(xi - rest).mul_(over_d).addcmul_(at.b - at.a, over_n)
    bend.mul_(over_w).mul_(2)  # dl / dx
    g_start, g_span, g_slopes = xi.new_empty(3, *at.span.shape)  # of both axes or sides
    g_low, a = g_start.unbind()
    g_in, b = torch.mul(g_out, at.inside, out=a if not inverse else g_low), g_log * at.inside
    if inverse:
        b = b.neg_()
        torch.addcmul(g_in, b, bend, out=a).div_(slope).neg_()
        g_x: Tensor = -a
    else:
        g_x = torch.addcmul(b * bend, a, slope)
        torch.neg(g_x, out=g_low)
    g_x.addcmul_(g_out, 1 - at.inside)
    # Gradients for s, d0 and d1, then for width and height.
    t, rise = xi * rest, (xi * at.a).mul_(over_d)
    push = (a * h).mul_(t).mul_(over_d)
    by_n, by_d = b * over_n, b * over_d
    double = (by_d * t).mul_(2)
    g_s = (b / s).addcmul_(t, by_n).sub_(by_d).add_(double).mul_(2)
    g_s.addcmul_(push * over_d, (xi * at.b).addcmul_(rest, at.a, value=-1)).mul_(over_w)
    (lower, upper), (g_width, g_height) = g_slopes.unbind(), g_span.unbind()
    torch.mul(push, rise, out=upper)
    torch.sub(push, upper, out=lower).addcmul_(rest * rest, by_n).sub_(double)
    upper.neg_().addcmul_(xi * xi, by_n).sub_(double)
    g_slopes.mul_(torch.expm1(LEAST - at.slopes).neg_()).mul_(at.slopes < STEEPEST)
    torch.mul(g_low, xi, out=g_width).addcmul_(g_s, s, value=-1)
    torch.addcmul(g_s, a, rise, out=g_height)
    # Softmax: with P a bin's share and g the gradient for its length, raw gets P (g - sum P g).
    bins, count, shape = spline.bins, len(xi), theta.shape[1:]
    before = (at.start + spline.interval).sub_(at.number, alpha=spline.least)
    mean = (g_start * before).addcmul_(g_span, at.span - spline.least).div_(spline.free)
    own = g_span.sub_(mean).mul_(at.scale)
    base, passing = mean.mul_(at.scale).neg_()[:, None], g_start.mul(at.scale)[:, None]
    rows, slopes = xi.new_empty(2, bins, count), xi.new_zeros(bins + 1, count)
    torch.addcmul(base, at.passed, passing, out=rows[:, :-1])
    rows[:, -1:].copy_(base)
    place = _place(at.number).long()
    for axis in (0, 1):
        rows[axis].view(-1).scatter_(0, place, own[axis])
        slopes[axis:].view(-1).scatter_(0, place, g_slopes[axis])
    lengths = spline._raw(theta)
    torch.mul(rows.view(lengths.shape), at.weights.view(lengths.shape), out=lengths)
    slopes = slopes.view(bins + 1, *shape)
    if spline.tails == "circular":
        slopes[0].add_(slopes[-1])
        torch.mul(a.view(shape), spline.interval, out=slopes[-1])
    theta[2 * bins :].copy_(slopes[1:-1] if spline.tails == "linear" else slopes)
    return g_x
