"""Classifiers with vanilla, residual and implicit blocks for growing restrictions: test errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from .. import classification
from ..classification import BLOCKS, DEFAULTS
from ..data import Images, read_images
from ..plots.errors import by_restriction
from ..training import FitConfig
from .parts import Count, Done, Job, Part, Positive, Row, Settings, among

__all__ = ["Classify"]

FREE = "vanilla"  # the block that has no coefficient


class Classify(Settings):
    """Every block with every bound ``coefficients`` on its convolutions, on every set of images.

    ``width`` and ``pool`` as in ``Classifier``. A fit ends at the first of ``steps`` and
    ``seconds`` (of processor time); ``fit`` holds its further settings, ``measuring`` the seconds
    of building and testing, to announce the time. The split depends on the seed of the start.
    """

    images: tuple[str, ...]
    blocks: tuple[str, ...] = BLOCKS
    coefficients: Annotated[tuple[float, ...], Field(min_length=1)]
    width: Positive
    pool: Count = 1
    seeds: Count = 1
    steps: Count
    seconds: Positive
    fit: dict[str, Any] = Field(default_factory=dict)
    measuring: Positive = 10.0

    @model_validator(mode="after")
    def _names_exist(self) -> Classify:
        among(self.blocks, BLOCKS)
        among(self.fit, FitConfig.model_fields)
        return self

    def _networks(self) -> list[tuple[str, str, float | None]]:
        """Images, block and coefficient of each line of the table."""
        return [
            (name, block, c)
            for name in self.images
            for block in self.blocks
            for c in ((None,) if block == FREE else self.coefficients)
        ]

    def minutes(self) -> float:
        return self.seeds * len(self._networks()) * (self.seconds + self.measuring) / 60

    def parts(self) -> Sequence[Part]:
        shared = self.model_dump(mode="json", include={"width", "pool", "steps", "seconds", "fit"})
        return [
            Part(
                _key(*network, start),
                {**shared, "network": list(network), "start": start},
                partial(self._study, *network, start),
            )
            for start in range(self.seeds)
            for network in self._networks()
        ]  # fmt: skip

    def _study(
        self, name: str, block: str, c: float | None, start: int, job: Job
    ) -> dict[str, Any]:
        """Train one network, its weights selected on the validation images; test it."""
        seed = job.seed + start
        images = _read(name, seed)
        options: dict[str, Any] = {"width": self.width, "pool": self.pool}
        if c is not None:
            options["c"] = c
        model = classification.make(images, block, seed, **options)
        settings = {"clock": "processor", "validate_seconds": max(self.seconds / 10, 0.2),
                    **DEFAULTS, **self.fit}  # fmt: skip
        config = FitConfig(steps=self.steps, minutes=self.seconds / 60, seed=seed, **settings)
        history = job.watch(
            classification.fit(
                model, images, config,
                checkpoint=job.folder / "resume", should_stop=job.should_stop,
            )
        )  # fmt: skip
        classification.save(model, job.folder)
        found = classification.measure(model, images)
        found["lipschitz"] = max(found["lipschitz"])
        found["block_lipschitz"] = max(found["block_lipschitz"])
        return {
            **found,
            "parameters": sum(p.numel() for p in model.parameters()),
            "epochs": history.steps * config.batch_size / len(images.train),
            "fit_seconds": round(history.seconds, 3),
        }

    def summarise(self, done: Mapping[str, Done], job: Job) -> Iterator[Row]:
        rows = {network: self._row(*network, done) for network in self._networks()}
        panels: dict[str, dict[str, dict[float | None, tuple[float, float]]]] = {}
        for (name, block, c), row in rows.items():
            if row.ours is not None and row.se is not None:
                panels.setdefault(name, {}).setdefault(block, {})[c] = (row.ours, row.se)
        if panels:
            job.draw("errors", by_restriction(panels, "what a bound on the convolutions costs"))
        yield from rows.values()

    def _row(self, name: str, block: str, c: float | None, done: Mapping[str, Done]) -> Row:
        """One network: means over the seeds."""
        parts = [done[_key(name, block, c, start)] for start in range(self.seeds)]
        labels = {"images": name, "block": block, "c": "none" if c is None else f"{c:g}"}
        measure = "test error, %"
        errors = [part.error for part in parts if part.error is not None]
        if errors:
            return Row(labels=labels, measure=measure, error=errors[0])

        def mean(key: str) -> float:
            return float(np.mean([part.result[key] for part in parts]))

        each = np.array([part.result["test_error"] for part in parts])
        se = mean("test_error_se")  # of one network, from the number of test images
        if self.seeds > 1:
            se = float(each.std(ddof=1) / math.sqrt(self.seeds))
        titles = {
            "validation error": "validation_error", "nats": "test_log_prob",
            "calibration error": "calibration_error", "Lip branch": "lipschitz",
            "Lip block": "block_lipschitz", "parameters": "parameters", "epochs": "epochs",
            "seconds": "fit_seconds",
        }  # fmt: skip
        return Row(
            labels=labels, measure=measure, ours=float(each.mean()), se=se, better="lower",
            more={"seeds": self.seeds, **{title: mean(key) for title, key in titles.items()}},
        )  # fmt: skip


@lru_cache(maxsize=1)
def _read(name: str, seed: int) -> Images:
    return read_images(name, seed=seed)


def _key(name: str, block: str, c: float | None, start: int) -> str:
    """The part of one network, a file name."""
    return f"{name}-{block}-{'none' if c is None else f'{c:g}'}-{start}"
