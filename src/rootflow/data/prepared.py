"""Prepared data sets: plain arrays in a folder, with a note of what they are and how they split."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootflow.data.archives import cache_folder
from rootflow.errors import DataError

__all__ = [
    "NOTE", "PREPARED", "Prepared", "find_prepared", "fingerprint", "open_prepared", "unknown",
]  # fmt: skip

NOTE = "rootflow-data.json"

PREPARED: dict[str, dict[str, str]] = {
    "table": {
        "power": "2,049,280 x 6: electricity of a household (Papamakarios et al. 2017)",
        "gas": "1,052,065 x 8: gas sensors, ethylene and CO (Papamakarios et al. 2017)",
        "hepmass": "525,123 x 21: particle collisions (Papamakarios et al. 2017)",
        "miniboone": "36,488 x 43: neutrino events (Papamakarios et al. 2017)",
        "bsds300": "1,300,000 x 63: patches of natural images (Papamakarios et al. 2017)",
    },
    "images": {
        "mnist": "70,000 x 1 x 28 x 28: handwritten digits in 10 classes",
        "fashion-mnist": "70,000 x 1 x 28 x 28: clothes in 10 classes (Zalando, MIT)",
        "cifar10": "60,000 x 3 x 32 x 32: photographs in 10 classes",
        "cifar100": "60,000 x 3 x 32 x 32: photographs in 100 classes",
        "svhn": "99,289 x 3 x 32 x 32: house numbers, digits in 10 classes",
        "imagenet32-old": "1,331,148 x 3 x 32 x 32: as in most papers, no longer offered",
        "imagenet64-old": "1,331,148 x 3 x 64 x 64: as in most papers, no longer offered",
        "imagenet32-new": "1,331,167 x 3 x 32 x 32: 1,000 classes, box filter",
        "imagenet64-new": "1,331,167 x 3 x 64 x 64: 1,000 classes, box filter",
    },
}


@dataclass(frozen=True)
class Prepared:
    """A prepared data set.

    ``kind`` "table": ``values`` float32 ``(n, d)``, rows of training, validation and test one after
    the other, ``parts`` their three numbers. ``kind`` "images": ``values`` uint8 ``(n, c, h, w)``,
    training and test, ``parts`` their two numbers; ``labels`` int64 ``(n,)`` or None.
    """

    name: str
    kind: str
    columns: list[str]
    parts: tuple[int, ...]
    values: NDArray[Any]
    labels: NDArray[np.int64] | None
    note: dict[str, Any]


def find_prepared(name: str, kind: str) -> Prepared | None:
    """What lies in the cache folder under a name of ``PREPARED``, or None. Raises DataError."""
    folder = cache_folder() / name
    if name not in PREPARED[kind] or not (folder / NOTE).exists():
        return None
    return open_prepared(folder, kind)


def open_prepared(folder: Path, kind: str) -> Prepared:
    """Open the folder that ``prepare`` wrote, its arrays mapped from their files.

    Raises DataError if it is damaged or of the other kind.
    """
    try:
        note = json.loads((folder / NOTE).read_bytes())
        name, found, columns, parts = (note[k] for k in ("name", "kind", "columns", "parts"))
        values = np.load(folder / "values.npy", mmap_mode="r", allow_pickle=False)
        path = folder / "labels.npy"
        labels = np.load(path, allow_pickle=False) if path.exists() else None
        if list(values.shape) != note["shape"] or sum(parts) != len(values):
            raise ValueError(f"values have shape {values.shape}")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{folder}: prepared data that are damaged or incomplete ({reason}); "
                        f"remove the folder and prepare them again") from None
    if found != kind:
        wanted = {"table": "a table", "images": "images"}
        raise DataError(f"{folder}: holds {wanted[found]}, not {wanted[kind]}")
    return Prepared(name, kind, columns, tuple(parts), values, labels, note)


def unknown(name: str) -> str:
    """What to tell somebody who asks for a set of another name."""
    if name in ("imagenet32", "imagenet64"):
        return (f"there are two versions, whose bits per dimension cannot be compared: {name}-old, "
                f"on which most papers report, and the smoother {name}-new; say which")
    known = ", ".join(name for sets in PREPARED.values() for name in sets)
    return f"nothing of this name can be prepared; known are {known}"


def fingerprint(values: NDArray[Any]) -> str:
    """Sixteen hex digits of the SHA-256 of the first 100 rows: tells variants of a set apart."""
    return hashlib.sha256(np.ascontiguousarray(values[:100]).tobytes()).hexdigest()[:16]
