"""A target with what is known about it: normaliser, exact draws, reference quantities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .target import Target

__all__ = ["Box", "KnownTarget", "Reference", "grid"]

Box = tuple[tuple[float, float], tuple[float, float]]


def grid(box: Box, points: int) -> tuple[Tensor, float]:
    """Nodes ``(points^2, 2)`` of a rectangle rule in float64, and the area of a cell."""
    lines = [torch.linspace(a, b, points + 1, dtype=torch.float64)[:-1] for a, b in box]
    return torch.cartesian_prod(*lines), math.prod((b - a) / points for a, b in box)


@dataclass(frozen=True)
class Reference:
    """Independent draws ``(n, d)`` of ``names``; ``means`` and ``sds`` ``(d,)`` of ``count`` draws.

    ``draws`` are some of the ``count`` ones. Everything is float64.
    """

    names: tuple[str, ...]
    draws: Tensor
    means: Tensor
    sds: Tensor
    count: int


class KnownTarget(Target):
    """A built-in target.

    ``summary``: one line. ``log_normaliser``: log of the integral of exp(log_prob) over the
    support, in nats; None if unknown. ``box``: bounds in unconstrained space that hold all of a
    two-dimensional target but less than 1e-8. ``sampler(n, generator)``: exact independent draws
    ``(n, features)``, float64; None if there is no way. ``to_quantities`` and ``from_quantities``:
    between parameters ``(n, features)`` and the quantities of ``reference(name)``, where these
    differ. ``view``: what a picture of a two-dimensional target should show, in its own units;
    the box if nothing else is said.
    """

    def __init__(
        self,
        log_prob: Callable[[Any], Any],
        features: Any = None,
        support: Any = None,
        names: Any = None,
        *,
        name: str,
        summary: str,
        log_normaliser: float | None = None,
        box: Box | None = None,
        sampler: Callable[[int, torch.Generator], Tensor] | None = None,
        to_quantities: Callable[[Tensor], Tensor] | None = None,
        from_quantities: Callable[[Tensor], Tensor] | None = None,
        view: Box | None = None,
    ) -> None:
        super().__init__(log_prob, features, support, names, name=name)
        self.summary, self.log_normaliser, self.box = summary, log_normaliser, box
        self.sampler, self.view = sampler, view or box
        self.to_quantities, self.from_quantities = to_quantities, from_quantities

    def quantities(self, x: Tensor) -> Tensor:
        """What the reference draws hold, for parameters ``(n, features)``."""
        return x if self.to_quantities is None else self.to_quantities(x)

    def parameters_of(self, quantities: Tensor) -> Tensor:
        """The way back from ``quantities``, for log densities at reference draws."""
        return quantities if self.from_quantities is None else self.from_quantities(quantities)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact independent draws ``(n, features)``, float64.

        Raises ValueError for a target without a way to draw.
        """
        if self.sampler is None:
            raise ValueError(f"{self.name}: no exact draws; use reference({self.name!r})")
        return self.sampler(n, generator)
