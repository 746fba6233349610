"""Tables of numbers in and out: whatever can be read becomes a ``Table``, samples become files.

Everything is read in float64 (casts come later), in batches into one array of known size. Whatever
is not a finite number stops the reading with one DataError line that names the file, the row and
the column. Rows are file lines for text files (the header is line 1) and counted from 1 elsewhere.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rootflow.data.cells import EXACT, MOST_LEVELS, Column, Mixed
from rootflow.data.memory import require_memory
from rootflow.data.rows import DiskRows, MemoryRows
from rootflow.data.sources import BUILTIN, UNREADABLE, Source, kind_of_file, open_source
from rootflow.errors import DataError

__all__ = ["BUILTIN", "Table", "read_table", "require_rows", "split", "write_table"]

Floats = NDArray[np.float64]
Positions = NDArray[np.int64]
STRAY, STRAY_CELLS = 0.01, 5  # fewer empty cells than both, per row and in all, are an accident
NAMED = (".csv", ".csv.gz", ".parquet", ".feather")  # kinds of files with columns of any type
WRITABLE = f"{' '.join(NAMED)} .npy .npz"


@dataclass(frozen=True)
class Table:
    """Numbers in named columns.

    ``values`` is (n, d) float64, C-contiguous, or ``DiskRows`` if it did not fit into memory;
    ``dtypes`` are the NumPy dtype names the columns had before, with which ``write_table`` writes
    samples back. ``parts``: how many rows, in this order, are for training, validation and test, of
    a data set that comes with its split. Read with ``mixed``, a column may also be "str": the
    numbers of its ``levels``; "date": days; "timestamp", with its zone if any: seconds since 1970;
    and hold NaN.
    """

    name: str
    columns: tuple[str, ...]
    values: Any  # Floats, or DiskRows if it did not fit
    dtypes: tuple[str, ...]
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
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

    def only(self, columns: Sequence[str]) -> "Table":
        """The same rows with these columns."""
        places = [self.columns.index(name) for name in columns]
        values = np.ascontiguousarray(self.values[:, places])
        dtypes = tuple(self.dtypes[j] for j in places)
        return replace(self, columns=tuple(columns), values=values, dtypes=dtypes)


def read_table(
    source: Any,
    *,
    columns: Sequence[str] | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    max_bytes: int | None = None,
    mixed: Mixed | None = None,
    spool: Path | None = None,
) -> Table:
    """Read a table from a path, a data frame, a 2-d array or tensor, or a built-in name.

    Paths end in one of .csv .tsv .txt (also with .gz) .parquet .feather .arrow .npy .npz. Built-in
    names are the keys of ``BUILTIN``, ``PACKAGED`` and ``PREPARED["table"]``; a toy may carry its
    number of rows ("rings:5000") and uses ``seed``; a table that comes with its split may be
    narrowed to a part ("power:test"). The folder of a prepared table is a path too.
    ``columns``: the columns wanted, in this order; others are ignored with a warning. An array
    without names gives x1..xd, or takes ``columns`` by position. ``max_rows``: only the first rows.
    ``max_bytes``: the most to hold in memory (default: half of the machine's); a larger table goes
    into the file ``spool``, or is refused without one. ``mixed``: also read texts, dates and empty
    cells, as that says.

    Raises DataError, one line, for everything that cannot be used.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"read_table: max_rows must be at least 1, got {max_rows}")
    try:
        opened = open_source(source, seed)
        return _load(opened, columns, max_rows, max_bytes, mixed, spool)
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
    values: Any, columns: Sequence[str], dtypes: Sequence[str], path: str | os.PathLike[str],
    levels: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write (n, d) numbers as a file of the kind of its name; integers are rounded, kept in range.

    The file appears under its name only when it is complete. .npy holds no column names; .npz
    holds ``values`` and ``columns``. Texts (numbers of ``levels``), dates and empty cells (NaN in a
    column of integers) need .csv, .csv.gz, .parquet or .feather.
    """
    path = Path(path)
    suffix = kind_of_file(path)
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    if array.ndim != 2 or not array.shape[1] == len(columns) == len(dtypes):
        raise ValueError(
            f"write_table: values have shape {array.shape}, but there are {len(columns)} columns "
            f"and {len(dtypes)} dtypes"
        )
    if suffix not in WRITABLE.split():
        raise DataError(f"{path}: cannot write files of kind {suffix!r}; known are {WRITABLE}")
    named = suffix in NAMED
    for column, cell, dtype in zip(columns, array.T, dtypes, strict=True):
        if not named and not _is_number(dtype):
            raise DataError(f"{path}: column {column} holds {dtype}, which needs one of "
                            f"{' '.join(NAMED)}")
        whole = _is_number(dtype) and np.dtype(dtype).kind in "biu"
        bad = np.isinf(cell) if named and levels is not None else ~np.isfinite(cell)
        if whole and bad.any():
            raise DataError(f"column {column}: NaN or infinity cannot be written as {dtype}")
    if named:
        cells = [_arrow(array[:, j], dtype, None if levels is None else levels.get(columns[j], ()))
                 for j, dtype in enumerate(dtypes)]  # fmt: skip
    else:
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


def as_cells(
    values: Any, columns: Sequence[str], dtypes: Sequence[str], levels: Mapping[str, Sequence[str]]
) -> list[list[Any]]:
    """(n, d) numbers as rows of texts, ISO dates, whole numbers, numbers and None, for JSON."""
    arrays = [_arrow(np.asarray(values)[:, j], dtype, levels.get(columns[j], ())).to_pylist()
              for j, dtype in enumerate(dtypes)]  # fmt: skip
    return [[cell if isinstance(cell, (int, float, str, type(None))) else cell.isoformat()
             for cell in row] for row in zip(*arrays, strict=True)]  # fmt: skip


def _is_number(dtype: str) -> bool:
    return dtype not in ("str", "date") and not dtype.startswith("timestamp")


def _arrow(cell: Floats, dtype: str, texts: Sequence[str] | None) -> Any:
    """One column of numbers as an Arrow array of its type; NaN is null, if texts are given."""
    import pyarrow as pa

    empty = np.isnan(cell)
    if _is_number(dtype):
        kind = np.dtype(dtype)
        if kind.kind == "f" and texts is None:
            return pa.array(_cast(cell, kind))
        return pa.array(_cast(np.where(empty, 0, cell), kind), mask=empty)
    if dtype == "str":
        index = pa.array(np.where(empty, 0, cell).astype(np.int64), mask=empty)
        return pa.array(list(texts or ()), pa.string()).take(index)
    whole = np.rint(np.where(empty, 0, cell) * (1 if dtype == "date" else 1e6))
    unit = pa.date32() if dtype == "date" else pa.timestamp("us", dtype.partition(" ")[2] or None)
    ticks = pa.array(whole.astype(np.int64), mask=empty)
    return ticks.cast(pa.int32()).cast(unit) if dtype == "date" else ticks.cast(unit)


def _write(file: Any, suffix: str, cells: list[Any], columns: list[str]) -> None:
    if suffix in NAMED:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv
        from pyarrow import feather, parquet

        table = pa.Table.from_arrays(cells, names=columns)
        if suffix == ".csv.gz":
            with pa.CompressedOutputStream(file, "gzip") as packed:
                arrow_csv.write_csv(table, packed)
        else:
            kinds = {".csv": arrow_csv.write_csv, ".parquet": parquet.write_table}
            kinds.get(suffix, feather.write_feather)(table, file)
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
    if len(set(columns)) < len(columns):
        twice = sorted({column for column in columns if list(columns).count(column) > 1})
        raise DataError(f"{name}: columns {', '.join(twice)} are asked for more than once")
    missing = [column for column in columns if column not in present]
    if missing:
        raise DataError(f"{name}: columns {', '.join(missing)} are missing; "
                        f"it has {', '.join(present)}")
    ignored = [column for column in present if column not in columns]
    if ignored:
        warnings.warn(f"{name}: columns not needed are ignored: {', '.join(ignored)}", stacklevel=4)
    return [present.index(column) for column in columns], list(columns)


def _load(
    opened: Source, columns: Sequence[str] | None, max_rows: int | None, max_bytes: int | None,
    mixed: Mixed | None, spool: Path | None,
) -> Table:
    wanted, names = _choose(opened, columns)
    rows = min(opened.rows, max_rows or opened.rows)
    store = _store(opened.name, rows, len(wanted), max_bytes, spool)
    readers = [Column(name, opened.text, mixed) for name in names]
    bad = Cells(len(names)), Cells(len(names))  # infinite ones, and empty ones or NaN
    read = 0
    for arrays in opened.batches(wanted):
        size = min(len(arrays[0]), rows - read)
        block = np.empty((size, len(wanted)))
        for j, cells in enumerate(arrays):
            where = partial(_where, opened, names[j], read)
            block[:, j] = readers[j].numbers(cells.slice(0, size), where)
        bad[0].note(np.isinf(block), read)
        bad[1].note(np.isnan(block), read)
        if mixed is not None and mixed.missing == "drop":
            block = block[~np.isnan(block).any(1)]
        store.append(block)
        read += size
        if read == rows:
            break
    if not read:
        raise DataError(f"{opened.name}: has columns but no rows")
    levels = {r.name: tuple(r.codes) for r in readers if r.dtype == "str"}
    names_only = {name for name, texts in levels.items() if len(texts) > MOST_LEVELS}
    _refuse(opened, names, bad, mixed, names_only, read)
    values = store.finish()
    if not len(values):
        raise DataError(f"{opened.name}: every row has an empty cell, and such rows are dropped")
    if len(values) < read:
        warnings.warn(f"{opened.name}: {read - len(values):,} of {read:,} rows have empty cells "
                      "and are dropped", stacklevel=3)
    return Table(opened.name, tuple(names), values, tuple(r.dtype or "float64" for r in readers),
                 levels, opened.parts if len(values) == opened.rows else None)


class Cells:
    """Where bad cells are: per column their number and the first row."""

    def __init__(self, columns: int) -> None:
        self.count = np.zeros(columns, np.int64)
        self.first = np.full(columns, -1, np.int64)

    def note(self, bad: NDArray[np.bool_], start: int) -> None:
        if bad.any():
            new = bad.any(0) & (self.first < 0)
            self.first[new] = start + bad.argmax(0)[new]
            self.count += bad.sum(0)


def _refuse(
    opened: Source, names: list[str], bad: tuple[Cells, Cells], mixed: Mixed | None,
    ignored: Set[str], rows: int,
) -> None:
    """Raise DataError for the first infinite or empty cell, unless such cells may stay."""
    infinite, empty = bad
    holes = np.where([name in ignored for name in names], 0, empty.count)
    if mixed is not None:
        common = holes.sum() >= max(STRAY_CELLS, STRAY * rows)
        if mixed.missing == "drop" or (mixed.missing == "auto" and common):
            holes[:] = 0
        elif mixed.missing == "keep":
            holes[[mixed.holes is None or name in mixed.holes for name in names]] = 0
    places = [(int(cells.first[j]), int(j), kind) for cells, count, kind in
              ((infinite, infinite.count, "infinite"), (empty, holes, "empty or NaN"))
              for j in np.flatnonzero(count)]  # fmt: skip
    if places:
        row, j, kind = min(places)
        total = infinite.count.sum() + holes.sum()
        remedy = "remove these rows or fill them"
        free = mixed is not None and mixed.holes is None and kind != "infinite"
        remedy += ", or --missing drop or keep" if free else ""
        raise DataError(f"{_where(opened, names[j], row, 0)}: {kind} (the first of {total} empty, "
                        f"NaN or infinite cells); {remedy}")


def _where(opened: Source, column: str, start: int, row: int) -> str:
    return f"{opened.name}, {opened.row_name(start + row)}, column {column}"


def _store(
    name: str, rows: int, columns: int, limit: int | None, spool: Path | None
) -> MemoryRows | DiskRows:
    """Where the values are gathered: in memory, or in a file in ``spool`` if that is too small."""
    what, advice = f"{name}: {rows} rows x {columns} columns", "read fewer rows with max_rows="
    try:
        require_memory(what, rows * columns * 8, limit, advice)
    except DataError:
        if spool is None:
            raise
        return DiskRows(spool, columns)
    return MemoryRows(rows, columns)
