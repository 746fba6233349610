r"""Convex potential flows: the map is the gradient of a strongly convex function.

Huang et al. 2021 (arXiv:2012.05942). With s softplus, a_1 = W_1 x + b_1 and
a_{k+1} = P_k s(a_k) + W_{k+1} x + b_{k+1}, all entries of P_k and p positive, the potential

.. math::
    F(x) = \tfrac{m}{2} |x|^2 + p \cdot s(a_n) + v \cdot x

is convex: increasing convex functions and positive sums keep convexity. Its Hessian is

.. math::
    m I + \sum_k J_k^\top \mathrm{diag}(s''(a_k)\, g_k)\, J_k, \qquad
    J_{k+1} = P_k\, \mathrm{diag}(s'(a_k))\, J_k + W_{k+1}, \quad J_1 = W_1,

with g_k > 0 the derivative of F with respect to s(a_k): m or more in every direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..logdet import invert
from ..solvers import Problem, attach, find_root
from .base import Transform
from .conditioners import check_hidden
from .ridge import Numbers, stacked

__all__ = ["ConvexPotential", "cpflow"]

LEAST = 1e-3  # least curvature in every direction
STEEP = 8.0  # units start with a steepness of 1 to this, its logarithm uniform


class ConvexPotential(Transform):
    """z = grad F(x) with F strongly convex for every value of its parameters.

    to_latent is a formula. to_data minimises F(x) - z . x by Newton's method with the exact
    Hessian, damped so that it arrives from any start; a root is off by at most residual / m, and a
    row that misses its tolerance raises NotConverged. log_det is exact, in nats, in any number of
    columns d; it takes the work of d + 1 evaluations and one factorisation of a d by d matrix, as
    does each step of the solve. Both directions are differentiable twice. ``hidden``: widths of the
    potential's layers; a context moves b_k and v by a network of the same widths. Unit j is
    s(c_j a_j) / c_j with a steepness c_j of its own: it says how sharply the map bends there and
    leaves alone by how much.
    """

    def __init__(self, features: int, context: int = 0, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__((features,), context)
        widths = check_hidden(hidden)
        self.sizes = [*widths, features]
        self.raw_curvature = nn.Parameter(torch.tensor(math.log(math.expm1(0.5))))
        self.weights = nn.ParameterList(
            torch.randn(width, features) / math.sqrt(features) for width in widths
        )
        self.raw_positive = nn.ParameterList(
            torch.randn(after, before)
            for before, after in zip(widths, (*widths[1:], 1), strict=True)
        )
        self.log_steepness = nn.Parameter(torch.rand(sum(widths)) * math.log(STEEP))
        with torch.no_grad():
            self.raw_positive[-1].add_(3)
        biases = torch.cat([2 * torch.randn(sum(widths)), torch.zeros(features)])
        self.numbers = Numbers(biases, context, widths, "silu")

    def _tensors(self, context: Tensor | None) -> tuple[Tensor, ...]:
        """What ``_gradient`` needs: all b_k and v in one, m, all W_k, all positive matrices."""
        steepness = self.log_steepness.exp()  # made part of the matrices and biases around it
        own = torch.split_with_sizes(steepness, self.sizes[:-1])
        positive = [F.softplus(raw) * (2 / raw.shape[1]) for raw in self.raw_positive]
        weights = [w * s[:, None] for w, s in zip(self.weights, own, strict=True)]
        positive = [p / s for p, s in zip(positive, own, strict=True)]
        positive[:-1] = [p * s[:, None] for p, s in zip(positive[:-1], own[1:], strict=True)]
        numbers = self.numbers(context) * F.pad(steepness, (0, self.sizes[-1]), value=1.0)
        curvature = F.softplus(self.raw_curvature) + LEAST
        return numbers, curvature, *weights, *positive

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, hessian = self._gradient(x, *self._tensors(context))
        return z, log_det(hessian)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        tensors = self._tensors(context)
        with torch.no_grad():
            steepest = self._steepest(*tensors[1:])
            contraction = 1 - tensors[1] / steepest

        def residual(x: Tensor, z: Tensor, *tensors: Tensor) -> Tensor:
            return (self._gradient(x, *tensors, hessian=False)[0] - z) / steepest

        def jacobian(x: Tensor, z: Tensor, *tensors: Tensor) -> Tensor:
            return self._gradient(x, *tensors)[1] / steepest

        per_row = frozenset({0} if context is None else {0, 1})
        problem = Problem(residual, (z, *tensors), per_row, contraction, jacobian)
        x = find_root(problem, z, method="damped-newton", adjoint="none").value
        with torch.no_grad():  # the bound on the steepest is loose, and so is what it lets pass
            image, hessian = self._gradient(x, *tensors)
            x = x - torch.linalg.solve(hessian, image - z)
        x = attach(problem, x)
        return x, -log_det(self._gradient(x, *tensors)[1])

    def _gradient(
        self, x: Tensor, numbers: Tensor, curvature: Tensor, *rest: Tensor, hessian: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The gradient of F ``(n, d)`` and its Hessian ``(n, d, d)``, or without it x again."""
        n, d = x.shape
        count = len(rest) // 2
        weights, positive = rest[:count], rest[count:]
        *biases, v = torch.split_with_sizes(numbers, self.sizes, -1)
        slopes: list[Tensor] = []
        tangents: list[Tensor] = []
        h = x
        for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
            a = x @ w.mT + b
            if k:
                a = a + h @ positive[k - 1].mT
            if hessian and k == 1:  # the first tangents are W_1 in every row: one product
                mixed = (weights[0][:, :, None] * positive[0].mT[:, None]).flatten(1)
                tangents.append((slopes[0] @ mixed).view(n, d, len(w)) + w.mT)
            elif hessian and k:
                tangents.append((tangents[-1] * slopes[-1][:, None]) @ positive[k - 1].mT + w.mT)
            h = F.softplus(a)
            slopes.append(torch.sigmoid(a))
        z = curvature * x + v
        matrix = curvature * torch.eye(d, dtype=x.dtype, device=x.device)
        g = positive[-1]
        for k in reversed(range(count)):
            u = slopes[k] * g
            z = z + u @ weights[k]
            if hessian:
                bend = u * (1 - slopes[k])
                if k:
                    matrix = matrix + (tangents[k - 1] * bend[:, None]) @ tangents[k - 1].mT
                else:
                    pairs = (weights[0][:, :, None] * weights[0][:, None]).flatten(1)
                    matrix = matrix + (bend @ pairs).view(n, d, d)
            if k:
                g = u @ positive[k - 1]
        return z, matrix if hessian else x

    def _steepest(self, curvature: Tensor, *rest: Tensor) -> Tensor:
        """A bound on every eigenvalue of every Hessian: s' is at most 1, s'' at most 1/4.

        The largest sum of a row of |J|^T diag(g) |J| bounds that of a matrix of such products.
        """
        count = len(rest) // 2
        weights, positive = rest[:count], rest[count:]
        largest = [weights[0].abs()]
        for w, p in zip(weights[1:], positive, strict=False):
            largest.append(p @ largest[-1] + w.abs())
        bound, g = curvature, positive[-1][0]
        for k in reversed(range(count)):
            j = largest[k]
            bound = bound + 0.25 * (j.mT @ (g * j.sum(1))).amax()
            g = g @ positive[k - 1] if k else g
        return bound


class _LogDet(torch.autograd.Function):
    """log det of symmetric positive matrices; its gradient is the inverse, found along with it."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        if matrix.shape[-1] <= 16:
            inverse, value = invert(matrix.permute(1, 2, 0).contiguous())
            inverse = inverse.permute(2, 0, 1)
        else:  # twice as fast as the general inverse
            factor, failed = torch.linalg.cholesky_ex(matrix)
            inverse = torch.cholesky_inverse(factor)
            value = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            value = torch.where(failed > 0, torch.nan, value)  # flatter than rounding can tell
        ctx.save_for_backward(matrix, inverse)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        matrix, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # the caller will differentiate this result
            inverse = torch.linalg.inv(matrix)
        gradient: Tensor = gradients[0][:, None, None] * inverse
        return gradient


def log_det(matrix: Tensor) -> Tensor:
    """Logarithm of the determinant ``(n,)`` of symmetric positive ``(n, d, d)``, differentiable."""
    value: Tensor = _LogDet.apply(matrix)  # type: ignore[no-untyped-call]
    return value


def cpflow(
    features: int,
    context: int = 0,
    *,
    blocks: int = 4,
    hidden: Sequence[int] = (64, 64),
    actnorm: bool = True,
    linear: str | None = "lu",
) -> list[Transform]:
    """A convex potential flow of ``blocks`` potentials."""
    return stacked(
        lambda: ConvexPotential(features, context, hidden), features, blocks, actnorm, linear
    )
