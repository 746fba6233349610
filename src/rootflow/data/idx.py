"""Arrays of bytes in the idx format of MNIST and its relatives."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootflow.errors import DataError

__all__ = ["IDX_FILES", "read_idx"]

# pixels and labels of the training set, then of the test set
IDX_FILES = (
    "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz",
)  # fmt: skip


def read_idx(path: Path, dimensions: int, md5: str | None = None) -> NDArray[np.uint8]:
    """The uint8 array of a gzipped idx file.

    Its header is big-endian: two zero bytes, 8 for unsigned bytes, the number of dimensions, then
    each size as four bytes. ``md5``: of the decompressed file, if it is known.
    Raises DataError for a damaged or cut file and for other dimensions.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, damaged or cut short: {error}") from None
    if md5 is not None:
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise DataError(f"{path}: the MD5 of its content is {found}, not {md5}: damaged")
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path}: begins with {content[:4].hex()}; an idx file of bytes in "
                        f"{dimensions} dimensions begins with 000008{dimensions:02x}")
    shape: Any = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    if len(content) - start != math.prod(shape):
        raise DataError(f"{path}: {len(content) - start:,} bytes follow the header, which promises "
                        f"{' x '.join(map(str, shape))}: cut short or damaged")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
