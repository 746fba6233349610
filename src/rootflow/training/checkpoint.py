"""The state of an unfinished fit: one safetensors file, its checksum in its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from ..errors import CheckpointError
from ..store import write_atomically

__all__ = ["read_state", "write_state"]


def write_state(directory: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replace the saved state in ``directory`` by ``tensors`` and the JSON-able ``facts``."""
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"state": json.dumps(dict(facts), allow_nan=False)}
    content = save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, metadata)
    name = f"state-{int(facts['step']):09d}-{hashlib.sha256(content).hexdigest()[:24]}.safetensors"
    write_atomically(directory / name, content)
    for old in directory.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def read_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole state, or None if there is none.

    Raises CheckpointError if all of them are damaged.
    """
    found = sorted(directory.glob("state-*.safetensors"), reverse=True)
    for path in found:
        content = path.read_bytes()
        if not path.stem.endswith(hashlib.sha256(content).hexdigest()[:24]):
            continue
        try:
            with safe_open(path, "pt") as f:
                facts = json.loads(f.metadata()["state"])
            return load(content), facts
        except (SafetensorError, KeyError, TypeError, ValueError):
            continue
    if found:
        raise CheckpointError(
            f"{found[0]}: the checksum does not match; the file is damaged and cannot be resumed"
        )
    return None
