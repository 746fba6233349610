"""Maps of some columns by numbers that a network makes of others, with their gradient by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Transform
from .conditioners import Network
from .univariate import ByHand, Kept, Univariate, recorded, traced

__all__ = ["Conditioned"]


class Conditioned(Transform):
    r"""z[driven] = f(x[driven]; theta(x[drivers], context)), all other columns as they are.

    A subclass names the columns, builds the network and says in ``given`` what it reads, unless it
    reads ``x[drivers]`` alone. Shapes: x, z ``(batch, features)``; log_det in nats, the sum of the
    logarithms of f's slopes.

    Network and map are one operation of automatic differentiation, whose gradient is written out:
    it takes a third of the operations, and keeps and copies nothing that it does not need.
    """

    net: Network

    def __init__(
        self, features: int, univariate: Univariate, context: int, drivers: slice, driven: slice
    ) -> None:
        super().__init__((features,), context)
        self.univariate, self.drivers, self.driven = univariate, drivers, driven
        self.alone = context == 0

    def given(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The network's input from x ``(features, n)`` and context ``(width, n)``."""
        raise NotImplementedError

    def placed(self, drivers: Tensor, driven: Tensor) -> Tensor:
        """The whole ``(features, n)`` of both parts, which may be the same."""
        if self.drivers == self.driven:
            return driven
        parts = [drivers, driven] if self.driven.stop is None else [driven, drivers]
        return torch.cat(parts)

    def plain(
        self, x: Tensor, h: Tensor | None, values: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """The whole map, feature-major, by torch's own operations."""
        theta = self.net(x[self.drivers] if h is None else h, values)
        y, log_slope = self.univariate.plain(x[self.driven], theta, inverse)
        return self.placed(x[self.drivers], y), log_slope.sum(0)

    def run(
        self, x: Tensor, h: Tensor | None, values: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor, Kept]:
        """The same without a graph, and what ``pull`` needs."""
        driver, weights = x[self.drivers], self.net.masked(values)
        inputs, kept, theta = self.net.run(driver if h is None else h, self.net.pieces(weights))
        y, log_slope, used = self.univariate.run(x[self.driven], theta, inverse)
        return self.placed(driver, y), log_slope.sum(0), (weights, *inputs, *kept, *used)

    def pull(
        self,
        kept: Kept,
        inverse: bool,
        g_z: Tensor,
        g_log: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, h and values from those of the results."""
        net, count, weights, rest = self.net, len(self.net.blocks), kept[0], kept[1:]
        inputs, kept, used = rest[:count], rest[count : 2 * count - 1], rest[2 * count - 1 :]
        g_own, g_rest = g_z[self.driven], g_z[self.drivers]
        g_own, g_theta = self.univariate.pull(used, inverse, g_own, g_log.expand_as(g_own))
        through = needs[0] if self.alone else needs[1]
        pulled, g_values = net.backward(
            net.pieces(weights), inputs, kept, g_theta, (through, needs[2])
        )
        if self.alone and pulled is not None:
            same = self.drivers == self.driven
            pulled = pulled.add_(g_own if same else g_rest)
            return self.placed(pulled, pulled if same else g_own), None, g_values
        return self.placed(g_rest, g_own) if needs[0] else None, pulled, g_values

    def move(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """Image of x ``(batch, features)`` and log_det ``(batch,)``."""
        # feature-major inside; what returns is a view, so a chain of such maps copies nothing here
        x, values = x.mT.contiguous(), self.net.values
        h = None if self.alone else self.given(x, None if context is None else context.mT)
        if traced():
            z, log_det = self.plain(x, h, values, inverse)
        elif recorded(x, h, values):
            z, log_det = ByHand.apply(self, inverse, x, h, values)  # type: ignore[no-untyped-call]
        else:
            driver, layers = x[self.drivers], self.net.pieces(self.net.masked(values))
            theta = self.net.run(driver if h is None else h, layers)[-1]
            f = self.univariate.inverse if inverse else self.univariate.forward
            y, log_slope = f(x[self.driven], theta)
            z, log_det = self.placed(driver, y), log_slope.sum(0)
        return z.mT, log_det
