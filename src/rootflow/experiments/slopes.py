"""How many blocks a steep function of one variable needs: one implicit, or log2 L residual ones.

The function is x / L for x < 0 and L x for x >= 0, on [-1, 1]. Source: Lu et al. 2021
(arXiv:2103.09527), figure with slopes 0.1 and 10, and theorem 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ..plots import slopes as plots_slopes
from ..solvers import Problem, find_root
from .fits import build, descend
from .parts import Count, Done, Job, Part, Positive, Row, Settings

__all__ = ["Slopes", "ThreeParameters", "lower_bound", "steep"]

HAND = "3 parameters, by hand"
TRAINED = "3 parameters, trained"
GRID = 4001  # points of [-1, 1] on which the largest error is sought; 0 and both ends included


def steep(x: Tensor, slope: float) -> Tensor:
    """The function to fit."""
    return torch.where(x < 0, x / slope, slope * x)


def lower_bound(slope: float, blocks: int) -> tuple[float, float]:
    """Least largest error of residual flows on [-1, 1]: that of theorem 3, and a sharper one.

    A flow of l blocks stretches no distance by more than 2^l; on the ball [0, 1] of radius 1/2 the
    theorem gives (L - 2^l) / 4. Comparing both ends of [0, 1] alone gives (L - 2^l) / 2.
    """
    gap = max(slope - 2.0**blocks, 0.0)
    return gap / 4, gap / 2


class ThreeParameters(nn.Module):
    """The smallest implicit block: x + relu(p1 x) = z + p2 relu(p3 z), each |p| < 1.

    Both sides are contractions away from the identity for every value of the raw parameters
    ``(3,)``, p = tanh(raw).
    """

    def __init__(self, raw: Tensor) -> None:
        super().__init__()
        self.raw = nn.Parameter(raw.clone())

    @classmethod
    def by_hand(cls, slope: float) -> ThreeParameters:
        """The exact block: the left side has slope 1 / L below 0, the right side 1 / L above."""
        steepness = 1 - 1 / slope
        root = math.sqrt(steepness)
        return cls(torch.atanh(torch.tensor([-steepness, -root, root], dtype=torch.float64)))

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``(n, 1)`` to z; differentiable through the root, not through its search."""
        first, second, third = self.raw.tanh()
        side = x + torch.relu(first * x)

        def residual(z: Tensor, side: Tensor, second: Tensor, third: Tensor) -> Tensor:
            return z + second * torch.relu(third * z) - side

        problem = Problem(residual, (side, second, third), frozenset({0}))
        return find_root(problem, side).value


class Slopes(Settings):
    """One function fitted by several maps, then a grid of slopes against numbers of blocks.

    ``slope`` and ``blocks`` are those of the published figure, ``starts`` how often the three
    parameters are trained from random ones. ``stairs`` are the slopes of the grid, with 1 to
    ``most_blocks`` residual blocks. ``options`` are those of all trained networks.
    """

    slope: Annotated[float, Field(gt=1)]
    blocks: tuple[Count, ...]
    starts: Count
    stairs: tuple[Annotated[float, Field(gt=1)], ...]
    most_blocks: Count
    options: dict[str, Any] = Field(default_factory=dict)
    steps: Count
    batch: Count
    lr: Positive = 3e-3
    seconds_per_block: Positive = 2.0  # of a fit of these steps, to announce the time

    def minutes(self) -> float:
        stairs = len(self.stairs) * self.most_blocks * (self.most_blocks + 1) / 2
        blocks = sum(self.blocks) + 4 + self.starts + stairs
        return blocks * self.seconds_per_block / 60

    def parts(self) -> Sequence[Part]:
        shared = self.model_dump(mode="json", include={"slope", "options", "steps", "batch", "lr"})

        def part(key: str, work: Callable[[Job], dict[str, Any]]) -> Part:
            return Part(key, {**shared, "part": key}, work)

        found = [part("by-hand", self._by_hand)]
        found += [part(f"trained-{k}", partial(self._trained, k)) for k in range(self.starts)]
        for name, count in self._maps():
            found.append(part(f"{name}-{count}", partial(self._network, name, count, self.slope)))
        for slope in self.stairs:
            for count in range(1, self.most_blocks + 1):
                work = partial(self._network, "residual", count, slope)
                found.append(part(f"stairs-{slope:g}-{count}", work))
        return found

    def _maps(self) -> list[tuple[str, int]]:
        return [*(("residual", count) for count in self.blocks), ("implicit", 1), ("monotone", 1)]

    def _by_hand(self, job: Job) -> dict[str, Any]:
        block = ThreeParameters.by_hand(self.slope)
        return _measure(block, self.slope, job, torch.float64) | {"parameters": 3, "steps": 0}

    def _trained(self, start: int, job: Job) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 * job.seed + start)
        block = ThreeParameters(0.5 * torch.randn(3, generator=generator))
        self._regress(block, block.parameters(), self.slope, 10 * self.lr, generator, job)
        found = [round(float(p), 6) for p in block.raw.detach().tanh()]
        measured = _measure(block, self.slope, job, torch.float32)
        return measured | {"parameters": 3, "steps": self.steps, "found": found}

    def _network(self, name: str, count: int, slope: float, job: Job) -> dict[str, Any]:
        plain = {"actnorm": False, "linear": None}  # the theorem is about blocks alone
        flow = build(name, 1, {**plain, **self.options, "blocks": count}, job.seed)
        flow.train()
        parameters = [p for p in flow.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(job.seed)

        def image(x: Tensor) -> Tensor:
            z: Tensor = flow(x)[0]
            return z

        self._regress(image, parameters, slope, self.lr, generator, job)
        flow.eval()
        measured = _measure(image, slope, job, torch.float32)
        return measured | {"parameters": sum(p.numel() for p in parameters), "steps": self.steps}

    def _regress(
        self, image: Callable[[Tensor], Tensor], parameters: Any, slope: float, lr: float,
        generator: torch.Generator, job: Job,
    ) -> None:
        """Least squares on fresh uniform points."""

        def loss() -> Tensor:
            x = 2 * torch.rand(self.batch, 1, generator=generator) - 1
            return (image(x) - steep(x, slope)).square().mean()

        descend(loss, parameters, self.steps, lr, job)

    def summarise(self, done: Mapping[str, Done], job: Job) -> Iterator[Row]:
        function = f"slopes {1 / self.slope:g} and {self.slope:g}"
        best = min(
            (done[f"trained-{k}"] for k in range(self.starts)),
            key=lambda part: part.result.get("sup", math.inf),
        )
        exact = sum(
            done[f"trained-{k}"].result.get("sup", math.inf) < 0.01 * self.slope
            for k in range(self.starts)
        )
        chosen = {HAND: done["by-hand"], TRAINED: best}
        for name, count in self._maps():
            chosen[f"{name}, {count} block{'s' * (count > 1)}"] = done[f"{name}-{count}"]
        self._draw(chosen, done, job)
        for name, part in chosen.items():
            kind, _, size = name.partition(", ")
            blocks = int(size.split()[0]) if kind == "residual" else None
            more = {"starts": float(self.starts), "exact": float(exact)} if name == TRAINED else {}
            yield self._row(function, name, part, self.slope, blocks, more)
        for slope in self.stairs:
            for count in range(1, self.most_blocks + 1):
                name = f"residual, {count} block{'s' * (count > 1)}"
                function = f"slopes {1 / slope:g} and {slope:g}, stairs"
                part = done[f"stairs-{slope:g}-{count}"]
                yield self._row(function, name, part, slope, count, {})

    def _row(
        self, function: str, name: str, part: Done, slope: float, count: int | None,
        more: dict[str, float],
    ) -> Row:
        labels, measure = {"function": function, "map": name}, "largest error on [-1, 1]"
        if part.error is not None:
            return Row(labels=labels, measure=measure, error=part.error)
        r = part.result
        theorem, sharp = (None, None) if count is None else lower_bound(slope, count)
        return Row(
            labels=labels, measure=measure, ours=r["sup"],
            more={
                "theorem": theorem, "bound": sharp, "mse": r["mse"], "parameters": r["parameters"],
                "seconds": r["seconds"], **more,
            },
        )  # fmt: skip

    def _draw(self, chosen: Mapping[str, Done], done: Mapping[str, Done], job: Job) -> None:
        good = {name: part for name, part in chosen.items() if part.error is None}
        x = torch.linspace(-1, 1, GRID, dtype=torch.float64)
        fits = {name: part.shown()["image"] for name, part in good.items()}
        notes = {name: f"largest error {part.result['sup']:.2g}" for name, part in good.items()}
        title = f"Fits of x / {self.slope:g} below 0 and {self.slope:g} x above"
        job.draw("fits", plots_slopes.fits(x, steep(x, self.slope), fits, notes, title))
        residual = {
            count: done[f"residual-{count}"].result["sup"]
            for count in self.blocks
            if done[f"residual-{count}"].error is None
        }
        others = {n: p.result["sup"] for n, p in good.items() if not n.startswith("residual")}
        job.draw("errors", plots_slopes.errors(self.slope, residual, others, lower_bound))
        if not self.stairs:
            return
        shares = np.full((len(self.stairs), self.most_blocks), np.nan)
        for i, slope in enumerate(self.stairs):
            for count in range(1, self.most_blocks + 1):
                part = done[f"stairs-{slope:g}-{count}"]
                if part.error is None:
                    shares[i, count - 1] = part.result["sup"] / slope
        job.draw("staircase", plots_slopes.staircase(self.stairs, shares))


@torch.no_grad()
def _measure(
    image: Callable[[Tensor], Tensor], slope: float, job: Job, dtype: torch.dtype
) -> dict[str, Any]:
    x = torch.linspace(-1, 1, GRID, dtype=dtype).unsqueeze(-1)
    got = image(x)
    error = (got - steep(x, slope)).double().abs()
    job.keep(image=got.double().squeeze(-1))
    return {"sup": float(error.max()), "mse": float(error.square().mean())}
