"""Files of a saved flow: JSON, safetensors, checksums; written whole or not at all, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from .errors import CheckpointError

__all__ = [
    "FORMAT_VERSION", "load_directory", "read_config", "save_directory", "write_atomically",
    "write_json",
]  # fmt: skip

FORMAT_VERSION = 1


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary neighbour, flush to disk, rename: no file is ever half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """One JSON document, indented; NaN and infinity are refused."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def save_directory(
    directory: Path, recipe: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write config.json (unless there), model.safetensors and manifest.json into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    config_path = directory / "config.json"
    config = {"format_version": FORMAT_VERSION, "flow": dict(recipe)}
    if config_path.exists():
        config = {**json.loads(config_path.read_text()), **config}
    write_json(config_path, config)
    content = save_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    write_atomically(directory / "model.safetensors", content)
    files = {"config.json": config_path.read_bytes(), "model.safetensors": content}
    write_json(directory / "manifest.json", {name: _digest(data) for name, data in files.items()})


def _read(directory: Path, name: str) -> bytes:
    path = directory / name
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory}: there is no {name}; is this a directory written by rootflow?"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json after its checks: known format, checksums of all files of the manifest."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    raw = _read(directory, "config.json")
    try:
        config = json.loads(raw)
        version = config["format_version"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise CheckpointError(
            f"{directory / 'config.json'}: not a rootflow configuration"
        ) from None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{directory}: format version {version} is newer than this rootflow reads "
            f"({FORMAT_VERSION}); upgrade rootflow"
        )
    try:
        manifest = json.loads(_read(directory, "manifest.json"))
        expected = {str(k): str(v) for k, v in manifest.items()}
    except (ValueError, AttributeError, UnicodeDecodeError):
        raise CheckpointError(f"{directory / 'manifest.json'}: damaged") from None
    for name in ("config.json", "model.safetensors"):
        if expected.get(name) != _digest(_read(directory, name)):
            raise CheckpointError(
                f"{directory / name}: the checksum does not match manifest.json; "
                "the file is damaged"
            )
    if not isinstance(config, dict) or not isinstance(config.get("flow"), dict):
        raise CheckpointError(f"{directory / 'config.json'}: the entry 'flow' is missing")
    return config


def load_directory(directory: Path, module: nn.Module) -> None:
    """Load model.safetensors into ``module``; names, shapes and count must match exactly."""
    try:
        tensors = load_tensors(_read(directory, "model.safetensors"))
    except SafetensorError as error:
        raise CheckpointError(f"{directory / 'model.safetensors'}: {error}") from None
    own = module.state_dict()
    if set(own) != set(tensors):
        wrong = sorted(set(own) ^ set(tensors))
        raise CheckpointError(
            f"{directory}: tensors do not match the flow, first difference {wrong[0]!r}"
        )
    for name, t in tensors.items():
        if own[name].shape != t.shape:
            raise CheckpointError(
                f"{directory}: {name} has shape {tuple(t.shape)}, "
                f"the flow needs {tuple(own[name].shape)}"
            )
    first = next((t for t in tensors.values() if t.is_floating_point()), None)
    if first is not None:
        module.to(first.dtype)
    module.load_state_dict(tensors)
