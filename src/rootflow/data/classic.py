"""The five tables on which flows are compared, from the files of Papamakarios et al. 2017.

Each reader follows the published preprocessing step by step and returns names of the columns and
the rows of training, validation and test, in float64. Unless said otherwise the test is the last
tenth of the rows and the validation the last tenth of what remains, each rounded down.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootflow.data.gas_frame import read_frame
from rootflow.data.sources import UNREADABLE
from rootflow.errors import DataError

__all__ = ["Parts", "read_bsds300", "read_gas", "read_hepmass", "read_miniboone", "read_power"]

Floats = NDArray[np.float64]
Parts = tuple[list[str], Floats, Floats, Floats]


def read_power(files: Sequence[Path]) -> Parts:
    """POWER: 2,049,280 x 8, shuffled, two columns left out, noise within the meters' steps."""
    rows = _load(files[0], 8)
    generator = np.random.RandomState(42)
    generator.shuffle(rows)
    rows = np.delete(rows, [1, 3], axis=1)  # reactive power and intensity
    n = len(rows)
    voltage = 0.01 * generator.rand(n, 1)  # the order of these draws is part of the data
    power = 0.001 * generator.rand(n, 1)
    meters = generator.rand(n, 3)
    rows += np.hstack([power, voltage, meters, np.zeros((n, 1))])
    names = ["active_power", "voltage", "meter_1", "meter_2", "meter_3", "time"]
    return names, *_standardised(*_cut(rows, files[0]))


def read_gas(files: Sequence[Path]) -> Parts:
    """GAS: sensors, near copies left out; all rows standardised together, the test's included."""
    columns = read_frame(files[0])
    missing = {"Meth", "Eth", "Time"} - columns.keys()
    if missing:
        raise DataError(f"{files[0]}: column {', '.join(sorted(missing))} is missing; it has "
                        f"{', '.join(columns)}")
    names = [name for name in columns if name not in ("Meth", "Eth", "Time")]
    rows = np.stack([columns[name] for name in names], axis=1)
    while True:
        near = (np.atleast_2d(np.corrcoef(rows.T)) > 0.98).sum(1)
        if not (near > 1).any():
            break
        first = int((near > 1).argmax())
        rows = np.delete(rows, first, axis=1)
        del names[first]
    rows = (rows - rows.mean(0)) / rows.std(0, ddof=1)
    return names, *_cut(rows, files[0])


def read_hepmass(files: Sequence[Path]) -> Parts:
    """HEPMASS: the signal at mass 1000 without label; features with many repeated values left out.

    The test has its own file, which has one column more at the end.
    """
    width = _header(files[0])
    train, test = (_signal(path, width) for path in files)
    mean, sd = train.mean(0), train.std(0, ddof=1)
    train, test = (train - mean) / sd, (test - mean) / sd
    # The published rule looks at how often the smallest value occurs, not the most frequent one.
    kept = (train == train.min(0)).sum(0) <= 5
    cut = len(train) - int(0.1 * len(train))
    names = [f"f{j}" for j in np.flatnonzero(kept)]
    return names, train[:cut, kept], train[cut:, kept], test[:, kept]


def read_miniboone(files: Sequence[Path]) -> Parts:
    """MINIBOONE: 36,488 x 43, cleaned before it was published."""
    rows = _load(files[0], 43)
    return _names(43), *_standardised(*_cut(rows, files[0]))


def read_bsds300(files: Sequence[Path]) -> Parts:
    """BSDS300: 63 pixels of dequantised patches less their mean, used as they are."""
    try:
        import h5py
    except ImportError:
        raise DataError("bsds300: its file needs h5py; pip install rootflow[archives]") from None
    try:
        with h5py.File(files[0], "r") as file:
            parts = [np.asarray(file[key], np.float64) for key in ("train", "validation", "test")]
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{files[0]}: cannot be read as HDF5 with train, validation and test: "
                        f"{reason}") from None
    for part in parts:
        if part.ndim != 2 or part.shape[1] != 63:
            raise DataError(f"{files[0]}: holds shape {part.shape}; (rows, 63) is expected")
    return _names(63), parts[0], parts[1], parts[2]


def _names(d: int) -> list[str]:
    return [f"x{j + 1}" for j in range(d)]


def _load(path: Path, width: int) -> Floats:
    try:
        with path.open("rb") as file:
            rows: Any = np.load(file, allow_pickle=False)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read, damaged or cut short: {reason}") from None
    if rows.ndim != 2 or rows.shape[1] != width or rows.dtype.kind not in "iuf":
        raise DataError(f"{path}: holds {rows.dtype} of shape {rows.shape}; numbers of shape "
                        f"(rows, {width}) are expected")
    return np.asarray(rows, np.float64)


def _cut(rows: Floats, path: Path) -> tuple[Floats, Floats, Floats]:
    if len(rows) < 20:
        raise DataError(f"{path}: holds {len(rows)} rows; that is too few to split")
    rest = len(rows) - int(0.1 * len(rows))
    train = rest - int(0.1 * rest)
    return rows[:train], rows[train:rest], rows[rest:]


def _standardised(
    train: Floats, validation: Floats, test: Floats
) -> tuple[Floats, Floats, Floats]:
    """By the mean and standard deviation (ddof 0) of training and validation together."""
    seen = np.vstack([train, validation])
    mean, sd = seen.mean(0), seen.std(0)
    return (train - mean) / sd, (validation - mean) / sd, (test - mean) / sd


def _header(path: Path) -> int:
    """How many columns the first line of a CSV file names."""
    with path.open("rb") as file:
        return len(file.readline(65_536).split(b","))


def _signal(path: Path, width: int) -> Floats:
    """The rows with label 1 of a CSV file, without the label, its first ``width`` columns read."""
    found = [block[block[:, 0] == 1, 1:] for block in _blocks(path, width)]
    rows = np.concatenate(found) if found else np.empty((0, width - 1))
    if len(rows) < 20:
        raise DataError(f"{path}: holds {len(rows)} rows with label 1; that is too few")
    return rows


def _blocks(path: Path, width: int) -> Iterator[Floats]:
    import pyarrow as pa
    from pyarrow import csv

    names = [f"f{j}" for j in range(width)]  # by position: headers are shorter than rows
    types = dict.fromkeys(names, pa.float64())
    try:
        yield from (
            np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
            for batch in csv.open_csv(
                path,
                csv.ReadOptions(use_threads=False, skip_rows=1, autogenerate_column_names=True),
                convert_options=csv.ConvertOptions(column_types=types, include_columns=names),
            )
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as a CSV of {width} or more numbers: "
                        f"{reason}") from None
