r"""Neural autoregressive flows: each column through a small network that only ever rises.

Huang et al. 2018 (arXiv:1804.00779), section 3.1: a layer maps h to logit(sum_j w_j sigma(p_j))
with p_j = a_j h + b_j, a_j > 0 and shares w_j that add to one. With y the sum, both ln y and
ln(1 - y) are sums of positive terms scaled by their largest, so that the logit loses no digits
where y is close to 0 or 1 and the map reaches all of R, far tails included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..solvers import find_increasing
from .autoregressive import recipe
from .base import Transform
from .univariate import Univariate

__all__ = ["Sigmoidal", "naf"]

LEAST = 1e-3  # share of the identity in the map, and so its least slope
FLAT, STEEP = 1e-2, 1e3  # least and largest a_j
SHARE = 1e-3  # least w_j, relative to the largest that there could be
SHIFT = math.log(math.expm1(1 - FLAT))  # softplus(SHIFT) + FLAT = 1


class Sigmoidal(Univariate):
    r"""z = (1 - e) s(x) + e x with e = 0.001 and s ``layers`` sigmoidal layers of ``units`` each.

    Between layers lie ``units`` values h, each a mean of all sigmoids by shares of its own (the
    dense variant); the last layer returns one. theta holds for each layer ``units`` raw a,
    ``units`` b and the logits of the shares, ``units`` for each value that it returns. Every real
    theta gives a map of R onto R of slope e or more. It starts close to the identity, with units
    spread over [-2, 2].

    Forward is a formula. The inverse is a root find between bounds that always hold: the logit of a
    mean of sigmoids lies between the least and the largest p_j, so does the root between the x
    where these take the value z. A root is off by at most residual / e; an element that misses its
    tolerance raises NotConverged. Shapes as in ``Univariate``; log-slopes in nats. Differentiable
    to any order in both directions, implicitly in the inverse.
    Raises: ValueError for less than one layer or less than two units.
    """

    def __init__(self, units: int = 8, layers: int = 1) -> None:
        if units < 2:
            raise ValueError(f"units={units} must be at least 2")
        if layers < 1:
            raise ValueError(f"layers={layers} must be at least 1")
        self.units, self.layers = units, layers
        widths = [units] * (layers - 1) + [1]  # values that each layer returns
        self.sizes = [size for width in widths for size in (units, units, width * units)]
        self.size = sum(self.sizes)

    def __repr__(self) -> str:
        return f"Sigmoidal(units={self.units}, layers={self.layers})"

    def initial(self) -> Tensor:
        spread = torch.linspace(-2, 2, self.units, device="cpu")
        parts = [torch.zeros(size, device="cpu") for size in self.sizes]
        parts[1::3] = [spread] * self.layers
        return torch.cat(parts)

    def _parts(self, theta: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each layer a and b ``(units, *s)`` and the shares ``(width, units, *s)``."""
        parts, x = torch.split_with_sizes(theta, self.sizes), theta.shape[1:]
        layers = []
        for raw, b, logits in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            a = (F.softplus(raw + SHIFT, threshold=40.0) + FLAT).clamp(max=STEEP)
            shares = logits.view(len(logits) // self.units, self.units, *x).softmax(1)
            layers.append((a, b, (shares + SHARE) / (1 + SHARE * self.units)))
        return layers

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        z, slope = _image(x, *(t for layer in self._parts(theta) for t in layer))
        return z, slope.log()

    def inverse(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        parts = self._parts(theta)
        low = high = z
        size = torch.zeros_like(z)  # what the terms of the equation sum to, in absolute value
        for a, b, _ in reversed(parts):
            low, high = ((low - b) / a).amin(0), ((high - b) / a).amax(0)
        for a, b, _ in parts:
            size = a.amax(0) * size + b.abs().amax(0) + 1

        def equation(x: Tensor, z: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            y, slope = _image(x, *tensors)
            return y - z, slope

        tensors = [t for layer in parts for t in layer]
        x = find_increasing(
            equation, (z, *tensors), torch.minimum(low, z), torch.maximum(high, z),
            scale=size + z.abs(), least_slope=LEAST,
        ).value  # fmt: skip
        return x, -_image(x, *tensors)[1].log()


def _image(x: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
    """The map and its slope at x ``s``, for a, b ``(units, *s)`` and shares of every layer."""
    h, t = x[None], torch.ones_like(x)[None]  # values and their slopes
    for a, b, w in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        p, s = a * h + b, a * t
        scale = 1 / (1 + (-p.abs()).exp())
        below, above = p.clamp(max=0), p.clamp(min=0)
        top, bottom = below.detach().amax(0), above.detach().amin(0)
        e = (below - top).exp() * scale  # sigma(p) exp(-top)
        f = (bottom - above).exp() * scale  # sigma(-p) exp(bottom)
        up, down = (w * e).sum(1), (w * f).sum(1)
        h = up.log() - down.log() + (top + bottom)
        t = (w * (e * f * s)).sum(1) / (up * down)
    return torch.lerp(h[0], x, LEAST), torch.lerp(t[0], torch.ones_like(x), LEAST)


def naf(
    features: int,
    context: int = 0,
    *,
    blocks: int = 5,
    hidden: Sequence[int] = (128, 128),
    activation: str = "relu",
    residual: bool = False,
    units: int = 8,
    layers: int = 1,
    actnorm: bool = True,
    linear: str | None = "lu",
) -> list[Transform]:
    """Neural autoregressive flow; ``layers`` of one is its deep sigmoidal, more its dense form."""
    return recipe(
        features, context, Sigmoidal(units, layers), blocks, actnorm, linear,
        hidden=hidden, activation=activation, residual=residual,
    )  # fmt: skip
