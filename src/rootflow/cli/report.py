"""``rootflow report``: write the report of a run anew, from its weights and its table."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from rootflow.cli import run as runs
from rootflow.cli.common import Debug, Json, Threads, print_json, say, set_threads
from rootflow.cli.measure import measure
from rootflow.data import read_table
from rootflow.errors import DataError
from rootflow.report import write_report

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="Directory that `rootflow fit` wrote.")],
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write report.html and its figures again, and print where the page is.

    The held-out rows are read from the table of the fit; without it their figures are left out.
    """
    set_threads(threads)
    flow, plan = runs.open_run(run, torch.device("cpu"))
    data = plan["data"]
    evidence, log_prob = None, None
    try:
        if "source" not in data:
            raise DataError(f"{run} does not say which table it was fitted to")
        table = read_table(data["source"], columns=data["columns"], seed=data["seed"])
        runs.check_same(table, plan)
    except DataError as error:
        say(f"warning: no figures of held-out rows: {error}")
    else:
        test = table.split(data["seed"], tuple(data["fractions"]))[2]
        measured = measure(flow, table.values[test], data, data["seed"])
        evidence, log_prob = measured.evidence, measured.log_prob
    page = write_report(run, evidence, log_prob_fn=log_prob)
    if as_json:
        print_json({"run": str(run), "report": str(page)})
    else:
        print(page)
