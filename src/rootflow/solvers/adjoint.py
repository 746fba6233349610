r"""The derivative of a root: implicit differentiation, to any order, without storing the search.

At F(z, t) = 0 a gradient v with respect to z becomes, with A = dF/dz, the solution u of A^T u = v and then -u^T dF/dt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .result import Problem

__all__ = ["attach"]

Solve = Callable[[Tensor], Tensor]


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, shared: dict[str, Solve], root: Tensor, *tensors: Tensor) -> Tensor:
        ctx.problem, ctx.shared = problem, shared
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
            inputs = [t.view_as(t) if again else t.detach().requires_grad_(t.requires_grad) for t in tensors]
            wanted = [t for t, need in zip(inputs, ctx.needs_input_grad[3:], strict=True) if need]
            problem = Problem(ctx.problem.residual, tuple(inputs), jacobian=ctx.problem.jacobian)
            if again or "solve" not in ctx.shared:
                u = _transposed_solve(problem, z, grad, again)
            else:
                u = ctx.shared["solve"](grad)
            found = torch.autograd.grad(problem(z), wanted, -u, create_graph=again, allow_unused=True)
        results = iter(found)
        return (None, None, None, *(next(results) if need else None for need in ctx.needs_input_grad[3:]))


def _transposed_solve(problem: Problem, z: Tensor, v: Tensor, graph: bool) -> Tensor:
    with torch.set_grad_enabled(graph):
        jacobian = problem.jacobian_at(z if graph else z.detach())
        return torch.linalg.solve(jacobian.mT, v.unsqueeze(-1)).squeeze(-1)


def attach(problem: Problem, root: Tensor, shared: dict[str, Solve] | None = None) -> Tensor:
    """Give a root ``(batch, d)`` its exact derivative with respect to ``problem.tensors``.

    ``shared["solve"]`` may be filled in until the backward pass with a function that solves A^T u = v, when a
    factorisation of A at the root is at hand anyway.
    """
    root_: Tensor = _Root.apply(problem, {} if shared is None else shared, root, *problem.tensors)  # type: ignore[no-untyped-call]
    return root_
