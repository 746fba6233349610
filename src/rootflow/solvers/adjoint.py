r"""The derivative of a root: implicit differentiation, to any order, without storing the search.

At F(z, t) = 0 a gradient v with respect to z becomes, with A = dF/dz, the solution u of A^T u = v
and then -u^T dF/dt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .result import Problem

__all__ = ["attach"]


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, root: Tensor, *tensors: Tensor) -> Tensor:
        ctx.problem = problem
        out = root.clone()
        ctx.save_for_backward(out, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (root, *tensors), (grad,) = ctx.saved_tensors, gradients
        again = torch.is_grad_enabled()  # the caller will differentiate this result
        with torch.enable_grad():
            # Aliases: the gradient sought is that of F alone, not through the root's own history,
            # while a second differentiation still finds the way back to root and tensors.
            z = root if again else root.detach()
            inputs = [
                t.view_as(t) if again else t.detach().requires_grad_(t.requires_grad)
                for t in tensors
            ]
            needed = ctx.needs_input_grad[2:]
            wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
            problem = replace(ctx.problem, tensors=tuple(inputs))
            with torch.set_grad_enabled(again):
                transposed = problem.jacobian_at(z).mT
                u = torch.linalg.solve(transposed, grad.unsqueeze(-1)).squeeze(-1)
            found = iter(
                torch.autograd.grad(problem(z), wanted, -u, create_graph=again, allow_unused=True)
            )
        return (None, None, *(next(found) if need else None for need in needed))


def attach(problem: Problem, root: Tensor) -> Tensor:
    """Give a root ``(batch, d)`` its exact derivative with respect to ``problem.tensors``."""
    attached: Tensor = _Root.apply(problem, root, *problem.tensors)  # type: ignore[no-untyped-call]
    return attached
