"""The published files of image sets, read into two arrays on disk: pixels and classes.

Each reader takes the files in the order of its set, writes values.npy (and labels.npy) into a
folder, and returns how many images are for training and for the test, which stand in this order.
"""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from rootflow.data.archives import extract, open_tar
from rootflow.data.idx import read_idx
from rootflow.data.pictures import Bytes, read_picture
from rootflow.data.sources import UNREADABLE
from rootflow.errors import DataError

__all__ = ["read_cifar", "read_imagenet_npz", "read_imagenet_tar", "read_mnist", "read_svhn"]

CIFAR = {
    10: ([f"cifar-10-batches-bin/data_batch_{k}.bin" for k in range(1, 6)],
         "cifar-10-batches-bin/test_batch.bin"),
    100: (["cifar-100-binary/train.bin"], "cifar-100-binary/test.bin"),
}  # fmt: skip


def _write(folder: Path, pixels: Sequence[Bytes], labels: Sequence[Bytes]) -> None:
    np.save(folder / "values.npy", np.concatenate(pixels), allow_pickle=False)
    np.save(folder / "labels.npy", np.concatenate(labels).astype(np.int64), allow_pickle=False)


def read_mnist(files: Sequence[Path], folder: Path) -> tuple[int, int]:
    """MNIST and Fashion-MNIST: four idx files, images and labels of training and test."""
    arrays = [read_idx(path, d) for path, d in zip(files, (3, 1, 3, 1), strict=True)]
    for path, images, labels in zip(files[::2], arrays[::2], arrays[1::2], strict=True):
        if images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise DataError(f"{path}: holds {' x '.join(map(str, images.shape))} pixels for "
                            f"{len(labels)} labels; N x 28 x 28 for N labels are expected")
    _write(folder, [a[:, None] for a in arrays[::2]], arrays[1::2])
    return len(arrays[0]), len(arrays[2])


def read_cifar(files: Sequence[Path], folder: Path, classes: int) -> tuple[int, int]:
    """CIFAR-10 and CIFAR-100, binary version: records of the labels and 3,072 planar bytes.

    Of CIFAR-100's two labels the second, fine one counts.
    """
    train, test = CIFAR[classes]
    heads = 1 if classes == 10 else 2
    pixels, labels = [], []
    names = [*train, test]
    members = extract(files[0], names, folder)
    for name, path in zip(names, members, strict=True):
        content = np.fromfile(path, np.uint8)
        path.unlink()
        if not len(content) or len(content) % (heads + 3072):
            raise DataError(f"{files[0]}, {name}: has {len(content):,} bytes, which is no whole "
                            f"number of records of {heads + 3072:,} bytes")
        records = content.reshape(-1, heads + 3072)
        if records[:, heads - 1].max() >= classes:
            raise DataError(f"{files[0]}, {name}: holds the label {records[:, heads - 1].max()}; "
                            f"labels are 0 to {classes - 1}")
        labels.append(records[:, heads - 1])
        pixels.append(records[:, heads:].reshape(-1, 3, 32, 32))
    _write(folder, pixels, labels)
    return sum(map(len, pixels[:-1])), len(pixels[-1])


def read_svhn(files: Sequence[Path], folder: Path) -> tuple[int, int]:
    """SVHN, cropped digits: MATLAB files with X (32, 32, 3, N) and y, in which 10 stands for 0."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError("svhn: its files need scipy; pip install rootflow[archives]") from None
    pixels, labels = [], []
    for path in files:
        try:
            held: dict[str, Any] = loadmat(path, variable_names=["X", "y"])
            x, y = held["X"], held["y"].ravel()
        except KeyError as error:
            raise DataError(f"{path}: holds no variable {error}; X and y are expected") from None
        except Exception as error:  # scipy raises half a dozen kinds for damaged files
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: cannot be read, damaged or cut short: {reason}") from None
        if x.dtype != np.uint8 or x.shape[:3] != (32, 32, 3) or x.shape[3:] != y.shape:
            raise DataError(f"{path}: X is {x.dtype} {x.shape} and y {y.shape}; uint8 (32, 32, 3, "
                            f"N) and N labels are expected")
        pixels.append(np.ascontiguousarray(x.transpose(3, 2, 0, 1)))
        labels.append(y % 10)
    _write(folder, pixels, labels)
    return len(pixels[0]), len(pixels[1])


def read_imagenet_tar(files: Sequence[Path], folder: Path, side: int) -> tuple[int, int]:
    """The ImageNet of van den Oord et al. 2016: two tar files of PNG pictures without labels."""
    counts = []
    for path in files:
        with open_tar(path) as tar:
            counts.append(sum(_is_png(member) for member in tar))
        if not counts[-1]:
            raise DataError(f"{path}: holds no .png pictures")
    values = open_memmap(folder / "values.npy", "w+", np.uint8, (sum(counts), 3, side, side))
    row = 0
    for path in files:
        with open_tar(path) as tar:
            for member in tar:
                if not _is_png(member):
                    continue
                content = tar.extractfile(member)
                assert content is not None
                with content:
                    picture = read_picture(f"{path}, {member.name}", content)
                if picture.shape[1:] != (side, side):
                    raise DataError(f"{path}, {member.name}: is {picture.shape[2]} x "
                                    f"{picture.shape[1]}, not {side} x {side}")
                values[row] = picture  # a grey one fills all three channels
                row += 1
    values.flush()
    return counts[0], counts[1]


def _is_png(member: tarfile.TarInfo) -> bool:
    return member.isreg() and member.name.endswith(".png")


def read_imagenet_npz(files: Sequence[Path], folder: Path, side: int) -> tuple[int, int]:
    """The ImageNet of Chrabaszcz et al. 2017: .npz files, ten for training and one for the test.

    Each holds ``data`` (N, 3 side side), plane by plane, and ``labels`` from 1 to 1,000.
    """
    heads = [_npz_array(path, "labels") for path in files]
    total = sum(map(len, heads))
    values = open_memmap(folder / "values.npy", "w+", np.uint8, (total, 3, side, side))
    row = 0
    for path, labels in zip(files, heads, strict=True):
        data = _npz_array(path, "data")
        if data.dtype != np.uint8 or data.shape != (len(labels), 3 * side * side):
            raise DataError(f"{path}: data is {data.dtype} {data.shape}; uint8 ({len(labels)}, "
                            f"{3 * side * side}) is expected")
        values[row : row + len(data)] = data.reshape(-1, 3, side, side)
        row += len(data)
    values.flush()
    labels = np.concatenate(heads).astype(np.int64) - 1
    np.save(folder / "labels.npy", labels, allow_pickle=False)
    return total - len(heads[-1]), len(heads[-1])


def _npz_array(path: Path, key: str) -> Any:
    try:
        with path.open("rb") as file:
            return np.load(file, allow_pickle=False)[key]
    except (*UNREADABLE, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as .npz with data and labels: {reason}") from None
