"""``rootflow compare``: several flows on one table, with the same rows and the same budget."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from rootflow.cli import run as runs
from rootflow.cli.common import (
    AsIs,
    Columns,
    Debug,
    Device,
    Json,
    Kinds,
    Memory,
    Missing,
    Quiet,
    Seed,
    Threads,
    nats,
    print_grid,
    print_json,
    say,
    set_threads,
    usable_device,
)  # fmt: skip
from rootflow.cli.inputs import are_images, read
from rootflow.cli.settings import fit_config, parse
from rootflow.cli.tables import Reading
from rootflow.cli.train import Interrupted, make_plan, train
from rootflow.errors import RootflowError

__all__ = ["compare"]


def compare(
    data: Annotated[str, typer.Argument(help="A file or a built-in name.")],
    flows: Annotated[str, typer.Option(help="Names of flows, a,b,c; see `rootflow flows`.")],
    minutes: Annotated[
        float | None, typer.Option(help="Time for each flow.  [default: 5, without --steps]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps for each flow.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in fit; for each.")
    ] = None,
    columns: Columns = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep the run directories, in this directory.")
    ] = None,
    seed: Seed = 0,
    kinds: Kinds = None,
    missing: Missing = "auto",
    as_is: AsIs = False,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit several flows one after the other, and print one table of their held-out scores."""
    where = usable_device(device)
    set_threads(threads)
    names = list(dict.fromkeys(name.strip() for name in flows.split(",")))
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
                say(f"interrupted in {name}, after step {stop.step:,}")
                raise typer.Exit(128 + stop.signal) from None
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
