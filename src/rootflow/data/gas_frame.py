"""The one file that exists only as a pickle, read by an allow-list that lets arrays through.

The gas table of the archive of Papamakarios et al. is a pickled pandas frame, a sample drawn
without a seed: the raw data cannot replace it. ``read_frame`` makes arrays of it without pandas.
Names of pandas become inert records, four names of numpy and Python are let through, and any other
name ends the reading. It is called only after the user has asked for it with ``--unpickle``.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootflow.errors import DataError

__all__ = ["read_frame"]


class _Record:
    """Keeps what it was made from, and does nothing."""

    parts: list[Any]

    def __new__(cls, *arguments: Any) -> "_Record":
        self = object.__new__(cls)
        self.parts = list(arguments)
        return self

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "pandas" or module.startswith("pandas."):
            return _Record
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module.endswith("core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module in ("builtins", "__builtin__") and name == "slice":
            return slice
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not let through")


def read_frame(path: Path) -> dict[str, NDArray[np.float64]]:
    """The numeric columns of a pickled pandas frame by name. Raises DataError.

    Understands frames of pandas 0.14 to 0.25, whose state lists ``axes`` and ``blocks``, each
    with its ``values`` (columns, rows) and ``mgr_locs``, the positions of these columns.
    """
    try:
        with path.open("rb") as file:
            content = _Reader(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as a pickled table: {reason}") from None
    state = next((found for found in _walk(content) if {"axes", "blocks"} <= found.keys()), None)
    try:
        assert state is not None
        names = [str(name) for name in next(_arrays(state["axes"]))]
        columns = {}
        for block in state["blocks"]:
            places = block["mgr_locs"]
            if isinstance(places, slice):
                places = range(*places.indices(len(names)))
            for place, values in zip(places, block["values"], strict=True):
                columns[names[place]] = np.asarray(values, np.float64)
        if len(columns) != len(names) or len({len(column) for column in columns.values()}) != 1:
            raise ValueError
    except (AssertionError, LookupError, TypeError, ValueError, StopIteration):
        raise DataError(f"{path}: holds no table as pandas 0.14 to 0.25 wrote it") from None
    return {name: columns[name] for name in names}


def _walk(item: Any) -> Any:
    """Every dictionary inside."""
    if isinstance(item, dict):
        yield item
        item = list(item.values())
    if isinstance(item, _Record):
        item = item.parts
    if isinstance(item, list | tuple):
        for part in item:
            yield from _walk(part)


def _arrays(item: Any) -> Any:
    """Every array inside, in order."""
    if isinstance(item, np.ndarray):
        yield item
        return
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, _Record):
        item = item.parts
    if isinstance(item, list | tuple):
        for part in item:
            yield from _arrays(part)
