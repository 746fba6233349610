"""Couplings of images by convolutions, and Glow made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .actnorm import ActNorm
from .base import Compose, Transform
from .conditioners import check_hidden, found_in
from .linear import LULinear
from .multiscale import Squeezed, multiscale
from .univariate import Affine, Univariate

__all__ = ["ImageCoupling", "glow_images"]

Direction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ImageCoupling(Transform):
    """z_a = x_a and z_b = f(x_b; theta) with theta = net(x_a), a and b the halves of the channels.

    ``flip`` exchanges them. The net is convolutional with zero padding, kernels 3 x 3 at both ends
    and 1 x 1 between, started at the identity map. Both directions are closed and evaluate the net
    once; log_det is exact. Source: Kingma and Dhariwal 2018 (arXiv:1807.03039), section 3.3.
    Raises ValueError for a single channel.
    """

    def __init__(
        self,
        shape: Sequence[int],
        univariate: Univariate,
        *,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        flip: bool = False,
    ) -> None:
        super().__init__(shape)
        channels = self.event[0]
        if channels < 2:
            raise ValueError(f"shape={self.event}: a coupling needs at least two channels")
        self.univariate, self.flip = univariate, flip
        self.sizes = [channels // 2, channels - channels // 2]
        drivers, self.driven = reversed(self.sizes) if flip else self.sizes
        self.activation = found_in(activation).plain
        widths = [drivers, *check_hidden(hidden), univariate.size * self.driven]
        inner = [1] * (len(widths) - 3)
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, kernel, padding=kernel // 2)
            for i, o, kernel in zip(widths, widths[1:], [3, *inner, 3], strict=False)
        )
        with torch.no_grad():
            last = self.layers[-1]
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            last.bias.copy_(univariate.initial().repeat_interleave(self.driven))  # type: ignore[operator]

    def _theta(self, driver: Tensor) -> Tensor:
        """The numbers ``(size, n, driven, h, w)`` of the map."""
        h = driver
        for k, layer in enumerate(self.layers):
            h = layer(self.activation(h) if k else h)
        n, _, *places = h.shape
        return h.view(n, self.univariate.size, self.driven, *places).transpose(0, 1)

    def _move(self, univariate: Direction, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.split(x, self.sizes, 1)
        if self.flip:
            a, log_slope = univariate(a, self._theta(b))
        else:
            b, log_slope = univariate(b, self._theta(a))
        return torch.cat([a, b], 1), log_slope.flatten(1).sum(1)

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._move(self.univariate.forward, x)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._move(self.univariate.inverse, z)


def glow_images(
    shape: tuple[int, int, int],
    *,
    scales: int | None = None,
    blocks: int = 8,
    hidden: Sequence[int] = (128, 128),
    activation: str = "relu",
    factor_out: bool = True,
) -> list[Transform]:
    """Squeeze, ``blocks`` steps of ActNorm, permuted LU map, affine coupling; all ``scales`` times.

    Kingma and Dhariwal 2018 (arXiv:1807.03039), figure 2. The halves of a coupling alternate, and
    the permutation is drawn for every second step. Two scales unless sides are odd before. Raises
    ValueError for odd sides.
    """
    if blocks < 1:
        raise ValueError(f"blocks={blocks} must be at least 1")
    c, h, w = shape
    if h % 2 or w % 2:
        raise ValueError(f"{h} x {w}: glow squeezes before the first scale; it needs even sides")

    def level(shape: tuple[int, int, int]) -> list[Transform]:
        chain: list[Transform] = []
        for k in range(blocks):
            chain += [ActNorm(shape), LULinear(shape, permute=k % 2 == 0)]
            net = {"hidden": hidden, "activation": activation, "flip": k % 2 == 1}
            chain.append(ImageCoupling(shape, Affine(), **net))  # type: ignore[arg-type]
        return [*chain, ActNorm(shape)]

    squeezed = 4 * c, h // 2, w // 2
    return [Squeezed(Compose(multiscale(squeezed, scales, level, factor_out, most=2)))]
