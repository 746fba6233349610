"""Tables made from files of other installed packages, which are located but never imported.

``patches`` are 63 pixels of natural images as in BSDS300, made from the pictures of scikit-learn
and scikit-image; ``nyse`` are daily figures of the New York stock exchange from ISLP.
"""

import csv
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rootflow.data.pictures import read_picture
from rootflow.errors import DataError

__all__ = ["PACKAGED", "Split", "read_packaged"]

Split = tuple[list[str], NDArray[np.float64], tuple[int, int, int]]  # columns, rows, their parts

PACKAGED: dict[str, str] = {
    "patches": "250,000 x 63: natural image patches (pictures of scikit-learn and scikit-image)",
    "nyse": "6,051 x 3: days of the New York stock exchange, test last (ISLP)",
}
TRAINING = (
    "scikit-learn:sklearn/datasets/images/china.jpg", "scikit-image:skimage/data/coffee.png",
    "scikit-image:skimage/data/astronaut.png", "scikit-image:skimage/data/chelsea.png",
    "scikit-image:skimage/data/rocket.jpg", "scikit-image:skimage/data/grass.png",
    "scikit-image:skimage/data/gravel.png", "scikit-image:skimage/data/brick.png",
)  # fmt: skip
TEST = (
    "scikit-learn:sklearn/datasets/images/flower.jpg", "scikit-image:skimage/data/camera.png",
    "scikit-image:skimage/data/motorcycle_left.png",
)  # fmt: skip
PATCH = 8
PER_PICTURE = (25_000, 2_500, 10_000)  # patches for training, validation and test


def read_packaged(name: str) -> Split:
    """One of ``PACKAGED``, always the same rows. Raises DataError if its package is missing."""
    return _patches() if name == "patches" else _nyse()


def _locate(name: str, package: str, file: str) -> Path:
    try:
        path = Path(str(metadata.distribution(package).locate_file(file)))
    except metadata.PackageNotFoundError:
        raise DataError(f"{name}: is made from files of {package}, which is not installed; pip "
                        f"install {package}") from None
    if not path.is_file():
        raise DataError(f"{name}: {path} is missing; another version of {package} may have it")
    return path


def _patches() -> Split:
    """Grey patches of 8 x 8 (k + U[0, 1)) / 256, less their mean, without the last pixel.

    Validation has fresh places in the training pictures, the test has pictures of its own.
    """
    generator = np.random.default_rng(0)
    training, test = (
        [_grey(_locate("patches", *place.split(":"))) for place in places]
        for places in (TRAINING, TEST)
    )
    chosen = zip((training, training, test), PER_PICTURE, strict=True)
    drawn = [[_draw(picture, n, generator) for picture in some] for some, n in chosen]
    parts = [np.concatenate(pictures) for pictures in drawn]
    names = [f"p{j // PATCH}{j % PATCH}" for j in range(PATCH**2 - 1)]
    n_train, n_validation, n_test = map(len, parts)
    return names, np.concatenate(parts), (n_train, n_validation, n_test)


def _grey(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    with path.open("rb") as file:
        picture = read_picture(str(path), file).transpose(1, 2, 0)
    return np.asarray(Image.fromarray(picture.squeeze()).convert("L"))


def _draw(
    picture: NDArray[np.uint8], n: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    # Places are drawn, not on a grid: JPEG pictures have edges every eight pixels.
    windows = np.lib.stride_tricks.sliding_window_view(picture, (PATCH, PATCH))
    rows, columns = (generator.integers(0, size, n) for size in windows.shape[:2])
    values = windows[rows, columns].reshape(n, PATCH**2)
    noised = (values + generator.random((n, PATCH**2))) / 256
    centred: NDArray[np.float64] = noised - noised.mean(1, keepdims=True)
    return centred[:, :-1]


def _nyse() -> Split:
    """Return, log volume and log volatility; the test is the later part, as its ``train`` says."""
    path = _locate("nyse", "ISLP", "ISLP/data/NYSE.csv")
    names = ["DJ_return", "log_volume", "log_volatility"]
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    try:
        rows = np.array([[float(line[name]) for name in names] for line in lines])
        seen = sum(line["train"].upper() == "TRUE" for line in lines)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not the table that nyse is made from: {error}") from None
    return names, rows, (seen - seen // 10, seen // 10, len(rows) - seen)
