"""What is wrong with the columns of a table for a density: constants, copies, grids and spikes.

A flow that meets such a column can raise the density of the training rows without limit, so its
score means nothing. The diagnosis runs in float64, before any cast, and changes no data.
"""

from dataclasses import dataclass

import numpy as np

from rootflow.data.tables import Floats, Table

__all__ = ["ColumnReport", "describe_columns"]

TIED = 0.5  # a column with a smaller share of distinct values may lie on a grid
SPIKE = 0.01  # a single value with a larger share of the rows is a point mass,
SPIKE_ROWS = 5  # if it has at least so many rows
ON_GRID = 0.99  # share of the distinct values that must be multiples of the gap


@dataclass(frozen=True)
class ColumnReport:
    """What one column holds; shares are between 0 and 1, gaps in the unit of the column."""

    name: str
    n: int
    unique_share: float
    top_value: float
    top_share: float
    smallest_gap: float | None  # None for a constant column
    constant: bool
    quantised: bool
    gap: float | None  # spacing of the grid of a quantised column
    point_mass: float | None  # the value that too many rows of a continuous column share
    duplicate_of: str | None  # an earlier column that holds the same numbers
    warning: str | None  # one line


def describe_columns(table: Table) -> list[ColumnReport]:
    """Examine every column of a table with at least one row; warnings are returned, not raised."""
    seen: dict[bytes, str] = {}
    reports = []
    for name, values in zip(table.columns, table.values.T, strict=True):
        column = np.ascontiguousarray(values) + 0.0  # -0.0 is 0.0
        twin = seen.setdefault(column.tobytes() if len(column) < 1 else _digest(column), name)
        reports.append(_describe(name, column, twin if twin != name else None))
    return reports
