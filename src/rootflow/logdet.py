r"""Log-determinants of I + J with |J| < 1: exact, truncated with a bound, and unbiased, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["exact"]


def _sweep(a: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse and log-determinant of ``a`` ``(d, d, batch)`` by Gauss-Jordan elimination, in place.

    No pivoting: the symmetric part of I + J is positive definite for |J| < 1, so every pivot is positive. One vectorised pass
    over the batch per dimension, several times faster than batched LAPACK for small d.
    """
    log_det = torch.zeros_like(a[0, 0])
    for k in range(a.shape[0]):
        pivot = a[k, k].clone()
        log_det += pivot.log()
        column = a[:, k].clone()
        column[k] = 0
        row = a[k] / pivot
        row[k] = 1 / pivot
        a[:, k] = 0
        a.sub_(column[:, None] * row[None])
        a[k] = row
    return a, log_det


def _inverse_and_log_det(jac: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """Inverse ``[i, o, b]`` and log det of I + sign J, for ``jac`` laid out ``[i, b, o]``."""
    d = jac.shape[0]
    a = jac.permute(2, 0, 1) * sign
    a.diagonal(dim1=0, dim2=1).add_(1)
    if d == 1:
        return 1 / a, a[0, 0].log()
    if d == 2:
        (p, q), (r, s) = a
        det = p * s - q * r
        inverse = torch.stack([torch.stack([s, -q]), torch.stack([-r, p])]) / det
        return inverse, det.log()
    if d <= 16:
        return _sweep(a.contiguous())
    matrices = a.permute(2, 0, 1)
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrices)
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    eye = torch.eye(d, dtype=a.dtype, device=a.device).expand_as(matrices)
    inverse = torch.linalg.lu_solve(factors, pivots, eye)
    return inverse.permute(1, 2, 0), diagonal.abs().log().sum(-1)


class _Exact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, jac: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        inverse, log_det = _inverse_and_log_det(jac, sign)
        ctx.sign, ctx.cache = sign, inverse
        ctx.save_for_backward(jac)
        ctx.mark_non_differentiable(inverse)
        return log_det, inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (jac,), grad, inverse = ctx.saved_tensors, gradients[0], ctx.cache
        if torch.is_grad_enabled():  # a second derivative is wanted: recompute on the graph
            eye = torch.eye(jac.shape[0], dtype=jac.dtype, device=jac.device)
            inverse = torch.linalg.inv(eye + ctx.sign * jac.permute(1, 2, 0)).permute(1, 2, 0)
        return (inverse * (ctx.sign * grad)).permute(0, 2, 1), None


def exact(jac: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
    """``log det(I + sign J)`` ``(batch,)`` in nats and the inverse ``[i, o, b]`` of I + sign J, without gradient.

    ``jac`` is laid out ``[i, b, o]`` = d g_o / d x_i of row b, as ``value_and_jacobian`` returns it.
    Differentiable twice with respect to ``jac``.
    """
    log_det, inverse = _Exact.apply(jac, sign)  # type: ignore[no-untyped-call]
    return log_det, inverse
