"""Fits a Parquet file of many rows with little memory: time and peak memory of the whole command.

    python benchmarks/large.py --rows 10000000 --memory 0.1

The table has five columns: two dependent normals, a count, a zero-inflated amount, and a category.
The peak is the largest resident set of the command's process; beside it stands that of the same
command on a thousandth of the rows, which is what the program needs without data.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

PIECE = 500_000  # rows of a row group


def write(path: Path, rows: int) -> None:
    rng, writer = np.random.default_rng(0), None
    for start in range(0, rows, PIECE):
        n = min(PIECE, rows - start)
        a = rng.normal(size=n)
        amount = np.where(rng.random(n) < 0.4, 0.0, rng.gamma(2, size=n))
        table = pa.table({
            "a": a, "b": a + rng.normal(size=n), "count": rng.poisson(np.exp(a.clip(max=3) / 2)),
            "amount": amount, "kind": rng.choice(["red", "green", "blue"], n),
        })  # fmt: skip
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def fit(path: Path, run: Path, words: list[str]) -> tuple[float, float]:
    """Seconds and peak resident GiB of one `rootflow fit`."""
    command = [sys.executable, "-m", "rootflow", "fit", str(path), "--out", str(run), "-q", *words]
    start = time.monotonic()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.monotonic() - start, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--memory", default="0.1", help="GiB that a table may take")
    parser.add_argument("--flow", default="nsf-coupling")
    parser.add_argument("--minutes", default="0.5")
    options = parser.parse_args()
    words = ["--flow", options.flow, "--minutes", options.minutes, "--memory", options.memory]
    with tempfile.TemporaryDirectory() as folder:
        for rows in (options.rows // 1000, options.rows):
            path = Path(folder) / f"{rows}.parquet"
            write(path, rows)
            seconds, peak = fit(path, Path(folder) / f"run-{rows}", [*words, "--threads", "1"])
            size = rows * 5 * 8 / 2**30
            print(f"{rows:,} rows, {size:.2g} GiB as float64: {seconds:.0f} s, "
                  f"peak {peak:.2f} GiB")  # fmt: skip


if __name__ == "__main__":
    main()
