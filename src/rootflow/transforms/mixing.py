"""What stands between the blocks: normalisation, and a map that mixes columns or channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .actnorm import ActNorm
from .base import Transform, event_of
from .linear import LULinear

__all__ = ["MIXINGS", "Permute", "Reverse", "alternating", "check_mixing", "mixing", "stacked"]


class Reverse(Transform):
    """The columns or channels in opposite order; its own inverse, log_det 0."""

    def __init__(self, event: int | Sequence[int]) -> None:
        super().__init__(event_of(event))

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        # transposed, so that feature-major arrays stay so
        return x.transpose(0, 1).flip(0).transpose(0, 1), x.new_zeros(x.shape[0])

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.to_latent(z, context)


class Permute(Transform):
    """A fixed random order of columns or channels, drawn like a weight and saved; log_det 0."""

    order: Tensor

    def __init__(self, event: int | Sequence[int]) -> None:
        super().__init__(event_of(event))
        self.register_buffer("order", torch.randperm(self.event[0]))

    def _reorder(self, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1).index_select(0, order).transpose(0, 1)
        return x, x.new_zeros(x.shape[0])

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._reorder(x, self.order)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._reorder(z, self.order.argsort())


MIXINGS = {"lu": LULinear, "reverse": Reverse, "permute": Permute}


def mixing(event: int | Sequence[int], actnorm: bool, linear: str | None) -> list[Transform]:
    """The maps before a block: ActNorm if wanted, then what ``linear`` names.

    ``event``: how many columns, or the shape of images. Raises ValueError for an unknown name.
    """
    if linear is not None and linear not in MIXINGS:
        known = ", ".join(map(repr, MIXINGS))
        raise ValueError(f"linear={linear!r} is unknown; choose {known} or None")
    parts: list[Transform] = [ActNorm(event)] if actnorm else []
    return [*parts, MIXINGS[linear](event)] if linear and event_of(event)[0] > 1 else parts


def check_mixing(tails: str, actnorm: bool, linear: str | None) -> str | None:
    """What ``linear`` means under these tails: "auto" is "lu", or "permute" on an interval.

    Raises ValueError for maps that would lead out of the interval.
    """
    if linear == "auto":
        linear = "lu" if tails == "linear" else "permute"
    if tails != "linear" and (actnorm or linear == "lu"):
        wrong = "actnorm=True" if actnorm else "linear='lu'"
        raise ValueError(
            f"{wrong} leads out of the interval that tails={tails!r} keeps; "
            "use actnorm=False and linear='permute', 'reverse' or None"
        )
    return linear


def alternating(
    layer: Callable[[int], Transform], between: Callable[[int], list[Transform]], blocks: int
) -> list[Transform]:
    """Layers 0 to ``blocks - 1``, before the k-th and at the end what ``between(k)`` makes.

    Raises ValueError for less than one block.
    """
    if blocks < 1:
        raise ValueError(f"blocks={blocks} must be at least 1")
    chain: list[Transform] = []
    for k in range(blocks):
        chain += [*between(k), layer(k)]
    return [*chain, *between(blocks)]


def stacked(
    layer: Callable[[], Transform], features: int, blocks: int, actnorm: bool, linear: str | None
) -> list[Transform]:
    """``blocks`` layers, before each and after the last what ``mixing`` puts there."""
    return alternating(lambda _: layer(), lambda _: mixing(features, actnorm, linear), blocks)
