"""Experiments small enough for a test, and a kind whose parts only count."""

from functools import partial

from rootflow.experiments.catalogue import Recipe
from rootflow.experiments.parts import Part, Row, Settings

TINY = {"steps": 2, "seconds": 60.0, "rows": 200, "test_rows": 100, "cells": 20}
MIXTURE = {"weights": [0.5, 0.5], "means": [[-1.0], [2.0]], "sds": [0.5, 1.0]}
PLANE = {"weights": [1.0], "means": [[0.0, 1.0]], "sds": [0.5]}
OPTIONS = {"residual": {"blocks": 1, "hidden": [8]}, "monotone": {"blocks": 1, "hidden": [8]}}


def zoo_recipe(**changes):
    """A recipe of kind zoo with two small flows on one mixture."""
    common = {"mixtures": {"m": MIXTURE}, "flows": ["residual", "monotone"], "options": OPTIONS}
    common |= {"fit": {"batch_size": 64}, **TINY, **changes}
    return Recipe(
        name="tiny", kind="zoo", summary="a test", source="nowhere",
        common=common, smoke={}, small={}, paper={},
    )  # fmt: skip


class Counting(Settings):
    """Parts that note their call in CALLS; those in BROKEN fail."""

    names: tuple[str, ...]

    def minutes(self):
        return 0.01

    def parts(self):
        return [Part(name, {"name": name}, partial(self._work, name)) for name in self.names]

    def _work(self, name, job):
        CALLS.append(name)
        job.records.append({"kind": "train", "step": 1})
        if name in BROKEN:
            raise ValueError("this one\nis broken")
        return {"value": float(name if name == "nan" else len(name))}

    def summarise(self, done, job):
        for name, part in done.items():
            value = part.result.get("value")
            yield Row(labels={"word": name}, measure="letters", ours=value, error=part.error)


CALLS: list[str] = []
BROKEN: set[str] = set()


class CountingRecipe(Recipe):
    """A recipe whose settings are given as they are."""

    words: tuple[str, ...]

    @property
    def settings(self):
        return {"smoke": Counting(names=self.words), "small": Counting(names=self.words)}


def counting(*words, **published):
    return CountingRecipe(
        name="count", kind="zoo", summary="a test", source="nowhere", published=published,
        smoke={}, small={}, paper={}, words=words,
    )  # fmt: skip
