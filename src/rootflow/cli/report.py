"""``rootflow report``: write the report of a run anew, from its weights and its table."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from rootflow.cli import run as runs
from rootflow.cli.common import Debug, Json, Memory, Threads, print_json, say, set_threads
from rootflow.cli.inputs import parts, read_again
from rootflow.cli.tables import byte_count
from rootflow.cli.train import measured
from rootflow.errors import DataError
from rootflow.report import write_report

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="Directory that `rootflow fit` wrote.")],
    memory: Memory = None,
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
    found = None
    try:
        if "source" not in data:
            raise DataError(f"{run} does not say which table it was fitted to")
        table = read_again(data, byte_count(memory))
    except DataError as error:
        say(f"warning: no figures of held-out rows: {error}")
    else:
        found = measured(flow, parts(table)[2], data, data["seed"], run)
    if found is None:
        page = write_report(run)
    else:
        page = write_report(
            run, found.evidence, log_prob_fn=found.log_prob, pictures=found.pictures
        )
    if as_json:
        print_json({"run": str(run), "report": str(page)})
    else:
        print(page)
