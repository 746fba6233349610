"""Files of a saved flow: JSON, safetensors, checksums; written whole or not at all, no pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .errors import CheckpointError

__all__ = [
    "FORMAT_VERSION", "MIGRATIONS", "Budget", "fill", "plain", "read_config", "read_directory",
    "save_directory", "write_atomically", "write_json",
]  # fmt: skip

FORMAT_VERSION = 1
# MIGRATIONS[k] turns config.json and the tensors of format k, in place, into those of format k + 1.
MIGRATIONS: dict[int, Callable[[dict[str, Any], dict[str, Tensor]], None]] = {}
LARGEST_JSON, LARGEST_WEIGHTS = 2**24, 2**34  # bytes; two thousand million numbers in float64
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary neighbour, flush to disk, rename: no file is ever half written.

    What is there and is no file, such as /dev/stdout, is written to as it is.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        with temporary.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: tuples become lists; infinity and NaN become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def _read(directory: Path, name: str, limit: int) -> bytes:
    path = directory / name
    try:
        if (size := path.stat().st_size) > limit:
            raise CheckpointError(f"{path}: {size} bytes; at most {limit} are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory}: there is no {name}; is this a directory written by rootflow?"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(keys := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return keys


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _json(directory: Path, name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory / name}: damaged or foreign: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{directory / name}: holds no JSON object")
    return value


def read_directory(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a saved flow, brought to today's format.

    Checked: a known format, the checksums of both files, whole tensors without NaN or infinity.
    Raises CheckpointError.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    raw = _read(directory, "config.json", LARGEST_JSON)
    config = _json(directory, "config.json", raw)
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{directory / 'config.json'}: not a rootflow configuration")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{directory}: format version {version} is newer than this rootflow reads "
            f"({FORMAT_VERSION}); upgrade rootflow"
        )
    weights = _read(directory, "model.safetensors", LARGEST_WEIGHTS)
    manifest = _json(directory, "manifest.json", _read(directory, "manifest.json", LARGEST_JSON))
    for name, content in (("config.json", raw), ("model.safetensors", weights)):
        if manifest.get(name) != _digest(content):
            raise CheckpointError(
                f"{directory / name}: the checksum does not match manifest.json; "
                "the file is damaged"
            )
    try:
        tensors = load_tensors(weights)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{directory / 'model.safetensors'}: {error}") from None
    if not isinstance(config.get("flow"), dict):
        raise CheckpointError(f"{directory / 'config.json'}: the entry 'flow' is missing")
    for old in range(version, FORMAT_VERSION):
        MIGRATIONS[old](config, tensors)
    for name, t in tensors.items():
        if not torch.isfinite(t).all():
            raise CheckpointError(f"{directory}: {name} holds NaN or infinity")
    return config, tensors


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a saved flow alone, after the same checks."""
    return read_directory(directory)[0]


def fill(module: nn.Module, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Load ``tensors`` into ``module``; names, shapes, dtypes and count must match exactly."""
    own = module.state_dict()
    if set(own) != set(tensors):
        wrong = sorted(set(own) ^ set(tensors))
        raise CheckpointError(
            f"{directory}: tensors do not match the flow, first difference {wrong[0]!r}"
        )
    floating = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    for name, t in tensors.items():
        dtype = floating if own[name].is_floating_point() else own[name].dtype
        for what, given, needed in (
            ("shape", tuple(t.shape), tuple(own[name].shape)), ("dtype", t.dtype, dtype)
        ):  # fmt: skip
            if given != needed:
                raise CheckpointError(
                    f"{directory}: {name} has {what} {given}, the flow needs {needed}"
                )
    if floating not in DTYPES:
        raise CheckpointError(f"{directory}: weights of {floating} are not read")
    module.to(floating)
    module.load_state_dict(dict(tensors))


class Budget(TorchDispatchMode):
    """While a flow is built for a file, stops what its weights can have no use for.

    ``elements``: numbers in the file. An operation whose arguments could give more than that is
    tried on tensors without storage first, before memory is asked for. Raises ValueError.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.once, self.left = 16 * elements + 10**6, 100 * elements + 10**7

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if not _reach([*args, *given[1].values()]) <= min(self.once, self.left):
            try:
                trial_args, trial_kwargs = tree_map(_without_storage, given)
                made = tree_leaves(func(*trial_args, **trial_kwargs))
            except (NotImplementedError, RuntimeError):  # its result depends on values
                made = []
            if _numbers(made) > min(self.once, self.left):
                raise ValueError("its sizes are far beyond those of the weights")
        result = func(*given[0], **given[1])
        self.left -= _numbers(result if isinstance(result, list | tuple) else [result])
        return result


def _reach(arguments: Iterable[Any]) -> float:
    """No result of an operation with these arguments has more numbers, roughly."""
    size = 1.0
    for value in arguments:
        if isinstance(value, Tensor):
            size *= max(value.numel(), 1)
        elif isinstance(value, list | tuple):
            size *= _reach(value)
        elif isinstance(value, int | float):
            size *= 1 + abs(value) + 1 / (abs(value) or 1)  # also a step, of which there are many
    return size


def _numbers(tensors: Iterable[Any]) -> int:
    return sum(t.numel() for t in tensors if isinstance(t, Tensor))


def _without_storage(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value
