"""From a table to a finished run directory: what `fit` does once and `compare` for each flow."""

import json
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import rootflow
from rootflow.cli import run as runs
from rootflow.cli.common import Interrupted, say
from rootflow.cli.inputs import parts, schema_of
from rootflow.cli.measure import Measured, measure
from rootflow.cli.pictures import SCORED, Album, measure_images
from rootflow.cli.processes import wait
from rootflow.cli.progress import watching
from rootflow.cli.settings import as_words, build_flow
from rootflow.cli.tables import Parts, Reading
from rootflow.data import Images
from rootflow.data.feed import Feed, encoded
from rootflow.report import write_report
from rootflow.store import write_atomically, write_json
from rootflow.training import FitConfig, History, Tracker
from rootflow.training.checkpoint import read_state
from rootflow.training.parallel import World
from rootflow.transforms import Pixels

__all__ = ["how_it_went", "make_plan", "measured", "train", "watched"]


def make_plan(
    given: Parts | Images, source: str, flow: str, options: Mapping[str, Any], config: FitConfig,
    reading: Reading,
) -> dict[str, Any]:
    """What config.json of a new run says; also tries whether the flow can be built."""
    size: dict[str, Any] = {}
    if isinstance(given, Images):
        size["shape"] = list(given.shape)
    else:
        size["features"] = given.schema.features
    recipe = build_flow({"name": flow, **size, "options": options}, config.seed).recipe
    words = ["fit", source, "--flow", flow, *reading.words]
    words += as_words({**options, **config.model_dump(exclude_defaults=True)})
    entry = runs.describe(given, source, config.seed, reading.recorded)
    return runs.plan_of(words, config, flow=recipe, data=entry)


def train(
    run: Path, plan: Mapping[str, Any], given: Parts | Images, device: torch.device, quiet: bool,
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """Fit, or go on fitting, the run that ``plan`` describes; measure and report it.

    Returns the content of result.json; nothing in processes other than the first. Raises
    Interrupted after a signal, RootflowError if the fit or a file fails; the last saved state
    stays valid then.
    """
    data, config = plan["data"], FitConfig.model_validate(plan["fit"])
    rows = parts(given)
    with runs.kept(run, "fit"):
        if tracker is not None:
            tracker.start(plan)
        flow, history = _fit(run, plan, rows, device, quiet, tracker)
        if World().rank:
            return {}
        if not quiet:
            most = SCORED if "shape" in data else len(rows[2])
            say(f"measuring on {min(len(rows[2]), most):,} held-out rows")
        found = measured(flow, rows[2], data, config.seed, run)
        result = {
            "flow": plan["flow"]["name"],
            "data": data["name"],
            **dict(zip(("n_train", "n_validation", "n_test"), map(len, rows), strict=True)),
            "features": math.prod(flow.event),
            **{key: data[key] for key in ("columns", "shape", "levels") if key in data},
            "parameters": sum(p.numel() for p in flow.parameters() if p.requires_grad),
            **how_it_went(history, config, device),
            **found.numbers,
            **({"notes": given.schema.notes} if isinstance(given, Parts) else {}),
            "dequantised": given.schema.noised if isinstance(given, Parts) else [],
        }
        flow.save(run)
        write_json(run / "result.json", result)
        if tracker is not None:
            tracker.finish(result)
        write_report(run, found.evidence, log_prob_fn=found.log_prob, pictures=found.pictures)
    return result


def how_it_went(history: History, config: FitConfig, device: torch.device) -> dict[str, Any]:
    """What result.json says of a fit itself, whatever was fitted."""
    return {
        "steps": history.steps,
        "seconds": round(history.seconds, 3),
        "device": str(device),
        "version": rootflow.__version__,
        "seed": config.seed,
        "stopped": history.stopped,
        "skipped_steps": history.skipped,
        "best_step": history.best_step,
        "torch_threads": torch.get_num_threads(),
    }


def measured(
    flow: rootflow.Flow, rows: NDArray[Any], data: Mapping[str, Any], seed: int, run: Path
) -> Measured:
    """What the flow does with held-out rows of a table or with held-out images."""
    if "shape" in data:
        return measure_images(flow, rows, data, run)
    return measure(flow, rows, schema_of(data), seed)


def _fit(
    run: Path, plan: Mapping[str, Any], rows: Sequence[Any], device: torch.device, quiet: bool,
    tracker: Tracker | None,
) -> tuple[rootflow.Flow, History]:
    config, data = FitConfig.model_validate(plan["fit"]), plan["data"]
    flow = build_flow(plan["flow"], config.seed).to(device)
    images, album = "shape" in data, None
    given: dict[str, Any] = {}
    train: Tensor | Feed
    if images:  # they stay whole numbers in memory, and on the CPU
        train, validation = (torch.from_numpy(part) for part in rows[:2])
        given["pixels"], album = Pixels(data["levels"]), Album(run, data)
    else:
        schema, like = schema_of(data), torch.zeros((), device=device)
        validation = encoded(rows[1][: config.validation_rows], schema, like, config.seed)
        train = Feed(rows[0], schema, like)
        if schema.plain and isinstance(rows[0], np.ndarray):
            train = torch.as_tensor(rows[0], dtype=torch.float32, device=device)
    history = watched(
        run, config, quiet, "fit",
        partial(
            rootflow.fit, flow, train, validation, config=config, **given,
            on_validation=None if album is None else album.add,
        ),
        flow.save, tracker,
    )  # fmt: skip
    return flow, history


def watched(
    run: Path, config: FitConfig, quiet: bool, command: str, fit: Callable[..., History],
    save: Callable[[Path], None], tracker: Tracker | None = None,
) -> History:
    """Call ``fit`` with where it resumes and whom it tells: metrics.jsonl and the progress bar.

    Raises Interrupted if a signal ended it, after ``save`` of what there is.
    """
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
    log = (lambda _: None) if tracker is None else tracker.log
    behind = facts["step"], facts["seconds"]
    with watching(run, config, quiet, *behind, log) as (on_record, should_stop, signals):
        history = fit(checkpoint=run / "resume", on_record=on_record, should_stop=should_stop)
    if history.stopped == "interrupted":  # by a signal, perhaps to another process
        if World().rank == 0:
            save(run)
        raise Interrupted(
            signals.received or signal.SIGTERM,
            f"interrupted after step {history.steps:,}; go on with: "
            f"rootflow {command} --resume --out {run}",
        )
    return history
