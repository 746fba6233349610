"""Running an experiment: part by part into one directory, from which it can go on at any time."""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import rootflow

from ..errors import CheckpointError, RootflowError
from ..store import write_atomically, write_json
from .catalogue import Recipe, Scale
from .parts import Done, Job, Part, Row, Settings, Stopped
from .store import Result, append, hardware

__all__ = ["run"]

UNFINISHED = "not finished"


def run(
    recipe: Recipe,
    scale: Scale,
    out: Path,
    *,
    seed: int = 0,
    store: Path | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Do what is not done yet of an experiment, write its tables and pictures into ``out``.

    ``out`` ends up with config.json, result.json, metrics.jsonl, figures/ and parts/. Parts that
    are there already with the same settings are not repeated; those that failed are. A part that
    fails does not stop the others: its row holds the error. One line is appended to ``store``.

    Raises: CheckpointError if ``out`` holds something else, Stopped when asked to stop (repeat the
    call to go on), RootflowError if a file cannot be written.
    """
    settings = recipe.settings[scale]
    try:
        run_id = _begin(recipe, scale, out, seed, command)
        done = {}
        parts = settings.parts()
        for number, part in enumerate(parts, 1):
            job = Job(out / "parts" / part.key, out / "figures", seed, should_stop)
            done[part.key] = _do(part, job, f"{number}/{len(parts)} {part.key}", say)
            job.stop_if_asked()
        _gather_metrics(out, done)
        rows = _rows(recipe, settings, done, Job(out, out / "figures", seed, should_stop))
        result = Result(
            run_id=run_id, experiment=recipe.name, scale=scale, seed=seed,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(sum(d.result["seconds"] for d in done.values()), 3),
            hardware=hardware(), threads=torch.get_num_threads(), version=rootflow.__version__,
            torch=torch.__version__, command=command, run=str(out),
            failed=sum(row.error is not None for row in rows), rows=rows,
        )  # fmt: skip
        write_json(out / "result.json", result.model_dump())
        if store is not None:
            append(store, result)
    except OSError as error:
        raise RootflowError(
            f"{error.filename or out}: {error.strerror or error}; finished parts are kept, the "
            "same command goes on from there"
        ) from error
    return result


def _begin(recipe: Recipe, scale: Scale, out: Path, seed: int, command: str) -> str:
    """Make the directory, or recognise it as one of this run; returns the run's identity."""
    is_this = {"experiment": recipe.name, "scale": scale, "seed": seed}
    path = out / "config.json"
    if path.exists():
        try:
            known = json.loads(path.read_bytes())
            other = {key: known[key] for key in is_this}
            run_id = str(known["run_id"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path}: not written by rootflow reproduce") from None
        if other != is_this:
            raise CheckpointError(
                f"{out} holds {other['experiment']} at scale {other['scale']}, seed "
                f"{other['seed']}; give another --out"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty and holds no experiment; give another --out")
    else:
        run_id = uuid.uuid4().hex
    (out / "figures").mkdir(parents=True, exist_ok=True)
    settings = recipe.settings[scale].model_dump(mode="json")
    config = {"format_version": 1, "run_id": run_id, **is_this, "command": command,
              "source": recipe.source, "settings": settings}  # fmt: skip
    write_json(path, config)
    return run_id


def _do(part: Part, job: Job, title: str, say: Callable[[str], None]) -> Done:
    """The part's result, from its file if it is there, else from its work."""
    path = job.folder / "result.json"
    facts = {**part.recipe, "seed": job.seed, "version": rootflow.__version__}
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    known = _read(path)
    if known.get("mark") == mark and known.get("error") is None:
        say(f"{title}: done before")
        return Done(known, job.folder)
    if known.get("mark") != mark or known["error"] != UNFINISHED:
        _discard(job.folder)  # other settings, or a failure: begin afresh
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"mark": mark, "error": UNFINISHED, "seconds": 0.0})
    begin = time.monotonic()
    try:
        result = {"error": None, **part.work(job)}
        for name, value in result.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ArithmeticError(f"{name} is {value}")
    except (Stopped, OSError):
        raise
    except Exception as error:  # whatever it is, the other parts can still be done
        known_kind = isinstance(error, RootflowError | ValueError | ArithmeticError)
        text = str(error) if known_kind else repr(error)
        result = {"error": " ".join(text.split())}
    result |= {"mark": mark, "seconds": round(time.monotonic() - begin, 3)}
    lines = [json.dumps({"part": part.key, **record}) + "\n" for record in job.records]
    write_atomically(job.folder / "metrics.jsonl", "".join(lines).encode())
    write_json(path, result)
    failed = f"failed: {result['error']}" if result["error"] else "done"
    say(f"{title}: {failed}, {result['seconds']:.1f} s")
    return Done(result, job.folder)


def _rows(recipe: Recipe, settings: Settings, done: dict[str, Done], job: Job) -> list[Row]:
    rows = list(settings.summarise(done, job))
    return [row.model_copy(update={"published": recipe.published.get(row.key)}) for row in rows]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _discard(folder: Path) -> None:
    """Remove what other settings left in the folder of a part."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _gather_metrics(out: Path, done: dict[str, Done]) -> None:
    lines = [(part.folder / "metrics.jsonl").read_bytes() for part in done.values()]
    write_atomically(out / "metrics.jsonl", b"".join(lines))
