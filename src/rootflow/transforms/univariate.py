"""Increasing functions of one variable, the parts that coupling and autoregressive flows share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Affine", "ByHand", "Shift", "Univariate", "Written", "again", "recorded", "room", "traced",
]  # fmt: skip

Kept = tuple[Tensor, ...]


def traced() -> bool:
    """Whether operations are being compiled or transformed, which no hand-written gradient is."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def recorded(*tensors: Tensor | None) -> bool:
    """Whether a result of these is part of a graph."""
    given = [t for t in tensors if t is not None]
    return torch.is_grad_enabled() and any(t.requires_grad for t in given)


class ByHand(torch.autograd.Function):
    """``owner.run`` with the gradient ``owner.pull``; any further derivative is ``owner.plain``'s.

    ``run(*inputs, inverse)`` returns two results, and what ``pull`` needs beside their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, owner: Any, inverse: bool, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, log_slope, kept = owner.run(*inputs, inverse)
        ctx.owner, ctx.inverse, ctx.count = owner, inverse, len(inputs)
        ctx.save_for_backward(*inputs, *kept)
        return out, log_slope

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # the caller will differentiate this result
            plain = partial(ctx.owner.plain, inverse=ctx.inverse)
            return None, None, *again(plain, inputs, gradients, needs)
        return None, None, *ctx.owner.pull(kept, ctx.inverse, *gradients, needs)


def again(
    plain: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``plain(*inputs)`` that can be differentiated.

    Of aliases: where one input was made from another, the gradient is for it as it stands.
    """
    aliases = [None if v is None else v.view_as(v) for v in inputs]
    wanted = [v for v, need in zip(aliases, needs, strict=True) if need and v is not None]
    found = iter(_gradients(plain(*aliases), wanted, gradients, create_graph=True))
    return [next(found) if need else None for need in needs]


def _gradients(
    results: Sequence[Tensor], wanted: Sequence[Tensor], gradients: Sequence[Tensor], **how: bool
) -> tuple[Tensor, ...]:
    pairs = [(y, g) for y, g in zip(results, gradients, strict=True) if y.requires_grad]
    ys, gs = [y for y, _ in pairs], [g for _, g in pairs]
    return torch.autograd.grad(ys, wanted, gs, materialize_grads=True, **how)


def room(like: Tensor, size: int) -> Tensor:
    """Memory for theta ``(size, *s)`` of x ``s``; rows of one dimension lie as a network's do."""
    *first, last = like.shape or (1,)
    return like.new_empty(*first, size, last).movedim(-2, 0).view(size, *like.shape)


class Univariate:
    """A family of increasing functions of one variable, each given by ``size`` numbers theta.

    Both directions act elementwise: x of any shape ``s``, theta ``(size, *s)``, results of shape
    ``s``. The numbers come first, so that each of them is one contiguous array over the batch.
    """

    size: int

    def initial(self) -> Tensor:
        """The theta ``(size,)`` of the identity."""
        return torch.zeros(self.size)

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Image of x and the logarithm of the slope there."""
        raise NotImplementedError

    def inverse(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The x whose image is z, and the logarithm of the slope of this inverse."""
        raise NotImplementedError

    def plain(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Either direction by torch's own operations, for any derivative."""
        return self.inverse(x, theta) if inverse else self.forward(x, theta)

    def run(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Kept]:
        """Either direction without a graph, and what ``pull`` needs."""
        with torch.enable_grad():
            x, theta = x.detach().requires_grad_(), theta.detach().requires_grad_()
            out, log_slope = self.plain(x, theta, inverse)
        return out.detach(), log_slope.detach(), (x, theta, out, log_slope)

    def pull(
        self, kept: Kept, inverse: bool, g_out: Tensor, g_log: Tensor, needs: Sequence[bool] = ()
    ) -> tuple[Tensor, ...]:
        """Gradients of x and theta from those of the results."""
        return _gradients(kept[2:], kept[:2], (g_out, g_log), retain_graph=True)


class Written(Univariate):
    """One with ``plain``, ``run`` and ``pull`` of its own, among which its directions choose."""

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return self._call(x, theta, False)

    def inverse(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return self._call(z, theta, True)

    def _call(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if traced():
            return self.plain(x, theta, inverse)
        if recorded(x, theta):
            out, log_slope = ByHand.apply(self, inverse, x, theta)  # type: ignore[no-untyped-call]
            return out, log_slope
        return self.run(x, theta, inverse)[:2]


class Shift(Written):
    """z = x + t; Dinh et al. 2015 (arXiv:1410.8516), equation 9."""

    size = 1

    def plain(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return x - theta[0] if inverse else x + theta[0], torch.zeros_like(x)

    def run(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Kept]:
        return *self.plain(x, theta, inverse), ()

    def pull(
        self, kept: Kept, inverse: bool, g_out: Tensor, g_log: Tensor, needs: Sequence[bool] = ()
    ) -> tuple[Tensor, ...]:
        return g_out, (-g_out if inverse else g_out)[None]


class Affine(Written):
    """z = x exp(s) + t, with s bent smoothly into (-limit, limit) so that no scale overflows.

    Dinh et al. 2017 (arXiv:1605.08803), equation 7; the bend is limit tanh(s / limit).
    """

    size = 2
    limit = math.log(1000.0)

    def plain(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        s, t = torch.tanh(theta[0] / self.limit) * self.limit, theta[1]
        if inverse:
            return (x - t) * (-s).exp(), -s
        return torch.addcmul(t, x, s.exp()), s

    def run(self, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Kept]:
        raw, t = theta.unbind(0)
        bent = torch.mul(raw, 1 / self.limit).tanh_()
        log_slope = bent * (-self.limit if inverse else self.limit)
        slope = log_slope.exp()
        out = torch.sub(x, t).mul_(slope) if inverse else torch.addcmul(t, x, slope)
        return out, log_slope, (out if inverse else x, bent, slope)

    def pull(
        self, kept: Kept, inverse: bool, g_out: Tensor, g_log: Tensor, needs: Sequence[bool] = ()
    ) -> tuple[Tensor, ...]:
        point, bent, slope = kept
        g_x, g_theta = g_out * slope, room(point, 2)
        g_s, g_t = g_theta.unbind(0)
        if inverse:
            torch.addcmul(g_log, g_out, point, out=g_s).neg_()
            torch.neg(g_x, out=g_t)
        else:
            torch.addcmul(g_log, g_x, point, out=g_s)
            g_t.copy_(g_out)
        g_s.addcmul_(g_s * bent, bent, value=-1)
        return g_x, g_theta
