"""``rootflow score``: the log-density of each row of a table under a fitted flow."""

import copy
import math
from pathlib import Path
from typing import Annotated

import torch
import typer

from rootflow.cli.common import (
    Debug,
    Device,
    Json,
    Threads,
    print_json,
    say,
    set_threads,
    usable_device,
)
from rootflow.cli.measure import log_density
from rootflow.cli.run import open_run
from rootflow.data import read_table
from rootflow.store import write_atomically

__all__ = ["score"]

DRAWS = 16  # of the noise in dequantised columns


def score(
    run: Annotated[Path, typer.Argument(help="Directory that `rootflow fit` wrote.")],
    data: Annotated[str, typer.Argument(help="A file or a built-in name with the same columns.")],
    out: Annotated[Path | None, typer.Option(help="Write the CSV there, not to stdout.")] = None,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the log-density of each row in nats, as CSV; low values are outliers.

    Columns are matched by name. A row whose equations could not be solved gets nan.
    """
    where = usable_device(device)
    set_threads(threads)
    flow, plan = open_run(run, where)
    data_plan = plan["data"]
    table = read_table(data, columns=data_plan["columns"], seed=data_plan.get("seed", 0))
    rows = torch.as_tensor(table.values, device=where)
    values = log_density(copy.deepcopy(flow).double(), rows, data_plan, DRAWS)[0].cpu()
    missed = int(values.isnan().sum())
    if missed:
        say(f"warning: {missed:,} of {len(values):,} rows did not converge; their score is nan")
    if out is not None:
        lines = "".join(f"{value!r}\n" for value in values.tolist())
        write_atomically(out, f"log_prob\n{lines}".encode())
    if as_json:
        good = values[values.isfinite()]
        print_json({
            "run": str(run), "data": table.name,
            "rows": len(values), "not_finite": len(values) - len(good),
            "mean": float(good.mean()) if len(good) else None,
            "standard_error": float(good.std()) / math.sqrt(len(good)) if len(good) > 1 else None,
            **({"log_prob": values.tolist()} if out is None else {"out": str(out)}),
        })  # fmt: skip
    elif out is None:
        print("log_prob")
        for value in values.tolist():
            print(repr(value))
