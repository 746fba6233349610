"""Real tables learned by several flows for equal time: held-out nats, beside those published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..data import read_table, split
from ..errors import DataError
from ..training import FitConfig
from .comparison import Comparison, Rows
from .parts import Positive, Strict, among

__all__ = ["Source", "Tables"]


class Source(Strict):
    """A table by its name in ``rootflow data list``, or "breast_cancer" of scikit-learn.

    ``seconds`` and ``fit``: what its fits do otherwise than those of the other tables.
    """

    seconds: Positive | None = None
    fit: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _settings_exist(self) -> Source:
        among(self.fit, FitConfig.model_fields)
        return self


class Tables(Comparison):
    """Flows on tables. A table without a split of its own is split anew for every start.

    Scores are in the units of the rows as given: those of the classic tables are standardised as
    published, the others are not.
    """

    DATA: ClassVar[str] = "table"
    MEASURE: ClassVar[str] = "held-out log-density, nats per row"
    BETTER: ClassVar[Literal["higher", "lower"]] = "higher"
    UNIT: ClassVar[float] = 1.0

    tables: dict[str, Source]

    def names(self) -> Sequence[str]:
        return list(self.tables)

    def budget(self, name: str) -> dict[str, Any]:
        source = self.tables[name]
        seconds = source.seconds or self.seconds
        return {**super().budget(name), "seconds": seconds, **source.fit}

    def rows(self, name: str, seed: int) -> Rows:
        values = _breast_cancer() if name == "breast_cancer" else read_table(name).values
        rows = torch.as_tensor(values, dtype=torch.float32)
        return Rows(*(rows[part] for part in split(len(rows), seed)))


def _breast_cancer() -> NDArray[np.float64]:
    """569 rows of 30 columns."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError:
        raise DataError("breast_cancer: needs scikit-learn; pip install scikit-learn") from None
    values: NDArray[np.float64] = load_breast_cancer().data
    return values
