r"""The exact route: one batched Jacobian serves log-determinant, root and both gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..lipschitz import CertifiedNet, Tape, Weights

__all__ = [
    "Solve", "chunks", "exact", "gather", "inverse_and_log_det", "invert", "polish",
    "pull", "transposed_product",
]  # fmt: skip

Solve = Callable[[Tensor, Weights], Tensor]
CACHE_ELEMENTS = 2**20
IMAGE_ELEMENTS = 2**19


def _sweep(a: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse and log-determinant of ``a`` ``(d, d, batch)`` by Gauss-Jordan elimination, in place.

    No pivoting: the symmetric part of I + J is positive definite for |J| < 1, so every pivot is
    positive. One vectorised pass over the batch per dimension, several times faster than batched
    LAPACK for small d.
    """
    log_det = torch.zeros_like(a[0, 0])
    for k in range(a.shape[0]):
        inverse_pivot = a[k, k].reciprocal()
        log_det -= inverse_pivot.log()
        row = a[k] * inverse_pivot
        row[k] = inverse_pivot
        column = a[:, k].clone()
        column[k] = 0
        a[:, k] = 0
        a.addcmul_(column[:, None], row[None], value=-1)
        a[k] = row
    return a, log_det


def invert(a: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses ``(d, d, m)`` of the matrices ``a[:, :, k]`` and ln |det| ``(m,)``; may overwrite a.

    Their symmetric parts must be positive definite. Not differentiable.
    """
    d = a.shape[0]
    if d == 1:
        return 1 / a, a[0, 0].log()
    if d == 2:
        (p, q), (r, s) = a
        det = torch.addcmul(p * s, q, r, value=-1)
        return torch.stack([s, -q, -r, p]).view(2, 2, -1) / det, det.log()
    if d <= 16:
        return _sweep(a)
    matrices = a.permute(2, 0, 1)
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrices)
    eye = torch.eye(d, dtype=a.dtype, device=a.device).expand_as(matrices)
    inverse = torch.linalg.lu_solve(factors, pivots, eye).permute(1, 2, 0)
    return inverse, factors.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def inverse_and_log_det(jac: Tensor, signs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inverses ``[sign, o, i, b]`` of (I + sign J)^T and log-determinants ``(sign, batch)``.

    ``jac`` is laid out ``[b, i, o]``. Not differentiable.
    """
    batch, d, _ = jac.shape
    j = jac.permute(2, 1, 0)
    a = torch.stack([j * sign for sign in signs], -2)  # (o, i, sign, b)
    a.diagonal(dim1=0, dim2=1).add_(1)
    inverse, log_det = invert(a.flatten(2))
    # inverse of (I + sign J) is [i, o]; its transpose is read with the axes exchanged
    inverse = inverse.view(d, d, len(signs), batch).permute(2, 1, 0, 3)
    return inverse, log_det.view(len(signs), batch)


def chunks(batch: int, net: CertifiedNet, tangents: int) -> list[slice]:
    """Rows that are worked on together: few enough that their tangents stay in a core's cache."""
    least, most = (64, CACHE_ELEMENTS) if len(net.grid) == 1 else (1, IMAGE_ELEMENTS)
    size = max(least, most // ((tangents + 1) * net.width))
    count = max(1, -(-batch // size))
    size = max(1, -(-batch // count))
    return [slice(k, min(k + size, batch)) for k in range(0, max(batch, 1), size)]


def gather(
    weights: Weights, parts: Sequence[Sequence[Tensor]], again: Tensor | None = None
) -> list[Tensor]:
    """Gradients of input and weights from those of the chunks: side by side, if shared summed.

    With ``again`` the last part belongs to these rows once more.
    """
    per_row = [True] + [False] * len(weights.matrices) + [b.dim() == 2 for b in weights.biases]
    if len(parts) == 1:
        return list(parts[0])
    chunks = len(parts) if again is None else len(parts) - 1
    found = []
    for rows, pieces in zip(per_row, zip(*parts, strict=True), strict=True):
        total = torch.cat(pieces[:chunks]) if rows else torch.stack(pieces).sum(0)
        if rows and again is not None:
            total.index_add_(0, again, pieces[-1])
        found.append(total)
    return found


def polish(y: Tensor, c: Tensor, g: Tensor, root: int, inverse: Tensor) -> Tensor:
    """One Newton step for y + root g = c with the inverse at hand: leaves rounding error only."""
    residual = torch.add(y - c, g, alpha=root)
    return y - (inverse * residual.t()[:, None]).sum(0).t()


class _Exact(torch.autograd.Function):
    """Explicit: y to g(y) and log det(I + sign J(y)). Implicit: c to the root y and that."""

    @staticmethod
    def forward(
        ctx: Any,
        net: CertifiedNet,
        root: int,
        signs: tuple[int, ...],
        solve: Solve | None,
        at: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights = Weights.rebuild(tensors)
        y = at if solve is None else solve(at, weights)
        rows = chunks(len(at), net, at.shape[1])
        tapes = [net.record(y[r], weights.rows(r)) for r in rows]
        inverses, log_dets = inverse_and_log_det(torch.cat([t.jacobian for t in tapes]), signs)
        out = torch.cat([t.value for t in tapes])
        if solve is not None:
            out = polish(y, at, out, root, inverses[signs.index(root)])
        ctx.net, ctx.root, ctx.signs, ctx.implicit = net, root, signs, solve is not None
        ctx.rows, ctx.tapes, ctx.inverses = rows, tapes, inverses
        ctx.save_for_backward(out if ctx.implicit else at, *tensors)
        return out, log_dets

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return None, None, None, None, *_exact_backward_on_graph(ctx, *gradients)
        grad_out, grad_logs = gradients
        weighted = grad_logs * grad_logs.new_tensor(ctx.signs)[:, None]
        # d log det(I + sJ) = tr((I + sJ)^-1 s dJ)
        grad_jac = (ctx.inverses * weighted[:, None, None]).sum(0).permute(2, 1, 0).contiguous()
        inverse = ctx.inverses[ctx.signs.index(ctx.root)] if ctx.implicit else None
        parts = []
        for rows, tape in zip(ctx.rows, ctx.tapes, strict=True):
            adjoint = None if inverse is None else partial(transposed_product, inverse[..., rows])
            slope_grads, matrix_grads = tape.pull_jacobian(grad_jac[rows])
            parts.append(pull(tape, grad_out[rows], slope_grads, matrix_grads, ctx.root, adjoint))
        weights = Weights.rebuild(ctx.saved_tensors[1:])
        return None, None, None, None, *gather(weights, parts)


def transposed_product(inverse: Tensor, v: Tensor) -> Tensor:
    """Solve (I + sJ)^T u = v, ``(batch, d)``, with the inverse ``[o, i, b]``."""
    return (inverse * v.t()[None]).sum(1).t()


def pull(
    tape: Tape,
    grad_out: Tensor,
    slope_grads: list[Tensor],
    matrix_grads: list[Tensor],
    root: int,
    adjoint: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, ...]:
    """Gradients of input and weights from those of the output and, through J, slopes and matrices.

    Without ``adjoint`` the output is g(y) and the input y. With it, the output is the root y of
    y + root g(y) = c and the input c; ``adjoint`` solves (I + root J)^T u = v.
    """
    if adjoint is None:
        grad_at, pulled = tape.pull_value(grad_out, slope_grads)
        return grad_at, *tape.pull_weights(grad_out, pulled, matrix_grads)
    more, pulled = tape.pull_value(None, slope_grads)
    u = adjoint(grad_out + more)
    down = u * -root
    _, pulled_down = tape.pull_value(down, None)
    both = [p.add_(q) for p, q in zip(pulled_down, pulled, strict=True)]
    return u, *tape.pull_weights(down, both, matrix_grads)


def _exact_backward_on_graph(ctx: Any, grad_out: Tensor, grad_logs: Tensor) -> tuple[Tensor, ...]:
    """The same gradients by differentiable operations, for who will differentiate them again."""
    at, *tensors = ctx.saved_tensors
    # Aliases: gradients stop at them now, and flow through them to the originals the second time.
    y, aliases = at.view_as(at), [t.view_as(t) for t in tensors]
    tape = ctx.net.record(y, Weights.rebuild(aliases))
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    log_dets = torch.stack([torch.linalg.slogdet(eye + s * tape.jacobian)[1] for s in ctx.signs])
    variables = [y, *aliases]

    def back(outputs: Tensor, gradient: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(outputs, inputs, gradient, create_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if f is None else f for f, t in zip(found, inputs, strict=True)]

    grad_y, *grads = back(log_dets, grad_logs, variables)
    if not ctx.implicit:
        more_y, *more = back(tape.value, grad_out, variables)
        return (grad_y + more_y, *(a + b for a, b in zip(grads, more, strict=True)))
    matrix = eye + ctx.root * tape.jacobian  # [b, i, o], the transpose of dF/dy
    u = torch.linalg.solve(matrix, (grad_out + grad_y).unsqueeze(-1)).squeeze(-1)
    more = back(tape.value, -ctx.root * u, aliases)
    return (u, *(a + b for a, b in zip(grads, more, strict=True)))


def exact(
    net: CertifiedNet,
    weights: Weights,
    at: Tensor,
    signs: Sequence[int],
    *,
    root: int = 1,
    solve: Solve | None = None,
) -> tuple[Tensor, Tensor]:
    """Both g and log det(I + sign J) for each sign, from one exact Jacobian.

    Shapes: ``(batch, d)`` and ``(sign, batch)``, in nats. Without ``solve``: at y = ``at``,
    returning g(y). With ``solve``, a function from (c, weights) to the root y of y + root g(y) = c:
    ``at`` is c, the first result is y, and its derivative is the implicit one, from the same
    Jacobian (``root`` must then be among ``signs``). Differentiable twice, in ``at`` and in the
    weights. Work: 3 (d + 1) evaluations of g for value and gradient; memory (d + 1) times that of
    one evaluation.
    """
    inputs = (at, *weights.tensors())
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        out, log_dets = _Exact.apply(  # type: ignore[no-untyped-call]
            net, root, tuple(signs), solve, *inputs
        )
        return out, log_dets
    y = at if solve is None else solve(at, weights)
    out, jacobian = net.jacobian(y, weights)
    inverses, log_dets = inverse_and_log_det(jacobian, signs)
    if solve is not None:
        out = polish(y, at, out, root, inverses[list(signs).index(root)])
    return out, log_dets
