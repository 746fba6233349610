r"""A network whose i-th group of outputs sees only the inputs before i: the masked conditioner.

Every unit has a degree m and depends on x_1 .. x_m only. Units lie in order of their degree, so
a sweep over the dimensions computes each of them exactly once. Feature-major: ``(units, n)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .conditioners import Network, Piece, check_hidden

__all__ = ["Masked"]


def degrees(width: int, low: int, high: int) -> Tensor:
    """Sorted degrees ``(width,)`` from ``low`` to ``high``, in equal numbers or spread evenly."""
    k, count = torch.arange(width, device="cpu"), high - low + 1
    if width >= count:
        return low + k * count // width
    return low + (k * (count - 1) + (width - 1) // 2) // max(width - 1, 1)


class Masked(Network):
    r"""Parameters theta ``(size, features, n)``, theta[:, i] a function of x[:i] and the context.

    With ``circle`` = B an input enters as cosine and sine of the angle pi x / B. Units of degree 0,
    which see the context alone, exist only with a context. Hidden layers narrower than the number
    of degrees are right but tell fewer prefixes apart.

    Sources: Germain et al. 2015 (arXiv:1502.03509), section 3; Nash and Durkan 2019
    (arXiv:1904.05626), section 4, for residual layers.
    """

    def __init__(
        self,
        features: int,
        initial: Tensor,
        context: int = 0,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        residual: bool = False,
        circle: float | None = None,
    ) -> None:
        hidden, low = check_hidden(hidden), 0 if context else 1
        if low == features:  # one dimension without context: theta is a constant
            hidden = ()
        per = 1 if circle is None else 2
        dimensions = torch.arange(features, device="cpu")
        outside = torch.full((context,), -1, device="cpu")
        layers = [torch.cat([outside, (dimensions + 1).repeat_interleave(per)])]
        layers += [degrees(width, low, features - 1) for width in hidden]
        layers.append(dimensions)
        super().__init__(layers, initial, activation, residual)
        self.features, self.context, self.circle, self.per = features, context, circle, per
        # seen[k][i]: how many units of layer k have a degree below i.
        below = torch.arange(-1, features, device="cpu")
        self.seen = [torch.searchsorted(m, below, right=True).tolist() for m in layers]

    def dense(self, pieces: Sequence[Sequence[Piece]]) -> tuple[list[Tensor], list[Tensor]]:
        """Whole biases ``(units, 1)`` and matrices ``(units, visible below)`` of all layers."""
        biases, matrices = [], []
        for blocks, layer in zip(self.blocks, pieces, strict=True):
            biases.append(torch.cat([bias for bias, _ in layer]))
            whole = [F.pad(w, (0, blocks[-1].p - w.shape[1])) for _, w in layer]
            matrices.append(torch.cat(whole))
        return biases, matrices

    def embed(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The first layer's input: context above x ``(features, n)`` or its circular features."""
        if self.circle is not None:
            angle = x * (math.pi / self.circle)
            x = torch.stack([angle.cos(), angle.sin()], 1).flatten(0, 1)
        return x if context is None else torch.cat([context, x])

    def turned(self, h: Tensor) -> Tensor:
        """Derivative ``(features, 2, n)`` of the circular features that the input h holds."""
        cosine, sine = h[self.context :].view(self.features, 2, -1).unbind(1)
        return torch.stack([-sine, cosine], 1) * (math.pi / (self.circle or 1))

