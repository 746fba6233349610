"""Real tables learned by several flows for equal time: held-out nats, beside those published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..data import read_table
from ..errors import DataError
from ..training import FitConfig
from .comparison import Comparison, Rows, Variant
from .parts import Count, Positive, Strict, among

__all__ = ["Source", "Tables"]


class Source(Strict):
    """What fits to one table do otherwise: seconds, settings, and options of flows by name."""

    seconds: Positive | None = None
    fit: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _settings_exist(self) -> Source:
        among(self.fit, FitConfig.model_fields)
        return self


class Tables(Comparison):
    """Flows on ``tables``: names of ``rootflow data list``, or "breast_cancer" of scikit-learn.

    A table without a split of its own is split anew for every start. At most ``test_rows`` rows,
    drawn once, are scored, by default all. Scores are in the units of the rows as given: those of
    the classic tables are standardised as published, the others are not.
    """

    DATA: ClassVar[str] = "table"
    MEASURE: ClassVar[str] = "held-out log-density, nats per row"
    BETTER: ClassVar[Literal["higher", "lower"]] = "higher"
    UNIT: ClassVar[float] = 1.0

    tables: dict[str, Source]
    test_rows: Count | None = None

    @model_validator(mode="after")
    def _flows_exist(self) -> Tables:
        for source in self.tables.values():
            among(source.options, self.flows)
        return self

    def names(self) -> Sequence[str]:
        return list(self.tables)

    def budget(self, name: str) -> dict[str, Any]:
        source = self.tables[name]
        seconds = source.seconds or self.seconds
        return {**super().budget(name), "seconds": seconds, **source.fit}

    def variant(self, name: str, label: str) -> Variant:
        found = super().variant(name, label)
        options = {**found.options, **self.tables[name].options.get(label, {})}
        return found.model_copy(update={"options": options})

    def rows(self, name: str, seed: int) -> Rows:
        table = read_table(_breast_cancer() if name == "breast_cancer" else name)
        values = torch.as_tensor(table.values, dtype=torch.float32)
        train, validation, test = (values[part] for part in table.split(seed))
        # a part may be in some order, of which its first rows alone would be no fair sample
        generator = torch.Generator().manual_seed(0)
        validation, test = (
            rows[torch.randperm(len(rows), generator=generator)] for rows in (validation, test)
        )
        return Rows(train, validation, test[: self.test_rows])


def _breast_cancer() -> NDArray[np.float64]:
    """569 rows of 30 columns."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError:
        raise DataError("breast_cancer: needs scikit-learn; pip install scikit-learn") from None
    values: NDArray[np.float64] = load_breast_cancer().data
    return values
