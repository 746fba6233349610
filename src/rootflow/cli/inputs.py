"""What DATA on the command line is: a table, or a set of images; read, and recognised again."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rootflow.cli.common import WrongUse
from rootflow.cli.tables import LEAST_ROWS, Parts, Reading, read_new
from rootflow.cli.tables import read_again as read_table_again
from rootflow.data import BUILTIN, IMAGES, Images, read_images
from rootflow.data.prepared import NOTE, PREPARED
from rootflow.data.schema import Schema
from rootflow.errors import DataError

__all__ = [
    "are_images", "digest", "enough_images", "image_set", "parts", "read", "read_again",
    "schema_of",
]  # fmt: skip

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


def read(source: str, reading: Reading, seed: int, quiet: bool = True) -> Parts | Images:
    """The table, cut into parts, or the images of that name.

    Raises DataError, or WrongUse for an option that is only for tables.
    """
    if not are_images(source):
        return read_new(source, reading, seed, quiet)
    if reading.words:
        raise WrongUse(f"{reading.words[0]} is for tables; {source} holds images")
    return enough_images(source, seed)


def enough_images(source: str, seed: int) -> Images:
    """The images of that name. Raises DataError if they are too few for a split."""
    images = image_set(source, seed)
    if min(map(len, (images.train, images.validation, images.test))) < 2:
        count = len(images.pixels)
        raise DataError(f"{images.name}: {count} images; at least {LEAST_ROWS} are needed")
    return images


def read_again(data: Mapping[str, Any], max_bytes: int | None = None) -> Parts | Images:
    """The data that the entry ``data`` of config.json describes. Raises DataError if changed."""
    found: Parts | Images
    if "shape" in data:
        found = image_set(data["source"], data["seed"])
    else:
        found = read_table_again(data, schema_of(data), max_bytes)
    if digest(found) != data["sha256"]:
        raise DataError(f"{found.name}: the data have changed since the run began; start a new run")
    return found


def image_set(source: str, seed: int) -> Images:
    """The images of that name, however few."""
    name = source.removesuffix(SUFFIX)
    return read_images(name if name in IMAGES else source, seed=seed)


def digest(data: Parts | Images) -> str:
    """SHA-256 of names and values, by which a resumed run knows its data again."""
    if isinstance(data, Parts):
        return data.sha256
    found = hashlib.sha256(json.dumps([data.pixels.shape, data.levels]).encode())
    found.update(np.ascontiguousarray(data.pixels).data)
    return found.hexdigest()


def parts(data: Parts | Images) -> list[Any]:
    """Training, validation and test rows, of a table float64 (n, d), of images uint8 pixels."""
    if isinstance(data, Images):
        return [data.pixels[rows] for rows in (data.train, data.validation, data.test)]
    return [data.train, data.validation, data.test]


def schema_of(data: Mapping[str, Any]) -> Schema:
    """The schema of the columns in the entry ``data`` of config.json. Raises CheckpointError."""
    if "schema" not in data:  # a flow saved from Python, or before there were schemas
        return Schema.of(data["columns"], data["dtypes"])
    return Schema.from_json(data["schema"])
