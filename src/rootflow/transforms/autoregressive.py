r"""Autoregressive flows: z_i is an increasing function of x_i whose parameters come from x[:i].

Scoring takes one pass of a masked network. The other direction is a sweep over the dimensions in
which each hidden unit and each parameter is computed exactly once, so that sampling costs about one
pass of arithmetic as well; its gradient is the same sweep in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..solvers.adjoint import attach
from ..solvers.result import Problem
from .base import Inverse, Transform
from .conditioned import Conditioned
from .masked import Masked
from .mixing import check_mixing, stacked
from .spline import Spline
from .univariate import Affine, Univariate, again

__all__ = ["AutoregressiveTransform", "iaf", "maf", "nsf_ar", "recipe"]

STRIP = 16  # dimensions whose units a sweep prepares with one product


class AutoregressiveTransform(Conditioned):
    r"""z_i = f(x_i; theta_i(x_1 .. x_{i-1}, context)) with f any univariate map.

    Shapes: x, z ``(batch, features)``; log_det in nats, exact, the sum of the logarithms of f's
    slopes. Latent to data is a sweep in the order of the columns, exact and differentiable to any
    order. ``circle`` = B: the columns are angles on [-B, B], whose ends are the same point.
    Other arguments are those of ``Masked``.

    Source: Papamakarios et al. 2017 (arXiv:1705.07057), equations 2 to 5, for affine f.
    """

    net: Masked

    def __init__(
        self,
        features: int,
        univariate: Univariate,
        context: int = 0,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        residual: bool = False,
        circle: float | None = None,
    ) -> None:
        super().__init__(features, univariate, context, slice(None), slice(None))
        self.net = Masked(
            features, univariate.initial(), context, hidden, activation, residual, circle
        )

        self.alone = context == 0 and circle is None

    def given(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.net.embed(x, context)

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.move(x, context, inverse=False)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        c = None if context is None else context.mT
        inputs = z.mT.contiguous(), c, self.net.values
        x, log_det = _Sweep.apply(self.net, self.univariate, *inputs)  # type: ignore[no-untyped-call]
        return x.mT, log_det


class _Step(NamedTuple):
    """What one layer contributes to a sweep over a strip of dimensions.

    Its units ``a:b`` of these degrees see the units ``:p`` of the layer below, complete when the
    strip is entered, and those in ``p:q`` that the strip itself completes.
    """

    a: int
    b: int
    p: int
    q: int
    sizes: list[int]  # units of each dimension
    done: Tensor  # the matrix that reads units ``:p``
    rows: Sequence[Tensor]  # for each dimension the matrix that reads units ``p:q``


def _strips(features: int) -> list[tuple[int, int]]:
    return [(i, min(i + STRIP, features)) for i in range(0, features, STRIP)]


def _steps(net: Masked, matrices: Sequence[Tensor], first: int, stop: int) -> list[_Step]:
    """One for each layer, for the strip of dimensions ``first`` to ``stop - 1``."""
    steps, last = [], len(matrices) - 1
    for k, w in enumerate(matrices):
        below, own = net.seen[k], net.seen[k + 1]
        copies = net.size if k == last else 1
        a, b = own[first] * copies, own[stop] * copies
        p, q = (min(below[i], w.shape[1]) for i in (first, stop))
        sizes = [(own[i + 1] - own[i]) * copies for i in range(first, stop)]
        steps.append(
            _Step(a, b, p, q, sizes, w[a:b, :p], torch.split_with_sizes(w[a:b, p:q], sizes))
        )
    return steps


def _sweep(
    net: Masked, univariate: Univariate, z: Tensor, context: Tensor | None, values: Tensor
) -> tuple[Tensor, Tensor]:
    """The x ``(d, n)`` whose image is z, and the log_det ``(n,)`` of this direction."""
    n, (biases, matrices) = z.shape[1], net.dense(net.pieces(net.masked(values)))
    # Of every layer all units, first the input's. Units not reached yet meet only zero weights.
    units = [z.new_zeros(width, n) for width in net.widths[:-1]]
    units.append(z.new_empty(net.features * net.size, n))
    if context is not None:
        units[0][: net.context] = context
    outside = torch.split_with_sizes(units[0][net.context :], [net.per] * net.features)
    last, given = len(matrices) - 1, z.unbind(0)
    found, log_slopes = [], []
    for first, stop in _strips(net.features):
        strip = []
        for k, (a, b, p, q, sizes, done, rows) in enumerate(_steps(net, matrices, first, stop)):
            torch.addmm(biases[k][a:b], done, units[k][:p], out=units[k + 1][a:b])
            strip.append((rows, torch.split_with_sizes(units[k + 1][a:b], sizes), units[k][p:q]))
        for i in range(stop - first):
            previous = None
            for k, (rows, own, below) in enumerate(strip):
                y = own[i].addmm_(rows[i], below)
                if previous is not None and net.adds(k):
                    y.add_(previous)
                if k < last:
                    previous = y.clone() if net.residual else None
                    net.activation.inplace(y)
            x, log_slope = univariate.inverse(given[first + i], y)
            outside[first + i].copy_(net.embed(x[None], None))
            found.append(x)
            log_slopes.append(log_slope)
    return torch.stack(found), torch.stack(log_slopes).sum(0)


class _Sweep(torch.autograd.Function):
    """``_sweep`` with its gradient, the reverse sweep."""

    @staticmethod
    def forward(
        ctx: Any, net: Masked, univariate: Univariate, z: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, log_det = _sweep(net, univariate, z, *others)  # type: ignore[arg-type]
        ctx.net, ctx.univariate = net, univariate
        ctx.save_for_backward(x, z, *others)
        return x, log_det

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # the caller will differentiate this result
            solve = partial(_solve, ctx.net, ctx.univariate, x)
            return None, None, *again(solve, inputs, gradients, ctx.needs_input_grad[2:])
        return None, None, *_reverse(ctx.net, ctx.univariate, x, *inputs[1:], *gradients)


def _solve(
    net: Masked, univariate: Univariate, x: Tensor, z: Tensor, context: Tensor | None, v: Tensor
) -> tuple[Tensor, Tensor]:
    """The results of ``_sweep``, which found x, with gradients by dense solves."""

    def image(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        *given, values = others
        theta = net(net.embed(x, given[0] if given else None), values)
        return univariate.plain(x, theta, False)

    def residual(x: Tensor, z: Tensor, *others: Tensor) -> Tensor:
        return image(x.mT, *others)[0].mT - z

    others = (v,) if context is None else (context, v)
    root = attach(Problem(residual, (z.mT, *others)), x.mT).mT
    return root, -image(root, *others)[1].sum(0)


def _reverse(
    net: Masked,
    univariate: Univariate,
    x: Tensor,
    context: Tensor | None,
    values: Tensor,
    grad_x: Tensor,
    grad_log_det: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    r"""Gradients of z, context and values by a sweep from the last dimension to the first.

    With F the univariate map, S the logarithm of its slope and g the gradient of log_det: the total
    derivative u_i with respect to x_i, less g S_x, is v_i; exp(-S) v_i is the gradient of z_i and
    -g S_theta - exp(-S) v_i F_theta that of theta_i, which the network carries to earlier u_j.
    """
    layers, n = net.pieces(net.masked(values)), x.shape[1]
    matrices = net.dense(layers)[1]
    inputs, kept, theta = net.run(net.embed(x, context), layers)
    _, log_slope, used = univariate.run(x, theta, False)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    _, f_theta = univariate.pull(used, False, one, zero)
    s_x, s_theta = univariate.pull(used, False, zero, grad_log_det.expand_as(x))
    contraction = (-log_slope).exp()
    through_x = (f_theta * -contraction).transpose(0, 1).contiguous().unbind(0)
    theta_bar = (-s_theta).transpose(0, 1).contiguous()
    theta_rows = theta_bar.unbind(0)  # completed in place, one dimension after the other
    slopes = [net.activation.backward(torch.ones_like(y), y) for y in kept]
    # Total derivatives of every layer's units, first the input's; those of hidden units become
    # derivatives of their pre-activations when complete.
    totals = [x.new_zeros(width, n) for width in net.widths[:-1]]
    outside, known, v = (
        torch.split_with_sizes(totals[0][net.context :], [net.per] * net.features),
        grad_x - s_x,
        [],
    )
    turned = None if net.circle is None else net.turned(inputs[0])
    last = len(matrices) - 1
    for first, stop in reversed(_strips(net.features)):
        strip, steps = [], _steps(net, matrices, first, stop)
        for k, (a, b, p, q, sizes, _, rows) in enumerate(steps):
            own = torch.split_with_sizes(totals[k + 1][a:b], sizes) if k < last else ()
            slope = torch.split_with_sizes(slopes[k][a:b], sizes) if k < last else ()
            strip.append((rows, totals[k][p:q], own, slope))
        for i in range(stop - first - 1, -1, -1):
            j = first + i
            u = outside[j] if turned is None else (outside[j] * turned[j]).sum(0, keepdim=True)
            v.append(u + known[j])
            g = theta_rows[j].addcmul_(v[-1], through_x[j])
            for k in range(last, -1, -1):
                rows, below, own, slope = strip[k]
                if k < last:
                    above, g = g, own[i].mul_(slope[i])
                    if net.adds(k + 1):
                        g.add_(above)
                below.addmm_(rows[i].mT, g)
        pre = [*totals[1:], theta_bar.flatten(0, 1)]
        for k, step in enumerate(steps):
            totals[k][: step.p].addmm_(step.done.mT, pre[k][step.a : step.b])
    grad_context = None if context is None else totals[0][: net.context]
    return contraction * torch.cat(v[::-1]), grad_context, net.values_gradient(inputs, pre)


def recipe(
    features: int,
    context: int,
    univariate: Univariate,
    blocks: int,
    actnorm: bool,
    linear: str | None,
    inverted: bool = False,
    **options: Any,
) -> list[Transform]:
    """``blocks`` autoregressive maps with what ``mixing`` puts between them."""

    def layer() -> Transform:
        block = AutoregressiveTransform(features, univariate, context, **options)
        return Inverse(block) if inverted else block

    return stacked(layer, features, blocks, actnorm, linear)


def _affine(inverted: bool) -> Callable[..., list[Transform]]:
    def build(
        features: int,
        context: int = 0,
        *,
        blocks: int = 5,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        residual: bool = False,
        actnorm: bool = True,
        linear: str | None = "lu",
    ) -> list[Transform]:
        return recipe(
            features, context, Affine(), blocks, actnorm, linear, inverted,
            hidden=hidden, activation=activation, residual=residual,
        )  # fmt: skip

    return build


maf = _affine(inverted=False)  # scores in one pass, samples by a sweep
iaf = _affine(inverted=True)  # the other way round; Kingma et al. 2016 (arXiv:1606.04934), 3


def nsf_ar(
    features: int,
    context: int = 0,
    *,
    blocks: int = 5,
    hidden: Sequence[int] = (128, 128),
    activation: str = "relu",
    residual: bool = False,
    bins: int = 8,
    interval: float = 5.0,
    tails: str = "linear",
    actnorm: bool = False,
    linear: str | None = "auto",
) -> list[Transform]:
    """Autoregressive rational-quadratic splines; Durkan et al. 2019 (arXiv:1906.04032).

    ``linear="auto"`` is "lu", or "permute" where the tails keep an interval. Raises ValueError for
    maps between the blocks that would leave it.
    """
    linear = check_mixing(tails, actnorm, linear)
    spline = Spline(bins=bins, interval=interval, tails=tails)
    return recipe(
        features, context, spline, blocks, actnorm, linear,
        hidden=hidden, activation=activation, residual=residual,
        circle=interval if tails == "circular" else None,
    )  # fmt: skip
