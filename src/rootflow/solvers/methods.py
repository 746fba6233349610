r"""Root finding per sample: fixed point, Anderson, Broyden, Newton, with a common safeguard.

All methods solve F(z) = 0 for each row of a batch on its own: a row stops when its own residual is
small enough, and finished rows leave the batch. A proposed step is kept only if it shrinks the
residual; otherwise the plain step z - F(z) is taken, which for z + g(z) = c with Lip(g) < 1
contracts. So every method converges whenever the fixed-point iteration is certified to. The damped
method takes a shorter part of its step instead: where F is the gradient of a strongly convex
function some part shrinks the residual, so it converges as well, and needs no bound below one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .adjoint import attach
from .result import REACTIONS, Problem, Solution, choose

__all__ = ["METHODS", "default_tolerance", "find_root"]

ROUGH = 4e-3  # tolerance of the steps on a rough equation: a unit of bfloat16
ROUGH_STEPS = 8


def _dot(v: Tensor, w: Tensor) -> Tensor:
    """Inner product of each row, ``(batch, 1)``."""
    product = v * w
    if v.shape[-1] > 16:
        return product.sum(-1, keepdim=True)
    return product @ v.new_ones(v.shape[-1], 1)  # torch sums short rows one by one


def _norm(v: Tensor) -> Tensor:
    norm: Tensor = _dot(v, v)[:, 0].sqrt_()
    return norm


class _Rule:
    """How a method proposes its next step; rows of its memory can be dropped."""

    retreats = 1  # replacements of a step that does not shrink the residual; the last is taken

    def propose(self, problem: Problem, z: Tensor, f: Tensor) -> Tensor:
        """Step to add to z, given the residual f there."""
        return -f

    def retreat(self, step: Tensor, f: Tensor) -> Tensor:
        """What to try in place of a step that did not shrink the residual f."""
        return -f

    def learn(self, step: Tensor, f: Tensor, f_new: Tensor) -> None:
        """Take note of the step that was taken and the residuals before and after it."""

    def keep(self, rows: Tensor) -> None:
        """Forget all but these rows."""


class _Newton(_Rule):
    """Newton's method with the exact Jacobian; quadratic, the work of d + 1 evaluations a step."""

    def propose(self, problem: Problem, z: Tensor, f: Tensor) -> Tensor:
        # no error for the batch when one row is singular: the safeguard replaces its useless step
        step: Tensor = torch.linalg.solve_ex(problem.jacobian_at(z), -f.unsqueeze(-1))[0]
        return step.squeeze(-1)


class _Damped(_Newton):
    """Newton's method that shortens a step until the residual shrinks."""

    retreats = 12

    def retreat(self, step: Tensor, f: Tensor) -> Tensor:
        return step / 4


class _Broyden(_Rule):
    """Broyden's good method, started from the identity, as a product of rank-one corrections.

    Source: Broyden 1965; limited-memory form as in Kelley, Iterative Methods, section 7.3.
    """

    def __init__(self) -> None:
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        self.ahead: Tensor | None = None  # H f, the next step turned round

    def _apply(self, v: Tensor) -> Tensor:
        for u, w in zip(self.left, self.right, strict=True):
            v = torch.addcmul(v, u, _dot(w, v))
        return v

    def propose(self, problem: Problem, z: Tensor, f: Tensor) -> Tensor:
        if self.ahead is None:
            self.ahead = f
        return -self.ahead

    def learn(self, step: Tensor, f: Tensor, f_new: Tensor) -> None:
        assert self.ahead is not None
        h_new = self._apply(f_new)
        hy = h_new - self.ahead
        denominator = _dot(step, hy)
        safe = denominator.abs() > 1e-3 * _dot(step, step)
        u = (step - hy) * torch.where(safe, 1 / denominator, 0)
        # (I + u step^T) H is the updated inverse
        self.left.append(u)
        self.right.append(step)
        self.ahead = torch.addcmul(h_new, u, _dot(step, h_new))
        if len(self.left) > 24:
            del self.left[0], self.right[0]
            self.ahead = self._apply(f_new)

    def keep(self, rows: Tensor) -> None:
        self.left = [u[rows] for u in self.left]
        self.right = [w[rows] for w in self.right]
        self.ahead = None if self.ahead is None else self.ahead[rows]


class _Anderson(_Rule):
    """Anderson's method of depth five (Walker and Ni 2011), least squares per row."""

    depth = 5

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.changes: list[Tensor] = []

    def propose(self, problem: Problem, z: Tensor, f: Tensor) -> Tensor:
        if not self.steps:
            return -f
        s, y = torch.stack(self.steps, -1), torch.stack(self.changes, -1)  # (batch, d, m)
        info = torch.finfo(f.dtype)
        scale: Tensor = torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min(info.tiny)
        s, y = s / scale, y / scale
        gram = y.mT @ y
        gram = gram + info.eps * 10 * torch.eye(gram.shape[-1], dtype=f.dtype, device=f.device)
        weights: Tensor = torch.linalg.solve(gram, y.mT @ f.unsqueeze(-1))
        return -f - ((s - y) @ weights).squeeze(-1)

    def learn(self, step: Tensor, f: Tensor, f_new: Tensor) -> None:
        self.steps.append(step)
        self.changes.append(f_new - f)
        if len(self.steps) > min(self.depth, step.shape[-1]):
            del self.steps[0], self.changes[0]

    def keep(self, rows: Tensor) -> None:
        self.steps = [s[rows] for s in self.steps]
        self.changes = [y[rows] for y in self.changes]


METHODS: dict[str, Callable[[int], _Rule]] = {
    "fixed-point": lambda d: _Rule(),
    "anderson": lambda d: _Anderson(),
    "broyden": lambda d: _Broyden(),
    "newton": lambda d: _Newton(),
    "damped-newton": lambda d: _Damped(),
    "auto": lambda d: _Broyden() if d <= 64 else _Anderson(),
}


def default_tolerance(dtype: torch.dtype) -> float:
    """Residual relative to ``1 + |z|`` that rounding lets every row reach: 32 machine epsilons."""
    return 32 * torch.finfo(dtype).eps


def _iterate(problem: Problem, z: Tensor, rule: _Rule, tol: float, max_steps: int) -> Solution:
    batch = z.shape[0]
    value, residual = z.clone(), z.new_full((batch,), torch.inf)
    steps = torch.zeros(batch, dtype=torch.long, device=z.device)
    converged = torch.zeros(batch, dtype=torch.bool, device=z.device)
    rows = torch.arange(batch, device=z.device)  # of the batch, still at work
    open_ = torch.ones(batch, dtype=torch.bool, device=z.device)  # among them, not yet settled
    more = torch.zeros_like(steps)  # evaluations for replaced steps
    f = problem(z)
    norm, taken, left = _norm(f), 1, batch
    while left:
        limit = tol * (1 + _norm(z))
        going = open_ & (norm > limit) if taken < max_steps else torch.zeros_like(open_)  # NaN: not
        if (count := int(going.sum())) < left:
            new = (open_ & ~going).nonzero().squeeze(-1)
            at, reached = rows[new], norm[new]
            value[at], residual[at] = z[new], reached
            converged[at] = (reached <= limit[new]) & reached.isfinite()
            steps[at] = taken + more[new]
            open_, left = going, count
            if not left:
                break
            if problem.per_row is not None and left < 0.85 * len(rows):
                kept = open_.nonzero().squeeze(-1)
                rows, z, f, norm, open_, more = (t[kept] for t in (rows, z, f, norm, open_, more))
                problem = problem.rows(kept)
                rule.keep(kept)
        step = rule.propose(problem, z, f)
        moved = z + step
        f_new = problem(moved)
        norm_new = _norm(f_new)
        taken += 1
        worse = open_ & ~(norm_new < 0.99 * norm)
        for _ in range(rule.retreats):
            if not bool(worse.any()):
                break
            step = torch.where(worse[:, None], rule.retreat(step, f), step)
            moved = z + step
            bad = worse.nonzero().squeeze(-1)
            if problem.per_row is None:
                f_new = problem(moved)
            else:
                f_new[bad] = problem.rows(bad)(moved[bad])
            norm_new = _norm(f_new)
            more[bad] += 1
            worse = worse & ~(norm_new < norm)
        rule.learn(step, f, f_new)
        z, f, norm = moved, f_new, norm_new
    contraction = problem.contraction
    bound = residual / (1 - contraction) if contraction is not None else residual * torch.nan
    return Solution(value, residual, bound, steps, converged)


def find_root(
    problem: Problem | Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    method: str = "auto",
    tol: float | None = None,
    max_steps: int = 1000,
    on_failure: str = "raise",
    adjoint: str = "implicit",
    rough: Problem | None = None,
) -> Solution:
    """Solve ``problem(z) = 0`` for each row of ``start`` ``(batch, d)`` by itself.

    A plain callable is a Problem without gradients to anything. A row has converged when its
    residual is at most ``tol * (1 + |z|)`` (default: 32 machine epsilons). ``start`` gets no
    gradient: a root does not depend on where the search began. ``adjoint``: "implicit" attaches the
    exact derivative of the root with respect to ``problem.tensors``, differentiable again; "none"
    returns a constant. ``rough``: the same equation at less work and precision, bfloat16 for
    example; the search takes its first steps there, and what it returns solves ``problem``.

    Raises: NotConverged if a row missed ``tol`` and ``on_failure`` is "raise"; "warn" warns, "nan"
    puts NaN into those rows. ``Solution.converged`` tells which. ValueError for an unknown name.
    """
    if not isinstance(problem, Problem):
        problem = Problem(problem)
    rule, react = choose(METHODS, method, "method"), choose(REACTIONS, on_failure, "on_failure")
    if adjoint not in ("implicit", "none"):
        raise ValueError(f"adjoint={adjoint!r} is unknown; choose one of implicit, none")
    tol = default_tolerance(start.dtype) if tol is None else tol
    start = start.detach()
    with torch.no_grad():
        if rough is not None:
            near = _iterate(rough.detach(), start, rule(start.shape[-1]), ROUGH, ROUGH_STEPS).value
            start = torch.where(near.isfinite().all(-1, keepdim=True), near, start)
        found = _iterate(problem.detach(), start, rule(start.shape[-1]), tol, max_steps)
        if not bool(found.converged.all()):
            found = react(found)
    if adjoint == "none" or not torch.is_grad_enabled():
        return found
    return replace(found, value=attach(problem, found.value))
