"""``rootflow sample``: draw rows from a fitted flow, in the columns and types of its table."""

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from rootflow.cli.common import (
    Debug,
    Device,
    Json,
    Seed,
    Threads,
    print_json,
    set_threads,
    usable_device,
)  # fmt: skip
from rootflow.cli.run import gaps, grid_start, open_run
from rootflow.data import write_table

__all__ = ["sample"]

CHUNK = 10_000


def sample(
    run: Annotated[Path, typer.Argument(help="Directory that `rootflow fit` wrote.")],
    n: Annotated[int, typer.Option("-n", "--rows", min=1, help="How many rows.")],
    out: Annotated[
        Path | None, typer.Option(help="A .csv, .parquet, .npy or .npz file, not CSV to stdout.")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw rows; dequantised columns are put back on their grid."""
    where = usable_device(device)
    set_threads(threads)
    flow, plan = open_run(run, where)
    data = plan["data"]
    generator = torch.Generator(where).manual_seed(seed)
    sizes = [CHUNK] * (n // CHUNK) + [n % CHUNK] * (n % CHUNK > 0)
    rows = torch.cat([flow.sample((size,), generator=generator).cpu().double() for size in sizes])
    if (widths := gaps(data)) is not None:
        start, spacing = grid_start(data), torch.where(widths > 0, widths, 1.0)
        rows = torch.where(widths > 0, start + ((rows - start) / spacing).floor() * spacing, rows)
    if out is not None:
        write_table(rows, data["columns"], data["dtypes"], out)
    if as_json:
        drawn = {"out": str(out)} if out is not None else {"values": rows.tolist()}
        print_json({"run": str(run), "rows": n, "seed": seed, "columns": data["columns"], **drawn})
    elif out is None:
        with tempfile.TemporaryDirectory() as folder:
            write_table(rows, data["columns"], data["dtypes"], Path(folder) / "rows.csv")
            with (Path(folder) / "rows.csv").open(encoding="utf-8") as lines:
                for line in lines:
                    print(line, end="")
