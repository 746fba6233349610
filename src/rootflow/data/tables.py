"""Tables of numbers in and out: whatever can be read becomes a ``Table``, samples become files.

Everything is read in float64 (casts come later), in batches into one array of known size. Whatever
is not a finite number stops the reading with one DataError line that names the file, the row and
the column. Rows are file lines for text files (the header is line 1) and counted from 1 elsewhere.
"""

import contextlib
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rootflow.data.memory import require_memory
from rootflow.data.sources import BUILTIN, UNREADABLE, Source, open_source
from rootflow.errors import DataError

__all__ = ["BUILTIN", "Table", "read_table", "require_rows", "split", "write_table"]

Floats = NDArray[np.float64]
Positions = NDArray[np.int64]
EXACT = 2**53  # up to here float64 holds every integer
WRITABLE = ".csv .parquet .npy .npz"


@dataclass(frozen=True)
class Table:
    """Finite numbers in named columns.

    ``values`` is (n, d) float64, C-contiguous; ``dtypes`` are the NumPy dtype names the columns had
    before, with which ``write_table`` writes samples back. ``parts``: how many rows, in this order,
    are for training, validation and test, of a data set that comes with its split.
    """

    name: str
    columns: tuple[str, ...]
    values: Floats
    dtypes: tuple[str, ...]
    parts: tuple[int, ...] | None = None

    def split(
        self, seed: int = 0, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    ) -> tuple[Positions, Positions, Positions]:
        """Rows of training, validation and test: as ``parts`` says, else drawn by ``split``."""
        if self.parts is None:
            return split(len(self.values), seed, fractions)
        rows = np.arange(len(self.values))
        train, validation, _ = self.parts
        return rows[:train], rows[train : train + validation], rows[train + validation :]


def read_table(
    source: Any,
    *,
    columns: Sequence[str] | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    max_bytes: int | None = None,
) -> Table:
    """Read a table from a path, a data frame, a 2-d array or tensor, or a built-in name.

    Paths end in one of .csv .tsv .txt .parquet .feather .arrow .npy .npz. Built-in names are the
    keys of ``BUILTIN``, ``PACKAGED`` and ``PREPARED["table"]``; a toy may carry its number of rows
    ("rings:5000") and uses ``seed``; a table that comes with its split may be narrowed to a part
    ("power:test"). The folder of a prepared table is a path too.
    ``columns``: the columns wanted, in this order; others are ignored with a warning. An array
    without names gives x1..xd, or takes ``columns`` by position. ``max_rows``: only the first rows.
    ``max_bytes``: refuse to hold more than this (default: half of the machine's memory).

    Raises DataError, one line, for everything that cannot be used.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"read_table: max_rows must be at least 1, got {max_rows}")
    try:
        return _load(open_source(source, seed), columns, max_rows, max_bytes)
    except DataError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        kind = source if isinstance(source, (str, Path)) else type(source).__name__
        raise DataError(f"{kind}: cannot be read, damaged or cut short: {reason}") from None


def require_rows(table: Table, at_least: int) -> None:
    """Raise DataError if the table has fewer rows than that."""
    if len(table.values) < at_least:
        raise DataError(f"{table.name}: {len(table.values)} rows; at least {at_least} are needed")


def split(
    n: int, seed: int = 0, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> tuple[Positions, Positions, Positions]:
    """Shuffle range(n) and cut it into the indices of train, validation and test.

    The order is ``numpy.random.RandomState(seed).permutation(n)``; validation and test get their
    fraction rounded down, train the rest.
    """
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1):
        raise ValueError(f"split: fractions must be >= 0 and add up to 1, got {fractions}")
    order = np.random.RandomState(seed).permutation(n).astype(np.int64)
    validation, test = (int(n * fraction + 1e-9) for fraction in fractions[1:])
    train = n - validation - test
    return order[:train], order[train : train + validation], order[train + validation :]


def write_table(
    values: Any, columns: Sequence[str], dtypes: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Write (n, d) numbers as .csv, .parquet, .npy or .npz; integers are rounded and kept in range.

    The file appears under its name only when it is complete. .npy holds no column names; .npz
    holds ``values`` and ``columns``.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    if array.ndim != 2 or not array.shape[1] == len(columns) == len(dtypes):
        raise ValueError(
            f"write_table: values have shape {array.shape}, but there are {len(columns)} columns "
            f"and {len(dtypes)} dtypes"
        )
    if suffix not in WRITABLE.split():
        raise DataError(f"{path}: cannot write files of kind {suffix!r}; known are {WRITABLE}")
    for column, cell, dtype in zip(columns, array.T, dtypes, strict=True):
        if np.dtype(dtype).kind in "biu" and not np.isfinite(cell).all():
            raise DataError(f"column {column}: NaN or infinity cannot be written as {dtype}")
    cells = [_cast(array[:, j], np.dtype(dtype)) for j, dtype in enumerate(dtypes)]
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial_path.open("wb") as file:
            _write(file, suffix, cells, list(columns))
        partial_path.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial_path.unlink(missing_ok=True)


def _write(file: Any, suffix: str, cells: list[NDArray[Any]], columns: list[str]) -> None:
    if suffix in (".csv", ".parquet"):
        import pyarrow as pa
        from pyarrow import csv as arrow_csv
        from pyarrow import parquet

        table = pa.Table.from_arrays([pa.array(cell) for cell in cells], names=columns)
        (arrow_csv.write_csv if suffix == ".csv" else parquet.write_table)(table, file)
    elif suffix == ".npy":
        np.save(file, np.column_stack(cells), allow_pickle=False)
    else:
        np.savez(file, values=np.column_stack(cells), columns=np.array(columns))


def _cast(cell: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind == "b":
        return cell >= 0.5
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        # float64(2**63 - 1) is 2**63: stay below it
        top = np.nextafter(float(limits.max), 0) if limits.max > EXACT else limits.max
        cell = np.clip(np.rint(cell), limits.min, top)
    return np.ascontiguousarray(cell, dtype=dtype)


def _choose(opened: Source, columns: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """Positions and names of the columns to read."""
    name, present = opened.name, opened.columns
    if not present:
        raise DataError(f"{name}: has no columns")
    repeated = sorted({column for column in present if present.count(column) > 1})
    if repeated:
        raise DataError(f"{name}: column names occur twice: {', '.join(map(repr, repeated))}")
    if columns is None:
        if "" in present:
            raise DataError(f"{name}: column {present.index('') + 1} has no name")
        return list(range(len(present))), present
    if not opened.named:
        if len(columns) != len(present):
            raise DataError(f"{name}: {len(present)} columns without names, but {len(columns)} are "
                            f"needed: {', '.join(columns)}")
        return list(range(len(present))), list(columns)
    missing = [column for column in columns if column not in present]
    if missing:
        raise DataError(f"{name}: columns {', '.join(missing)} are missing; "
                        f"it has {', '.join(present)}")
    ignored = [column for column in present if column not in columns]
    if ignored:
        warnings.warn(f"{name}: columns not needed are ignored: {', '.join(ignored)}", stacklevel=4)
    return [present.index(column) for column in columns], list(columns)


def _load(
    opened: Source, columns: Sequence[str] | None, max_rows: int | None, max_bytes: int | None
) -> Table:
    wanted, names = _choose(opened, columns)
    rows = min(opened.rows, max_rows or opened.rows)
    what = f"{opened.name}: {rows} rows x {len(wanted)} columns"
    require_memory(what, rows * len(wanted) * 8, max_bytes, "read fewer rows with max_rows=")
    values, filled = np.empty((rows, len(wanted))), 0
    dtypes: list[str] = [""] * len(wanted)
    unusable: list[tuple[int, int]] = []  # the first cell of every batch and column: row, position
    count = 0
    for arrays in opened.batches(wanted):
        size = min(len(arrays[0]), rows - filled)
        for j, cells in enumerate(arrays):
            where = partial(_where, opened, names[j], filled)
            numbers, dtypes[j] = _numbers(cells.slice(0, size), dtypes[j], opened.text, where)
            wrong = ~np.isfinite(numbers)
            if wrong.any():
                unusable.append((filled + int(wrong.argmax()), j))
                count += int(wrong.sum())
            values[filled : filled + size, j] = numbers
        filled += size
        if filled == rows:
            break
    if not filled:
        raise DataError(f"{opened.name}: has columns but no rows")
    if unusable:
        row, j = min(unusable)
        kind = "empty or NaN" if math.isnan(values[row, j]) else "infinite"
        raise DataError(f"{_where(opened, names[j], row, 0)}: {kind} (the first of {count} empty, "
                        f"NaN or infinite cells); remove these rows or fill them")
    parts = opened.parts if filled == opened.rows else None
    return Table(opened.name, tuple(names), values[:filled], tuple(dtypes), parts)


def _where(opened: Source, column: str, start: int, row: int) -> str:
    return f"{opened.name}, {opened.row_name(start + row)}, column {column}"


def _numbers(
    cells: Any, dtype: str, text: bool, where: Callable[[int], str]
) -> tuple[Floats, str]:
    """Some cells as float64 (NaN for null) and their NumPy dtype; ``dtype``: of those before."""
    import pyarrow as pa

    kind = pa.types
    raw = cells
    if text:
        cells, dtype = _parse(cells, dtype, where)
    elif kind.is_decimal(cells.type) or kind.is_null(cells.type):
        dtype = "float64"
    elif kind.is_integer(cells.type) or kind.is_floating(cells.type) or kind.is_boolean(cells.type):
        dtype = np.dtype(cells.type.to_pandas_dtype()).name
    else:
        first = f": {str(cells[0])!r}" if len(cells) else ""
        raise DataError(f"{where(0)}: holds {cells.type}, not numbers{first}; leave the column out")
    numbers: Floats = cells.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    exact = dtype.startswith("float") and not text
    for i in [] if exact else np.flatnonzero(np.abs(numbers) >= EXACT).tolist():
        shown = str(raw[i])
        if re.fullmatch(r"[+-]?\d+", shown) and abs(int(shown)) > EXACT:
            raise DataError(f"{where(i)}: {shown} is an integer beyond 2**53, which float64 cannot "
                            f"tell from its neighbours; leave the column out")
    return numbers, dtype


def _parse(cells: Any, dtype: str, where: Callable[[int], str]) -> tuple[Any, str]:
    import pyarrow as pa
    from pyarrow import compute

    order = {"": ("int64", "float64", "bool"), "int64": ("int64", "float64")}.get(dtype, (dtype,))

    def attempt(texts: Any, dtypes: tuple[str, ...]) -> tuple[Any, str] | None:
        for name in dtypes:
            try:
                return compute.cast(texts, name), name
            except pa.ArrowInvalid:
                continue
        return None

    parsed = attempt(cells, order)
    if parsed is None:
        cells = compute.utf8_trim_whitespace(cells)
        cells = compute.if_else(compute.equal(cells, ""), pa.scalar(None, cells.type), cells)
        parsed = attempt(cells, order)
    if parsed is not None:
        return parsed
    low, high = 0, len(cells)  # the first cell that fails is in cells[low:high]
    while high - low > 1:
        middle = (low + high) // 2
        good = attempt(cells[low:middle], ("bool",) if dtype == "bool" else ("float64",))
        low, high = (middle, high) if good else (low, middle)
    raise DataError(f"{where(low)}: {cells[low].as_py()!r} is not a number; "
                    f"remove the row or the column")
