"""Images in: built-in and prepared sets, folders of pictures and NumPy files become ``Images``.

Nothing is resized, converted or rescaled: a picture that does not fit the others is an error that
names its file.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rootflow.data.idx import IDX_FILES, read_idx
from rootflow.data.pictures import Bytes, Classes, read_folder
from rootflow.data.prepared import (
    NOTE,
    PREPARED,
    Prepared,
    find_prepared,
    open_prepared,
    unknown,
)
from rootflow.data.sources import UNREADABLE
from rootflow.data.tables import read_table, split
from rootflow.errors import DataError

__all__ = ["IMAGES", "Images", "read_images"]

IMAGES: dict[str, str] = {
    "digits": "1,797 x 1 x 8 x 8: handwritten digits in 10 classes, levels 0 to 16",
}
VALIDATION = 10_000  # rows at most, of a training set whose test set is fixed

# Debian packs the files anew, so that only what they hold can be compared: MD5 in their order.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_MD5 = (
    "f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9",
    "8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965",
)  # fmt: skip


@dataclass(frozen=True)
class Images:
    """Images of one size with their split.

    ``pixels`` is uint8 ``(n, c, h, w)``, values 0 to ``levels - 1``, perhaps mapped from a file;
    ``labels`` int64 ``(n,)``, classes from 0, or None. ``train``, ``validation`` and ``test`` are
    positions in them.
    """

    name: str
    pixels: Bytes
    labels: Classes | None
    levels: int
    train: Classes
    validation: Classes
    test: Classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        c, h, w = self.pixels.shape[1:]
        return c, h, w


def read_images(source: str | os.PathLike[str], *, seed: int = 0) -> Images:
    """Read images from a built-in or prepared name, a folder of pictures, a .npz or .npy file.

    A folder holds 8-bit grey or RGB pictures of one size; if all of them lie in subfolders, each
    subfolder is a class. A .npz holds one uint8 array ``(n, h, w)``, ``(n, c, h, w)`` or
    ``(n, h, w, c)`` with one or three channels, and may hold ``labels`` ``(n,)``. ``seed`` draws
    the split: 80, 10 and 10 percent, or a tenth of the training set (at most 10,000) for validation
    where the test set is given.

    Raises DataError, one line, for everything that cannot be used.
    """
    name = os.fspath(source)
    if name == "digits":
        pixels = read_table("digits").values.astype(np.uint8).reshape(-1, 1, 8, 8)
        labels = np.load(Path(__file__).with_name("digits-labels.npy"), allow_pickle=False)
        return _split(name, pixels, labels.astype(np.int64), 17, seed)
    if (prepared := find_prepared(name, "images")) is not None:
        return _prepared(prepared, seed)
    if name == "fashion-mnist" and DEBIAN.is_dir():
        return _debian(name, seed)
    path, known = Path(name), [*IMAGES, *PREPARED["images"]]
    if (path / NOTE).exists():
        return _prepared(open_prepared(path, "images"), seed)
    if path.is_dir():
        return _split(name, *read_folder(path), 256, seed)
    if not path.exists():
        if name in PREPARED["images"]:
            hint = ", or install Debian's dataset-fashion-mnist" if name == "fashion-mnist" else ""
            raise DataError(f"{name}: is not prepared yet; run: rootflow data prepare {name}{hint}")
        if name in ("imagenet32", "imagenet64"):
            raise DataError(f"{name}: {unknown(name)}")
        raise DataError(f"{path}: no such file or folder, nor a built-in set ({', '.join(known)})")
    if path.suffix.lower() not in (".npz", ".npy"):
        raise DataError(f"{path}: is no set of images; give a folder of pictures, a .npz or .npy "
                        f"file, or a built-in name ({', '.join(known)})")
    return _split(name, *_read_numpy(path), 256, seed)


def _split(
    name: str, pixels: Bytes, labels: Classes | None, levels: int, seed: int,
    tests: int | None = None,
) -> Images:
    """Images with their split; ``tests``: how many at the end are the test set, if it is given."""
    n = len(pixels)
    if tests is None:
        return Images(name, pixels, labels, levels, *split(n, seed))
    order = np.random.RandomState(seed).permutation(n - tests).astype(np.int64)
    cut = n - tests - min(VALIDATION, (n - tests) // 10)
    return Images(name, pixels, labels, levels, order[:cut], order[cut:], np.arange(n - tests, n))


def _prepared(found: Prepared, seed: int) -> Images:
    return _split(found.name, found.values, found.labels, 256, seed, found.parts[1])


def _debian(name: str, seed: int) -> Images:
    images, labels, test_images, test_labels = (
        read_idx(DEBIAN / file, dimensions, md5)
        for file, dimensions, md5 in zip(IDX_FILES, (3, 1, 3, 1), DEBIAN_MD5, strict=True)
    )
    pixels = np.concatenate([images, test_images])[:, None]
    classes = np.concatenate([labels, test_labels]).astype(np.int64)
    return _split(name, pixels, classes, 256, seed, len(test_images))


def _read_numpy(path: Path) -> tuple[Bytes, Classes | None]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"pixels": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except UNREADABLE as error:
        text = " ".join(str(error).split())
        reason = "holds pickled objects, which are never loaded" if "pickle" in text else (
            f"cannot be read, damaged or cut short: {text}")
        raise DataError(f"{path}: {reason}") from None
    held = ", ".join(f"{key} {a.dtype} {a.shape}" for key, a in arrays.items()) or "nothing"
    found = [a for a in arrays.values() if a.ndim in (3, 4) and a.dtype == np.uint8]
    if len(found) != 1 or not found[0].size:
        raise DataError(f"{path}: must hold exactly one uint8 array (n, h, w), (n, c, h, w) or "
                        f"(n, h, w, c); it holds {held}")
    pixels = found[0][:, None] if found[0].ndim == 3 else found[0]
    if pixels.shape[1] not in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.shape[1] not in (1, 3):
        raise DataError(f"{path}: has shape {found[0].shape}; images have one or three channels")
    labels = arrays.get("labels")
    if labels is None:
        return np.ascontiguousarray(pixels), None
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}; give whole numbers "
                        f"from 0, one for each of the {len(pixels)} images")
    return np.ascontiguousarray(pixels), labels.astype(np.int64)

