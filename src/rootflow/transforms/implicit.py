r"""Blocks defined by the roots of an equation: implicit, residual and monotone.

With g of certified Lipschitz constant below one:

==========  =====================================================  ==================
block       equation                                               solve needed in
==========  =====================================================  ==================
residual    z = x + g(x)                                           inverse
implicit    x + g_x(x) = z + g_z(z)                                both directions
monotone    w + g(w) = sqrt(2) x,  w - g(w) = sqrt(2) z            both directions
==========  =====================================================  ==================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import logdet as logdets
from ..lipschitz.networks import LipschitzNet, Weights
from ..solvers import Problem, attach, find_root
from .base import Transform

__all__ = ["ImplicitBlock", "MonotoneBlock", "ResidualBlock"]

SQRT2 = math.sqrt(2)


class _RootBlock(Transform):
    """What the three blocks share: networks, solves and log-determinants."""

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (128, 128),
        *,
        activation: str = "sin",
        lipschitz: float = 0.97,
        context: int = 0,
        solver: str = "auto",
        nets: int = 1,
    ) -> None:
        super().__init__((features,), context)
        self.solver = solver
        self.nets = torch.nn.ModuleList(
            LipschitzNet(features, hidden, activation=activation, lipschitz=lipschitz, context=context)
            for _ in range(nets)
        )

    def _net(self, k: int) -> LipschitzNet:
        net = self.nets[k]
        assert isinstance(net, LipschitzNet)
        return net

    def _solve(self, net: LipschitzNet, weights: Weights, sign: int, c: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Root of y + sign g(y) = c, attached to its derivative; the dictionary awaits a shared solve."""

        def residual(y: Tensor, c: Tensor, *tensors: Tensor) -> Tensor:
            return y + sign * net.value(y, Weights.rebuild(tensors)) - c

        def jacobian(y: Tensor, c: Tensor, *tensors: Tensor) -> Tensor:
            jac = net.value_and_jacobian(y, Weights.rebuild(tensors))[1].permute(1, 2, 0)
            return torch.eye(y.shape[-1], dtype=y.dtype, device=y.device) + sign * jac

        tensors = (c, *weights.tensors())
        per_row = frozenset(k for k, t in enumerate(tensors) if k == 0 or (t.dim() == 2 and k > len(weights.matrices)))
        problem = Problem(residual, tensors, per_row, net.lipschitz, jacobian)
        found = find_root(problem, c, method=self.solver, adjoint="none")
        shared: dict[str, Any] = {}
        return attach(problem, found.value, shared) if torch.is_grad_enabled() else found.value, shared

    def _log_det(
        self, net: LipschitzNet, weights: Weights, y: Tensor, *signs: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """g(y), log det(I + sign J(y)) for each sign, and the inverses."""
        g, jac = net.value_and_jacobian(y, weights)
        pairs = [logdets.exact(jac, sign) for sign in signs]
        return g, [p[0] for p in pairs], [p[1] for p in pairs]


def _transposed(inverse: Tensor) -> Any:
    return lambda v: torch.einsum("iob,bi->bo", inverse, v)


class ResidualBlock(_RootBlock):
    """z = x + g(x); Behrmann et al. 2019, Chen et al. 2019 (arXiv:1906.02735)."""

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        net = self._net(0)
        g, (log_det,), _ = self._log_det(net, net.prepare(context), x, 1)
        return x + g, log_det

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        net = self._net(0)
        weights = net.prepare(context)
        x, shared = self._solve(net, weights, 1, z)
        _, (log_det,), (inverse,) = self._log_det(net, weights, x, 1)
        shared["solve"] = _transposed(inverse)
        return x, -log_det


class ImplicitBlock(_RootBlock):
    """x + g_x(x) = z + g_z(z); Lu et al. 2021 (arXiv:2103.09527), equation 5."""

    def __init__(self, features: int, hidden: Sequence[int] = (128, 128), **options: Any) -> None:
        super().__init__(features, hidden, **options, nets=2)

    def g_x(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The network on the data side, ``(batch, features)``."""
        return self._net(0).value(x, self._net(0).prepare(context))

    def g_z(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The network on the latent side, ``(batch, features)``."""
        return self._net(1).value(z, self._net(1).prepare(context))

    def _map(self, x: Tensor, context: Tensor | None, near: int, far: int) -> tuple[Tensor, Tensor]:
        here, there = self._net(near), self._net(far)
        g, (log_det,), _ = self._log_det(here, here.prepare(context), x, 1)
        weights = there.prepare(context)
        z, shared = self._solve(there, weights, 1, x + g)
        _, (log_det_z,), (inverse,) = self._log_det(there, weights, z, 1)
        shared["solve"] = _transposed(inverse)
        return z, log_det - log_det_z

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, 0, 1)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(z, context, 1, 0)


class MonotoneBlock(_RootBlock):
    """The Cayley form of a strongly monotone map; Ahn et al. 2022, "Invertible Monotone Operators"."""

    def _map(self, x: Tensor, context: Tensor | None, sign: int) -> tuple[Tensor, Tensor]:
        net = self._net(0)
        weights = net.prepare(context)
        w, shared = self._solve(net, weights, sign, SQRT2 * x)
        _, (top, bottom), (_, inverse) = self._log_det(net, weights, w, -sign, sign)
        shared["solve"] = _transposed(inverse)
        return SQRT2 * w - x, top - bottom

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, 1)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(z, context, -1)
