"""``rootflow report``: write the report of a run anew, from its weights and its table."""


import torch

from rootflow.cli import given
from rootflow.cli import run as runs
from rootflow.cli.common import print_json, say, set_threads
from rootflow.cli.inputs import parts, read_again
from rootflow.cli.measure import Measured
from rootflow.cli.tables import byte_count
from rootflow.cli.train import measured
from rootflow.errors import DataError
from rootflow.report import Evidence, write_report

__all__ = ["report"]


def report(
    run: given.Run,
    memory: given.Memory = None,
    threads: given.Threads = None,
    as_json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Write report.html and its figures again, and print where the page is.

    The held-out rows are read from the table of the fit; without it their figures are left out.
    """
    set_threads(threads)
    found = Measured({}, Evidence(), None)
    if runs.read_finished(run)["flow"].get("name") != "classifier":
        flow, plan = runs.open_run(run, torch.device("cpu"))
        data = plan["data"]
        try:
            if "source" not in data:
                raise DataError(f"{run} does not say which table it was fitted to")
            table = read_again(data, byte_count(memory))
        except DataError as error:
            say(f"warning: no figures of held-out rows: {error}")
        else:
            found = measured(flow, parts(table)[2], data, data["seed"], run)
    page = write_report(run, found.evidence, log_prob_fn=found.log_prob, pictures=found.pictures)
    if as_json:
        print_json({"run": str(run), "report": str(page)})
    else:
        print(page)
