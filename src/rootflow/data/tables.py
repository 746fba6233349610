"""Tables of numbers in and out: files, data frames, arrays and built-in sets become a ``Table``.

Everything is read in float64 (casts come later), in batches into one array of known size. Whatever
is not a finite number stops the reading with one DataError line that names the file, the row and
the column. Rows are file lines for text files (the header is line 1) and counted from 1 elsewhere.
"""

import csv
import math
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rootflow.data.toys import TOYS
from rootflow.errors import DataError

__all__ = ["BUILTIN", "Table", "read_table", "require_rows", "split", "write_table"]

Floats = NDArray[np.float64]
Batches = Iterable[Sequence[Any]]  # Arrow arrays, one per column
BATCH = 65536  # rows
TOY_ROWS = 100_000
EXACT = 2**53  # the largest integer up to which float64 holds all of them
READABLE = ".csv .tsv .txt .parquet .feather .arrow .npy .npz"
WRITABLE = ".csv .parquet .npy .npz"

BUILTIN: dict[str, str] = {
    "galaxies": "100,000 x 7: redshift and six magnitudes of simulated galaxies (pzflow, MIT)",
    **{name: f"toy, fresh rows x 2: {toy.summary}" for name, toy in TOYS.items()},
}


@dataclass(frozen=True)
class Table:
    """Finite numbers in named columns.

    ``values`` is (n, d) float64, C-contiguous; ``dtypes`` are the NumPy dtype names the columns had
    before, with which ``write_table`` writes samples back.
    """

    name: str
    columns: tuple[str, ...]
    values: Floats
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """A table not read yet: ``batches(positions)`` yields the Arrow arrays of those columns."""

    name: str
    columns: list[str]
    rows: int  # at most
    batches: Callable[[list[int]], Batches]
    named: bool = True
    row_name: Callable[[int], str] = lambda row: f"row {row + 1}"
    text: bool = False  # cells are strings to be parsed


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
    keys of ``BUILTIN``; a toy may carry its number of rows ("rings:5000") and uses ``seed``.
    ``columns``: the columns wanted, in this order; others are ignored with a warning. An array
    without names gives x1..xd, or takes ``columns`` by position. ``max_rows``: only the first rows.
    ``max_bytes``: refuse to hold more than this (default: half of the machine's memory).

    Raises DataError, one line, for everything that cannot be used.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"read_table: max_rows must be at least 1, got {max_rows}")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _load(_open_array("array", source), columns, max_rows, max_bytes)
    if not isinstance(source, (str, Path)):
        return _load(_open_frame(source), columns, max_rows, max_bytes)
    try:
        known = isinstance(source, str) and source.partition(":")[0] in BUILTIN
        opened = _open_builtin(str(source), seed) if known else _open_path(Path(source))
        return _load(opened, columns, max_rows, max_bytes)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source}: cannot be read, damaged or cut short: {reason}") from None


def require_rows(table: Table, at_least: int) -> None:
    """Raise DataError if the table has fewer rows than that."""
    if len(table.values) < at_least:
        raise DataError(f"{table.name}: {len(table.values)} rows; at least {at_least} are needed")


def split(
    n: int, seed: int = 0, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Shuffle range(n) by ``numpy.random.RandomState(seed)`` and cut it into train, validation, test.

    Validation and test get their fraction rounded down, train the rest.
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
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    if array.ndim != 2 or not array.shape[1] == len(columns) == len(dtypes):
        raise ValueError(
            f"write_table: values {array.shape} do not fit {len(columns)} columns, {len(dtypes)} dtypes"
        )
    if path.suffix not in WRITABLE.split():
        raise DataError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; use {WRITABLE}")
    cells = [_cast(array[:, j], np.dtype(dtype)) for j, dtype in enumerate(dtypes)]
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial_path.open("wb") as file:
            _write(file, path.suffix, cells, list(columns))
        partial_path.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        partial_path.unlink(missing_ok=True)


def _write(file: Any, suffix: str, cells: list[NDArray[Any]], columns: list[str]) -> None:
    if suffix in (".csv", ".parquet"):
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import csv as arrow_csv  # type: ignore[import-untyped]
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


def _open_builtin(source: str, seed: int) -> _Source:
    name, _, count = source.partition(":")
    if name not in TOYS:
        if count:
            raise DataError(f"{source}: only toys take a number of rows; use max_rows=")
        return replace(_open_path(Path(__file__).with_name("galaxies.parquet")), name=name)
    if not re.fullmatch("[1-9][0-9]{0,14}", count or str(TOY_ROWS)):
        raise DataError(f"{source}: {count!r} is not a number of rows; write for instance {name}:5000")
    rows = int(count or TOY_ROWS)

    def batches(wanted: list[int]) -> Iterator[Sequence[Any]]:
        draws = TOYS[name].sample(rows, torch.Generator().manual_seed(seed), torch.float64)
        yield from _array_batches(draws.numpy(), wanted)

    return _Source(name, ["x1", "x2"], rows, batches)


def _open_path(path: Path) -> _Source:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{path}: is a directory, not a table")
    if not path.exists():
        raise DataError(f"{path}: no such file, nor a built-in table ({', '.join(BUILTIN)})")
    if suffix not in READABLE.split():
        raise DataError(f"{path}: unknown kind of file {suffix!r}; known are {READABLE}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    if suffix in (".csv", ".tsv", ".txt"):
        return _open_text(path, suffix)
    if suffix in (".npy", ".npz"):
        return _open_numpy(path)
    return _open_parquet(path) if suffix == ".parquet" else _open_arrow(path)


def _open_parquet(path: Path) -> _Source:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    names = list(file.schema_arrow.names)

    def batches(wanted: list[int]) -> Iterator[Sequence[Any]]:
        for batch in file.iter_batches(BATCH, columns=[names[j] for j in wanted]):
            yield [batch.column(names[j]) for j in wanted]

    return _Source(str(path), names, file.metadata.num_rows, batches)


def _open_arrow(path: Path) -> _Source:
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_file(mapped).read_all()
    except pa.ArrowInvalid:  # the other layout of such files
        mapped.seek(0)
        table = pa.ipc.open_stream(mapped).read_all()

    def batches(wanted: list[int]) -> Iterator[Sequence[Any]]:
        return ([batch.column(j) for j in wanted] for batch in table.to_batches(BATCH))

    return _Source(str(path), list(table.column_names), table.num_rows, batches)


def _open_frame(source: Any) -> _Source:
    import narwhals as nw
    import pyarrow as pa

    try:
        frame = nw.from_native(source)
        frame = frame.collect() if isinstance(frame, nw.LazyFrame) else frame
        series = list(frame.iter_columns())
    except TypeError:
        raise DataError(
            f"cannot read a table from {type(source).__name__}; give a path, a data frame, "
            f"a 2-d array or a built-in name"
        ) from None
    except nw.exceptions.NarwhalsError as error:
        raise DataError(f"data frame: {' '.join(str(error).split())}") from None

    def batches(wanted: list[int]) -> Iterator[Sequence[Any]]:
        arrays = []
        for j in wanted:
            try:
                array = series[j].to_arrow()
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError) as error:
                reason = " ".join(str(error).split())
                raise DataError(f"data frame, column {series[j].name}: {reason}") from None
            arrays.append(array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array)
        yield arrays

    return _Source("data frame", [str(one.name) for one in series], len(frame), batches)


def _open_numpy(path: Path) -> _Source:
    try:
        large = path.stat().st_size > 2**20
        loaded = np.load(path, mmap_mode="r" if large else None, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _open_array(str(path), loaded)
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except ValueError as error:
        if "pickle" in str(error) or "Python objects" in str(error):
            raise DataError(f"{path}: holds pickled objects, which are never loaded; "
                            f"save plain numbers") from None
        raise
    tables = [array for array in arrays.values() if array.ndim == 2]
    if len(tables) != 1:
        held = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise DataError(f"{path}: must hold exactly one 2-d array; it holds {held}")
    names = arrays.get("columns", np.empty(0))
    fits = names.dtype.kind == "U" and names.shape == tables[0].shape[1:]
    return _open_array(str(path), tables[0], names.tolist() if fits else None)


def _open_array(name: str, array: Any, names: list[str] | None = None) -> _Source:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name}: its values are {array.dtype}; only real numbers can be used")
    if array.ndim != 2:
        raise DataError(f"{name}: has shape {array.shape}; a table has shape (rows, columns)")
    columns = names or [f"x{j + 1}" for j in range(array.shape[1])]
    return _Source(name, columns, len(array), partial(_array_batches, array), named=bool(names))


def _array_batches(array: NDArray[Any], wanted: list[int]) -> Iterator[Sequence[Any]]:
    import pyarrow as pa

    dtype = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    for start in range(0, len(array), BATCH):
        block = array[start : start + BATCH]
        yield [pa.array(np.ascontiguousarray(block[:, j], dtype)) for j in wanted]


def _open_text(path: Path, suffix: str) -> _Source:
    with path.open("rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        header_line, header = next(lines, (0, b""))
        file.seek(0)
        chunks = iter(partial(file.read, 2**24), b"")
        rows = 1 + sum(max(chunk.count(b"\n"), chunk.count(b"\r")) for chunk in chunks)
    if not header_line:
        raise DataError(f"{path}: the file is empty")
    try:
        line = header.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    found = (mark for mark in ",\t;" if mark in line)
    delimiter = "\t" if suffix == ".tsv" else next(found, " " if suffix == ".txt" else ",")
    names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]
    if all(_is_number(name) for name in names):
        raise DataError(f"{path}, line {header_line}: {names[0]!r} is a number; "
                        f"the first line must hold the column names")

    def row_name(row: int) -> str:
        with path.open("rb") as file:
            filled = (n for n, text in enumerate(file, 1) if n > header_line and text.strip(b"\r\n"))
            return f"line {next(n for i, n in enumerate(filled) if i == row)}"

    batches = partial(_text_batches, path, names, delimiter, header_line, row_name)
    return _Source(str(path), names, rows, batches, row_name=row_name, text=True)


def _text_batches(
    path: Path, names: list[str], delimiter: str, header_line: int,
    row_name: Callable[[int], str], wanted: list[int],
) -> Iterator[Sequence[Any]]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    ragged: list[Any] = []

    def stop(row: Any) -> str:
        ragged.append(row)
        return "error"

    try:
        yield from (batch.columns for batch in arrow_csv.open_csv(
            path,
            arrow_csv.ReadOptions(
                use_threads=False, block_size=2**22, skip_rows=header_line, column_names=names),
            arrow_csv.ParseOptions(delimiter=delimiter, invalid_row_handler=stop),
            arrow_csv.ConvertOptions(
                column_types={name: pa.string() for name in names}, null_values=[""],
                strings_can_be_null=True, include_columns=[names[j] for j in wanted]),
        ))
    except pa.ArrowInvalid as error:
        if ragged:
            where = row_name(ragged[0].number - header_line - 1)
            raise DataError(f"{path}, {where}: {ragged[0].actual_columns} cells, but the header "
                            f"has {ragged[0].expected_columns}") from None
        raise (_not_utf8(path) if "UTF8" in str(error) else error) from None


def _not_utf8(path: Path) -> DataError:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return DataError(f"{path}, line {number}, byte {error.start + 1}: 0x{byte:02x} is "
                                 f"not UTF-8; save the file again in the encoding UTF-8")
    return DataError(f"{path}: is not UTF-8; save the file again in the encoding UTF-8")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _choose(opened: _Source, columns: Sequence[str] | None) -> tuple[list[int], list[str]]:
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
        raise DataError(f"{name}: lacks the columns {', '.join(missing)}; it has {', '.join(present)}")
    ignored = [column for column in present if column not in columns]
    if ignored:
        warnings.warn(f"{name}: columns not needed are ignored: {', '.join(ignored)}", stacklevel=4)
    return [present.index(column) for column in columns], list(columns)


def _load(
    opened: _Source, columns: Sequence[str] | None, max_rows: int | None, max_bytes: int | None
) -> Table:
    wanted, names = _choose(opened, columns)
    rows = min(opened.rows, max_rows or opened.rows)
    _check_memory(opened.name, rows, len(wanted), max_bytes)
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
        raise DataError(f"{_where(opened, names[j], row, 0)}: the cell is {kind} ({count} empty, NaN "
                        f"or infinite cells in all); remove these rows or fill them")
    return Table(opened.name, tuple(names), values[:filled], tuple(dtypes))


def _where(opened: _Source, column: str, start: int, row: int) -> str:
    return f"{opened.name}, {opened.row_name(start + row)}, column {column}"


def _check_memory(name: str, rows: int, columns: int, limit: int | None) -> None:
    if limit is None:
        try:
            limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, ValueError, OSError):  # not known on this system
            return
    if rows * columns * 8 > limit:
        need, have = (f"{size / 2**30:.3g} GiB" for size in (rows * columns * 8, limit))
        raise DataError(f"{name}: {rows} rows x {columns} columns need {need} of memory, the limit "
                        f"is {have}; read fewer rows with max_rows=")


def _numbers(
    cells: Any, dtype: str, text: bool, where: Callable[[int], str]
) -> tuple[Floats, str]:
    """One column's batch as float64 (NaN for null) and its NumPy dtype; ``dtype`` was the last's."""
    import pyarrow as pa
    from pyarrow import compute

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
    for i in np.flatnonzero(np.abs(numbers) >= EXACT):
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
