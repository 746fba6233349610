r"""Activations with slope at most one, with the first two derivatives in closed form.

Each is written as ``scale_out * phi(scale_in * a)`` so that both scales can be folded into the
weights of the layers around it. A *paired* activation maps ``a`` to
``[phi(a + shift), phi(-a + shift)]`` and doubles the width; its bound holds for the joint Jacobian
norm of the pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation"]

Triple = tuple[Tensor, Tensor, Tensor]


def _sin(a: Tensor) -> Triple:
    h = torch.sin(a)
    return h, torch.cos(a), h


def _swish(a: Tensor) -> Triple:
    s = torch.sigmoid(a)
    h, below = a * s, s - 1
    bent = h * below
    return h, s - bent, torch.addcmul(bent, s, below - bent, value=2)


def _swish_slope(a: Tensor) -> tuple[Tensor, Tensor]:
    one = a.new_ones(()).expand_as(a)
    return torch.nn.functional.silu(a), torch.ops.aten.silu_backward(one, a)


def _tanh(a: Tensor) -> Triple:
    h = torch.tanh(a)
    slope = 1 - h * h
    return h, slope, 2 * h * slope


def _elu(a: Tensor) -> Triple:
    e = torch.exp(a.clamp(max=0))
    positive = a > 0
    return torch.where(positive, a, e - 1), e, torch.where(positive, 0, -e)


def _pila(a: Tensor, k: float = 5.0) -> Triple:
    t = a.clamp(max=0)
    e = torch.exp(k * t)
    h = torch.where(a > 0, a, (k * k * t * t / 2 - k * t + 1) * t * e)
    slope = (((k * t + 1) * k * t / 2 - 1) * k * t + 1) * e
    return h, slope, (k * t / -2 - 2) * k**3 * t * t * e


@dataclass(frozen=True)
class Activation:
    """One activation; ``derivatives(a)`` gives phi, phi' and -phi'' at ``a``, each of its shape."""

    name: str
    derivatives: Callable[[Tensor], Triple]
    value: Callable[[Tensor], Tensor]
    scale_in: float = 1.0
    scale_out: float = 1.0
    paired: bool = False
    shift: float = 0.0
    learned_scale: bool = False  # scale_in is a parameter: a -> phi(beta a) / beta
    fused: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # value and slope in two passes

    @property
    def widen(self) -> int:
        """Width after the activation per unit before it."""
        return 2 if self.paired else 1

    def value_and_slope(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Phi and phi' at ``a``."""
        return self.derivatives(a)[:2] if self.fused is None else self.fused(a)

    def spread(self, a: Tensor) -> Tensor:
        """The arguments of phi: ``a`` itself, or the two of a pair along the last axis."""
        return torch.cat([self.shift + a, self.shift - a], -1) if self.paired else a

    def mirror(self, tangents: Tensor) -> Tensor:
        """A tangent of ``a`` as the tangent of ``spread(a)``."""
        return torch.cat([tangents, -tangents], -1) if self.paired else tangents

    def fold(self, cotangents: Tensor) -> Tensor:
        """Adjoint of ``mirror``: a gradient of ``spread(a)`` as the gradient of ``a``."""
        if not self.paired:
            return cotangents
        first, second = cotangents.chunk(2, -1)
        return first - second

    def __call__(self, a: Tensor) -> Tensor:
        """Phi of the pre-activation ``(..., width)``, without the two scales."""
        return self.value(self.spread(a))


_silu = torch.nn.functional.silu

# Constants: largest slope of swish 1.0998; of the pair of swishes 1.1 * 1.004; of the pair of Pila
# 1.06. Sources: sine, Lu et al. 2021; LipSwish, Chen et al. 2019 (arXiv:1906.02735); CLipSwish,
# Perugachi-Diaz et al. 2021 (arXiv:2102.02694); Pila and CPila, Ahn et al. 2022.
ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("sin", _sin, torch.sin, 2 * math.pi, 1 / (2 * math.pi)),
        Activation("lipswish", _swish, _silu, 1.0, 1 / 1.1, learned_scale=True, fused=_swish_slope),
        Activation(
            "clipswish",
            _swish,
            _silu,
            1.0,
            1 / (1.1 * 1.004),
            paired=True,
            learned_scale=True,
            fused=_swish_slope,
        ),
        Activation("cpila", _pila, lambda a: _pila(a)[0], 1.0, 1 / 1.06, paired=True, shift=-0.2),
        Activation("tanh", _tanh, torch.tanh),
        Activation("elu", _elu, torch.nn.functional.elu),
    )
}
