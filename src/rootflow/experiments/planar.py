"""Flows of growing length fitted to densities on the plane by variational inference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from .. import inference
from ..inference.diagnostics import grid_kl
from ..plots import lengths as plots_lengths
from ..plots.zoo import Extent
from ..zoo import ZOO
from .fits import cells
from .parts import Count, Done, Job, Part, Positive, Row, Settings, among, plain

__all__ = ["PlanarInference"]

# Seconds for measuring one fit and drawing, by points of the grid, to announce the time.
OVERHEAD, OF_GRID = 0.5, 5.0 / 256**2


class PlanarInference(Settings):
    """Every target with every flow at every length; the exact KL(q, p) of each by a grid.

    ``targets`` maps names of ``rootflow.inference`` to half the width of the window drawn.
    ``flows`` maps a flow of the registry to its options; ``lengths`` become its ``blocks``, of
    which ``shown`` are drawn. ``fit`` holds further settings of the fit. Each fit ends at the first
    of ``steps`` and ``seconds``; of ``starts`` seeds the one with the best ELBO is kept.
    """

    targets: dict[str, Positive]
    flows: dict[str, dict[str, Any]]
    lengths: tuple[Count, ...]
    shown: tuple[Count, ...]
    fit: dict[str, Any] = Field(default_factory=dict)
    steps: Count
    seconds: Positive
    starts: Count = 1
    points: Annotated[int, Field(ge=8)] = 256
    cells: Annotated[int, Field(ge=20)] = 120

    @model_validator(mode="after")
    def _names_exist(self) -> PlanarInference:
        among(self.targets, inference.TARGETS)
        among(self.flows, ZOO)
        among(self.fit, inference.VIConfig.model_fields)
        among(self.shown, self.lengths)
        return self

    def _combinations(self) -> Iterator[tuple[str, str, int]]:
        return (
            (target, name, length)
            for target in self.targets
            for name in self.flows
            for length in self.lengths
        )

    def minutes(self) -> float:
        count = len(self.targets) * len(self.flows) * len(self.lengths)
        measuring = OVERHEAD + OF_GRID * self.points**2
        return count * (self.starts * self.seconds + measuring) / 60

    def parts(self) -> Sequence[Part]:
        shared = self.model_dump(mode="json", include={"fit", "steps", "seconds", "starts"})
        shared |= {"points": self.points, "cells": self.cells}
        return [
            Part(
                f"{target}-{name}-{length}",
                {
                    **shared, "target": target, "window": self.targets[target], "flow": name,
                    "options": self.flows[name], "length": length,
                },
                partial(self._study, target, name, length),
            )
            for target, name, length in self._combinations()
        ]  # fmt: skip

    def _study(self, target_name: str, name: str, length: int, job: Job) -> dict[str, Any]:
        """Fit, keep the best start, and compare it with the exact density on a grid."""
        target = inference.target(target_name)
        if target.log_normaliser is None:
            raise ValueError(f"{target_name} has no known normaliser")
        best: inference.Posterior | None = None
        for start in range(self.starts):
            settings = {
                "validate_seconds": max(self.seconds / 10, 0.2), "steps": self.steps,
                "minutes": self.seconds / 60, **self.fit,
            }  # fmt: skip
            found = inference.fit(
                target, name,
                config=inference.VIConfig(seed=job.seed + 1000 * start, **settings),
                options={**plain(self.flows[name]), "blocks": length},
                on_record=partial(_note, job, start), should_stop=job.should_stop,
            )  # fmt: skip
            job.stop_if_asked()
            if best is None or found.elbo.value > best.elbo.value:
                best = found
        assert best is not None
        best.save(job.folder)
        flow = best._exact()
        exact = grid_kl(flow.log_prob, target, points=self.points)
        if not math.isfinite(exact.value):
            raise ArithmeticError("the flow's density is not finite on the grid")
        extent = _extent(self.targets[target_name])
        nodes = cells(extent, self.cells)
        shape = (self.cells, self.cells)
        job.keep(
            true=_within(target, nodes, target.log_normaliser).reshape(shape),
            learned=best.log_prob(nodes).exp().reshape(shape),
        )
        trace = best.trace
        return {
            "kl": exact.value, "kl_error": exact.error, "mass": exact.mass,
            "reliable": exact.reliable,
            "kl_draws": target.log_normaliser - best.elbo.value, "kl_draws_se": best.elbo.se,
            "khat": best.khat if math.isfinite(best.khat) else None,
            "parameters": sum(p.numel() for p in flow.parameters() if p.requires_grad),
            "steps": 0 if trace is None else trace.steps,
            "fit_seconds": 0.0 if trace is None else round(trace.seconds, 3),
        }  # fmt: skip

    def summarise(self, done: Mapping[str, Done], job: Job) -> Iterator[Row]:
        self._draw(done, job)
        for target, name, length in self._combinations():
            part = done[f"{target}-{name}-{length}"]
            labels = {"target": target, "flow": name, "length": str(length)}
            measure = "KL(q, p) by grid integration, nats"
            if part.error is not None:
                yield Row(labels=labels, measure=measure, error=part.error)
                continue
            r = part.result
            yield Row(
                labels=labels, measure=measure, ours=r["kl"], se=r["kl_error"], exact=0.0,
                more={
                    "mass": r["mass"], "KL by draws": r["kl_draws"], "its se": r["kl_draws_se"],
                    "k-hat": r["khat"], "parameters": r["parameters"], "steps": r["steps"],
                    "seconds": r["fit_seconds"],
                },
            )  # fmt: skip

    def _draw(self, done: Mapping[str, Done], job: Job) -> None:
        """For each flow the densities by length; for all, the KL by length."""
        good = {key: part for key, part in done.items() if part.error is None}
        for name in self.flows:
            rows = []
            for target, half in self.targets.items():
                keys = {length: f"{target}-{name}-{length}" for length in self.shown}
                arrays = {n: good[key].shown() for n, key in keys.items() if key in good}
                if not arrays:
                    continue
                learned = {
                    f"length {n}" + (f": {good[keys[n]].result['kl']:.3g}" if n in arrays else ""):
                    arrays[n]["learned"] if n in arrays else None
                    for n in self.shown
                }  # fmt: skip
                exact = next(iter(arrays.values()))["true"]
                rows.append(plots_lengths.Strip(target, _extent(half), exact, learned))
            if rows:
                title = f"{name} flows of growing length, with the exact KL(q, p) in nats"
                job.draw(name, plots_lengths.strips(rows, title))
        values: dict[str, dict[str, dict[int, float]]] = {
            target: {name: {} for name in self.flows} for target in self.targets
        }
        for target, name, length in self._combinations():
            if (key := f"{target}-{name}-{length}") in good:
                values[target][name][length] = good[key].result["kl"]
        job.draw("kl-by-length", plots_lengths.by_length(values, "KL(q, p) in nats by length"))


def _note(job: Job, start: int, record: dict[str, Any]) -> None:
    job.records.append({"start": start, **record})


def _extent(half: float) -> Extent:
    return -half, half, -half, half


def _within(target: inference.Target, nodes: Tensor, log_normaliser: float) -> np.ndarray:
    """The exact density (n,) at nodes (n, 2); zero outside the support."""
    inside = target.inside(nodes)
    density = torch.zeros(len(nodes), dtype=torch.float64)
    density[inside] = (target.log_prob(nodes[inside].double()) - log_normaliser).exp().double()
    return density.numpy()
