"""Known densities through every flow of the registry: fits, pictures layer by layer, one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from ..data.toys import TOYS
from ..flow import Flow
from ..plots import zoo as plots_zoo
from ..plots.style import span
from ..training import FitConfig
from ..zoo import ZOO
from .densities import Density, Mixture, toy
from .fits import build, cells, learn, log_density, window
from .layers import curves, warps
from .parts import Count, Done, Job, Part, Positive, Row, Settings, among

__all__ = ["Zoo"]

SHOWN = 2000  # rows in the pictures
OVERHEAD = 2.0  # seconds for measuring and drawing one flow, to announce the time


class Zoo(Settings):
    """Which densities, and the budget of each fit: the first spent of ``steps`` and ``seconds``.

    ``flows`` chooses from the registry, by default all of it. ``options`` maps a flow to options
    that differ from its defaults; ``fit`` holds further settings of the fit.
    """

    mixtures: dict[str, Mixture] = Field(default_factory=dict)
    toys: tuple[str, ...] = ()
    flows: tuple[str, ...] = ()
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    fit: dict[str, Any] = Field(default_factory=dict)
    steps: Count
    seconds: Positive
    rows: Count
    test_rows: Count
    cells: Annotated[int, Field(ge=20)] = 120

    @model_validator(mode="after")
    def _names_exist(self) -> Zoo:
        among(self.toys, TOYS)
        among([*self.flows, *self.options], ZOO)
        among(self.fit, FitConfig.model_fields)
        if not self.mixtures and not self.toys:
            raise ValueError("there is no density; give mixtures or toys")
        return self

    def _names(self) -> list[str]:
        return [name for name in ZOO if not self.flows or name in self.flows]

    def densities(self) -> list[Density]:
        """The densities to learn, mixtures first."""
        mixtures = [mixture.density(name) for name, mixture in self.mixtures.items()]
        return [*mixtures, *map(toy, self.toys)]

    def minutes(self) -> float:
        count = len(self.mixtures) + len(self.toys)
        return count * len(self._names()) * (self.seconds + OVERHEAD) / 60

    def parts(self) -> Sequence[Part]:
        shared = self.model_dump(mode="json", exclude={"mixtures", "toys", "flows", "options"})
        found = []
        for density in self.densities():
            mixture = self.mixtures.get(density.name)
            about = density.name if mixture is None else mixture.model_dump(mode="json")
            for name in self._names():
                recipe = {**shared, "density": about, "flow": name,
                          "options": self.options.get(name, {})}  # fmt: skip
                work = partial(self._study, density, name)
                found.append(Part(f"{density.name}-{name}", recipe, work))
        return found

    def _study(self, density: Density, name: str, job: Job) -> dict[str, Any]:
        """Fit one flow to one density, draw it, and measure it on held-out rows."""
        generator = torch.Generator().manual_seed(job.seed)
        sizes = (self.rows, max(self.rows // 10, 100), self.test_rows)
        train, validation, test = (density.sample(n, generator) for n in sizes)
        flow = build(name, density.features, self.options.get(name, {}), job.seed)
        budget = {"seconds": self.seconds, "steps": self.steps, **self.fit}
        _, facts = learn(flow, train, validation, budget, job.seed, job)
        log_q = log_density(flow, test, finite=True)
        gap = density.log_prob(test) - log_q
        self._draw(density, name, flow, test[:SHOWN], generator, job)
        return {
            "log_prob": float(log_q.mean()),
            "se": float(log_q.std() / len(test) ** 0.5),
            "kl": float(gap.mean()),
            "kl_se": float(gap.std() / len(test) ** 0.5),
            "entropy": density.entropy,
            **facts,
        }

    def _draw(
        self, density: Density, name: str, flow: Flow, rows: Tensor, generator: torch.Generator,
        job: Job,
    ) -> None:
        with torch.no_grad():
            samples = flow.sample((len(rows),), generator=generator)
            latent = flow(rows)[0]
        title = f"{name} on {density.name}"
        if density.features == 1:
            ends = span(density.sample(100_000, generator).double().numpy(), 1e-4, 1 - 1e-4, 0.08)
            grid = torch.linspace(*ends, 600).unsqueeze(-1)
            true, learned = density.log_prob(grid).exp(), log_density(flow, grid).exp()
            figure = plots_zoo.flow_1d(
                rows, latent, samples, grid[:, 0], true, learned, curves(flow, rows), title
            )
            job.keep(grid=grid[:, 0], true=true, learned=learned)
        else:
            extent = window(density.sample(20_000, generator))
            nodes = cells(extent, self.cells)
            true = density.log_prob(nodes).exp().reshape(self.cells, -1)
            learned = log_density(flow, nodes).exp().reshape(self.cells, -1)
            figure = plots_zoo.flow_2d(rows, samples, extent, learned, warps(flow, rows), title)
            job.keep(extent=np.array(extent), true=true, learned=learned)
        job.draw(f"{density.name}-{name}", figure)

    def summarise(self, done: Mapping[str, Done], job: Job) -> Iterator[Row]:
        for density in self.densities():
            mine = {name: done[f"{density.name}-{name}"] for name in self._names()}
            self._overview(density, mine, job)
            for name, part in mine.items():
                labels = {"density": density.name, "flow": name}
                measure = "held-out log-density, nats"
                if part.error is not None:
                    yield Row(labels=labels, measure=measure, error=part.error)
                    continue
                r = part.result
                yield Row(
                    labels=labels, measure=measure, ours=r["log_prob"], se=r["se"],
                    exact=-r["entropy"],
                    more={
                        "KL": r["kl"], "KL se": r["kl_se"], "parameters": r["parameters"],
                        "steps": r["steps"], "seconds": r["fit_seconds"],
                    },
                )  # fmt: skip

    def _overview(self, density: Density, mine: Mapping[str, Done], job: Job) -> None:
        panels: dict[str, Any] = {}
        shown: dict[str, NDArray[Any]] = {}
        best_first = sorted(mine, key=lambda name: mine[name].result.get("kl", np.inf))
        for name in best_first:
            part = mine[name]
            if part.error is not None:
                panels[name] = None
                continue
            shown = part.shown()
            panels[f"{name}: {part.result['kl']:.3f}"] = shown["learned"]
        if not shown:
            return
        title = f"{density.name}: what each flow learned, with KL(data, flow) in nats"
        if density.features == 1:
            figure = plots_zoo.overview_1d(shown["grid"], shown["true"], panels, title)
        else:
            left, right, bottom, top = map(float, shown["extent"])
            extent = left, right, bottom, top
            figure = plots_zoo.overview_2d(extent, shown["true"], panels, title)
        job.draw(f"overview-{density.name}", figure)
