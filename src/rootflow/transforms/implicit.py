r"""Blocks defined by the roots of an equation: implicit, residual and monotone.

With g of certified Lipschitz constant below one:

==========  =====================================================  ==================
block       equation                                               solve needed in
==========  =====================================================  ==================
residual    z = x + g(x)                                           inverse
implicit    x + g_x(x) = z + g_z(z)                                both directions
monotone    w + g(w) = sqrt(2) x,  w - g(w) = sqrt(2) z            both directions
==========  =====================================================  ==================

The first argument is a number of columns, and g then a dense network, or the shape
``(channels, height, width)`` of images, and g convolutional. Everything else is the same code on
flat rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import logdet as logdets
from ..lipschitz import CertifiedNet, LipschitzConvNet, LipschitzNet, Weights, bfloat16_gains
from ..solvers import METHODS, Problem, default_tolerance, find_root
from ..solvers.result import choose
from .base import Transform

__all__ = ["ImplicitBlock", "MonotoneBlock", "ResidualBlock"]

SQRT2 = math.sqrt(2)


class _RootBlock(Transform):
    """What the three blocks share: networks, solves and log-determinants.

    ``activation`` defaults to "sin" for columns and to "lipswish" for images. ``kernels`` and
    ``preactivation`` are those of ``LipschitzConvNet``; images only. ``logdet``, ``terms`` and
    ``probes``: see ``logdet.Series``; "auto" is exact up to 64 dimensions. ``save_memory``: build
    what the gradient of an estimated log-determinant needs in the backward pass, not before.
    """

    def __init__(
        self,
        features: int | Sequence[int],
        hidden: Sequence[int] = (128, 128),
        *,
        activation: str | None = None,
        lipschitz: float = 0.97,
        context: int = 0,
        solver: str = "auto",
        logdet: str = "auto",
        terms: int | None = None,
        probes: int = 1,
        save_memory: bool = True,
        kernels: Sequence[int] | None = None,
        preactivation: bool = False,
        nets: int = 1,
    ) -> None:
        event = (features,) if isinstance(features, int) else tuple(features)
        super().__init__(event, context)
        choose(METHODS, solver, "solver")
        self.solver = solver
        options: dict[str, Any] = {"lipschitz": lipschitz, "context": context}
        if len(event) == 3:
            options |= {"kernels": kernels, "preactivation": preactivation}
            options["activation"] = activation or "lipswish"
            terms = logdets.Series.leading(lipschitz) if terms is None else terms
        elif len(event) != 1:
            raise ValueError(f"event={event} must be a number of columns or (channels, h, w)")
        elif kernels is not None or preactivation:
            raise ValueError("kernels and preactivation are for images; give a shape (c, h, w)")
        else:
            options["activation"] = activation or "sin"
        if logdet == "auto":
            logdet = "exact" if math.prod(event) <= 64 else "geometric"
        self.series = (
            None
            if logdet == "exact"
            else logdets.Series(logdet, 4 if terms is None else terms, probes, save_memory)
        )
        self.draws = 0  # seeds the random terms and probes; the training loop sets it, for resuming
        kind: Any = LipschitzConvNet if len(event) == 3 else LipschitzNet
        size: Any = event if len(event) == 3 else event[0]
        self.nets = torch.nn.ModuleList(kind(size, hidden, **options) for _ in range(nets))

    def _net(self, k: int) -> CertifiedNet:
        net = self.nets[k]
        assert isinstance(net, CertifiedNet)
        return net

    def _rows(self, x: Tensor) -> Tensor:
        """Flat rows, in the order in which the networks hold them."""
        net = self.nets[0]
        return net.rows(x) if isinstance(net, LipschitzConvNet) else x

    def _event(self, rows: Tensor) -> Tensor:
        """Flat rows in the shape of the event."""
        net = self.nets[0]
        return net.images(rows) if isinstance(net, LipschitzConvNet) else rows

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, log_det = self._latent(self._rows(x), context)
        return self._event(z), log_det

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, log_det = self._data(self._rows(z), context)
        return self._event(x), log_det

    def _latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``to_latent`` on flat rows."""
        raise NotImplementedError

    def _data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``to_data`` on flat rows."""
        raise NotImplementedError

    def _branch(
        self, net: CertifiedNet, weights: Weights, at: Tensor, *signs: int, root: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The value g(``at``) (root 0) or the y with y + root g(y) = ``at``, and log-determinants.

        These are log det(I + sign J) there, for each sign.
        """
        solve = partial(self._solve, net, root) if root else None
        series = self.series
        if series is not None and not self.training:  # columns are evaluated exactly, always
            images = len(self.event) == 3 and series.method != "probe"
            series = series.evaluation(net.lipschitz) if images else None
        if series is None:
            return logdets.exact(net, weights, at, signs, root=root, solve=solve)
        return logdets.estimated(
            net, weights, at, signs, series, self._generator(), root=root, solve=solve
        )

    def _solve(self, net: CertifiedNet, root: int, c: Tensor, weights: Weights) -> Tensor:
        tensors = (c, *weights.tensors())

        def residual(y: Tensor, c: Tensor, *tensors: Tensor) -> Tensor:
            value = net.value(y.to(tensors[0]), Weights.rebuild(tensors))
            return torch.add(y - c, value.to(y), alpha=root)

        def jacobian(y: Tensor, c: Tensor, *tensors: Tensor) -> Tensor:
            jac = net.value_and_jacobian(y, Weights.rebuild(tensors))[1].mT
            return torch.eye(y.shape[-1], dtype=y.dtype, device=y.device) + root * jac

        first_bias = 1 + len(weights.matrices)
        per_row = {0, *(k for k in range(first_bias, len(tensors)) if tensors[k].dim() == 2)}
        problem = Problem(residual, tensors, frozenset(per_row), net.lipschitz, jacobian)
        if len(self.event) == 1:
            return find_root(problem, c, method=self.solver, adjoint="none").value
        # the norm of an image grows with its size, and the tolerance with the norm: be stricter
        tol = default_tolerance(c.dtype) / 4
        rough = None
        if bfloat16_gains(c, several_times=True):
            rough = replace(problem, tensors=(c, *weights.to(torch.bfloat16).tensors()))
        y = find_root(problem, c, method=self.solver, tol=tol, adjoint="none", rough=rough).value
        return y - residual(y, *tensors)

    def _certificate(
        self, k: int, y: Tensor, c: Tensor, doubt: Tensor | float, context: Tensor | None
    ) -> Tensor:
        """Bound on |y - root| for y + g_k(y) = c, rounding included; c may be off by ``doubt``."""
        net = self._net(k)
        weights = net.prepare(context)
        norm = partial(torch.linalg.vector_norm, dim=-1)
        g = net.value(y, weights)
        residual = norm(y + g - c)
        rounding = net.rounding(y, weights)
        rounding = rounding + torch.finfo(y.dtype).eps * 2 * (norm(y) + norm(g) + norm(c))
        result: Tensor = (residual + rounding + doubt) / (1 - net.bound())
        return result

    def _generator(self) -> torch.Generator:
        self.draws += 1
        return torch.Generator().manual_seed(self.draws)


class ResidualBlock(_RootBlock):
    """z = x + g(x); Behrmann et al. 2019, Chen et al. 2019 (arXiv:1906.02735)."""

    def _latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        net = self._net(0)
        g, log_dets = self._branch(net, net.prepare(context), x, 1)
        return x + g, log_dets[0]

    def _data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        net = self._net(0)
        x, log_dets = self._branch(net, net.prepare(context), z, 1, root=1)
        return x, -log_dets[0]


class ImplicitBlock(_RootBlock):
    """x + g_x(x) = z + g_z(z); Lu et al. 2021 (arXiv:2103.09527), equation 5."""

    def __init__(
        self,
        features: int | Sequence[int],
        hidden: Sequence[int] = (128, 128),
        **options: Any,
    ) -> None:
        super().__init__(features, hidden, **options, nets=2)

    def _g(self, k: int, y: Tensor, context: Tensor | None) -> Tensor:
        net = self._net(k)
        return self._event(net.value(self._rows(y), net.prepare(context)))

    def g_x(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The network on the data side, ``(batch, *event)``."""
        return self._g(0, x, context)

    def g_z(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The network on the latent side, ``(batch, *event)``."""
        return self._g(1, z, context)

    def _map(self, x: Tensor, context: Tensor | None, near: int, far: int) -> tuple[Tensor, Tensor]:
        here, there = self._net(near), self._net(far)
        g, gain = self._branch(here, here.prepare(context), x, 1)
        z, loss = self._branch(there, there.prepare(context), x + g, 1, root=1)
        return z, gain[0] - loss[0]

    def _latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, 0, 1)

    def certificate(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        x, z = self._rows(x), self._rows(z)
        net = self._net(0)
        weights = net.prepare(context)
        return self._certificate(1, z, x + net.value(x, weights), net.rounding(x, weights), context)

    def _data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(z, context, 1, 0)


class MonotoneBlock(_RootBlock):
    """Cayley form of a strongly monotone map; Ahn et al. 2022, "Invertible Monotone Operators"."""

    def _map(self, x: Tensor, context: Tensor | None, sign: int) -> tuple[Tensor, Tensor]:
        net = self._net(0)
        w, log_dets = self._branch(net, net.prepare(context), SQRT2 * x, -sign, sign, root=sign)
        return SQRT2 * w - x, log_dets[0] - log_dets[1]

    def _latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, 1)

    def certificate(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        x, z = self._rows(x), self._rows(z)
        return SQRT2 * self._certificate(0, (x + z) / SQRT2, SQRT2 * x, 0.0, context)

    def _data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(z, context, -1)
