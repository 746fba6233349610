"""What DATA on the command line is: a table, or a set of images; read, and recognised again."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootflow.cli.common import WrongUse
from rootflow.data import BUILTIN, IMAGES, Images, Table, read_images, read_table
from rootflow.data.prepared import NOTE, PREPARED
from rootflow.errors import DataError

__all__ = ["are_images", "digest", "parts", "read", "read_again"]

SUFFIX = "-images"  # tells the images called "digits" from the table of that name
PREPARED_IMAGES = {*PREPARED["images"], "imagenet32", "imagenet64"}  # whose reader says which


def are_images(source: str) -> bool:
    """Whether DATA means images: one of their names, a folder, or a file of uint8 arrays."""
    if source.partition(":")[0] in BUILTIN:
        return False
    if source.removesuffix(SUFFIX) in IMAGES or source in PREPARED_IMAGES:
        return True
    path = Path(source)
    if path.is_dir():
        return not (path / NOTE).exists() or '"images"' in (path / NOTE).read_text("utf-8")
    if path.suffix.lower() not in (".npy", ".npz") or not path.is_file():
        return False
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")
        arrays = [loaded] if isinstance(loaded, np.ndarray) else [loaded[k] for k in loaded.files]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return False  # whoever reads it will say what is wrong
    return any(a.dtype == np.uint8 and a.ndim in (3, 4) for a in arrays)


def read(source: str, columns: str | None, dequantise: bool, seed: int) -> Table | Images:
    """The table or the images of that name. Raises DataError, or WrongUse for a table's option."""
    if not are_images(source):
        return read_table(source, columns=columns.split(",") if columns else None, seed=seed)
    if columns or dequantise:
        option = "--columns" if columns else "--dequantise"
        raise WrongUse(f"{option} is for tables; {source} holds images, always dequantised")
    name = source.removesuffix(SUFFIX)
    return read_images(name if name in IMAGES else source, seed=seed)


def read_again(data: Mapping[str, Any]) -> Table | Images:
    """The data that the entry ``data`` of config.json describes. Raises DataError if changed."""
    if "shape" in data:
        found = read(data["source"], None, False, data["seed"])
    else:
        found = read_table(data["source"], columns=data["columns"], seed=data["seed"])
    if digest(found) != data["sha256"]:
        raise DataError(f"{found.name}: the data have changed since the run began; start a new run")
    return found


def digest(data: Table | Images) -> str:
    """SHA-256 of names and values, by which a resumed run knows its data again."""
    head: Any
    values: NDArray[Any]
    if isinstance(data, Images):
        head, values = [data.pixels.shape, data.levels], data.pixels
    else:
        head, values = data.columns, data.values
    found = hashlib.sha256(json.dumps(head).encode())
    found.update(np.ascontiguousarray(values).data)
    return found.hexdigest()


def parts(data: Table | Images, plan: Mapping[str, Any]) -> list[NDArray[Any]]:
    """Training, validation and test rows, of a table float64 (n, d), of images uint8 pixels.

    ``plan``: the entry ``data`` of config.json.
    """
    if isinstance(data, Images):
        return [data.pixels[rows] for rows in (data.train, data.validation, data.test)]
    chosen = data.split(plan["seed"], tuple(plan["fractions"]))
    return [data.values[rows] for rows in chosen]
