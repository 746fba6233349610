"""Toy densities learned by several flows for equal time, in bits beside their true entropies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..data.toys import TOYS
from ..flow import Flow
from ..plots import lengths as plots_lengths
from ..plots.zoo import Extent
from .comparison import Comparison, Rows, key
from .fits import cells, log_density, window
from .parts import Count, Done, Job, among

__all__ = ["Toys"]


class Toys(Comparison):
    """Flows on toys, judged by ``test_rows`` fresh points.

    The densities of the flows ``shown`` are drawn beside the exact ones, on ``cells`` squared.
    """

    DATA: ClassVar[str] = "density"
    MEASURE: ClassVar[str] = "bits on fresh points"
    BETTER: ClassVar[Literal["higher", "lower"]] = "lower"
    UNIT: ClassVar[float] = -1 / math.log(2)

    toys: tuple[str, ...]
    train_rows: Count
    test_rows: Count
    shown: tuple[str, ...] = ()
    cells: Annotated[int, Field(ge=20)] = 150

    @model_validator(mode="after")
    def _toys_exist(self) -> Toys:
        among(self.toys, TOYS)
        among(self.shown, self.flows)
        return self

    def names(self) -> Sequence[str]:
        return self.toys

    def rows(self, name: str, seed: int) -> Rows:
        generator = torch.Generator().manual_seed(seed)
        sizes = self.train_rows, max(self.train_rows // 10, 100), self.test_rows
        return Rows(*(TOYS[name].sample(n, generator) for n in sizes))

    def exact(self, name: str, seed: int) -> Tensor:
        return TOYS[name].log_prob(self.rows(name, seed).test)

    def entropy(self, name: str) -> float:
        return TOYS[name].entropy()

    def pictured(self, name: str, flow: Flow) -> dict[str, Tensor]:
        return {"learned": log_density(flow, self._nodes(name)[1]).exp().float()}

    def _nodes(self, name: str) -> tuple[Extent, Tensor]:
        extent = window(TOYS[name].sample(20_000, torch.Generator().manual_seed(0)))
        return extent, cells(extent, self.cells)

    def draw(self, done: Mapping[str, Done], job: Job) -> None:
        """The exact density of each toy and what some flows learned, as in the published figure."""
        strips = []
        for name in self.toys:
            extent, nodes = self._nodes(name)
            shape = (self.cells, self.cells)
            exact = TOYS[name].log_prob(nodes).exp().reshape(shape)
            learned: dict[str, Any] = {}
            for label in self.shown:
                part = done.get(key(name, label, 0))
                if part is None:
                    continue
                if part.error is not None:
                    learned[label] = None
                    continue
                arrays = part.shown()
                bits = arrays["log_q"].mean() * self.UNIT
                learned[f"{label}: {bits:.3f}"] = arrays["learned"].reshape(shape)
            title = f"{name}: {self.entropy(name) / math.log(2):.3f}"
            strips.append(plots_lengths.Strip(title, extent, exact, learned))
        if self.shown:
            title = "Exact and learned densities, with entropy and scores in bits"
            job.draw("densities", plots_lengths.strips(strips, title))
