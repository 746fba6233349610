"""Picture files: 8-bit grey or RGB as they are; anything else is an error that names the file."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rootflow.data.memory import require_memory
from rootflow.errors import DataError

__all__ = ["Bytes", "Classes", "read_folder", "read_picture"]

Bytes = NDArray[np.uint8]
Classes = NDArray[np.int64]
KINDS = ".png .jpg .jpeg .bmp .webp .tif .tiff .gif .pgm .ppm"


def read_folder(folder: Path) -> tuple[Bytes, Classes | None]:
    """Pixels of all pictures in the order of their names; classes if they lie in subfolders."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS.split())
    if not files:
        raise DataError(f"{folder}: holds no pictures ({KINDS})")
    pixels: Any = None
    for k, path in enumerate(files):
        with path.open("rb") as file:
            picture = read_picture(str(path), file)
        if pixels is None:
            what = f"{folder}: its {len(files)} pictures"
            require_memory(what, len(files) * picture.size, None, "take fewer or smaller ones")
            pixels = np.empty((len(files), *picture.shape), np.uint8)
        if picture.shape != pixels.shape[1:]:
            raise DataError(f"{path}: is {_size(picture.shape)}, but {files[0].name} is "
                            f"{_size(pixels.shape[1:])}; all pictures must have one size and "
                            f"the same channels")
        pixels[k] = picture
    homes = [path.relative_to(folder).parts[:-1] for path in files]
    if not all(homes):
        return pixels, None
    names = sorted({home[0] for home in homes})
    return pixels, np.array([names.index(home[0]) for home in homes])


def read_picture(name: str, file: IO[bytes]) -> Bytes:
    """One 8-bit grey or RGB picture, ``(c, h, w)``."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            mode = picture.mode
            if mode in ("L", "RGB"):
                values = np.asarray(picture)
                return values[None] if mode == "L" else values.transpose(2, 0, 1)
    except UnidentifiedImageError:
        raise DataError(f"{name}: is no picture, or damaged") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: cannot be read as a picture: {reason}") from None
    kinds = {"P": "has a palette", "PA": "has a palette", "1": "has 1 bit per pixel",
             "LA": "has transparency", "RGBA": "has transparency", "F": "holds fractions"}
    kind = kinds.get(mode, "has 16 or more bits per pixel" if mode[0] == "I" else f"is {mode}")
    raise DataError(f"{name}: {kind}; only 8-bit grey or RGB pictures can be used, convert it")


def _size(shape: Sequence[int]) -> str:
    channels = {1: "grey", 3: "RGB"}[shape[0]]
    return f"{shape[2]} x {shape[1]} {channels}"
