"""What is wrong with the columns of a table for a density: constants, copies, grids and spikes.

A flow that meets such a column can raise the density of the training rows without limit, so its
score means nothing. The diagnosis runs in float64, before any cast, and changes no data.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from rootflow.data.tables import Floats, Table

__all__ = ["SPIKE", "SPIKE_ROWS", "TIED", "ColumnReport", "describe_columns", "grid"]

TIED = 0.5  # only a column with a smaller share of distinct values may be quantised
ON_GRID = 0.99  # share of its distinct values that must be whole gaps apart
SPIKE = 0.01  # a value with a larger share of a continuous column is a point mass,
SPIKE_ROWS = 5  # provided that it fills at least so many rows


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
    warning: str | None  # one line, None if the column is fit for a density


def describe_columns(table: Table) -> list[ColumnReport]:
    """Examine every column of a table with at least one row; bad ones get a warning text."""
    seen: dict[bytes, str] = {}
    reports = []
    for name, values in zip(table.columns, table.values.T, strict=True):
        column = np.ascontiguousarray(values) + 0.0  # makes -0.0 equal to 0.0
        twin = seen.setdefault(hashlib.sha256(column.data).digest(), name)
        reports.append(_describe(name, column, None if twin == name else twin))
    return reports


def _describe(name: str, column: Floats, twin: str | None) -> ColumnReport:
    ordered = np.sort(column)
    n, steps = len(ordered), np.diff(ordered)
    starts = np.concatenate([[0], np.flatnonzero(steps > 0) + 1])
    counts = np.diff(starts, append=n)
    top = int(counts.argmax())
    top_value, top_rows = float(ordered[starts[top]]), int(counts[top])
    constant = len(starts) == 1
    gap = grid(ordered[starts], ON_GRID) if len(starts) < TIED * n and not constant else None
    tied = top_rows > max(SPIKE * n, SPIKE_ROWS - 1) and not constant
    spike = top_value if tied and gap is None else None
    return ColumnReport(
        name, n, len(starts) / n, top_value, top_rows / n,
        None if constant else float(steps[steps > 0].min()),
        constant, gap is not None, gap, spike, twin,
        _warning(name, constant, twin, gap, spike, len(starts), top_value, top_rows / n, n),
    )


def grid(levels: Floats, at_least: float) -> float | None:
    """The spacing of sorted distinct numbers of which that share is whole spacings apart."""
    steps = np.diff(levels)
    steps = steps[steps > 1e-9 * np.abs(levels).max()]  # smaller ones are rounding errors
    if not len(steps):
        return None
    width = levels[-1] - levels[0]
    gap = float(width / np.rint(width / steps.min()))  # the widest distance is the most exact
    offsets = (levels - levels[0]) / gap
    on_grid = np.abs(offsets - np.rint(offsets)) < 0.01  # room for grids once stored as float32
    return gap if on_grid.mean() >= at_least else None


def _warning(
    name: str, constant: bool, twin: str | None, gap: float | None, spike: float | None,
    levels: int, top_value: float, top_share: float, n: int,
) -> str | None:
    harm = "the density would be meaninglessly high"
    if constant:
        return f"column {name} is always {top_value:g}: {harm}; leave it out"
    if twin is not None:
        return f"column {name} repeats column {twin}: {harm}; leave one of them out"
    if gap is not None:
        return (f"column {name} has only {levels} distinct values in {n} rows, spaced by {gap:g}: "
                f"{harm} without a cell for each")
    if spike is not None:
        return (f"column {name} is exactly {spike:g} in {top_share:.1%} of the rows: {harm} there "
                f"without a cell for this value")
    if levels < TIED * n:
        return (f"column {name} has only {levels} distinct values in {n} rows, unevenly spaced: "
                f"{harm} without a cell for each")
    return None
