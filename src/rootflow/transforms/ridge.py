"""What planar and Sylvester layers are made of: increasing functions p + (g - 1) tanh(p).

Their roots, slopes and errors, and numbers that a context may give. Every gain
g = exp(asinh(t)) = t + sqrt(1 + t^2) is positive for every real t, is 1 with slope 1 at t = 0, and
grows or falls only as fast as t or 1 / t: no exponential overflows, none reaches zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..solvers import Solution, find_increasing
from .conditioners import dense
from .mixing import stacked

__all__ = [
    "Numbers", "drawn", "error_bound", "gained", "log_slope", "precise", "root", "solve", "stacked",
    "times", "unit",
]  # fmt: skip


class Numbers(nn.Module):
    """The numbers of a layer: learned ``(1, size)``, or from each context ``(rows, size)``.

    Given a context of width above zero, a network with ``hidden`` widths makes them, and starts
    with the same numbers for every context.
    """

    def __init__(
        self, initial: Tensor, context: int, hidden: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        self.net = dense(context, 1, initial, hidden, activation) if context else None
        self.free = None if context else nn.Parameter(initial)

    def forward(self, context: Tensor | None) -> Tensor:
        """Numbers ``(1, size)`` or ``(rows, size)``."""
        if self.net is not None and context is not None:
            made: Tensor = self.net(context.mT)
            return made[:, 0].mT
        assert self.free is not None
        return self.free[None]

    def precise(self, context: Tensor | None) -> Tensor:
        """The same in float64 where the device has it, from the weights as they are."""
        tensors = {k: precise(v.detach()) for k, v in self.named_parameters()}
        with torch.no_grad():
            given = None if context is None else precise(context)
            numbers: Tensor = functional_call(self, tensors, (given,))
        return numbers


def precise(x: Tensor) -> Tensor:
    """In float64, but for the one kind of device that has none."""
    return x if x.device.type == "mps" else x.double()


def unit(v: Tensor) -> Tensor:
    """Columns of v ``(..., d, m)`` at length one, whatever their length; zero stays zero."""
    size = v.detach().abs().amax(-2, keepdim=True)
    v = v / torch.where(size > 0, size, 1)  # the squares below neither overflow nor vanish
    length: Tensor = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    return v / length.clamp_min(0.5)


def _bend(p: Tensor) -> Tensor:
    """tanh'(p) = 1 - tanh(p)^2, to full precision where it is small."""
    return 4 * torch.sigmoid(2 * p) * torch.sigmoid(-2 * p)


def log_slope(p: Tensor, log_gain: Tensor) -> Tensor:
    """log(1 + (g - 1) tanh'(p)), elementwise: the logarithm of a sum of positive terms."""
    return torch.log(log_gain.exp() * _bend(p) + torch.tanh(p).square())


def solve(s: Tensor, log_gain: Tensor) -> Solution:
    """The p with p + (g - 1) tanh(p) = s, elementwise; s and log_gain broadcast. No gradients.

    The bracket is closed because |tanh p| <= min(1, |p|): for p and s above zero the root lies
    between s and its bound on the side of the gain. There the function is convex (g < 1) or
    concave (g > 1) so that Newton's method from that bound approaches the root from one side.
    """
    gain, change, size = log_gain.exp(), torch.expm1(log_gain), s.abs()

    def equation(p: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.tanh(p)
        return torch.addcmul(p - s, change, t), 1 + change * (1 - t * t)

    near, far = size - change, size / gain
    edge = torch.where(change > 0, torch.maximum(near, far), torch.minimum(near, far))
    edge = torch.where(s < 0, -edge, edge)
    return find_increasing(
        equation, (), torch.minimum(edge, s), torch.maximum(edge, s),
        start=edge, scale=size, least_slope=gain.clamp_max(1), adjoint="none",
    )  # fmt: skip


class _Root(torch.autograd.Function):
    """``attach`` for this one equation: its slope is a formula, so no graph of it is needed."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, log_gain: Tensor) -> Tensor:
        p = solve(s, log_gain).value
        ctx.save_for_backward(p, log_gain)
        return p

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (p, log_gain), (grad,) = ctx.saved_tensors, gradients
        t, gain = torch.tanh(p), log_gain.exp()
        u = grad / (gain * _bend(p) + t.square())
        return u, (-u * gain * t).sum_to_size(log_gain.shape)


def root(s: Tensor, log_gain: Tensor) -> Tensor:
    """The p with p + (g - 1) tanh(p) = s, differentiable to any order; log_gain may broadcast."""
    p: Tensor = _Root.apply(s, log_gain)  # type: ignore[no-untyped-call]
    return p


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """Rows ``(n, a)`` times ``(1, a, b)`` or ``(n, a, b)``."""
    return x @ matrix[0] if len(matrix) == 1 else (x[:, None] @ matrix)[:, 0]


def error_bound(x: Tensor, z: Tensor, u: Tensor, w: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    r"""Bound ``(n,)`` on the distance of z from the z* with z* + U tanh(W^T z* + b) = x.

    ``u``, ``w`` ``(1 | n, d, m)`` with M = W^T U upper triangular and ``gain`` ``(1 | n, m)`` =
    1 + diag M > 0. With r the residual at z, D the mean slopes of tanh between p = W^T z + b and
    p*, and pi = p - p*: z - z* = r - U D pi and pi = W^T r - M D pi, from which |D pi| is
    bounded from its last entry on. Each D is at most the slope at that point of the interval
    known to hold p* which is nearest to zero. The rounding of this evaluation is added to r.
    """
    dtype, m = x.dtype, u.shape[-1]
    x, z = precise(x), precise(z)
    norm = torch.linalg.vector_norm
    p = times(z, w) + bias
    r = z + times(torch.tanh(p), u.mT) - x
    digits = 8 * (u.shape[-2] + m) * torch.finfo(z.dtype).eps
    inner = 1 + norm(w, dim=(-2, -1)) * norm(z, dim=-1) + norm(bias, dim=-1)
    rounding = digits * (norm(x, dim=-1) + norm(z, dim=-1) + norm(u, dim=(-2, -1)) * inner)
    columns = norm(w, dim=-2)
    along = times(r, w).abs() + columns * rounding[:, None]
    product = (w.mT @ u).abs()
    moved: list[Tensor] = []  # |D pi|, from the last entry on
    for i in reversed(range(m)):
        reach = along[:, i]
        for k, known in enumerate(moved):
            reach = reach + product[:, i, m - 1 - k] * known
        nearest = (p[:, i].abs() - reach / gain[:, i].clamp_max(1)).clamp_min(0)
        bend = _bend(nearest)
        moved.append(reach * bend / (gain[:, i] * bend + torch.tanh(nearest).square()))
    shift = (torch.stack(moved[::-1], -1) * norm(u, dim=-2)).sum(-1)
    bound: Tensor = norm(r, dim=-1) + rounding + shift
    return bound.to(dtype) * (1 + 4 * torch.finfo(dtype).eps)


def gained(t: Tensor) -> tuple[Tensor, Tensor]:
    """The log g of g = t + sqrt(1 + t^2), and the factor (g - 1 - t) / t = tanh(log g / 2)."""
    log_gain = torch.asinh(t)
    return log_gain, torch.tanh(log_gain / 2)


def drawn(*shape: int) -> Tensor:
    """Directions of length about one: normal with variance 1 / shape[0]."""
    return torch.randn(*shape) / math.sqrt(shape[0])
