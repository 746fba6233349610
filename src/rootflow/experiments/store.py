"""The results store: one line of JSON for each finished run, never edited, only appended to."""

from __future__ import annotations

import os
import platform
import warnings
from pathlib import Path

import torch
from pydantic import Field, ValidationError

from .parts import Row, Strict

__all__ = ["Result", "append", "hardware", "read"]


class Result(Strict):
    """One finished run: what was measured, beside what was published, and how to repeat it.

    ``run_id`` tells runs apart; where two lines share it, the later one counts. ``seconds`` is the
    time of all parts, ``time`` when the run ended (UTC).
    """

    format_version: int = 1
    run_id: str
    experiment: str
    scale: str
    seed: int
    time: str
    seconds: float
    hardware: str
    threads: int
    version: str
    torch: str
    command: str
    run: str
    failed: int
    rows: list[Row] = Field(default_factory=list)


def append(path: Path, result: Result) -> bool:
    """Add one line to the store; False if its last line about this run says the same already."""
    known = [old for old in read(path) if old.run_id == result.run_id]
    if known and known[-1].rows == result.rows:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    line = result.model_dump_json() + "\n"
    with path.open("a+b") as store:
        if store.tell():  # a killed writer may have left half a line
            store.seek(-1, os.SEEK_END)
            line = line if store.read(1) == b"\n" else "\n" + line
        store.write(line.encode())  # one write, so that two runs at once do not mix
        store.flush()
        os.fsync(store.fileno())
    return True


def read(path: Path) -> list[Result]:
    """Every readable line, oldest first; a damaged line is passed over with a warning."""
    found = []
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found.append(Result.model_validate_json(line, strict=True))
        except ValidationError:
            warnings.warn(f"{path}, line {number}: not a result; passed over", stacklevel=2)
    return found


def hardware() -> str:
    """Processor and number of cores, in words."""
    name = platform.processor() or platform.machine()
    table = Path("/proc/cpuinfo")
    if table.exists():  # Linux hides the processor's name from the platform module
        lines = table.read_text("utf-8", errors="replace").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    graphics = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{graphics}"
