"""Rows of numbers in memory or in a file, read piece by piece through the same few operations.

A file of rows is plain little-endian float64, one row after the other. It is read with ordinary
reads, never mapped, so that the memory in use is that of the pieces asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["DiskRows", "MemoryRows", "hold_out", "pieces"]

Floats = NDArray[np.float64]
PIECE = 65_536  # rows


class DiskRows:
    """(n, d) float64 in a temporary file in ``folder``, which has no name and ends with its user.

    ``append`` rows, then read slices with ``rows[a:b]``.
    """

    def __init__(self, folder: Path, columns: int) -> None:
        self.columns, self.n = columns, 0
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def append(self, block: Floats) -> None:
        self.file.seek(0, 2)
        self.file.write(np.ascontiguousarray(block, "<f8").data)
        self.n += len(block)

    def finish(self) -> DiskRows:
        return self

    def __len__(self) -> int:
        return self.n

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.columns

    def __getitem__(self, where: slice) -> Floats:
        start, stop, step = where.indices(self.n)
        if step != 1:
            raise IndexError("rows in a file are read in one piece: rows[a:b]")
        out = np.empty((max(stop - start, 0), self.columns), "<f8")
        self.file.seek(start * self.columns * 8)
        held = self.file.readinto(out.data.cast("B")) if out.size else 0
        if held != out.nbytes:
            raise OSError("the temporary file of rows was cut short")
        return out

    def put(self, index: NDArray[np.int64], block: Floats) -> None:
        """Overwrite the rows at ``index``."""
        for k, row in zip(index.tolist(), np.ascontiguousarray(block, "<f8"), strict=True):
            self.file.seek(k * self.columns * 8)
            self.file.write(row.data)

    def first(self, n: int) -> DiskRows:
        """The first n rows, as a view of the same file."""
        view = object.__new__(DiskRows)
        view.columns, view.n, view.file = self.columns, n, self.file
        return view


class MemoryRows:
    """Gathers at most ``rows`` rows in one array."""

    def __init__(self, rows: int, columns: int) -> None:
        self.values, self.n = np.empty((rows, columns)), 0

    def append(self, block: Floats) -> None:
        self.values[self.n : self.n + len(block)] = block
        self.n += len(block)

    def finish(self) -> Floats:
        return self.values[: self.n]


def pieces(values: Floats | DiskRows) -> Iterator[Floats]:
    """All rows in order, at most PIECE at a time."""
    for start in range(0, len(values), PIECE):
        yield values[start : start + PIECE]


def hold_out(rows: DiskRows, held: int, seed: int) -> tuple[DiskRows, Floats]:
    """Set rows drawn at random aside: the remaining ones, and those ``(held, d)`` in their order.

    The rows at the end of the file move into the places of the drawn ones before it, so that the
    remaining rows lie together.
    """
    n = len(rows)
    drawn = np.random.Generator(np.random.PCG64(seed)).choice(n, held, replace=False)
    values = np.concatenate([rows[i : i + 1] for i in drawn.tolist()] or [rows[:0]])
    inside = drawn[drawn < n - held]
    spared = np.setdiff1d(np.arange(n - held, n), drawn)
    rows.put(inside, np.concatenate([rows[i : i + 1] for i in spared.tolist()] or [rows[:0]]))
    return rows.first(n - held), values
