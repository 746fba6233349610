"""What stands between the blocks of a flow: normalisation and a map that mixes the columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .actnorm import ActNorm
from .base import Transform
from .linear import LULinear

__all__ = ["MIXINGS", "Permute", "Reverse", "check_mixing", "mixing"]


class Reverse(Transform):
    """The columns in opposite order; its own inverse, log_det 0."""

    def __init__(self, features: int) -> None:
        super().__init__((features,))

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.mT.flip(0).mT, x.new_zeros(x.shape[0])  # keeps feature-major arrays so

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.to_latent(z, context)


class Permute(Transform):
    """A fixed random order of the columns, drawn like a weight and saved; log_det 0."""

    order: Tensor

    def __init__(self, features: int) -> None:
        super().__init__((features,))
        self.register_buffer("order", torch.randperm(features))

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.mT.index_select(0, self.order).mT, x.new_zeros(x.shape[0])

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z.mT.index_select(0, self.order.argsort()).mT, z.new_zeros(z.shape[0])


MIXINGS = {"lu": LULinear, "reverse": Reverse, "permute": Permute}


def mixing(features: int, actnorm: bool, linear: str | None) -> list[Transform]:
    """The maps before a block: ActNorm if wanted, then what ``linear`` names.

    Raises ValueError for an unknown name.
    """
    if linear is not None and linear not in MIXINGS:
        known = ", ".join(map(repr, MIXINGS))
        raise ValueError(f"linear={linear!r} is unknown; choose {known} or None")
    parts: list[Transform] = [ActNorm(features)] if actnorm else []
    return [*parts, MIXINGS[linear](features)] if linear and features > 1 else parts


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
