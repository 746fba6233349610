"""``rootflow reproduce``: an experiment of the papers, run here, beside the published number."""

import shlex
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from rootflow.cli import given
from rootflow.cli.common import Interrupted, WrongUse, print_grid, print_json, say, set_threads
from rootflow.cli.progress import Signals
from rootflow.experiments import (
    SCALES,
    Recipe,
    Result,
    Scale,
    Stopped,
    duration,
    grids,
    names,
    page,
    read,
    recipe,
    recipes,
    run,
)

__all__ = ["reproduce"]


def reproduce(
    name: Annotated[str | None, typer.Argument(help="Which experiment; see --list.")] = None,
    scale: Annotated[str, typer.Option(help="smoke, small or paper.")] = "small",
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run.  [default: runs/NAME-SCALE-SEED]")
    ] = None,
    store: Annotated[
        Path, typer.Option(help="File to which a line about each run is added.")
    ] = Path("runs/results.jsonl"),
    list_all: Annotated[bool, typer.Option("--list", help="List the experiments.")] = False,
    results: Annotated[
        bool, typer.Option("--results", help="Print all results of the store as a Markdown page.")
    ] = False,
    seed: given.Seed = 0,
    threads: given.Threads = None,
    quiet: given.Quiet = False,
    as_json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Run an experiment of the papers, with its pictures and its table.

    The same command on the same directory goes on where it was interrupted, and repeats only what
    failed or has other settings now.
    """
    if list_all:
        _list(as_json)
        return
    if results:
        if not store.exists():
            raise WrongUse(f"--store {store}: no such file; run an experiment first")
        print(page(read(store), recipes()), end="")
        return
    if name is None:
        raise WrongUse("say which experiment; `rootflow reproduce --list` lists them")
    chosen: Scale | None = next((known for known in SCALES if known == scale), None)
    if chosen is None:
        raise WrongUse(f"--scale {scale}: unknown; choose one of {', '.join(SCALES)}")
    if name not in names():
        raise WrongUse(f"experiment {name}: unknown; choose one of {', '.join(names())}")
    set_threads(threads)
    found = recipe(name)
    out = out or Path("runs") / f"{name}-{chosen}-{seed}"
    if not quiet:
        minutes = duration(found.settings[chosen].minutes())
        say(f"{name} at scale {chosen}: at most about {minutes} on an idle core; writes {out}")
    command = shlex.join(["rootflow", "reproduce", name, "--scale", chosen, "--seed", str(seed)])
    with Signals() as signals:
        try:
            result = run(
                found, chosen, out, seed=seed, store=store, command=command,
                say=(lambda _: None) if quiet else say,
                should_stop=lambda: signals.received is not None,
            )  # fmt: skip
        except Stopped:
            raise Interrupted(
                signals.received or signal.SIGINT,
                f"interrupted; this goes on from here: {command} --out {shlex.quote(str(out))}",
            ) from None
    if as_json:
        print_json(result.model_dump())
    else:
        _show(result, out)
    if result.rows and result.failed == len(result.rows):
        raise typer.Exit(1)


def _list(as_json: bool) -> None:
    """Every experiment with its source and its time at each scale."""
    known = recipes()
    if as_json:
        print_json({"experiments": [_describe(found) for found in known]})
        return
    for found in known:
        times = (f"{s} {duration(found.settings[s].minutes())}" for s in SCALES)
        print(f"{found.name}: {found.summary}\n  at most, on an idle core: {', '.join(times)}")
        print(f"  source: {found.source}")


def _describe(found: Recipe) -> dict[str, Any]:
    minutes = {scale: round(found.settings[scale].minutes(), 2) for scale in SCALES}
    return {"name": found.name, "summary": found.summary, "source": found.source,
            "minutes": minutes}  # fmt: skip


def _show(result: Result, out: Path) -> None:
    for head, lines in grids(result.rows):
        print_grid(lines, head)
    for row in result.rows:
        if row.error is not None:
            say(f"failed: {row.key}: {row.error}")
    drawn = any((out / "figures").iterdir())
    print(f"{result.seconds:.0f} s; " + (f"pictures in {out / 'figures'}" if drawn else str(out)))
