"""Image sets from files of the published layout, byte for byte; damaged ones are named."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data.archive_helpers import idx, served, tar
from rootflow.data import prepare, read_images
from rootflow.data.idx import IDX_FILES
from rootflow.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
LABELS = np.array([3, 0, 9, 1, 1, 7, 2, 5, 8, 4, 6, 3], np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


def ready(name, source):
    prepare(name, source=str(source), verify=False)
    return read_images(name)


def refused(match, name, source):
    with pytest.raises(DataError, match=match) as caught:
        prepare(name, source=str(source), verify=False)
    assert "\n" not in str(caught.value)


def cifar(folder, per_file=2, labels=LABELS):
    records = [bytes([k]) + image.tobytes() for k, image in zip(labels, PIXELS, strict=True)]
    names = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
    batches = [b"".join(records[2 * k : 2 * k + per_file]) for k in range(6)]
    members = {f"cifar-10-batches-bin/{n}": b for n, b in zip(names, batches, strict=True)}
    members["cifar-10-batches-bin/batches.meta.txt"] = b"aeroplane"
    tar(folder / "cifar-10-binary.tar.gz", members)
    return members


def same(found, pixels=PIXELS, labels=LABELS, tests=2):
    np.testing.assert_array_equal(found.pixels, pixels)
    assert (found.labels is None) == (labels is None)
    if labels is not None:
        np.testing.assert_array_equal(found.labels, labels)
    assert found.test.tolist() == list(range(len(pixels) - tests, len(pixels)))
    assert sorted([*found.train, *found.validation]) == list(range(len(pixels) - tests))
    assert found.levels == 256


def test_cifar10_from_a_server(files, tmp_path):
    cifar(files)
    with served(files) as server:
        same(ready("cifar10", server.url))
        assert len(server.asked) == 1
        prepare("cifar10")  # is there already
        same(read_images(tmp_path / "cache" / "rootflow" / "cifar10"))


def test_cifar100_takes_the_fine_label(files):
    heads = zip(LABELS, LABELS[::-1] + 90, PIXELS, strict=True)
    records = [bytes([coarse, fine]) + image.tobytes() for coarse, fine, image in heads]
    members = {"train.bin": b"".join(records[:9]), "test.bin": b"".join(records[9:])}
    tar(files / "cifar-100-binary.tar.gz", {f"cifar-100-binary/{k}": v for k, v in members.items()})
    same(ready("cifar100", files), labels=LABELS[::-1] + 90, tests=3)


def test_cifar_records_that_do_not_fit(files):
    members = cifar(files)
    name = "cifar-10-batches-bin/data_batch_4.bin"
    for content in (members[name][:-1], members[name] + b"0", b""):
        tar(files / "cifar-10-binary.tar.gz", {**members, name: content})
        refused("data_batch_4.bin: has .* no whole number of records", "cifar10", files)
    cifar(files, labels=LABELS + 1)
    refused("data_batch_2.bin: holds the label 10", "cifar10", files)
    del members[name]
    tar(files / "cifar-10-binary.tar.gz", members)
    refused("no member .*data_batch_4.bin", "cifar10", files)
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz: its SHA256 is .* as published"):
        prepare("cifar10", source=str(files))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_mnist_and_its_relative(name, files):
    grey = PIXELS[:, 0, :28, :28]
    for file, array in zip(IDX_FILES, (grey[:9], LABELS[:9], grey[9:], LABELS[9:]), strict=True):
        idx(files / file, array)
    same(ready(name, files), grey[:, None], tests=3)


def test_mnist_files_that_do_not_belong_together(files):
    for file, array in zip(IDX_FILES, (PIXELS[:, 0], LABELS) * 2, strict=True):
        idx(files / file, array)
    refused("12 x 32 x 32 pixels for 12 labels", "mnist", files)
    idx(files / IDX_FILES[0], PIXELS[:9, 0, :28, :28])
    refused("train-images.*9 x 28 x 28 pixels for 12 labels", "mnist", files)
    (files / IDX_FILES[3]).unlink()
    refused("t10k-labels.* no such file", "mnist", files)
    refused("4 files; give their folder", "mnist", files / IDX_FILES[0])


def test_svhn_writes_zero_as_ten(files):
    for name, part in (("train", slice(0, 7)), ("test", slice(7, 12))):
        labels = np.where(LABELS[part] == 0, 10, LABELS[part])[:, None]
        held = {"X": PIXELS[part].transpose(2, 3, 1, 0), "y": labels}
        savemat(files / f"{name}_32x32.mat", held, do_compression=True)
    same(ready("svhn", files), tests=5)


def test_svhn_files_that_are_damaged(files):
    train, test = files / "train_32x32.mat", files / "test_32x32.mat"
    for path, held in ((train, {"X": PIXELS, "y": LABELS}), (test, {"y": LABELS})):
        savemat(path, held)
    refused(r"train.*X is uint8 \(12, 3, 32, 32\)", "svhn", files)
    savemat(train, {"X": PIXELS.transpose(2, 3, 1, 0), "y": LABELS})
    refused("test.* no variable 'X'", "svhn", files)
    test.write_bytes(train.read_bytes()[:5000])
    refused("test.* damaged or cut short", "svhn", files)
    for size in (0, 50):
        test.write_bytes(train.read_bytes()[:size])
        refused("test.* damaged or cut short", "svhn", files)


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "png")
    return out.getvalue()


def test_the_old_imagenet_is_a_tar_of_pictures(files):
    rows = [png(image.transpose(1, 2, 0)) for image in PIXELS]
    rows[2] = png(PIXELS[2, 0])
    head = tarfile.TarInfo("train_32x32")
    head.type = tarfile.DIRTYPE
    members = {"train_32x32": head, **{f"train_32x32/{k}.png": rows[k] for k in range(9)}}
    tar(files / "train_32x32.tar", members, "w")
    tar(files / "valid_32x32.tar", {f"valid_32x32/{k}.png": rows[k] for k in range(9, 12)}, "w")
    pixels = PIXELS.copy()
    pixels[2] = PIXELS[2, :1]
    same(ready("imagenet32-old", files), pixels, None, tests=3)


def test_the_old_imagenet_with_a_bad_picture(files):
    good = png(PIXELS[0].transpose(1, 2, 0))
    for bad, match in ((good[:60], "picture"), (png(PIXELS[0, 0, :9]), "32 x 9, not 32 x 32")):
        tar(files / "train_32x32.tar", {"a/1.png": good, "a/2.png": bad}, "w")
        tar(files / "valid_32x32.tar", {"b/1.png": good}, "w")
        refused(f"train_32x32.tar, a/2.png.*{match}", "imagenet32-old", files)
    tar(files / "valid_32x32.tar", {"b/1.txt": b"1"}, "w")
    refused("valid_32x32.tar: holds no .png", "imagenet32-old", files)
    with pytest.raises(DataError, match=r"or at all; .* to valid_32x32.tar by --from"):
        prepare("imagenet32-old")


def test_the_new_imagenet_is_eleven_files(files):
    names = [*(f"train_data_batch_{k}.npz" for k in range(1, 11)), "val_data.npz"]
    cuts = np.split(np.arange(12), range(1, 11))
    for name, rows in zip(names, cuts, strict=True):
        flat = PIXELS[rows].reshape(len(rows), -1)
        np.savez(files / name, data=flat, labels=LABELS[rows] + 1, mean=flat.mean(0))
    same(ready("imagenet32-new", files), tests=2)
    np.savez(files / names[4], data=PIXELS[:1].reshape(1, -1)[:, 1:], labels=LABELS[:1])
    prepared = files / "again"
    with pytest.raises(DataError, match=r"batch_5.npz: data is uint8 \(1, 3071\)"):
        prepare("imagenet32-new", source=str(files), out=prepared)
    np.savez(files / names[4], data=np.array([None]), labels=LABELS[:1])
    with pytest.raises(DataError, match=r"batch_5.npz: cannot be read as .npz"):
        prepare("imagenet32-new", source=str(files), out=prepared)


def test_names_that_are_not_enough(tmp_path):
    for ask in (prepare, read_images):
        with pytest.raises(DataError, match=r"two versions.*imagenet32-old.*imagenet32-new"):
            ask("imagenet32")
    with pytest.raises(DataError, match=r"nothing of this name.*power.*mnist"):
        prepare("nothing")
    for name in ("cifar10", "svhn"):
        with pytest.raises(DataError, match=f"not prepared yet; run: rootflow data prepare {name}"):
            read_images(name)


def test_a_prepared_folder_that_was_damaged(files, tmp_path):
    cifar(files)
    folder, _ = prepare("cifar10", source=str(files), verify=False)
    values = folder / "values.npy"
    values.write_bytes(values.read_bytes()[:-1])
    for ask in (read_images, prepare):
        with pytest.raises(DataError, match=r"damaged or incomplete .*; remove the folder"):
            ask("cifar10")
