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

from .univariate import Kept, Written, recorded, traced

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
SHIFT = math.log(math.expm1(1 - LEAST))  # softplus(SHIFT) + LEAST = 1


class _Bin(NamedTuple):
    """Where each of the n points fell, all that its gradient needs."""

    inside: Tensor  # (n,) bool
    weights: Tensor  # (2, bins, n): exponentials of the raw widths and heights
    scale: Tensor  # (2, n): size of a bin = least + scale * weight
    passed: Tensor  # (bins - 1, n): 1 for each bin to the left of the point, else 0
    number: Tensor  # (n,) number of the bin, as floating point
    place: Tensor  # (n,) place of the point's entry in a flattened array (bins, n)
    x0: Tensor
    y0: Tensor
    w: Tensor
    h: Tensor
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
        self.first = 2 * bins - (tails == "linear")  # row of the slope left of bin 0

    def __repr__(self) -> str:
        return f"Spline(bins={self.bins}, interval={self.interval:g}, tails={self.tails!r})"

    def _call(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if x.numel() > FEW or traced() or recorded(x, theta):
            return super()._call(x, theta, inverse)
        out, log_slope = self._few(*self._flat(x, theta), inverse)
        return out.view(x.shape), log_slope.view(x.shape)

    def _flat(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        if theta.shape != (self.size, *x.shape):
            raise ValueError(
                f"theta has shape {tuple(theta.shape)}, but {self!r} of x with shape "
                f"{tuple(x.shape)} needs {(self.size, *x.shape)}"
            )
        return x.reshape(-1), theta.reshape(self.size, -1).to(x.dtype)

    def plain(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        out, log_slope, _ = self._evaluate(*self._flat(x, theta), inverse, lean=False)
        return out.view(x.shape), log_slope.view(x.shape)

    def run(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Kept]:
        out, log_slope, found = self._evaluate(*self._flat(x, theta), inverse, lean=True)
        return out.view(x.shape), log_slope.view(x.shape), found

    def pull(
        self, kept: Kept, inverse: bool, g_out: Tensor, g_log: Tensor, needs: Sequence[bool] = ()
    ) -> tuple[Tensor, ...]:
        at, shape = _Bin(*kept), g_out.shape
        g_x, g_theta = _gradient(self, inverse, g_out.reshape(-1), g_log.reshape(-1), at)
        return g_x.view(shape), g_theta.view(self.size, *shape)

    def _evaluate(
        self, x: Tensor, theta: Tensor, inverse: bool, *, lean: bool
    ) -> tuple[Tensor, Tensor, _Bin]:
        """Image and log-slope of x ``(n,)`` for theta ``(size, n)``.

        ``lean`` writes into buffers, which is faster and which autograd cannot follow; the
        arithmetic, and so every bit of the result, is the same.
        """
        bins, edge = self.bins, self.interval
        inside = x.abs() <= edge
        y = torch.where(inside, x, 0.0)  # outside and NaN: any point with finite gradients
        turn = self._wrap(edge * theta[-1].fmod(2)) if self.tails == "circular" else None
        if turn is not None and inverse:
            y = self._wrap(y - turn)

        knots, weights, scale = self._knots(theta[: 2 * bins].view(2, bins, -1), lean)
        interior = knots[int(inverse), 1:bins]
        if lean:
            passed = torch.ge(y, interior, out=torch.empty_like(interior))
        else:
            passed = (y >= interior).to(y.dtype)
        bin_ = passed.sum(0)
        count = len(x)
        index = torch.add(torch.arange(count, device=x.device), bin_.long(), alpha=count)
        flat, axis = knots.view(-1), (bins + 1) * count
        x0, x1, y0, y1 = (flat[k:].index_select(0, index) for k in (0, count, axis, axis + count))
        raw = self._slopes(theta)
        slopes = torch.stack([raw[k:].index_select(0, index) for k in (0, count)])
        slopes = F.softplus(slopes + SHIFT, threshold=40.0).add_(LEAST).clamp(max=STEEPEST)
        d0, d1 = slopes.unbind()

        w, h = x1 - x0, y1 - y0
        out, log_slope, *rest = _rational(y, x0, y0, w, h, d0, d1, inverse)
        out = self._finish(x, out, inside, None if inverse else turn)
        found = _Bin(inside, weights, scale, passed, bin_, index, x0, y0, w, h, slopes, *rest)
        return out, log_slope * inside, found

    def _few(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """``_evaluate`` in half the operations, for points so few that dispatch is what costs."""
        bins, edge = self.bins, self.interval
        y = x.clamp(-edge, edge)
        outside = y != x
        turn = self._wrap(edge * theta[-1].fmod(2)) if self.tails == "circular" else None
        if turn is not None and inverse:
            y = self._wrap(y - turn)
        shares = theta[: 2 * bins].view(2, bins, -1).softmax(1).cumsum(1)
        knots = x.new_empty(2, bins + 1, len(x))
        inner = knots[:, 1:bins]
        torch.add(self._shift(theta), shares[:, :-1], alpha=self.free, out=inner)
        knots[:, 0].fill_(-edge)
        knots[:, bins].fill_(edge)
        below = (inner[int(inverse)] <= y).sum(0)
        ends = torch.stack([below, below + 1])
        start, end = knots.gather(1, ends.expand(2, 2, -1)).unbind(1)
        (x0, y0), (w, h) = start.unbind(), (end - start).unbind()
        slopes = self._slopes(theta).view(bins + 1, -1).gather(0, ends).add_(SHIFT)
        d0, d1 = F.softplus(slopes, threshold=40.0).add_(LEAST).clamp_(max=STEEPEST).unbind()
        out, log_slope, *_ = _rational(y, x0, y0, w, h, d0, d1, inverse)
        out.clamp_(-edge, edge)
        if turn is not None and not inverse:
            out = self._wrap(out + turn)
        return torch.where(outside, x, out), log_slope.masked_fill_(outside, 0.0)

    def _finish(self, x: Tensor, out: Tensor, inside: Tensor, turn: Tensor | None) -> Tensor:
        """Images within the interval, turned if it is a circle; x itself outside."""
        held = out.clamp(-self.interval, self.interval)  # rounding must not carry a point across
        # the edge, nor stop its gradient
        out = out + (held - out).detach() if out.requires_grad else held
        return torch.where(inside, out if turn is None else self._wrap(out + turn), x)

    def _wrap(self, x: Tensor) -> Tensor:
        turns = (x.detach() / (2 * self.interval)).round()
        return torch.sub(x, turns, alpha=2 * self.interval)

    def _knots(self, raw: Tensor, lean: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Knots ``(2, bins + 1, n)`` of raw widths and heights ``(2, bins, n)``.

        Also the unnormalised softmax weights and the length of a unit of weight. The running sum
        goes row by row because torch's own is slow across rows, and a triangular matrix product
        would follow the user's settings for reduced precision.
        """
        edge, bins = self.interval, self.bins
        top = raw.detach().amax(1, keepdim=True)
        weights = (raw - top).exp_() if lean else (raw - top).exp()
        shift = self._shift(raw)
        parts = weights.unbind(1)
        if lean:
            knots = raw.new_empty(2, bins + 1, raw.shape[-1])
            start, *sums = knots.unbind(1)
            torch.add(parts[0], parts[1], out=sums[1])
            for k in range(2, bins):
                torch.add(sums[k - 1], parts[k], out=sums[k])
            sums[0].copy_(parts[0])
            scale = self.free / sums[-1]
            torch.addcmul(shift, knots[:, 1:-1], scale[:, None], out=knots[:, 1:-1])
            start.fill_(-edge)
            sums[-1].fill_(edge)
            return knots, weights, scale
        sums = [parts[0]]
        for part in parts[1:]:
            sums.append(sums[-1] + part)
        scale = self.free / sums[-1]
        knots = torch.addcmul(shift, torch.stack(sums[:-1], 1), scale[:, None])
        end = torch.full_like(knots[:, :1], edge)
        return torch.cat([-end, knots, end], 1), weights, scale

    def _shift(self, like: Tensor) -> Tensor:
        """Inner knots ``(bins - 1, 1)`` as they would be if all bins had their least size."""
        low, high = self.least - self.interval, (self.bins - 1) * self.least - self.interval
        steps = torch.linspace(low, high, self.bins - 1, dtype=like.dtype, device=like.device)
        return steps[:, None]

    def _slopes(self, theta: Tensor) -> Tensor:
        """Raw slopes at all knots, flattened ``((bins + 1) n,)``; raw zero is slope 1."""
        raw = theta[2 * self.bins :]
        if self.tails == "linear":
            end = torch.zeros_like(theta[:1])
            raw = torch.cat([end, raw, end])
        elif self.tails == "circular":
            raw = torch.cat([raw[:-1], raw[:1]])
        return raw.reshape(-1)


def _rational(
    y: Tensor, x0: Tensor, y0: Tensor, w: Tensor, h: Tensor, d0: Tensor, d1: Tensor, inverse: bool
) -> tuple[Tensor, ...]:
    """Image of y, log-slope there, and s, xi, A, B, D, N of the formulas above, each ``(n,)``."""
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
    spline: Spline, inverse: bool, g_out: Tensor, g_log: Tensor, at: _Bin
) -> tuple[Tensor, Tensor]:
    """Gradients for x ``(n,)`` and for theta ``(size, n)``.

    Of f and l = log f' for fixed x, with a and b the gradients for f and l. The inverse has the
    slope 1 / f', and moving theta moves it by -df / f', so both directions share all but a and b.
    """
    xi, rest, s, w = at.xi, 1 - at.xi, at.s, at.w
    d0, d1 = at.slopes.unbind()
    over_d, over_n, over_w = at.d.reciprocal(), at.n.reciprocal(), w.reciprocal()
    slope = (s * over_d).square_().mul_(at.n)
    bend = (d0 + d1).sub_(s, alpha=2).mul_(xi - rest).mul_(over_d).addcmul_(at.b - at.a, over_n)
    bend.mul_(over_w).mul_(2)  # dl / dx
    g_in, b = g_out * at.inside, g_log * at.inside
    if inverse:
        b = b.neg_()
        a = torch.addcmul(g_in, b, bend).div_(slope).neg_()
        g_x, g_low = -a, g_in
    else:
        a = g_in
        g_x = torch.addcmul(b * bend, a, slope)
        g_low = -g_x
    g_x = torch.where(at.inside, g_x, g_out)
    # Gradients for s, d0 and d1, then for width and height.
    t, rise = xi * rest, (xi * at.a).mul_(over_d)
    push = (a * at.h).mul_(t).mul_(over_d)
    by_n, by_d = b * over_n, b * over_d
    double = (by_d * t).mul_(2)
    g_s = (b / s).addcmul_(t, by_n).sub_(by_d).add_(double).mul_(2)
    g_s.addcmul_(push * over_d, (xi * at.b).addcmul_(rest, at.a, value=-1)).mul_(over_w)
    g_slopes = torch.empty_like(at.slopes)
    lower, upper = g_slopes.unbind()
    torch.mul(push, rise, out=upper)
    torch.sub(push, upper, out=lower).addcmul_(rest * rest, by_n).sub_(double)
    upper.neg_().addcmul_(xi * xi, by_n).sub_(double)
    g_slopes.mul_(torch.expm1(LEAST - at.slopes).neg_()).mul_(at.slopes < STEEPEST)
    g_width = (g_low * xi).addcmul_(g_s, s, value=-1)
    g_height = torch.addcmul(g_s, a, rise)

    # Softmax: with P a bin's share and g the gradient for its length, raw gets P (g - sum P g).
    # Rows overlap and one is spare: slopes left of linear ends fall on rows that are filled later.
    bins, count = spline.bins, len(xi)
    theta = xi.new_empty(spline.size + 1, count)
    flat = theta.view(-1)
    theta[2 * bins :].zero_()
    for row, own in ((spline.first, lower), (spline.first + 1, upper)):
        flat[row * count :].scatter_(0, at.place, own)
    if spline.tails == "circular":
        theta[2 * bins].add_(theta[3 * bins])
        torch.mul(a, spline.interval, out=theta[3 * bins])
    start = (g_low, at.x0, g_width, w), (a, at.y0, g_height, at.h)
    for axis, (g_start, low, g_own, own) in enumerate(start):
        share = own - spline.least
        before = (low + spline.interval).sub_(at.number, alpha=spline.least)
        mean = (g_start * before).addcmul_(g_own, share).div_(spline.free)
        scale, weights = at.scale[axis], at.weights[axis]
        base = (scale * mean).neg_()
        rows = theta[axis * bins : (axis + 1) * bins]
        torch.addcmul(base, at.passed, scale * g_start, out=rows[:-1])
        rows[-1].copy_(base)
        rows.mul_(weights)
        flat[axis * bins * count :].scatter_(0, at.place, g_own.sub_(mean).mul_(share))
    return g_x, theta[:-1]
