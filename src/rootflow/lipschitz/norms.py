r"""Certified upper bounds on the operator 2-norm of a matrix, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["norm_bound"]

SMALL = 16  # up to this side an exact eigenvalue is cheaper than the iteration
LARGE = 160  # from this side on a proof by factorisation is
KRYLOV = 24
SLACK = 0.01  # of the square of such a bound


def _gram(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``w`` over its largest entry, that entry, and the smaller Gram matrix of the quotient."""
    size = w.detach().abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    v = w / size
    return v, size[..., 0, 0], v @ v.mT if w.shape[-2] <= w.shape[-1] else v.mT @ v


def _proved(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """A bound on the largest eigenvalue and the projector on a vector near it, if a guess holds.

    The guess is the best Rayleigh quotient in a Krylov space and some slack; a Cholesky
    factorisation proves that no eigenvalue is larger.
    """
    start = torch.arange(1.0, gram.shape[-1] + 1, dtype=gram.dtype, device=gram.device).sin()
    space = [start[:, None].expand(*gram.shape[:-1], 1)]
    for _ in range(KRYLOV):
        v = gram @ space[-1]
        size: Tensor = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
        space.append(v / size.clamp_min(torch.finfo(v.dtype).tiny))
    basis = torch.linalg.qr(torch.cat(space, -1))[0]
    values, vectors = torch.linalg.eigh(basis.mT @ gram @ basis)
    bound = values[..., -1] * (1 + SLACK)
    shifted = -gram.double()
    shifted.diagonal(dim1=-2, dim2=-1).add_(bound[..., None])
    if bool(torch.linalg.cholesky_ex(shifted)[1].any()):
        return None
    return bound, basis @ vectors[..., -1:]


def _bound(w: Tensor, squarings: int) -> tuple[Tensor, Tensor]:
    """The bound and its gradient; plain differentiable operations where a graph is wanted."""
    tiny = torch.finfo(w.dtype).tiny
    v, size, gram = _gram(w)
    large = gram.shape[-1] >= LARGE and not torch.is_grad_enabled()
    if gram.shape[-1] <= SMALL:
        values, vectors = torch.linalg.eigh(gram.double())
        bound = values[..., -1].clamp_min(0).sqrt().to(w.dtype)
        top = vectors[..., -1:].to(w.dtype)
        projector = [top, top.mT]
    elif large and (proved := _proved(gram)) is not None:
        bound, top = proved[0].sqrt(), proved[1]
        projector = [top, top.mT]
    else:
        norm = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(tiny)
        start = power = gram / norm
        log_norm = total = norm.log()
        for k in range(1, squarings + 1):  # power is G^(2^k) up to the factor exp(total)
            power = power @ power
            total = 2 * total
            if k % 4 == 0:  # until then no less than n^-8 is left of a norm of one
                norm = torch.linalg.matrix_norm(power, keepdim=True).clamp_min(tiny)
                power = power / norm
                total = total + norm.log()
        projector = [power]
        trace = (start * power).sum((-2, -1)).clamp_min(tiny)
        bound = ((trace.log() + (log_norm + total)[..., 0, 0]) / (2 * (2**squarings + 1))).exp()
    along = v
    for factor in reversed(projector):  # their product is symmetric
        along = factor @ along if w.shape[-2] <= w.shape[-1] else along @ factor.mT
    along = along / (along * v).sum((-2, -1), keepdim=True).clamp_min(tiny)
    return bound * size, along * bound[..., None, None]


class _NormBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, squarings: int) -> Tensor:
        bound, ctx.gradient = _bound(w, squarings)
        ctx.squarings = squarings
        ctx.save_for_backward(w)
        return bound

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        # when a second derivative is wanted, recompute on the graph
        gradient = _bound(w, ctx.squarings)[1] if torch.is_grad_enabled() else ctx.gradient
        return gradients[0][..., None, None] * gradient, None


def norm_bound(w: Tensor, squarings: int = 7) -> Tensor:
    r"""Upper bound on the largest singular value of each matrix.

    Gram iteration (after Delattre et al. 2023, arXiv:2305.16173): with :math:`G = W^\top W` and
    :math:`p = 2^t + 1`, :math:`\sigma(W) \le (\mathrm{tr}\, G^p)^{1/2p}` after t squarings, too
    large by at most a factor :math:`r^{1/2p}` for rank r (1.9 % for r = 128 and t = 7; 0.1 to 0.4 %
    is usual). The trace form gives the exact gradient with one further product. Where the smaller
    side is at most 16 the largest eigenvalue of G is computed in float64 instead; from 160 on half
    a percent more than a Rayleigh quotient is proved to suffice, which costs a quarter of the
    squarings (second derivatives are those of the trace form there, as is the bound where the
    proof fails). The result is raised by a bound on the rounding error, so that it is never below
    the norm of the matrix as stored.

    Shapes: ``w`` ``(..., m, n)``, result ``(...)``, in the units of ``w``. Differentiable twice.
    """
    bound: Tensor = _NormBound.apply(w, squarings)  # type: ignore[no-untyped-call]
    # The unit of float32 in every dtype: a network keeps its weights when its dtype changes.
    return bound * (1 + 4 * (max(w.shape[-2:]) + squarings) * torch.finfo(torch.float32).eps)
