"""Images at several resolutions: squeeze, and channels that leave early (factor-out)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Compose, Transform

__all__ = ["FirstChannels", "Squeezed", "multiscale"]

Level = Callable[[tuple[int, int, int]], list[Transform]]


class _Wrapper(Transform):
    """A transform of something smaller, seen from outside."""

    def __init__(self, event: Sequence[int], inner: Transform) -> None:
        super().__init__(event, inner.context)
        self.inner = inner

    def _wrap(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _unwrap(self, y: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner.to_latent(self._wrap(x), context)
        return self._unwrap(z, x), log_det

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, log_det = self.inner.to_data(self._wrap(z), context)
        return self._unwrap(x, z), log_det

    def certificate(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        return self.inner.certificate(self._wrap(x), self._wrap(z), context)


class Squeezed(_Wrapper):
    """A map of (4c, h, w) as one of (c, 2h, 2w): squeezed before, spread out again after.

    Squeezing makes channels 4i to 4i + 3 of the four pixels of each 2 x 2 square of channel i; its
    log_det is 0. Dinh et al. 2017 (arXiv:1605.08803), section 3.6.
    """

    def __init__(self, inner: Transform) -> None:
        c, h, w = inner.event
        super().__init__((c // 4, 2 * h, 2 * w), inner)

    def _wrap(self, x: Tensor) -> Tensor:
        # F.pixel_unshuffle and F.pixel_shuffle mistake the shape of an empty batch
        n, (c, h, w) = len(x), self.inner.event
        return x.reshape(n, c // 4, h, 2, w, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c, h, w)

    def _unwrap(self, y: Tensor, x: Tensor) -> Tensor:
        n, (c, h, w) = len(y), self.inner.event
        return y.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(x.shape)


class FirstChannels(_Wrapper):
    """A map of the first channels, past which the other channels of ``event`` go unchanged."""

    def __init__(self, event: Sequence[int], inner: Transform) -> None:
        super().__init__(event, inner)
        self.kept = inner.event[0]

    def _wrap(self, x: Tensor) -> Tensor:
        return x[:, : self.kept]

    def _unwrap(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.cat([y, x[:, self.kept :]], 1)


def multiscale(
    shape: tuple[int, int, int],
    scales: int | None,
    level: Level,
    factor_out: bool,
    most: int = 3,
) -> list[Transform]:
    """The maps ``level(shape)``, then squeezed once those of the next scale, and so on.

    ``factor_out``: half of the channels are latent after each squeeze; the others go on. The latent
    keeps the shape of the data, each of its values in the place of the pixels it came from. Source:
    Dinh et al. 2017, section 3.6. ``scales`` None: ``most``, or fewer where sides are odd. Raises
    ValueError for sides that cannot be halved so often.
    """
    c, h, w = shape
    halvings = 0
    while not (h % 2 ** (halvings + 1) or w % 2 ** (halvings + 1)):
        halvings += 1
    scales = min(most, halvings + 1) if scales is None else scales
    if not 1 <= scales <= halvings + 1:
        raise ValueError(
            f"scales={scales}: the sides of {h} x {w} can be halved {halvings} times; "
            f"give 1 to {halvings + 1}"
        )
    chain = level(shape)
    if scales > 1:
        squeezed = (4 * c, h // 2, w // 2)
        kept = (2 * c if factor_out else 4 * c, h // 2, w // 2)
        inner: Transform = Compose(multiscale(kept, scales - 1, level, factor_out))
        chain.append(Squeezed(FirstChannels(squeezed, inner) if factor_out else inner))
    return chain
