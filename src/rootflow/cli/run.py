"""The run directory: what config.json says, how a run begins, and how it is opened again."""

import json
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from pydantic import BaseModel

import rootflow
from rootflow.cli.common import WrongUse, say, set_threads
from rootflow.cli.inputs import digest
from rootflow.cli.tables import Parts
from rootflow.data import Images
from rootflow.errors import CheckpointError, RootflowError
from rootflow.store import FORMAT_VERSION, read_config, write_json

__all__ = [
    "begin", "default_path", "describe", "kept", "open_run", "plan_of", "read_finished",
    "read_plan", "resumed",
]  # fmt: skip

BESIDE_RESUME = {"data", "out", "resume", "memory", "track", "threads", "device", "quiet",
                 "as_json", "debug"}  # fmt: skip


def describe(
    data: Parts | Images, source: str, seed: int, reading: Mapping[str, Any]
) -> dict[str, Any]:
    """The entry ``data`` of config.json; ``reading``: how a table is read again."""
    whole = {
        "source": str(Path(source).resolve()) if Path(source).exists() else source,
        "name": Path(data.name).name, "seed": seed, "sha256": digest(data),
    }  # fmt: skip
    if isinstance(data, Images):
        return {**whole, "shape": list(data.shape), "levels": data.levels}
    schema = data.schema
    dtypes = [column.dtype for column in schema.columns]
    return {
        **whole, **reading, "columns": schema.names, "dtypes": dtypes, "schema": schema.to_json(),
    }  # fmt: skip


def plan_of(words: Sequence[str], fit: BaseModel, **more: Any) -> dict[str, Any]:
    """What config.json of a new run says: the command, ``more``, settings of the fit, versions."""
    return {
        "command": shlex.join(["rootflow", *words]),
        "rootflow_version": rootflow.__version__,
        **more,
        "fit": fit.model_dump(),
        "threads": torch.get_num_threads(),
    }


def default_path(data: str, flow: str) -> Path:
    """Where a run goes if nobody says: runs/<data>-<flow>-<time>."""
    stem = re.sub(r"[^\w.-]+", "-", Path(data).stem)
    return Path("runs") / f"{stem}-{flow}-{time.strftime('%Y%m%d-%H%M%S')}"


def begin(run: Path, plan: Mapping[str, Any], resumes: bool = True) -> None:
    """Make the directory of a new run and write its config.json.

    Raises RootflowError if the directory holds something already or cannot be written.
    """
    try:
        if run.is_dir() and any(run.iterdir()):
            raise RootflowError(
                f"{run} is not empty; give another --out"
                + (", or continue this run with --resume" if resumes else "")
            )
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", {"format_version": FORMAT_VERSION, **plan})
    except OSError as error:
        raise RootflowError(f"{run}: cannot be written: {error.strerror or error}") from None


def resumed(context: typer.Context) -> tuple[Path, dict[str, Any], dict[str, Any] | None]:
    """The run that ``--resume`` goes on with, its config.json, and its result if it is finished.

    Raises WrongUse for options that only a new run can have, CheckpointError.
    """
    out, data = context.params["out"], context.params.get("data")
    if out is None:
        raise WrongUse("--resume: say which run with --out RUN")
    given = {k for k in context.params if "COMMANDLINE" in str(context.get_parameter_source(k))}
    if data or given - BESIDE_RESUME:
        raise WrongUse("--resume takes data and settings from the run; give only --out with it")
    plan = read_plan(out, str(context.info_name))
    if not (out / "result.json").exists():
        set_threads(context.params["threads"] or plan["threads"])
        return out, plan, None
    say(f"{out} is finished already; this is its result")
    return out, plan, json.loads((out / "result.json").read_bytes())


@contextmanager
def kept(run: Path, command: str) -> Iterator[None]:
    """Work on a run in which a file may fail to be written. Raises RootflowError."""
    try:
        yield
    except OSError as error:
        raise RootflowError(
            f"{run}: cannot be written: {error.strerror or error}; what was saved before is whole, "
            f"continue with: rootflow {command} --resume --out {run}"
        ) from error


def read_plan(run: Path, command: str) -> dict[str, Any]:
    """config.json of a run of that command that may be unfinished. Raises CheckpointError."""
    try:
        plan: dict[str, Any] = json.loads((run / "config.json").read_bytes())
        version = plan["format_version"]
        known = {"flow", "data", "fit", "threads"} <= plan.keys()
        writer = "classify" if plan["flow"].get("name") == "classifier" else "fit"
    except FileNotFoundError:
        raise CheckpointError(f"{run}: there is no run to resume; leave out --resume") from None
    except OSError as error:
        raise CheckpointError(f"{run}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        known, version, writer = False, 0, command
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{run}: format version {version} is newer than this rootflow reads ({FORMAT_VERSION})"
        )
    if not known:
        raise CheckpointError(
            f"{run / 'config.json'}: not written by rootflow {command}, or damaged"
        )
    if writer != command:
        raise CheckpointError(f"{run}: was written by rootflow {writer}; continue it with that")
    return plan


def read_finished(run: Path) -> dict[str, Any]:
    """config.json of a run with weights. Raises CheckpointError."""
    if (run / "config.json").exists() and not (run / "manifest.json").exists():
        raise CheckpointError(
            f"{run}: the fit has not finished; continue it with: rootflow fit --resume --out {run}"
        )
    return read_config(run)


def open_run(run: Path, device: torch.device) -> tuple[rootflow.Flow, dict[str, Any]]:
    """The trained flow and config.json, whose ``data`` is empty for a flow saved without a table.

    Raises CheckpointError for a missing, damaged, unfinished or newer run.
    """
    plan = read_finished(run)
    if "inference" in plan:
        raise CheckpointError(
            f"{run} was written by rootflow vi, its draws beside it; read it in Python with "
            "rootflow.inference.load"
        )
    if plan["flow"].get("name") == "classifier":
        raise CheckpointError(
            f"{run} was written by rootflow classify; read it in Python with "
            "rootflow.classification.load"
        )
    flow = rootflow.load(run, device)
    if not (run / "result.json").exists() and (run / "resume").is_dir():
        say(f"warning: the fit of {run} was interrupted; these are its best weights so far")
    if "data" not in plan and len(flow.event) == 3:
        plan["data"] = {"shape": list(flow.event), "levels": 256, "seed": 0}
    elif "data" not in plan:
        names = [f"x{k + 1}" for k in range(flow.event[0])]
        plan["data"] = {"columns": names, "dtypes": ["float64"] * len(names)}
    return flow, plan
