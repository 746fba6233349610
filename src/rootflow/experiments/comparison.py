"""Several flows on several sets of rows for equal training time: scores and paired differences."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from ..flow import Flow
from ..training import FitConfig
from ..zoo import ZOO
from .fits import build, learn, log_density
from .parts import Count, Done, Job, Part, Positive, Row, Settings, Strict, among

__all__ = ["Comparison", "Rows", "Variant", "estimate"]

Scores = NDArray[np.float64]


class Rows(NamedTuple):
    """What one fit sees, each (n, features) float32; ``test`` selects nothing."""

    train: Tensor
    validation: Tensor
    test: Tensor


class Variant(Strict):
    """One row of the table: a flow of the registry, its options, and what its fit does otherwise.

    ``only``: the data on which it runs, by default all.
    """

    flow: str
    options: dict[str, Any] = Field(default_factory=dict)
    fit: dict[str, Any] = Field(default_factory=dict)
    only: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_exist(self) -> Variant:
        among([self.flow], ZOO)
        among(self.fit, FitConfig.model_fields)
        return self


class Comparison(Settings):
    """Every flow on every set of rows, from ``seeds`` starts; equal budgets, equal test rows.

    ``flows`` maps the name of a row to what it is; ``references`` are names from which the others'
    scores are subtracted, row by row of the test data. A fit ends at the first of ``steps`` and
    ``seconds`` (of processor time, which other work on the machine does not shorten); ``fit`` holds
    its further settings, ``measuring`` the seconds of building and scoring, to announce the time.
    """

    DATA: ClassVar[str]
    MEASURE: ClassVar[str]
    BETTER: ClassVar[Literal["higher", "lower"]]
    UNIT: ClassVar[float]  # what a log-density in nats is multiplied with

    flows: Annotated[dict[str, Variant], Field(min_length=1)]
    references: tuple[str, ...] = ()
    seeds: Count = 1
    steps: Count
    seconds: Positive
    fit: dict[str, Any] = Field(default_factory=dict)
    measuring: Positive = 2.0

    @model_validator(mode="after")
    def _names_exist(self) -> Comparison:
        among(self.fit, FitConfig.model_fields)
        among(self.references, self.flows)
        for variant in self.flows.values():
            among(variant.only, self.names())
        return self

    @abstractmethod
    def names(self) -> Sequence[str]:
        """The sets of rows."""

    @abstractmethod
    def rows(self, name: str, seed: int) -> Rows:
        """Those of one set. Raises RootflowError if they are not here."""

    def exact(self, name: str, seed: int) -> Tensor | None:
        """Exact log-density (n,) of the test rows, where it is known."""
        return None

    def entropy(self, name: str) -> float | None:
        """In nats, where it is known."""
        return None

    def budget(self, name: str) -> dict[str, Any]:
        """Seconds, steps and further settings of the fits to one set."""
        return {"seconds": self.seconds, "steps": self.steps, **self.fit}

    def variant(self, name: str, label: str) -> Variant:
        """A row of the table as it is for one set."""
        return self.flows[label]

    def pictured(self, name: str, flow: Flow) -> dict[str, Tensor]:
        """Arrays to keep for the pictures."""
        return {}

    def draw(self, done: Mapping[str, Done], job: Job) -> None:
        """Draw the pictures."""

    def rivals(self, name: str) -> list[str]:
        """The rows of the table for one set."""
        return [label for label, v in self.flows.items() if not v.only or name in v.only]

    def minutes(self) -> float:
        one = (
            float(self.budget(name)["seconds"]) + self.measuring
            for name in self.names()
            for _ in self.rivals(name)
        )
        return self.seeds * sum(one) / 60

    def parts(self) -> Sequence[Part]:
        kept = {"flows", "references", "seeds", "tables", "toys", "shown", "measuring"}
        about = self.model_dump(mode="json", exclude=kept)
        return [
            Part(
                key(name, label, start),
                {**about, "data": name, "flow": self.variant(name, label).model_dump(mode="json"),
                 "start": start, **self.budget(name)},
                partial(self._study, name, label, start),
            )
            for name in self.names()
            for start in range(self.seeds)
            for label in self.rivals(name)
        ]  # fmt: skip

    def _study(self, name: str, label: str, start: int, job: Job) -> dict[str, Any]:
        """Fit one flow, its best weights chosen on the validation rows; score the test rows."""
        variant, seed = self.variant(name, label), job.seed + start
        rows = self.rows(name, seed)
        flow = build(variant.flow, rows.train.shape[1], variant.options, seed)
        budget = {**self.budget(name), **variant.fit}
        history, facts = learn(flow, rows.train, rows.validation, budget, seed, job)
        job.keep(log_q=log_density(flow, rows.test, finite=True), **self.pictured(name, flow))
        return {**facts, "validation": history.best_log_prob, "best_step": history.best_step}

    def summarise(self, done: Mapping[str, Done], job: Job) -> Iterator[Row]:
        self.draw(done, job)
        for name in self.names():
            scores = {label: self._scores(name, label, done) for label in self.rivals(name)}
            truth = [self.exact(name, job.seed + start) for start in range(self.seeds)]
            entropy = self.entropy(name)
            for label, found in scores.items():
                parts = [done[key(name, label, start)] for start in range(self.seeds)]
                labels = {self.DATA: name, "flow": label}
                if found is None:
                    error = next(part.error for part in parts if part.error is not None)
                    yield Row(labels=labels, measure=self.MEASURE, error=error)
                    continue
                mean, se = estimate(found)
                more: dict[str, float | None] = {"seeds": self.seeds}
                if self.seeds > 1:
                    more["se over rows"] = float(np.mean([estimate(s[None])[1] for s in found]))
                if entropy is not None:
                    exact = np.stack([t.numpy() for t in truth if t is not None]) * self.UNIT
                    more["KL"], more["KL se"] = estimate(found - exact)
                for other in self.references:
                    base, title = scores.get(other), f"minus {other}"
                    gap = (None, None) if base is None or other == label else estimate(found - base)
                    more[title], more[f"{title} se"] = gap
                for title in ("parameters", "steps", "seconds"):
                    fact = title.replace("seconds", "fit_seconds")
                    more[title] = float(np.mean([part.result[fact] for part in parts]))
                yield Row(
                    labels=labels, measure=self.MEASURE, ours=mean, se=se, better=self.BETTER,
                    exact=None if entropy is None else -entropy * self.UNIT, more=more,
                )  # fmt: skip

    def _scores(self, name: str, label: str, done: Mapping[str, Done]) -> Scores | None:
        """In the unit of the table, (seeds, test rows); None if a part failed."""
        parts = [done[key(name, label, start)] for start in range(self.seeds)]
        if any(part.error is not None for part in parts):
            return None
        return np.stack([part.shown()["log_q"] for part in parts]) * self.UNIT


def key(name: str, label: str, start: int) -> str:
    """The part of one fit, a file name."""
    return "-".join([*re.findall(r"[a-z0-9]+", f"{name} {label}".lower()), str(start)])


def estimate(scores: Scores) -> tuple[float, float]:
    """Mean of (seeds, rows) and its standard error: over the seeds, or over the rows of one."""
    over = scores.mean(1) if len(scores) > 1 else scores[0]
    return float(over.mean()), float(over.std(ddof=1) / math.sqrt(len(over)))
