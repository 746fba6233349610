"""Images: folders, arrays and built-in sets come back to the pixel; misfits are named."""

import gzip

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data.archive_helpers import idx
from rootflow.data import images, read_images, read_table
from rootflow.data.idx import IDX_FILES, read_idx
from rootflow.errors import DataError

GREY = np.random.default_rng(0).integers(0, 256, (5, 4, 6), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 3, 4, 6), dtype=np.uint8)


def refused(source, *words):
    with pytest.raises(DataError) as caught:
        read_images(source)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def pictures(folder, arrays, names="abcde"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(names, arrays, strict=False):
        Image.fromarray(array if array.ndim == 2 else array.transpose(1, 2, 0)).save(
            folder / f"{name}.png"
        )
    return folder


def test_a_folder_gives_its_pictures_in_the_order_of_their_names(tmp_path):
    found = read_images(pictures(tmp_path / "grey", GREY, "bcdea"))
    np.testing.assert_array_equal(found.pixels[:, 0], GREY[[4, 0, 1, 2, 3]])
    assert (found.levels, found.labels, found.shape) == (256, None, (1, 4, 6))
    found = read_images(str(pictures(tmp_path / "colour", COLOUR)))
    np.testing.assert_array_equal(found.pixels, COLOUR)


def test_subfolders_are_classes(tmp_path):
    pictures(tmp_path / "cats", GREY[:2])
    pictures(tmp_path / "dogs", GREY[2:])
    found = read_images(tmp_path)
    np.testing.assert_array_equal(found.pixels[:, 0], GREY)
    np.testing.assert_array_equal(found.labels, [0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: Image.new("L", (7, 4)).save(p), ["7 x 4 grey", "a.png is 6 x 4 grey"]),
        (lambda p: Image.new("RGB", (6, 4)).save(p), ["6 x 4 RGB", "6 x 4 grey"]),
        (lambda p: Image.fromarray(GREY[0].astype(np.uint16) * 257).save(p), ["16"]),
        (lambda p: Image.new("P", (6, 4)).save(p), ["palette"]),
        (lambda p: Image.new("RGBA", (6, 4)).save(p), ["transparency"]),
        (lambda p: Image.new("1", (6, 4)).save(p), ["1 bit"]),
        (lambda p: p.write_bytes(p.read_bytes()[:45]), ["cannot be read"]),
        (lambda p: p.write_bytes(b"none"), ["no picture"]),
    ],
)
def test_one_bad_picture_is_named(tmp_path, spoil, words):
    pictures(tmp_path, GREY)
    spoil(tmp_path / "d.png")
    refused(tmp_path, "d.png", *words)


def test_arrays_with_channels_first_or_last(tmp_path):
    labels = np.array([2, 0, 1, 1, 0], np.uint8)
    for stored, wanted in (
        (GREY, GREY[:, None]), (COLOUR, COLOUR), (COLOUR.transpose(0, 2, 3, 1), COLOUR)
    ):  # fmt: skip
        np.savez(tmp_path / "x.npz", images=stored, labels=labels)
        found = read_images(tmp_path / "x.npz")
        np.testing.assert_array_equal(found.pixels, wanted)
        np.testing.assert_array_equal(found.labels, labels)
    np.save(tmp_path / "x.npy", GREY)
    np.testing.assert_array_equal(read_images(tmp_path / "x.npy").pixels[:, 0], GREY)


def test_arrays_that_are_no_images(tmp_path):
    path = tmp_path / "x.npz"
    for arrays, words in (
        ({"x": GREY.astype(float)}, ["uint8", "float64 (5, 4, 6)"]),
        ({"x": GREY, "y": GREY}, ["exactly one"]),
        ({"x": GREY[:0]}, ["exactly one"]),
        ({"x": GREY.reshape(5, 2, 6, 2)}, ["one or three channels"]),
        ({"x": GREY, "labels": np.arange(4)}, ["labels are int64 (4,)", "5 images"]),
        ({"x": GREY, "labels": np.arange(5) - 1}, ["from 0"]),
        ({"x": np.array([None])}, ["pickled"]),
    ):
        np.savez(path, **arrays)
        refused(path, "x.npz", *words)
    path.write_bytes(path.read_bytes()[:100])
    refused(path, "damaged or cut short")
    refused(tmp_path / "none", "no such file", "fashion-mnist")
    refused(pictures(tmp_path / "empty", []), "no pictures")


def test_digits_are_the_table():
    found = read_images("digits", seed=3)
    np.testing.assert_array_equal(found.pixels.reshape(-1, 64), read_table("digits").values)
    assert (found.levels, found.shape) == (17, (1, 8, 8))
    known = load_digits()
    np.testing.assert_array_equal(found.pixels.reshape(-1, 64), known.data)
    np.testing.assert_array_equal(found.labels, known.target)
    parts = (found.train, found.validation, found.test)
    assert sorted(np.concatenate(parts)) == list(range(1797))
    assert list(map(len, parts)) == [1439, 179, 179]


def test_the_files_of_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train = np.random.default_rng(2).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    test, labels = train[:10] ^ 255, np.arange(40, dtype=np.uint8) % 10
    for name, array in zip(IDX_FILES, (train, labels, test, labels[:10]), strict=True):
        idx(tmp_path / name, array)
    monkeypatch.setattr(images, "DEBIAN", tmp_path)
    refused("fashion-mnist", "MD5")
    monkeypatch.setattr(images, "DEBIAN_MD5", (None,) * 4)
    found = read_images("fashion-mnist")
    np.testing.assert_array_equal(found.pixels[:40, 0], train)
    np.testing.assert_array_equal(found.pixels[found.test, 0], test)
    np.testing.assert_array_equal(found.labels[found.test], labels[:10])
    assert sorted([*found.train, *found.validation]) == list(range(40))
    assert len(found.validation) == 4
    monkeypatch.setattr(images, "DEBIAN", tmp_path / "none")
    refused("fashion-mnist", "dataset-fashion-mnist")


def test_idx_files_that_are_damaged(tmp_path):
    path = tmp_path / "x.gz"
    idx(path, GREY)
    np.testing.assert_array_equal(read_idx(path, 3), GREY)
    whole = gzip.decompress(path.read_bytes())
    for content, words in (
        (path.read_bytes()[:-20], "cut short"),
        (gzip.compress(whole[:-1]), "119 bytes follow the header, which promises 5 x 4 x 6"),
        (gzip.compress(whole + b"0"), "121 bytes"),
        (gzip.compress(b"\0\0\x0b\x03" + whole[4:]), "begins with 00000b03"),
        (gzip.compress(whole[:9]), "begins with"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_idx(path, 3)


@pytest.mark.skipif(not images.DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_as_debian_packs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = read_images("fashion-mnist")
    assert found.pixels.shape == (70_000, 1, 28, 28)
    assert (found.pixels[:60_000] == 0).mean() == pytest.approx(0.502, abs=5e-4)
    assert np.bincount(found.labels).tolist() == [7000] * 10
    assert (len(found.train), len(found.validation), len(found.test)) == (54_000, 6000, 10_000)
