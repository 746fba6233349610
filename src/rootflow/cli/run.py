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
from rootflow.data import Images, Table
from rootflow.errors import CheckpointError, RootflowError
from rootflow.store import FORMAT_VERSION, read_config, write_json

__all__ = [
    "begin", "default_path", "describe", "gaps", "grid_start", "open_run", "read_plan",
]  # fmt: skip

FRACTIONS = (0.8, 0.1, 0.1)


def describe(
    table: Table | Images, source: str, dequantised: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """The entry ``data`` of config.json; ``dequantised`` maps columns to the gap of their grid."""
    if isinstance(table, Images):
        return {
            "source": str(Path(source).resolve()) if Path(source).exists() else source,
            "name": Path(table.name).name, "shape": list(table.shape), "levels": table.levels,
            "seed": seed, "sha256": digest(table),
        }  # fmt: skip
    lowest = dict(zip(table.columns, map(float, table.values.min(0)), strict=True))
    return {
        "source": str(Path(source).resolve()) if Path(source).exists() else source,
        "name": Path(table.name).name,
        "columns": list(table.columns),
        "dtypes": list(table.dtypes),
        "seed": seed,
        "fractions": list(FRACTIONS),
        "dequantised": dict(dequantised),
        "grid_start": {column: lowest[column] for column in dequantised},
        "sha256": digest(table),
    }


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


def read_plan(run: Path) -> dict[str, Any]:
    """config.json of a run that may be unfinished. Raises CheckpointError."""
    try:
        plan: dict[str, Any] = json.loads((run / "config.json").read_bytes())
        version = plan["format_version"]
        known = {"flow", "data", "fit", "threads"} <= plan.keys()
    except FileNotFoundError:
        raise CheckpointError(f"{run}: there is no run to resume; leave out --resume") from None
    except OSError as error:
        raise CheckpointError(f"{run}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        known, version = False, 0
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{run}: format version {version} is newer than this rootflow reads ({FORMAT_VERSION})"
        )
    if not known:
        raise CheckpointError(f"{run / 'config.json'}: not written by rootflow fit, or damaged")
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
    flow = rootflow.load(run, device)
    if not (run / "result.json").exists() and (run / "resume").is_dir():
        say(f"warning: the fit of {run} was interrupted; these are its best weights so far")
    if "data" not in plan and len(flow.event) == 3:
        plan["data"] = {"shape": list(flow.event), "levels": 256, "seed": 0}
    elif "data" not in plan:
        names = [f"x{k + 1}" for k in range(flow.event[0])]
        plan["data"] = {"columns": names, "dtypes": ["float64"] * len(names), "dequantised": {}}
    return flow, plan


def gaps(data: Mapping[str, Any]) -> torch.Tensor | None:
    """Width of the noise of each column, 0 where there is none; None without any. (d,) float64."""
    if not data["dequantised"]:
        return None
    widths = [data["dequantised"].get(column, 0.0) for column in data["columns"]]
    return torch.tensor(widths, dtype=torch.float64)


def grid_start(data: Mapping[str, Any]) -> torch.Tensor:
    """One level of each column's grid, (d,) float64; 0 for columns without grid."""
    starts = [data.get("grid_start", {}).get(column, 0.0) for column in data["columns"]]
    return torch.tensor(starts, dtype=torch.float64)
