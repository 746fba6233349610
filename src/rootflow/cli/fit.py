"""``rootflow fit``: learn the density of a table within a budget, and write a run directory."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rootflow.cli import given
from rootflow.cli import run as runs
from rootflow.cli.common import WrongUse, machine, nats, print_grid, print_json
from rootflow.cli.inputs import are_images, read, read_again
from rootflow.cli.processes import joined, wait
from rootflow.cli.settings import fit_config, parse
from rootflow.cli.tables import Reading, byte_count
from rootflow.cli.train import make_plan, train
from rootflow.errors import RootflowError
from rootflow.training import TRACKERS, Tracker

__all__ = ["fit"]


def fit(
    context: typer.Context,
    data: Annotated[
        str | None, typer.Argument(help="A file (.csv .parquet .npy ...) or a built-in name.")
    ] = None,
    flow: Annotated[str, typer.Option(help="Which flow; see `rootflow flows`.")] = "monotone",
    out: given.Out = None,
    minutes: given.Minutes = None,
    steps: given.Steps = None,
    settings: given.Set = None,
    columns: given.Columns = None,
    seed: given.OwnSeed = None,
    resume: given.Resume = False,
    kinds: given.Kinds = None,
    missing: given.Missing = "auto",
    as_is: given.AsIs = False,
    memory: given.Memory = None,
    track: Annotated[
        str | None, typer.Option(help=f"Send records there as well: {', '.join(TRACKERS)}.")
    ] = None,
    threads: given.Threads = None,
    device: given.Device = "cpu",
    quiet: given.Quiet = False,
    as_json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Learn the density of a table, score it on held-out rows, write a run directory.

    Ctrl-C saves the state; `rootflow fit --resume --out RUN` goes on from there. Under torchrun
    several processes train one flow, each with its share of every batch.
    """
    where = machine(device, threads)
    if track is not None and track not in TRACKERS:
        raise WrongUse(f"--track={track!r} is unknown; choose one of {', '.join(TRACKERS)}")
    if resume:
        out, plan, result = runs.resumed(context)
        if result is not None:
            _show(result, out, as_json)
            return
        table = read_again(plan["data"], byte_count(memory))
    else:
        if data is None:
            raise WrongUse("DATA is missing; give a file or a built-in name such as galaxies")
        images = are_images(data)
        options, chosen = parse(flow, settings or [], images=images)
        config = fit_config(chosen, minutes, steps, seed, images)
        reading = Reading.of(columns, kinds, missing, as_is, memory)
        table = read(data, reading, config.seed, quiet)
        plan = make_plan(table, data, flow, options, config, reading)
    batch = min(plan["fit"]["batch_size"], len(table.train))
    with joined(where, out, batch) as rank:
        if not resume:
            out = out or runs.default_path(data or "", flow)
            if rank == 0:
                runs.begin(out, plan)
            wait()
        assert out is not None
        to = tracker(track, out) if rank == 0 else None
        result = train(out, plan, table, where, quiet, to)
        if result:
            _show(result, out, as_json)


def tracker(name: str | None, run: Path) -> Tracker | None:
    """The tracker of that name, for this run."""
    if name is None:
        return None
    try:
        return TRACKERS[name](run / name)
    except ModuleNotFoundError as error:
        raise RootflowError(str(error)) from None


def _show(result: Mapping[str, Any], run: Path, as_json: bool) -> None:
    if as_json:
        print_json({**result, "run": str(run)})
        return
    error = result["inverse_error"]
    bounds = result["lipschitz"]
    images = "shape" in result
    unit = "units of [0, 1]" if images else "data units"
    unit = "the units that the flow sees" if result.get("notes") else unit
    columns = len(result.get("columns", ()))
    width = f"{columns} column{'s' * (columns != 1)}"
    width = " x ".join(map(str, result["shape"])) if images else width
    lines = {
        "flow": f"{result['flow']} on {result['data']}, {result['parameters']:,} parameters",
        "images" if images else "rows": f"{result['n_train']:,} train, "
        f"{result['n_validation']:,} validation, {result['n_test']:,} test; {width}",
        "held-out": held_out(result),
        "round trip": f"{'–' if error is None else format(error, '.2g')} at most, "
        f"in {unit}; "
        f"{math.floor(1e4 * result['converged_fraction']) / 100:g} % of the rows converged",
        "Lipschitz": f"at most {max(bounds):.4g} in each network, certified" if bounds else "–",
        "training": f"{result['steps']:,} steps in {result['seconds']:.4g} s, "
        f"best at {result['best_step']:,}; stopped by {result['stopped']}",
        "report": str(run / "report.html"),
    }
    print_grid(list(lines.items()))


def held_out(result: Mapping[str, Any]) -> str:
    """The headline of a result in words."""
    if "shape" not in result:
        text = f"{nats(result['test_log_prob'], result['test_log_prob_se'])} nats per row"
        return text + (" at least" if result["dequantised"] else "")
    text = f"{nats(result['test_bits_per_dim'], result['test_bits_per_dim_se'])} bits per dimension"
    own = result["test_bits_per_dim_estimator_se"]
    return text + (f", of which {own:.1g} by estimated log-determinants" if own else "")
