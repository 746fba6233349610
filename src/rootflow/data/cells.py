"""From the Arrow cells of one column to float64: numbers, dates, and texts as numbers of levels.

Without ``Mixed`` a column must hold numbers. With it, text becomes the number of its level in the
order in which the levels appear, a date the days, a timestamp the seconds since 1970, and an empty
cell NaN. What a column holds is decided by its first cells that are not empty; a later cell that
does not fit raises DataError, one line that names it.
"""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootflow.errors import DataError

__all__ = ["EXACT", "MOST_LEVELS", "UNKNOWN", "Column", "Mixed"]

Floats = NDArray[np.float64]
Where = Callable[[int], str]  # names the cell of that row, for errors
EXACT = 2**53  # up to here float64 holds every integer
MOST_LEVELS = 10_000  # of text; a column with more of them is taken for names, not categories
UNKNOWN = -1.0  # the number of a text that is none of the known levels
EMPTY = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")  # what text files write for nothing


@dataclass(frozen=True)
class Mixed:
    """What columns may hold beside numbers, and what is known of them before they are read.

    ``dtypes`` and ``levels``: of columns known from a fit; texts that are no level become UNKNOWN.
    ``texts``: columns whose cells are levels even if most of them look like numbers. ``missing``:
    "refuse" empty cells, "drop" their rows, "keep" them as NaN; "auto" keeps them where they are
    common and refuses a few stray ones. ``holes``: the only columns in which "keep" allows them.
    """

    dtypes: Mapping[str, str] = field(default_factory=dict)
    levels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    texts: Set[str] = frozenset()
    missing: str = "auto"
    holes: Set[str] | None = None


def is_text(of: Any) -> bool:
    """Whether an Arrow type holds strings."""
    return str(of) in ("string", "large_string", "string_view")


class Column:
    """One column while it is read, batch by batch."""

    def __init__(self, name: str, text: bool, mixed: Mixed | None) -> None:
        self.name, self.text, self.mixed = name, text, mixed
        self.dtype = "" if mixed is None else mixed.dtypes.get(name, "")
        known = None if mixed is None else mixed.levels.get(name)
        self.codes: dict[str, float] = {level: float(k) for k, level in enumerate(known or ())}
        self.closed = known is not None

    def numbers(self, cells: Any, where: Where) -> Floats:
        """The cells as float64, NaN for empty ones."""
        import pyarrow as pa

        kind, raw = pa.types, cells
        if kind.is_dictionary(cells.type):
            if self.mixed is not None and not self.closed and is_text(cells.type.value_type):
                for level in cells.dictionary.to_pylist():  # categories keep the order they have
                    if level is not None and len(self.codes) <= MOST_LEVELS:
                        self.codes.setdefault(level, float(len(self.codes)))
            cells = cells.dictionary_decode()
        if self.text:
            cells = self._parse(cells, where)
        of = cells.type
        if self.mixed is not None and is_text(of):
            return self._levels(cells.cast(pa.large_string()), where)
        if self.mixed is not None and (kind.is_date(of) or kind.is_timestamp(of)):
            return self._times(cells)
        if kind.is_decimal(of) or kind.is_null(of):
            self._decide("float64" if self.mixed is None or kind.is_decimal(of) else "", where)
        elif kind.is_integer(of) or kind.is_floating(of) or kind.is_boolean(of):
            self._decide(np.dtype(of.to_pandas_dtype()).name, where)
        else:
            first = f": {str(cells[0])!r}" if len(cells) else ""
            raise DataError(f"{where(0)}: holds {of}, not numbers{first}; leave the column out")
        numbers: Floats = cells.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        exact = self.dtype.startswith("float") and not self.text
        for i in [] if exact else np.flatnonzero(np.abs(numbers) >= EXACT).tolist():
            shown = str(raw[i])
            if re.fullmatch(r"[+-]?\d+", shown) and abs(int(shown)) > EXACT:
                raise DataError(f"{where(i)}: {shown} is an integer beyond 2**53, which float64 "
                                f"cannot tell from its neighbours; leave the column out")
        return numbers

    def _decide(self, dtype: str, where: Where) -> None:
        """Note the type of these cells; numbers of any kind go with each other."""
        if self.dtype in ("str", "date", "timestamp") and dtype:
            raise DataError(f"{where(0)}: holds {dtype}, but this column is {self.dtype}")
        if self.mixed is None or (not self.closed and self.name not in self.mixed.dtypes):
            self.dtype = dtype or self.dtype

    def _levels(self, cells: Any, where: Where) -> Floats:
        if self.dtype not in ("", "str"):
            raise DataError(f"{where(0)}: holds text, but this column is {self.dtype}")
        self.dtype = "str"
        encoded = cells.dictionary_encode()
        table = np.full(len(encoded.dictionary) + 1, np.nan)
        for k, level in enumerate(encoded.dictionary.to_pylist()):
            if level is not None and (self.text or level != ""):
                if not self.closed and len(self.codes) <= MOST_LEVELS:
                    self.codes.setdefault(level, float(len(self.codes)))
                table[k] = self.codes.get(level, UNKNOWN)
        index = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)
        found: Floats = table[index]
        return found

    def _times(self, cells: Any) -> Floats:
        import pyarrow as pa

        dtype = "date" if pa.types.is_date(cells.type) else "timestamp"
        if dtype == "timestamp" and cells.type.tz is not None:
            dtype = f"timestamp {cells.type.tz}"
        self.dtype = self.dtype or dtype
        if dtype == "date":
            days = cells.cast(pa.date32()).cast(pa.int32())
            return np.asarray(days.cast(pa.float64()).to_numpy(zero_copy_only=False))
        unit = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}[cells.type.unit]
        ticks = cells.cast(pa.int64()).cast(pa.float64(), safe=False)
        return np.asarray(ticks.to_numpy(zero_copy_only=False)) / unit

    def _parse(self, cells: Any, where: Where) -> Any:
        """Text cells as numbers, or as dates or trimmed texts where those are allowed."""
        import pyarrow as pa
        from pyarrow import compute

        def attempt(texts: Any, dtypes: Sequence[Any]) -> Any:
            for dtype in dtypes:
                try:
                    return compute.cast(texts, dtype)
                except pa.ArrowInvalid:
                    continue
            return None

        known = self.dtype
        order: Sequence[Any] = {
            "": ("int64", "float64", "bool"), "float64": ("float64",), "bool": ("bool",),
            "date": (pa.date32(),), "str": (),
        }.get(known, ("int64", "float64"))  # fmt: skip
        if known.startswith("timestamp"):
            order = (pa.timestamp("us", known.partition(" ")[2] or None),)
        parsed = attempt(cells, order)
        if parsed is None:
            cells = compute.utf8_trim_whitespace(cells)
            nothing = pa.array(EMPTY if self.mixed is not None else ("",))
            empty = compute.is_in(cells, nothing)
            cells = compute.if_else(empty, pa.scalar(None, cells.type), cells)
            parsed = attempt(cells, order)
        if parsed is None and self.mixed is not None and known == "":
            times = (pa.date32(), pa.timestamp("us"), pa.timestamp("us", "UTC"))
            parsed = attempt(cells, times)
        if parsed is not None:
            if self.mixed is not None and parsed.null_count == len(parsed):
                return pa.nulls(len(parsed))
            return parsed
        if known == "str":
            return cells
        if known == "" and self.mixed is not None:
            some = cells.drop_null().slice(0, 1000)
            numeric = sum(attempt(some.slice(i, 1), ("float64",)) is not None
                          for i in range(len(some)))  # fmt: skip
            if self.name in self.mixed.texts or numeric <= len(some) / 2:
                return cells
        low, high = 0, len(cells)  # the first cell that fails is in cells[low:high]
        single = order if known in ("bool", "date") or known.startswith("time") else ("float64",)
        while high - low > 1:
            middle = (low + high) // 2
            good = attempt(cells[low:middle], single) is not None
            low, high = (middle, high) if good else (low, middle)
        wanted = f"a {known.split()[0]}" if known.startswith(("date", "time")) else "a number"
        raise DataError(f"{where(low)}: {cells[low].as_py()!r} is not {wanted}; "
                        f"remove the row or the column")
