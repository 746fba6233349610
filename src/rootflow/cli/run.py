"""The run directory: what config.json says, how a run begins, and how it is opened again."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import rootflow
from rootflow.cli.common import say
from rootflow.cli.inputs import digest
from rootflow.cli.tables import Parts
from rootflow.data import Images
from rootflow.errors import CheckpointError, RootflowError
from rootflow.store import FORMAT_VERSION, read_config, write_json

__all__ = ["begin", "default_path", "describe", "open_run", "read_plan"]


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


def default_path(data: str, flow: str) -> Path:
    """Where a run goes if nobody says: runs/<data>-<flow>-<time>."""
    stem = re.sub(r"[^\w.-]+", "-", Path(data).stem)
    return Path("runs") / f"{stem}-{flow}-{time.strftime('%Y%m%d-%H%M%S')}"


def begin(run: Path, plan: Mapping[str, Any]) -> None:
    """Make the directory of a new run and write its config.json.

    Raises RootflowError if the directory holds something already or cannot be written.
    """
    try:
        if run.is_dir() and any(run.iterdir()):
            raise RootflowError(
                f"{run} is not empty; give another --out, or continue this run with --resume"
            )
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", {"format_version": FORMAT_VERSION, **plan})
    except OSError as error:
        raise RootflowError(f"{run}: cannot be written: {error.strerror or error}") from None


def read_plan(run: Path, command: str = "fit") -> dict[str, Any]:
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


def open_run(run: Path, device: torch.device) -> tuple[rootflow.Flow, dict[str, Any]]:
    """The trained flow and config.json, whose ``data`` is empty for a flow saved without a table.

    Raises CheckpointError for a missing, damaged, unfinished or newer run.
    """
    if (run / "config.json").exists() and not (run / "manifest.json").exists():
        raise CheckpointError(
            f"{run}: the fit has not finished; continue it with: rootflow fit --resume --out {run}"
        )
    plan = read_config(run)
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
