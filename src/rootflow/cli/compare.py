"""``rootflow compare``: several flows on one table, with the same rows and the same budget."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from rootflow.cli import given
from rootflow.cli import run as runs
from rootflow.cli.common import Interrupted, WrongUse, machine, nats, print_grid, print_json, say
from rootflow.cli.inputs import are_images, read
from rootflow.cli.settings import fit_config, parse
from rootflow.cli.tables import Reading
from rootflow.cli.train import make_plan, train
from rootflow.errors import RootflowError

__all__ = ["compare"]


def compare(
    data: Annotated[str, typer.Argument(help="A file or a built-in name.")],
    flows: Annotated[str, typer.Option(help="Names of flows, a,b,c; see `rootflow flows`.")],
    minutes: given.Minutes = None,
    steps: given.Steps = None,
    settings: given.Set = None,
    columns: given.Columns = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep the run directories, in this directory.")
    ] = None,
    seed: given.Seed = 0,
    kinds: given.Kinds = None,
    missing: given.Missing = "auto",
    as_is: given.AsIs = False,
    memory: given.Memory = None,
    threads: given.Threads = None,
    device: given.Device = "cpu",
    quiet: given.Quiet = False,
    as_json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Fit several flows one after the other, and print one table of their held-out scores.

    The budget is that of each flow.
    """
    where = machine(device, threads)
    names = list(dict.fromkeys(filter(None, map(str.strip, flows.split(",")))))
    if not names:
        raise WrongUse("--flows: give names such as monotone,nsf-ar; see `rootflow flows`")
    images = are_images(data)
    chosen = {name: parse(name, settings or [], images=images) for name in names}
    config = fit_config(chosen[names[0]][1], minutes, steps, seed, images)
    reading = Reading.of(columns, kinds, missing, as_is, memory)
    table = read(data, reading, config.seed, quiet)
    plans = {
        name: make_plan(table, data, name, options, config, reading)
        for name, (options, _) in chosen.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        parent = out or Path(folder)
        for name, plan in plans.items():
            runs.begin(parent / name, plan)
        results: list[dict[str, Any]] = []
        for name, plan in plans.items():
            if not quiet:
                say(f"{name}:")
            try:
                results.append(train(parent / name, plan, table, where, quiet))
            except Interrupted as stop:
                if out is not None:
                    raise
                raise Interrupted(stop.signal, f"interrupted in {name}; nothing is kept") from None
            except RootflowError as error:  # the other flows can still be compared
                say(f"error: {name}: {error}")
    if as_json:
        print_json({"data": table.name, "results": results})
    else:
        _show(results)
    if len(results) < len(names):
        raise typer.Exit(1)


def _show(results: list[dict[str, Any]]) -> None:
    images = any("shape" in r for r in results)
    score = "test_bits_per_dim" if images else "test_log_prob"
    head = ["flow", "bits per dimension" if images else "held-out nats"]
    head += ["parameters", "steps", "seconds", "round trip"]
    best_first = sorted(results, key=lambda r: -(r["test_log_prob"] or -1e300))
    rows = [
        [
            r["flow"],
            nats(r[score], r[f"{score}_se"]),
            f"{r['parameters']:,}",
            f"{r['steps']:,}",
            f"{r['seconds']:.4g}",
            "–" if r["inverse_error"] is None else f"{r['inverse_error']:.2g}",
        ]
        for r in best_first
    ]
    print_grid(rows, head)
