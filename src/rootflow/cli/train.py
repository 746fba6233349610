"""From a table to a finished run directory: what `fit` does once and `compare` for each flow."""

import json
import math
import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import rootflow
from rootflow.cli import run as runs
from rootflow.cli.common import say
from rootflow.cli.inputs import parts
from rootflow.cli.measure import Measured, measure
from rootflow.cli.pictures import Album, measure_images
from rootflow.cli.processes import wait
from rootflow.cli.progress import Progress, Signals
from rootflow.cli.settings import build_flow
from rootflow.data import Images, Table, describe_columns, require_rows
from rootflow.errors import DataError, RootflowError
from rootflow.report import write_report
from rootflow.store import write_atomically, write_json
from rootflow.training import FitConfig, History
from rootflow.training.checkpoint import read_state
from rootflow.training.parallel import World
from rootflow.transforms import Pixels

__all__ = ["Interrupted", "checked", "make_plan", "measured", "train"]

LEAST_ROWS = 20


class Interrupted(Exception):
    """A signal ended the fit after a whole step; its state is saved."""

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(signal)
        self.signal, self.step = signal, step


def checked(table: Table | Images, dequantise: bool) -> dict[str, float]:
    """The gap of each column to be dequantised; warns of ties that stay. Images have none.

    Raises DataError for too few rows and for constant or repeated columns: they have no density.
    """
    if isinstance(table, Images):
        if min(map(len, (table.train, table.validation, table.test))) < 2:
            count = len(table.pixels)
            raise DataError(f"{table.name}: {count} images; at least {LEAST_ROWS} are needed")
        return {}
    require_rows(table, LEAST_ROWS)
    gaps: dict[str, float] = {}
    for column, values in zip(describe_columns(table), table.values.T, strict=True):
        if column.constant or column.duplicate_of is not None:
            raise DataError(f"{table.name}: {column.warning} (choose columns with --columns)")
        if dequantise and column.gap is not None:
            gaps[column.name] = column.gap
        elif column.warning is not None:
            say(f"warning: {column.warning}")
        if np.abs(values).max() * np.finfo(np.float32).eps > 1e-3 * values.std():
            say(
                f"warning: column {column.name} varies little beside its size: training in float32 "
                "sees it coarsely; subtract a constant from it"
            )
    if dequantise and not gaps:
        say("warning: --dequantise has no effect: no column lies on a grid")
    return gaps


def make_plan(
    table: Table | Images, source: str, flow: str, options: Mapping[str, Any], config: FitConfig,
    gaps: Mapping[str, float], columns: str | None,
) -> dict[str, Any]:
    """What config.json of a new run says; also tries whether the flow can be built."""
    size: dict[str, Any] = {}
    if isinstance(table, Images):
        size["shape"] = list(table.shape)
    else:
        size["features"] = len(table.columns)
    recipe = build_flow({"name": flow, **size, "options": options}, config.seed).recipe
    words = ["rootflow", "fit", source, "--flow", flow]
    words += ["--columns", columns] if columns else []
    words += ["--dequantise"] if gaps else []
    for key, value in {**options, **config.model_dump(exclude_defaults=True)}.items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        words += ["--set", f"{key}={text}"]
    return {
        "command": shlex.join(words),
        "rootflow_version": rootflow.__version__,
        "flow": recipe,
        "data": runs.describe(table, source, gaps, config.seed),
        "fit": config.model_dump(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def train(
    run: Path, plan: Mapping[str, Any], table: Table | Images, device: torch.device, quiet: bool
) -> dict[str, Any]:
    """Fit, or go on fitting, the run that ``plan`` describes; measure and report it.

    Returns the content of result.json; nothing in processes other than the first. Raises
    Interrupted after a signal, RootflowError if the fit or a file fails; the last saved state
    stays valid then.
    """
    data, config = plan["data"], FitConfig.model_validate(plan["fit"])
    rows = parts(table, data)
    try:
        flow, history = _fit(run, plan, rows, device, quiet)
        if World().rank:
            return {}
        if not quiet:
            say(f"measuring on {len(rows[2]):,} held-out rows")
        found = measured(flow, rows[2], data, config.seed, run)
        result = {
            "flow": plan["flow"]["name"],
            "data": data["name"],
            **dict(zip(("n_train", "n_validation", "n_test"), map(len, rows), strict=True)),
            "features": math.prod(flow.event),
            **{key: data[key] for key in ("columns", "shape", "levels") if key in data},
            "parameters": sum(p.numel() for p in flow.parameters() if p.requires_grad),
            "steps": history.steps,
            "seconds": round(history.seconds, 3),
            **found.numbers,
            "device": str(device),
            "version": rootflow.__version__,
            "seed": config.seed,
            "stopped": history.stopped,
            "skipped_steps": history.skipped,
            "best_step": history.best_step,
            "torch_threads": torch.get_num_threads(),
            "dequantised": list(data.get("dequantised", [])),
        }
        flow.save(run)
        write_json(run / "result.json", result)
        write_report(run, found.evidence, log_prob_fn=found.log_prob, pictures=found.pictures)
    except OSError as error:
        raise RootflowError(
            f"{run}: cannot be written: {error.strerror or error}; what was saved before is whole, "
            f"continue with: rootflow fit --resume --out {run}"
        ) from error
    return result


def measured(
    flow: rootflow.Flow, rows: NDArray[Any], data: Mapping[str, Any], seed: int, run: Path
) -> Measured:
    """What the flow does with held-out rows of a table or with held-out images."""
    if "shape" in data:
        return measure_images(flow, rows, data, run)
    return measure(flow, rows, data, seed)


def _fit(
    run: Path, plan: Mapping[str, Any], rows: Sequence[NDArray[Any]], device: torch.device,
    quiet: bool,
) -> tuple[rootflow.Flow, History]:
    config, data = FitConfig.model_validate(plan["fit"]), plan["data"]
    flow = build_flow(plan["flow"], config.seed).to(device)
    images, album = "shape" in data, None
    given: dict[str, Any] = {}
    if images:  # they stay whole numbers in memory, and on the CPU
        train, validation = (torch.from_numpy(part) for part in rows[:2])
        given["pixels"], album = Pixels(data["levels"]), Album(run, data)
    else:
        train, validation = (
            torch.as_tensor(part, dtype=torch.float32, device=device) for part in rows[:2]
        )
        widths = runs.gaps(data)
        given["gaps"] = None if widths is None else widths.to(train)
    saved = read_state(run / "resume")
    facts: dict[str, Any] = {"step": 0, "seconds": 0.0, "records": []}
    if saved is not None:
        facts = saved[1]
    wait()  # the first process writes below, when all have read
    if World().rank == 0:
        for leftover in [*run.glob(".*.tmp"), *run.glob("resume/.*.tmp")]:
            leftover.unlink()  # of a fit that was killed while it wrote
        lines = [json.dumps(record) + "\n" for record in facts["records"]]
        write_atomically(run / "metrics.jsonl", "".join(lines).encode())
    wait()
    with (
        Signals() as signals,
        Progress(config, quiet, facts["step"], facts["seconds"]) as progress,
        (run / "metrics.jsonl").open("a", encoding="utf-8") as metrics,
    ):

        def on_record(record: dict[str, Any]) -> None:
            metrics.write(json.dumps(record, allow_nan=False) + "\n")
            metrics.flush()
            progress.note(record)

        def should_stop() -> bool:
            progress.tick()
            return signals.received is not None

        history = rootflow.fit(
            flow, train, validation, config=config, **given,
            checkpoint=run / "resume", on_record=on_record, should_stop=should_stop,
            on_validation=None if album is None else album.add,
        )  # fmt: skip
    if history.stopped == "interrupted":  # by a signal, perhaps to another process
        if World().rank == 0:
            flow.save(run)
        raise Interrupted(signals.received or signal.SIGTERM, history.steps)
    return flow, history
