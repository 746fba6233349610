"""What stands between the blocks of a flow: normalisation and a map that mixes the columns."""

from __future__ import annotations

from .actnorm import ActNorm
from .base import Transform
from .linear import LULinear

__all__ = ["mixing"]


def mixing(features: int, actnorm: bool, linear: str | None) -> list[Transform]:
    """The maps before a block: ActNorm if wanted, then what ``linear`` names."""
    if linear not in (None, "lu"):
        raise ValueError(f"linear={linear!r} is unknown; choose 'lu' or None")
    parts: list[Transform] = [ActNorm(features)] if actnorm else []
    return [*parts, LULinear(features)] if linear and features > 1 else parts
