"""Tables on the command line: read, told apart column by column, cut into parts, recognised."""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootflow.cli.common import WrongUse, say
from rootflow.data import Table, describe_columns, read_table, require_rows
from rootflow.data.cells import Mixed
from rootflow.data.detect import SAMPLE, Declared, declare, detect
from rootflow.data.rows import DiskRows, hold_out, pieces
from rootflow.data.schema import Schema
from rootflow.errors import DataError

__all__ = ["LEAST_ROWS", "Parts", "Reading", "byte_count", "read_again", "read_new", "read_rows"]

LEAST_ROWS = 20
FRACTIONS = (0.8, 0.1, 0.1)
MOST_HELD_OUT = 100_000  # rows for validation, and for the test, of a table in a file
MISSING = ("auto", "refuse", "drop", "keep")


def byte_count(memory: float | None) -> int | None:
    """GiB in bytes."""
    return None if memory is None else int(memory * 2**30)


@dataclass(frozen=True)
class Reading:
    """How a table is to be read, from the options of a command."""

    columns: list[str] | None
    kinds: Mapping[str, Declared]
    missing: str
    as_is: bool
    max_bytes: int | None
    words: list[str]  # the options, to be repeated

    @property
    def recorded(self) -> dict[str, Any]:
        """What config.json must know to read the table again."""
        return {"missing": self.missing, "as_is": self.as_is}

    @classmethod
    def of(
        cls, columns: str | None, kinds: Sequence[str] | None, missing: str, as_is: bool,
        memory: float | None,
    ) -> "Reading":
        """From the words of the command line. Raises WrongUse."""
        if missing not in MISSING:
            raise WrongUse(f"--missing {missing}: choose one of {', '.join(MISSING)}")
        if as_is and (kinds or missing != "auto"):
            raise WrongUse("--as-is takes the columns as they are; --kind and --missing do not")
        try:
            declared = dict(map(declare, kinds or ()))
        except ValueError as error:
            raise WrongUse(f"--kind {error}") from None
        names = None if columns is None else [name.strip() for name in columns.split(",")]
        if names is not None and not all(names):
            raise WrongUse(f"--columns {columns!r}: a name is empty; give names such as a,b,c")
        limit = byte_count(memory)
        words = ["--columns", columns] if columns else []
        words += [word for kind in kinds or () for word in ("--kind", kind)]
        words += ["--missing", missing] if missing != "auto" else []
        words += ["--as-is"] if as_is else []
        return cls(names, declared, missing, as_is, limit, words)


@dataclass(frozen=True)
class Parts:
    """Training, validation and test rows of a table, in float64; only the first may be a file.

    ``sha256``: of the whole table, by which a run knows its data again.
    """

    name: str
    schema: Schema
    train: Any
    validation: NDArray[np.float64]
    test: NDArray[np.float64]
    sha256: str


def read_new(source: str, reading: Reading, seed: int, quiet: bool) -> Parts:
    """A table that no run knows yet, told apart column by column.

    Says on stderr what each column is. Raises DataError for what has no density.
    """
    mixed = None
    if not (as_is := reading.as_is or (not reading.kinds and named_and_continuous(source))):
        texts = {name for name, kind in reading.kinds.items() if kind.kind in TEXT}
        order = {name: kind.texts for name, kind in reading.kinds.items() if kind.texts}
        mixed = Mixed(levels=order, texts=texts, missing=reading.missing)
    table = read_rows(source, reading.columns, seed, reading.max_bytes, mixed)
    require_rows(table, LEAST_ROWS)
    if as_is:
        _warn(table)
        return cut(table, Schema.of(table.columns, table.dtypes), seed)
    parts = cut(table, Schema(()), seed)
    schema = detect(table, [parts.train, parts.validation, parts.test], reading.kinds)
    if len(schema.names) < len(table.columns):
        if isinstance(table.values, DiskRows):
            table = read_rows(source, schema.names, seed, reading.max_bytes, schema.reading())
        else:
            table = table.only(schema.names)
        parts = cut(table, schema, seed)
    for note in [] if quiet else schema.notes:
        say(note)
    return replace(parts, schema=schema)


def named_and_continuous(source: str) -> bool:
    """Whether DATA names a data set whose columns are known to be free real numbers."""
    return not Path(source).is_file() and source.partition(":")[0] != "digits"


TEXT = ("category", "ordered")
KEPT = {"auto": "keep"}  # what was decided once is not decided again


def read_rows(
    source: str, columns: list[str] | None, seed: int, max_bytes: int | None, mixed: Mixed | None
) -> Table:
    """A table, in a temporary file if memory does not hold it."""
    folder = Path(tempfile.gettempdir())
    table = read_table(source, columns=columns, seed=seed, max_bytes=max_bytes, mixed=mixed,
                       spool=folder)  # fmt: skip
    if isinstance(table.values, DiskRows):
        size = table.values.n * table.values.columns * 8 / 2**30
        say(f"{table.name}: {len(table.values):,} rows are kept in a temporary file of "
            f"{size:.2g} GiB in {folder}")
    return table


def read_again(data: Mapping[str, Any], schema: Schema, max_bytes: int | None = None) -> Parts:
    """The parts of the table of a run that the entry ``data`` of its config.json describes.

    Raises DataError if it is gone.
    """
    mixed = None
    if not data.get("as_is", True):
        mixed = replace(schema.reading(), missing=KEPT.get(data["missing"], data["missing"]))
    with warnings.catch_warnings():  # the fit has said which columns it leaves out
        warnings.filterwarnings("ignore", message=".*columns not needed are ignored")
        table = read_rows(data["source"], data["columns"], data["seed"], max_bytes, mixed)
    return cut(table, schema, data["seed"])


def cut(table: Table, schema: Schema, seed: int) -> Parts:
    """Eight tenths to train, one to validate, one to test; of a file at most MOST_HELD_OUT each."""
    digest = hashlib.sha256(json.dumps(table.columns).encode())
    for block in pieces(table.values):
        digest.update(np.ascontiguousarray(block).data)
    sha256 = digest.hexdigest()
    if not isinstance(table.values, DiskRows):
        parts = [table.values[rows] for rows in table.split(seed, FRACTIONS)]
        return Parts(table.name, schema, parts[0], parts[1], parts[2], sha256)
    if table.parts is not None:
        n, m, _ = table.parts
        rows = table.values
        return Parts(table.name, schema, rows.first(n), rows[n : n + m], rows[n + m :], sha256)
    each = [min(int(len(table.values) * part), MOST_HELD_OUT) for part in FRACTIONS[1:]]
    train, held = hold_out(table.values, sum(each), seed)
    return Parts(table.name, schema, train, held[: each[0]], held[each[0] :], sha256)


def _warn(table: Table) -> None:
    """Say which columns taken as they are have no density; refuse constants and copies."""
    table = replace(table, values=table.values[:SAMPLE])
    for column, values in zip(describe_columns(table), table.values.T, strict=True):
        if column.constant or column.duplicate_of is not None:
            raise DataError(f"{table.name}: {column.warning} (choose columns with --columns)")
        if column.warning is not None:
            say(f"warning: {column.warning}")
        if np.abs(values).max() * np.finfo(np.float32).eps > 1e-3 * values.std():
            say(
                f"warning: column {column.name} varies little beside its size: training in float32 "
                "sees it coarsely; subtract a constant from it"
            )
