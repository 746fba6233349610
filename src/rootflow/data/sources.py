"""Where tables come from: every kind of file, frame and array as named Arrow batches.

A ``Source`` knows its columns and about how many rows it has before a number is read, so that
``tables.read_table`` can refuse what does not fit, choose columns, and name the row of a bad cell.
"""

import csv
import gzip
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tokenize import TokenError  # what numpy lets through for a damaged header
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rootflow.data.packaged import PACKAGED, read_packaged
from rootflow.data.prepared import NOTE, PREPARED, Prepared, find_prepared, open_prepared
from rootflow.data.toys import TOYS
from rootflow.errors import DataError

__all__ = ["BUILTIN", "READABLE", "UNREADABLE", "Source", "kind_of_file", "open_source"]

Batch = Sequence[Any]  # Arrow arrays, one per column
BATCH = 65536  # rows
TOY_ROWS = 100_000
PARTS = ("train", "validation", "test")
TEXT = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
READABLE = f"{' '.join(TEXT)} .parquet .feather .arrow .npy .npz"
# What readers raise for damaged files; Arrow's errors are ValueError or NotImplementedError.
UNREADABLE = (OSError, ValueError, EOFError, NotImplementedError, SyntaxError, TokenError,
              zipfile.BadZipFile, zlib.error)  # fmt: skip

BUILTIN: dict[str, str] = {
    "galaxies": "100,000 x 7: redshift and six magnitudes of simulated galaxies (pzflow, MIT)",
    "digits": "1,797 x 64: pixels 0 to 16 of handwritten digits, 8 x 8 (UCI optdigits, CC BY 4.0)",
    **{name: f"toy, fresh rows x 2: {toy.summary}" for name, toy in TOYS.items()},
}


@dataclass(frozen=True)
class Source:
    """A table not read yet: ``batches(positions)`` yields the Arrow arrays of those columns."""

    name: str
    columns: list[str]
    rows: int  # at most
    batches: Callable[[list[int]], Iterable[Batch]]
    named: bool = True
    row_name: Callable[[int], str] = lambda row: f"row {row + 1}"
    text: bool = False  # cells are strings to be parsed
    parts: tuple[int, ...] | None = None  # rows of training, validation and test, if given


def open_source(source: Any, seed: int) -> Source:
    """Open anything ``read_table`` accepts; DataError if it is nothing of the kind."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _open_array("array", source)
    if not isinstance(source, (str, Path)):
        return _open_frame(source)
    name, _, part = str(source).rpartition(":")
    if part in PARTS and name:
        return _one_part(open_source(name, seed), part)
    if isinstance(source, Path):
        return _open_path(source)
    if source.partition(":")[0] in BUILTIN:
        return _open_builtin(source, seed)
    if source in PACKAGED:
        columns, rows, parts = read_packaged(source)
        return replace(_open_array(source, rows, columns), parts=parts)
    if (prepared := find_prepared(source, "table")) is not None:
        return _open_prepared(prepared)
    return _open_path(Path(source))


def _open_builtin(source: str, seed: int) -> Source:
    name, _, count = source.partition(":")
    if name not in TOYS:
        if count:
            raise DataError(f"{source}: only toys take a number of rows; use max_rows=")
        return replace(_open_path(Path(__file__).with_name(f"{name}.parquet")), name=name)
    if not re.fullmatch("[1-9][0-9]{0,14}", count or str(TOY_ROWS)):
        raise DataError(f"{source}: {count!r} is not a number of rows; write {name}:5000, say")
    rows = int(count or TOY_ROWS)

    def batches(wanted: list[int]) -> Iterator[Batch]:
        draws = TOYS[name].sample(rows, torch.Generator().manual_seed(seed), torch.float64)
        yield from _array_batches(draws.numpy(), wanted)

    return Source(name, ["x1", "x2"], rows, batches)


def _open_prepared(prepared: Prepared) -> Source:
    return replace(
        _open_array(prepared.name, prepared.values, prepared.columns), parts=prepared.parts
    )


def _one_part(source: Source, part: str) -> Source:
    """The rows of one part of a table that comes with its split."""
    if source.parts is None:
        raise DataError(f"{source.name}: comes without a split, so that there is no :{part}")
    k = PARTS.index(part)
    start, stop = sum(source.parts[:k]), sum(source.parts[: k + 1])

    def batches(wanted: list[int]) -> Iterator[Batch]:
        row = 0
        for arrays in source.batches(wanted):
            low, high = (min(max(end - row, 0), len(arrays[0])) for end in (start, stop))
            row += len(arrays[0])
            if high > low:
                yield [cells.slice(low, high - low) for cells in arrays]

    return replace(
        source, name=f"{source.name}:{part}", rows=stop - start, batches=batches, parts=None
    )


def kind_of_file(path: Path) -> str:
    """The suffix in small letters, with the one before it if that is .gz."""
    return "".join(path.suffixes[-2 if path.suffix.lower() == ".gz" else -1 :]).lower()


def _open_path(path: Path) -> Source:
    suffix = kind_of_file(path)
    if (path / NOTE).exists():
        return _open_prepared(open_prepared(path, "table"))
    if path.is_dir():
        raise DataError(f"{path}: is a directory, not a table")
    if not path.exists():
        if str(path) in PREPARED["table"]:
            raise DataError(f"{path}: is not prepared yet; run: rootflow data prepare {path}")
        known = [*BUILTIN, *PACKAGED, *PREPARED["table"]]
        raise DataError(f"{path}: no such file, nor a built-in table ({', '.join(known)})")
    if suffix not in READABLE.split():
        raise DataError(f"{path}: unknown kind of file {suffix!r}; known are {READABLE}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    if suffix in TEXT:
        return _open_text(path, suffix.removesuffix(".gz"))
    if suffix in (".npy", ".npz"):
        return _open_numpy(path)
    return _open_parquet(path) if suffix == ".parquet" else _open_arrow(path)


def _open_parquet(path: Path) -> Source:
    from pyarrow import parquet

    file = parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    names = list(file.schema_arrow.names)

    def batches(wanted: list[int]) -> Iterator[Batch]:
        for batch in file.iter_batches(
            BATCH, columns=[names[j] for j in wanted], use_threads=False
        ):
            yield [batch.column(names[j]) for j in wanted]

    return Source(str(path), names, file.metadata.num_rows, batches)


def _open_arrow(path: Path) -> Source:
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_file(mapped).read_all()
    except pa.ArrowInvalid:  # the other layout of such files
        mapped.seek(0)
        table = pa.ipc.open_stream(mapped).read_all()

    def batches(wanted: list[int]) -> Iterator[Batch]:
        return ([batch.column(j) for j in wanted] for batch in table.to_batches(BATCH))

    return Source(str(path), list(table.column_names), table.num_rows, batches)


def _open_frame(source: Any) -> Source:
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

    def batches(wanted: list[int]) -> Iterator[Batch]:
        arrays = []
        for j in wanted:
            try:
                array = series[j].to_arrow()
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError) as error:
                reason = " ".join(str(error).split())
                raise DataError(f"data frame, column {series[j].name}: {reason}") from None
            arrays.append(array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array)
        yield arrays

    return Source("data frame", [str(one.name) for one in series], len(frame), batches)


def _open_numpy(path: Path) -> Source:
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            if zipped or path.suffix.lower() == ".npz":
                archive = np.load(file, allow_pickle=False)
                arrays = {name: archive[name] for name in archive.files}
            else:
                lazily: Any = "r" if path.stat().st_size > 2**20 else None
                array = np.load(path, mmap_mode=lazily, allow_pickle=False)
                return _open_array(str(path), array)
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


def _open_array(name: str, array: Any, names: list[str] | None = None) -> Source:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name}: its values are {array.dtype}; only real numbers can be used")
    if array.ndim != 2:
        raise DataError(f"{name}: has shape {array.shape}; a table has shape (rows, columns)")
    columns = names or [f"x{j + 1}" for j in range(array.shape[1])]
    return Source(name, columns, len(array), partial(_array_batches, array), named=bool(names))


def _array_batches(array: NDArray[Any], wanted: list[int]) -> Iterator[Batch]:
    import pyarrow as pa

    dtype = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    for start in range(0, len(array), BATCH):
        block = array[start : start + BATCH]
        yield [pa.array(np.ascontiguousarray(block[:, j], dtype)) for j in wanted]


def _bytes(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _open_text(path: Path, suffix: str) -> Source:
    with _bytes(path) as file:
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
        with _bytes(path) as file:
            numbered = enumerate(file, 1)
            filled = (n for n, cells in numbered if n > header_line and cells.strip(b"\r\n"))
            return f"line {next(n for i, n in enumerate(filled) if i == row)}"

    batches = partial(_text_batches, path, names, delimiter, header_line, row_name)
    return Source(str(path), names, rows, batches, row_name=row_name, text=True)


def _text_batches(
    path: Path, names: list[str], delimiter: str, header_line: int,
    row_name: Callable[[int], str], wanted: list[int],
) -> Iterator[Batch]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    try:
        yield from (batch.columns for batch in arrow_csv.open_csv(
            path,
            arrow_csv.ReadOptions(
                use_threads=False, block_size=2**22, skip_rows=header_line, column_names=names),
            arrow_csv.ParseOptions(delimiter=delimiter),
            arrow_csv.ConvertOptions(
                column_types={name: pa.string() for name in names}, null_values=[""],
                strings_can_be_null=True, include_columns=[names[j] for j in wanted]),
        ))
    except pa.ArrowInvalid as error:
        # Arrow cannot call an invalid_row_handler for a row that is not UTF-8
        if ragged := re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", str(error)):
            row, columns, found = map(int, ragged.groups())
            where = row_name(row - header_line - 1)
            raise DataError(
                f"{path}, {where}: {found} cells, but the header has {columns}") from None
        raise (_not_utf8(path) if "UTF8" in str(error) else error) from None


def _not_utf8(path: Path) -> DataError:
    with _bytes(path) as file:
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
