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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..logdet import invert
from ..solvers import Problem, attach, find_root
from ..solvers.result import choose
from .base import Transform
from .conditioners import check_hidden
from .ridge import Numbers, stacked

__all__ = ["ConvexPotential", "cpflow"]

LEAST = 1e-3  # least curvature in every direction
STEEP = 8.0  # units start with a steepness of 1 to this, its logarithm uniform
FEW = 16  # columns up to which training takes exact log-determinants
STEP, NODES = 1.0, 25  # of the quadrature of a logarithm: good to 1e-7 for 1e-4 to 1e4


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

    ``logdet`` "probe": while training, to_latent's log_det and its gradient are unbiased estimates
    (``_probed``), for the work of some ten evaluations instead of d; then differentiable once.
    "exact": never. "auto" is exact up to ``FEW`` columns. Raises ValueError for another.
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        hidden: Sequence[int] = (64,),
        *,
        logdet: str = "auto",
    ) -> None:
        super().__init__((features,), context)
        widths = check_hidden(hidden)
        kinds = {"auto": features > FEW, "exact": False, "probe": True}
        self.probed = choose(kinds, logdet, "logdet")
        self.draws = 0  # seeds the probes; the training loop sets it, for resuming
        self.sizes = [*widths, features]
        self.raw_curvature = nn.Parameter(torch.tensor(math.log(math.expm1(0.5))))
        self.weights = nn.Parameter(torch.randn(sum(widths), features) / math.sqrt(features))
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
        """What the map is made of: all b_k and v in one, m, all W_k in one, the P_k and p."""
        steepness = self.log_steepness.exp()  # made part of the matrices and biases around it
        own = self._layers(steepness)
        positive = [F.softplus(raw) * (2 / raw.shape[1]) for raw in self.raw_positive]
        positive = [p / s for p, s in zip(positive, own, strict=True)]
        positive[:-1] = [p * s[:, None] for p, s in zip(positive[:-1], own[1:], strict=True)]
        numbers = self.numbers(context) * F.pad(steepness, (0, self.sizes[-1]), value=1.0)
        curvature = F.softplus(self.raw_curvature) + LEAST
        return numbers, curvature, self.weights * steepness[:, None], *positive

    def _layers(self, joined: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
        """What stands in one tensor for all layers, layer by layer."""
        return joined.split_with_sizes(self.sizes[:-1], dim)

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        tensors = self._tensors(context)
        z, slopes, bends = self._gradient(x, *tensors)
        find = self._probed if self.probed and self.training else self._log_det
        return z, find(slopes, bends, *tensors[1:])

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        tensors = self._tensors(context)
        with torch.no_grad():
            steepest = self._steepest(*tensors[1:])
            contraction = 1 - tensors[1] / steepest

        def residual(x: Tensor, z: Tensor, *tensors: Tensor) -> Tensor:
            return (self._gradient(x, *tensors)[0] - z) / steepest

        def jacobian(x: Tensor, z: Tensor, *tensors: Tensor) -> Tensor:
            return self._hessian(*self._gradient(x, *tensors)[1:], *tensors[1:]) / steepest

        per_row = frozenset({0} if context is None else {0, 1})
        problem = Problem(residual, (z, *tensors), per_row, contraction, jacobian)
        x = find_root(problem, z, method="damped-newton", adjoint="none").value
        with torch.no_grad():  # the bound on the steepest is loose, and so is what it lets pass
            for _ in range(2):
                image, *parts = self._gradient(x, *tensors)
                x = x - torch.linalg.solve(self._hessian(*parts, *tensors[1:]), image - z)
        x = attach(problem, x)
        return x, -self._log_det(*self._gradient(x, *tensors)[1:], *tensors[1:])

    def _gradient(
        self, x: Tensor, numbers: Tensor, curvature: Tensor, weights: Tensor, *positive: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of F ``(n, d)``, all s'(a_k) and all s''(a_k) g_k ``(n, width)``."""
        biases, v = torch.split_with_sizes(numbers, [len(weights), x.shape[1]], -1)
        slopes: list[Tensor] = []
        a = x
        for k, b in enumerate(self._layers(torch.addmm(biases, x, weights.mT))):
            a = torch.addmm(b, F.softplus(a), positive[k - 1].mT) if k else b
            slopes.append(torch.sigmoid(a))
        units = [slopes[-1] * positive[-1]]
        for s, p in zip(slopes[-2::-1], positive[-2::-1], strict=True):
            units.insert(0, s * (units[0] @ p))
        joined, u = torch.cat(slopes, -1), torch.cat(units, -1)
        return torch.addmm(curvature * x + v, u, weights), joined, u * (1 - joined)

    def _hessian(
        self, slopes: Tensor, bends: Tensor, curvature: Tensor, weights: Tensor, *positive: Tensor
    ) -> Tensor:
        """The Hessian of F ``(n, d, d)``."""
        n, d = len(slopes), weights.shape[1]
        first, *rest = self._layers(weights, 0)
        s, (bend, *bent) = self._layers(slopes), self._layers(bends)
        pairs = (first[:, :, None] * first[:, None]).flatten(1)
        matrix = (bend @ pairs).view(n, d, d)
        matrix = matrix + curvature * torch.eye(d, dtype=matrix.dtype, device=matrix.device)
        tangents = matrix
        for k, (w, p, bend) in enumerate(zip(rest, positive[:-1], bent, strict=True)):
            if k:
                tangents = (tangents * s[k][:, None]) @ p.mT + w.mT
            else:  # the first tangents are W_1 in every row: one product
                mixed = (first[:, :, None] * p.mT[:, None]).flatten(1)
                tangents = (s[0] @ mixed).view(n, d, len(w)) + w.mT
            matrix = matrix + (tangents * bend[:, None]) @ tangents.mT
        return matrix

    def _log_det(self, *parts: Tensor) -> Tensor:
        return log_det(self._hessian(*parts))

    def _tangents(self, v: Tensor, slopes: Tensor, weights: Tensor, *positive: Tensor) -> Tensor:
        """All J_k v ``(..., n, width)`` for v ``(..., n, d)``."""
        first, *rest = self._layers(v @ weights.mT)
        found = [first]
        for t, s, p in zip(rest, self._layers(slopes)[:-1], positive[:-1], strict=True):
            found.append(t + (s * found[-1]) @ p.mT)
        return torch.cat(found, -1)

    def _probed(
        self, slopes: Tensor, bends: Tensor, curvature: Tensor, weights: Tensor, *positive: Tensor
    ) -> Tensor:
        r"""An unbiased estimate ``(n,)`` of log det H with an unbiased gradient.

        With M = C C^T the Hessian for the batch's mean slopes, K = C^{-1} H C^{-T} and a probe v of
        independent signs: log det H = log det M + E[v^T log(K) v], and the gradient is
        E[(K^{-1} v)^T C^{-1} dH C^{-T} v]. ``krylov`` has both from products of H alone.
        """
        self.draws += 1
        generator = torch.Generator().manual_seed(self.draws)
        shape = len(slopes), weights.shape[1]
        v = (2.0 * torch.randint(0, 2, shape, generator=generator) - 1).to(weights)
        with torch.no_grad():
            rest = curvature, weights, *positive
            mean = self._hessian(slopes.mean(0, True), bends.mean(0, True), *rest)[0]
            factor, _ = torch.linalg.cholesky_ex(mean)
            eye = torch.eye(len(factor), dtype=v.dtype, device=v.device)
            c: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
            inner, square = weights @ c.mT, curvature * c @ c.mT
            s = self._layers(slopes)

            def product(p: Tensor) -> Tensor:
                *pulled, u = self._layers(bends * self._tangents(p, slopes, inner, *positive))
                parts = [u]
                for k in reversed(range(len(pulled))):
                    u = torch.addcmul(pulled[k], s[k], u @ positive[k])
                    parts.insert(0, u)
                return torch.addmm(p @ square, torch.cat(parts, -1), inner)

            def matrix(rows: Tensor) -> Tensor:
                return c @ self._hessian(slopes[rows], bends[rows], *rest) @ c.mT

            u, value = krylov(product, matrix, v)
            value = value + 2 * factor.diagonal().log().sum()
            ends = torch.stack([u, v]) @ c
        left, right = self._tangents(ends, slopes, weights, *positive)
        form = (bends * left * right).sum(-1) + curvature * (ends[0] * ends[1]).sum(-1)
        estimate: Tensor = _Probed.apply(value, form)  # type: ignore[no-untyped-call]
        return estimate

    def _steepest(self, curvature: Tensor, weights: Tensor, *positive: Tensor) -> Tensor:
        """A bound on every eigenvalue of every Hessian: s' is at most 1, s'' at most 1/4.

        The largest sum of a row of |J|^T diag(g) |J| bounds that of a matrix of such products.
        """
        first, *rest = self._layers(weights.abs(), 0)
        largest = [first]
        for w, p in zip(rest, positive, strict=False):
            largest.append(p @ largest[-1] + w)
        bound, g = curvature, positive[-1][0]
        for k in reversed(range(len(largest))):
            j = largest[k]
            bound = bound + 0.25 * (j.mT @ (g * j.sum(1))).amax()
            g = g @ positive[k - 1] if k else g
        return bound


def krylov(
    product: Callable[[Tensor], Tensor], matrix: Callable[[Tensor], Tensor], v: Tensor
) -> tuple[Tensor, Tensor]:
    r"""K^{-1} v ``(n, d)`` and v^T log(K) v ``(n,)`` for symmetric positive K, one for each row.

    Conjugate gradients to a residual of sqrt(eps) |v|; its T, tridiagonal, has
    v^T f(K) v = |v|^2 f(T)_{11} to twice the digits (Gauss quadrature; Golub and Meurant 1994), and
    log T is the integral over s of 1 / (1 + e^{-s}) - (T e^{-s} + I)^{-1}, summed on a grid.
    ``product`` multiplies each row by its K. Rows that take more than d steps are solved by the
    eigenvalues of their ``matrix(rows)``. Not differentiable.
    """
    u, r, p = torch.zeros_like(v), v, v
    size = start = v.square().sum(-1, keepdim=True)
    diagonal, squares = [], []  # of T: its diagonal, squares of what stands beside it
    carried = torch.zeros_like(size)
    for _ in range(v.shape[1]):
        image = product(p)
        live = size > 0
        rate = torch.where(live, (p * image).sum(-1, keepdim=True) / size, 1)
        u = torch.addcdiv(u, p, rate)
        r = torch.addcdiv(r, image, rate, value=-1)
        after = r.square().sum(-1, keepdim=True)
        ratio = torch.where(live, after / size, 0)
        diagonal.append(rate + carried)
        carried = ratio * rate
        squares.append(carried * rate)
        p, size = torch.addcmul(r, ratio, p), after
        left = size > torch.finfo(v.dtype).eps * start
        if not left.any():
            break
    nodes = torch.exp(STEP * torch.arange(-NODES, NODES + 1, dtype=v.dtype, device=v.device))
    t = diagonal[-1] + nodes
    for a, b in zip(diagonal[-2::-1], squares[-2::-1], strict=True):
        t = a + nodes - b / t
    value = start[:, 0] * STEP * (nodes / (1 + nodes) - nodes / t).sum(-1)
    if left.any():
        rows = left[:, 0].nonzero()[:, 0]
        values, vectors = torch.linalg.eigh(matrix(rows))
        shares = (vectors.mT @ v[rows, :, None])[..., 0]
        u[rows] = (vectors @ (shares / values)[..., None])[..., 0]
        value[rows] = (shares.square() * values.log()).sum(-1)
    return u, value


class _Probed(torch.autograd.Function):
    """The first argument, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, form: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "logdet='probe' is differentiable once while training; use logdet='exact'"
            )
        return None, gradients[0]


class _LogDet(torch.autograd.Function):
    """log det of symmetric positive matrices; its gradient is the inverse."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        if matrix.shape[-1] <= 16:
            inverse, value = invert(matrix.permute(1, 2, 0).contiguous())
            ctx.save_for_backward(matrix, inverse.permute(2, 0, 1))
            return value
        factor, failed = torch.linalg.cholesky_ex(matrix)  # twice as fast as the general inverse
        ctx.save_for_backward(matrix, factor)
        value = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return torch.where(failed > 0, torch.nan, value)  # flatter than rounding can tell

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        matrix, found = ctx.saved_tensors
        if torch.is_grad_enabled():  # the caller will differentiate this result
            found = torch.linalg.inv(matrix)
        elif matrix.shape[-1] > 16:
            found = torch.cholesky_inverse(found)
        gradient: Tensor = gradients[0][:, None, None] * found
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
    hidden: Sequence[int] = (64,),
    actnorm: bool = True,
    linear: str | None = "lu",
    logdet: str = "auto",
) -> list[Transform]:
    """A convex potential flow of ``blocks`` potentials."""
    return stacked(
        lambda: ConvexPotential(features, context, hidden, logdet=logdet),
        features, blocks, actnorm, linear,
    )  # fmt: skip
