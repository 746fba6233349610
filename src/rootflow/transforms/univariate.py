"""Increasing functions of one variable, the parts that coupling and autoregressive flows share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["Affine", "Shift", "Univariate"]


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


class Shift(Univariate):
    """z = x + t; Dinh et al. 2015 (arXiv:1410.8516), equation 9."""

    size = 1

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return x + theta[0], torch.zeros_like(x)

    def inverse(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return z - theta[0], torch.zeros_like(z)


class Affine(Univariate):
    """z = x exp(s) + t, with s bent smoothly into (-limit, limit) so that no scale overflows.

    Dinh et al. 2017 (arXiv:1605.08803), equation 7; the bend is limit tanh(s / limit).
    """

    size = 2
    limit = math.log(1000.0)

    def _parts(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        s, t = theta.unbind(0)
        return torch.tanh(s / self.limit) * self.limit, t

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.plain(x, theta)
        z, s = _Affine.apply(x, theta, self)  # type: ignore[no-untyped-call]
        return z, s

    def plain(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``forward`` by torch's own operations, for any derivative."""
        s, t = self._parts(theta)
        return torch.addcmul(t, x, s.exp()), s

    def inverse(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self._parts(theta)
        return (z - t) * (-s).exp(), -s


class _Affine(torch.autograd.Function):
    """``Affine.plain`` with its gradient written out: a third of the operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
        raw, t = theta.unbind(0)
        bent = torch.mul(raw, 1 / affine.limit).tanh_()
        s = bent * affine.limit
        scale = s.exp()
        ctx.affine = affine
        ctx.save_for_backward(x, theta, bent, scale)
        return torch.addcmul(t, x, scale), s

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, bent, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # the caller will differentiate this result
            # Aliases: theta may depend on x, whose gradient here is for theta as it stands.
            pair = x.view_as(x), theta.view_as(theta)
            wanted = [v for v, need in zip(pair, ctx.needs_input_grad, strict=False) if need]
            results = ctx.affine.plain(*pair)
            found = iter(torch.autograd.grad(results, wanted, gradients, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:2]), None
        g_z, g_s = gradients
        g_x, g_theta = g_z * scale, torch.empty_like(theta)
        g_theta[1].copy_(g_z)
        torch.addcmul(g_s, g_x, x, out=g_theta[0])
        g_theta[0].addcmul_(g_theta[0] * bent, bent, value=-1)
        return g_x, g_theta, None
