"""``rootflow sample``: draw rows from a fitted flow, in the columns and types of its table."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from rootflow.cli import given
from rootflow.cli.common import WrongUse, machine, print_json
from rootflow.cli.inputs import schema_of
from rootflow.cli.pictures import draw, write_images
from rootflow.cli.run import open_run
from rootflow.data import write_table
from rootflow.data.tables import as_cells
from rootflow.errors import NotConverged
from rootflow.transforms import Pixels

__all__ = ["sample"]

CHUNK = 10_000


def sample(
    run: given.Run,
    n: Annotated[int, typer.Option("-n", "--rows", min=1, help="How many rows.")],
    out: Annotated[
        Path | None,
        typer.Option(help="A .csv, .parquet, .npy or .npz file, of images .npy, .npz or .png."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Stretch the latent; below 1 keeps to likely rows.")
    ] = 1.0,
    seed: given.Seed = 0,
    threads: given.Threads = None,
    device: given.Device = "cpu",
    as_json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Draw rows as CSV or into a file, with the columns, levels, bounds and types of the table.

    Images are drawn into a file: .png shows them side by side, .npy and .npz hold their pixels.
    """
    where = machine(device, threads)
    flow, plan = open_run(run, where)
    data = plan["data"]
    generator = torch.Generator(where).manual_seed(seed)
    if "shape" in data and (out is None or out.suffix.lower() not in (".npy", ".npz", ".png")):
        raise WrongUse(f"--out {out or ''}: images are drawn into a .npy, .npz or .png file")
    sizes = [CHUNK] * (n // CHUNK) + [n % CHUNK] * (n % CHUNK > 0)
    drawn = torch.cat([draw(flow, size, generator, temperature).cpu() for size in sizes])
    if missed := int(drawn.flatten(1).isnan().any(1).sum()):
        raise NotConverged(f"{missed:,} of {n:,} draws did not converge; none is written")
    if "shape" in data:
        assert out is not None
        write_images(Pixels(data["levels"]).quantise(drawn).numpy(), data["levels"], out)
        if as_json:
            print_json({"run": str(run), "rows": n, "seed": seed, "shape": data["shape"],
                        "out": str(out)})  # fmt: skip
        return
    schema = schema_of(data)
    rows = schema.decode(drawn)
    write = partial(write_table, rows, data["columns"], data["dtypes"], levels=schema.levels)
    if out is not None:
        write(out)
    if as_json:
        cells = as_cells(rows, data["columns"], data["dtypes"], schema.levels)
        what = {"out": str(out)} if out is not None else {"values": cells}
        print_json({"run": str(run), "rows": n, "seed": seed, "columns": data["columns"], **what})
    elif out is None:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "rows.csv")
            with (Path(folder) / "rows.csv").open(encoding="utf-8") as lines:
                for line in lines:
                    print(line, end="")
