"""Preparing a data set: obtain its published files, read them as published, keep plain arrays."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rootflow.data import classic, image_archives
from rootflow.data.archives import Published, Say, cache_folder, extract, obtain
from rootflow.data.idx import IDX_FILES
from rootflow.data.prepared import NOTE, Prepared, fingerprint, open_prepared, unknown
from rootflow.errors import DataError
from rootflow.store import write_json

__all__ = ["prepare"]


@dataclass(frozen=True)
class _Table:
    """Members of the archive, how they are read, and the rows of each part, all published."""

    members: tuple[str, ...]
    read: Callable[[Sequence[Path]], classic.Parts]
    parts: tuple[int, int, int]


@dataclass(frozen=True)
class _Images:
    """Where the files are (None: nowhere without an account), and how they are read."""

    url: str | None
    files: tuple[Published, ...]
    read: Callable[[Sequence[Path], Path], tuple[int, int]]


ARCHIVE_URL = "https://zenodo.org/record/1161203/files"
ARCHIVE = Published("data.tar.gz", "9b9c9b0375315ad270eba4ce80c093ab")

TABLES = {
    "power": _Table(("data/power/data.npy",), classic.read_power, (1_659_917, 184_435, 204_928)),
    "gas": _Table(("data/gas/ethylene_CO.pickle",), classic.read_gas, (852_174, 94_685, 105_206)),
    "hepmass": _Table(
        ("data/hepmass/1000_train.csv", "data/hepmass/1000_test.csv"),
        classic.read_hepmass, (315_123, 35_013, 174_987),
    ),
    "miniboone": _Table(
        ("data/miniboone/data.npy",), classic.read_miniboone, (29_556, 3_284, 3_648)
    ),
    "bsds300": _Table(
        ("data/BSDS300/BSDS300.hdf5",), classic.read_bsds300, (1_000_000, 50_000, 250_000)
    ),
}  # fmt: skip


def _idx(*checksums: str) -> tuple[Published, ...]:
    return tuple(map(Published, IDX_FILES, checksums))


def _imagenet_tar(side: int, train: str, valid: str) -> _Images:
    files = (f"train_{side}x{side}.tar", train), (f"valid_{side}x{side}.tar", valid)
    read = partial(image_archives.read_imagenet_tar, side=side)
    return _Images(None, tuple(Published(*file) for file in files), read)


def _imagenet_npz(side: int) -> _Images:
    names = [*(f"train_data_batch_{k}.npz" for k in range(1, 11)), "val_data.npz"]
    read = partial(image_archives.read_imagenet_npz, side=side)
    return _Images(None, tuple(map(Published, names)), read)


IMAGES = {
    "mnist": _Images(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        _idx("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
             "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
        image_archives.read_mnist,
    ),
    "fashion-mnist": _Images(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        _idx("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
             "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
        image_archives.read_mnist,
    ),
    "cifar10": _Images(
        "https://www.cs.toronto.edu/~kriz",
        (Published("cifar-10-binary.tar.gz",
                   "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),),
        partial(image_archives.read_cifar, classes=10),
    ),
    "cifar100": _Images(
        "https://www.cs.toronto.edu/~kriz",
        (Published("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),),
        partial(image_archives.read_cifar, classes=100),
    ),
    "svhn": _Images(
        "http://ufldl.stanford.edu/housenumbers",
        (Published("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
         Published("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3")),
        image_archives.read_svhn,
    ),
    "imagenet32-old": _imagenet_tar(
        32, "244a323d48f8d72f65ad8b54658c01fed68d2d7bdc77ccb43da58c11e94224e5",
        "862e559462b24cf736212a19f6b0d47b55c2dc8ebdaa95ccecfe71260124c8f7",
    ),
    "imagenet64-old": _imagenet_tar(
        64, "e2a2c1947a748d0d256e98e6d82800d855441dc9e4de2e71a773f1324c4524d7",
        "eeac03ec4f585baf871d2b4cb9c974bfe345e74878a74e5820fe6eb1041629cd",
    ),
    "imagenet32-new": _imagenet_npz(32),
    "imagenet64-new": _imagenet_npz(64),
}  # fmt: skip


def prepare(
    name: str,
    *,
    out: Path | None = None,
    source: str | None = None,
    verify: bool = True,
    unpickle: bool = False,
    say: Say = lambda _: None,
) -> tuple[Path, Prepared]:
    """Prepare a set of ``PREPARED`` in the folder ``out / name``; nothing is done if it is there.

    ``out``: the cache folder by default, where ``read_table(name)`` or ``read_images(name)`` find
    it; a set prepared elsewhere is read by its path. ``source``: a folder or URL with the published
    files, or the one file, instead of their home. ``verify``: compare checksums, and the published
    numbers of rows. ``unpickle``: let the allow-list reader at the file of ``gas``. Downloads are
    kept in ``out / "downloads"``.

    Raises DataError for an unknown name, a failed download, a wrong checksum or unexpected content.
    """
    out = cache_folder() if out is None else out
    if name not in {**TABLES, **IMAGES}:
        raise DataError(f"{name}: {unknown(name)}")
    kind = "table" if name in TABLES else "images"
    folder = out / name
    if (folder / NOTE).exists():
        return folder, open_prepared(folder, kind)
    if folder.exists():
        raise DataError(f"{folder}: is in the way; remove it, or give another folder")
    if name == "gas" and not unpickle:
        raise DataError("gas: its archive holds this table as a pickle only; --unpickle lets a "
                        "reader at it that makes arrays and refuses everything else")
    out.mkdir(parents=True, exist_ok=True)
    files = _obtain(name, source, out / "downloads", verify, say)
    say(f"reading {name}")
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as scratch:
        new = Path(scratch) / name
        new.mkdir()
        if name in TABLES:
            columns, parts = _build_table(TABLES[name], files[0], new, verify)
        else:
            columns, parts = [], IMAGES[name].read(files, new)
        values = np.load(new / "values.npy", mmap_mode="r", allow_pickle=False)
        write_json(new / NOTE, {
            "format_version": 1, "name": name, "kind": kind, "columns": columns,
            "parts": list(parts), "shape": list(values.shape), "first_rows": fingerprint(values),
            "verified": verify and all(file.checksum for file in _files(name)),
        })  # fmt: skip
        new.rename(folder)
    return folder, open_prepared(folder, kind)


def _files(name: str) -> tuple[Published, ...]:
    return (ARCHIVE,) if name in TABLES else IMAGES[name].files


def _obtain(name: str, source: str | None, folder: Path, verify: bool, say: Say) -> list[Path]:
    files = _files(name)
    home = ARCHIVE_URL if name in TABLES else IMAGES[name].url
    if source is None and home is None:
        raise DataError(f"{name}: cannot be downloaded without an account, or at all; give the "
                        f"folder with {files[0].name} to {files[-1].name} by --from")
    if source is not None and Path(source).is_file() and len(files) > 1:
        raise DataError(f"{source}: {name} consists of {len(files)} files; give their folder")
    where = folder if name in TABLES else folder / name
    return [obtain(source or home or "", file, where, verify=verify, say=say) for file in files]


def _build_table(
    table: _Table, archive: Path, folder: Path, verify: bool
) -> tuple[list[str], tuple[int, ...]]:
    members = extract(archive, table.members, folder)
    try:
        columns, *rows = table.read(members)
    except DataError as error:  # say where the user finds it
        text = str(error)
        for path, member in zip(members, table.members, strict=True):
            text = text.replace(str(path), f"{archive}, {member}")
        raise DataError(text) from None
    for path in members:
        path.unlink()
    parts = tuple(map(len, rows))
    if verify and parts != table.parts:
        raise DataError(f"{archive}: gives {parts} rows of training, validation and test, not "
                        f"{table.parts} as published")
    values = np.concatenate(rows).astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{archive}, {table.members[0]}: holds NaN or infinity")
    np.save(folder / "values.npy", values, allow_pickle=False)
    return columns, parts
