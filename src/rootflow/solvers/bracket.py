"""Roots of increasing functions of one variable between known bounds, one verdict per element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .adjoint import attach
from .result import REACTIONS, Problem, Solution, choose

__all__ = ["find_increasing"]

Equation = Callable[..., tuple[Tensor, Tensor]]
PLAIN_NEWTON = 20  # steps after which every other one bisects: few equations ever get there


def _iterate(
    equation: Callable[[Tensor], tuple[Tensor, Tensor]],
    low: Tensor,
    high: Tensor,
    y: Tensor,
    scale: Tensor | float,
    tol: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Newton from y inside a shrinking bracket; a settled element no longer moves."""
    steps = torch.ones(y.shape, dtype=torch.long, device=y.device)
    scale = tol * scale
    for k in range(max_steps):
        f, slope = equation(y)
        size = f.abs()
        # what rounding of y and of the terms of the equation makes of the residual at a root
        converged = size <= scale + (slope + 1) * (tol * y.abs())
        if k == max_steps - 1 or bool(converged.all()):
            break
        steps += ~converged
        below = f < 0
        low, high = torch.where(below, y, low), torch.where(below, high, y)
        if k >= PLAIN_NEWTON and k % 2:
            moved = low + (high - low) / 2
        else:
            moved = torch.clamp(y - f / slope, low, high)
        y = torch.where(converged, y, moved)
    return y, size, steps, converged


def find_increasing(
    equation: Equation,
    tensors: tuple[Tensor, ...],
    low: Tensor,
    high: Tensor,
    *,
    start: Tensor | None = None,
    scale: Tensor | float = 1.0,
    least_slope: Tensor | float | None = None,
    tol: float | None = None,
    max_steps: int = 200,
    on_failure: str = "raise",
    adjoint: str = "implicit",
) -> Solution:
    """Solve ``equation(y, *tensors) = 0`` for every element of y by itself.

    ``equation`` returns the value, increasing in y, and its slope; both and y have the shape of
    ``low`` and ``high``, which enclose the root. Newton's method from ``start`` (default: the
    middle), held inside the bracket; from the twentieth step on every other one bisects, so that
    every element arrives. It has converged when its residual is what rounding leaves at a root,
    ``tol * (scale + (1 + slope) |y|)`` with ``scale`` the size of the terms of the equation and
    ``tol`` four machine epsilons by default; an element whose bracket does not hold a root has
    not. With ``least_slope``, a certified lower bound of the slope, ``Solution.bound`` is
    residual / least_slope. ``adjoint`` as for ``find_root``.

    Returns a Solution whose fields all have the shape of ``low``.
    Raises: NotConverged, or what else ``on_failure`` says; ValueError for an unknown name.
    """
    react = choose(REACTIONS, on_failure, "on_failure")
    if adjoint not in ("implicit", "none"):
        raise ValueError(f"adjoint={adjoint!r} is unknown; choose one of implicit, none")
    shape = low.shape
    with torch.no_grad():
        constants = tuple(t.detach() for t in tensors)
        y, residual, steps, converged = _iterate(
            lambda y: equation(y, *constants), low.detach(), high.detach(),
            (low + (high - low) / 2 if start is None else start).detach(),
            scale, 4 * torch.finfo(low.dtype).eps if tol is None else tol, max_steps,
        )  # fmt: skip
        bound = residual * torch.nan if least_slope is None else residual / least_slope
        found = Solution(y, residual, bound, steps, converged)
        if not bool(converged.all()):
            rows = (residual.flatten(), bound.flatten(), steps.flatten(), converged.flatten())
            found = react(Solution(y.reshape(-1, 1), *rows))
    value = found.value.reshape(-1, 1)
    if adjoint == "implicit" and torch.is_grad_enabled():
        problem = Problem(
            lambda y, *t: equation(y.view(shape), *t)[0].reshape(-1, 1),
            tensors,
            jacobian=lambda y, *t: equation(y.view(shape), *t)[1].reshape(-1, 1, 1),
        )
        value = attach(problem, value)
    return replace(
        found, value=value.view(shape), residual=residual, bound=bound, steps=steps,
        converged=converged,
    )  # fmt: skip
