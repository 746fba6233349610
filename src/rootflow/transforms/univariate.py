"""Increasing functions of one variable, the parts that coupling and autoregressive flows share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Affine", "Shift", "Univariate"]


class Univariate:
    """A family of increasing functions of one variable, each given by ``size`` numbers theta.

    Both directions act elementwise: x of any shape ``s``, theta ``(size, *s)``, results of shape
    ``s``. The numbers come first, so that each of them is one contiguous array over the batch.
    """

    size: int

    def initial(self) -> Tensor:
        """The theta ``(size,)`` of the identity."""
        return torch.zeros(self.size)

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Image of x and the logarithm of the slope there."""
        raise NotImplementedError

    def inverse(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The x whose image is z, and the logarithm of the slope of this inverse."""
        raise NotImplementedError


class Shift(Univariate):
    """z = x + t; Dinh et al. 2015 (arXiv:1410.8516), equation 9."""

    size = 1

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return x + theta[0], torch.zeros_like(x)

    def inverse(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return z - theta[0], torch.zeros_like(z)


class Affine(Univariate):
    """z = x exp(s) + t, with s bent smoothly into (-limit, limit) so that no scale overflows.

    Dinh et al. 2017 (arXiv:1605.08803), equation 7; the bend is limit tanh(s / limit).
    """

    size = 2
    limit = math.log(1000.0)

    def _parts(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        s, t = theta.unbind(0)
        return torch.tanh(s / self.limit) * self.limit, t

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self._parts(theta)
        return torch.addcmul(t, x, s.exp()), s

    def inverse(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self._parts(theta)
        return (z - t) * (-s).exp(), -s
