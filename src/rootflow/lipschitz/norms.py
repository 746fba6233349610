r"""Certified upper bounds on the operator 2-norm of a matrix, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["norm_bound"]


def _powers(w: Tensor, squarings: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gram matrices G, G^2, G^4, ... of ``w``, each scaled to Frobenius norm one, and log |w| bound."""
    size = w.detach().abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    v = w / size
    gram = v @ v.mT if w.shape[-2] <= w.shape[-1] else v.mT @ v
    powers, log_norm = [], size.log()[..., 0, 0]
    for k in range(squarings + 1):
        norm = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        gram = gram / norm
        powers.append(gram)
        log_norm = log_norm + norm.log()[..., 0, 0] / 2 ** (k + 1)
        if k < squarings:
            gram = gram @ gram
    return v, log_norm, powers


def _direction(w: Tensor, v: Tensor, powers: list[Tensor]) -> Tensor:
    """Gradient of the bound, apart from the bound itself: W G^(2p-1) / <W, W G^(2p-1)>."""
    product = powers[0]
    for power in powers[1:]:
        product = product @ power
        product = product / torch.linalg.matrix_norm(product, keepdim=True).clamp_min(1e-30)
    along = product @ v if w.shape[-2] <= w.shape[-1] else v @ product
    return along / (along * w).sum((-2, -1), keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)


class _NormBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, squarings: int) -> Tensor:
        v, log_norm, powers = _powers(w, squarings)
        bound = log_norm.exp()
        ctx.squarings = squarings
        ctx.cache = _direction(w, v, powers) if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(w, bound)
        return bound

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        w, bound = ctx.saved_tensors
        direction = ctx.cache
        if torch.is_grad_enabled():  # a second derivative is wanted: recompute on the graph
            v, _, powers = _powers(w, ctx.squarings)
            direction = _direction(w, v, powers)
        return (gradients[0] * bound)[..., None, None] * direction, None


def norm_bound(w: Tensor, squarings: int | None = None) -> Tensor:
    r"""Upper bound on the largest singular value of each matrix.

    Gram iteration (Delattre et al. 2023, arXiv:2305.16173): with :math:`G = W^\top W` and
    :math:`p = 2^t`, :math:`\sigma(W) \le \lVert G^p \rVert_F^{1/2p}`; the excess is at most a factor
    :math:`r^{1/4p}` for rank r. The result is raised by a bound on the rounding error of the products, so that
    it is never below the exact norm of the matrix as stored.

    Shapes: ``w`` ``(..., m, n)``, result ``(...)``. ``squarings`` t: by default 10 where the
    smaller side is at most 16 and 6 above. Differentiable twice; exact gradient of the bound.
    """
    small = min(w.shape[-2:])
    if squarings is None:
        squarings = 10 if small <= 16 else 6
    bound: Tensor = _NormBound.apply(w, squarings)  # type: ignore[no-untyped-call]
    return bound * (1 + 4 * (max(w.shape[-2:]) + squarings) * torch.finfo(w.dtype).eps)
