"""The five tables, from archives of the published layout, against a calculation in plain NumPy."""

import hashlib
import io
import os
import pickle
from collections import Counter

import h5py
import numpy as np
import pytest

from data.archive_helpers import Pickle, npy, served, tar
from rootflow.data import published, read_table
from rootflow.data.archives import Published
from rootflow.data.gas_frame import read_frame
from rootflow.data.published import prepare
from rootflow.errors import DataError

N = 1000
draws = np.random.default_rng(0)
POWER = draws.normal(size=(N, 8)) * [1, 5, 0.1, 9, 2, 2, 2, 1]
MINIBOONE = draws.normal(3, 2, size=(N, 43))
SIZES = {"train": 80, "validation": 7, "test": 9}
BSDS = {key: draws.normal(size=(n, 63)) for key, n in SIZES.items()}
SENSORS = draws.normal(size=(N, 5))
SENSORS[:, 3] = SENSORS[:, 1] + 0.01 * SENSORS[:, 3]  # a near copy
GAS = {"Time": np.arange(N) / 100, "Meth": draws.normal(size=N), "Eth": draws.normal(size=N)}
GAS |= {f"R{j}": SENSORS[:, j] for j in range(5)}


def hepmass(n, surplus):
    """Label, 6 features of which one is rounded and one is bounded below, surplus column."""
    x = np.random.default_rng(n).normal(2, 3, size=(n, 7))
    x[:, 0] = x[:, 0] > 2
    x[:, 3] = x[:, 3].round()
    x[:, 5] = x[:, 5].clip(min=0)
    return np.hstack([x, np.full((n, 1), 1000.0)]) if surplus else x


def csv(rows, head):
    out = io.StringIO()
    np.savetxt(out, rows, delimiter=",", header=head, comments="", fmt="%.17g")
    return out.getvalue().encode()


HEAD = "# label," + ",".join(f"f{j}" for j in range(6))
TRAIN, TEST = hepmass(900, surplus=False), hepmass(500, surplus=True)


def gas_pickle():
    names = list(GAS)
    rest = np.array([GAS[name] for name in names if name != "Meth"])
    places = [k for k, name in enumerate(names) if name != "Meth"]
    return Pickle.frame([(slice(1, 2), GAS["Meth"][None]), (places, rest)], names)


def hdf5(parts):
    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        for key, rows in parts.items():
            file[key] = rows
    return out.getvalue()


def members(**changes):
    found = {
        "data/._power": b"junk",
        "data/power/data.npy": npy(POWER),
        "data/gas/ethylene_CO.pickle": gas_pickle(),
        "data/hepmass/1000_train.csv": csv(TRAIN, HEAD),
        "data/hepmass/1000_test.csv": csv(TEST, HEAD),  # its header is short by one, too
        "data/miniboone/data.npy": npy(MINIBOONE.astype(np.float32)),
        "data/BSDS300/BSDS300.hdf5": hdf5(BSDS),
    }
    changes = {next(k for k in found if f"/{name}/" in k): v for name, v in changes.items()}
    return {k: v for k, v in {**found, **changes}.items() if v is not None}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return tar(tmp_path_factory.mktemp("archive") / "data.tar.gz", members())


def by_hand(name):
    """The three parts, step by step as published, written anew without the package."""
    if name == "power":
        rng, x = np.random.RandomState(42), POWER.copy()
        rng.shuffle(x)
        x = x[:, [0, 2, 4, 5, 6, 7]]
        volt, gap, meters = rng.rand(N, 1), rng.rand(N, 1), rng.rand(N, 3)
        x[:, 0] += 0.001 * gap[:, 0]
        x[:, 1] += 0.01 * volt[:, 0]
        x[:, 2:5] += meters
        return standard(x[:810], x[810:900], x[900:])
    if name == "gas":
        x = SENSORS[:, [0, 2, 3, 4]]  # of the two near copies the first one goes
        x = (x - x.mean(0)) / np.sqrt(((x - x.mean(0)) ** 2).sum(0) / (N - 1))
        return x[:810], x[810:900], x[900:]
    if name == "hepmass":
        train, test = TRAIN[TRAIN[:, 0] == 1, 1:], TEST[TEST[:, 0] == 1, 1:-1]
        mean, sd = train.mean(0), train.std(0) * np.sqrt(len(train) / (len(train) - 1))
        train, test = (train - mean) / sd, (test - mean) / sd
        counts = [sorted(Counter(column).items())[0][1] for column in train.T]
        kept = [j for j, count in enumerate(counts) if count <= 5]
        assert kept == [0, 1, 2, 3, 5]  # the bounded one goes, the rounded one stays
        cut = len(train) - len(train) // 10
        return train[:cut, kept], train[cut:, kept], test[:, kept]
    if name == "miniboone":
        x = MINIBOONE.astype(np.float32).astype(float)
        return standard(x[:810], x[810:900], x[900:])
    return BSDS["train"], BSDS["validation"], BSDS["test"]


def standard(train, validation, test):
    seen = np.concatenate([train, validation])
    return [(part - seen.mean(0)) / seen.std(0, ddof=0) for part in (train, validation, test)]


@pytest.mark.parametrize("name", ["power", "gas", "hepmass", "miniboone", "bsds300"])
def test_the_published_preprocessing(name, archive, tmp_path):
    with served(archive.parent) as server:
        folder, note = prepare(name, out=tmp_path, source=server.url, verify=False, unpickle=True)
    table = read_table(folder)
    wanted = by_hand(name)
    assert table.parts == tuple(map(len, wanted))
    for rows, part in zip(table.split(), wanted, strict=True):
        np.testing.assert_array_equal(table.values[rows], np.float32(part))
    assert not note.note["verified"]
    assert set(os.listdir(tmp_path)) == {name, "downloads"}
    assert os.listdir(tmp_path / "downloads") == ["data.tar.gz"]


def test_the_published_sizes_follow_from_the_rule():
    for n, parts in ((2_049_280, "power"), (1_052_065, "gas"), (36_488, "miniboone")):
        rest = n - int(0.1 * n)
        train = rest - int(0.1 * rest)
        assert published.TABLES[parts].parts == (train, rest - train, n - rest)
    assert published.TABLES["hepmass"].parts[:2] == (350_136 - 35_013, 35_013)


def test_a_verified_archive_must_have_the_published_sizes(archive, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="MD5"):
        prepare("miniboone", out=tmp_path, source=str(archive))
    own = Published("data.tar.gz", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(published, "ARCHIVE", own)
    with pytest.raises(DataError, match=r"gives \(810, 90, 100\) rows .* not \(29556, 3284, 3"):
        prepare("miniboone", out=tmp_path, source=str(archive))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("power", {"power": None}, "no member data/power/data.npy"),
        ("power", {"power": npy(POWER[:, :7])}, r"data/power/data.npy: .*\(1000, 7\).*rows, 8"),
        ("power", {"power": npy(POWER.astype(str))}, "numbers of shape"),
        ("power", {"power": npy(POWER)[:-8]}, "damaged or cut short"),
        ("power", {"power": npy(POWER[:9])}, "9 rows"),
        ("power", {"power": npy(np.where(POWER > 1e9, 0, np.nan))}, "NaN or infinity"),
        ("miniboone", {"miniboone": npy(MINIBOONE[:, 0])}, r"\(1000,\)"),
        ("bsds300", {"BSDS300": hdf5({"train": BSDS["train"]})}, "validation"),
        ("bsds300", {"BSDS300": hdf5({k: v[:, 1:] for k, v in BSDS.items()})}, r"\(80, 62\)"),
        ("bsds300", {"BSDS300": b"no HDF5"}, "cannot be read as HDF5"),
        ("gas", {"gas": b"no pickle"}, "cannot be read as a pickled table"),
        ("gas", {"gas": pickle.dumps([1, 2], 2)}, "no table as pandas"),
        ("hepmass", {"hepmass": csv(TRAIN[TRAIN[:, 0] == 0], HEAD)}, "0 rows with label 1"),
        ("hepmass", {"hepmass": csv(TRAIN, HEAD).replace(b"7,", b"x,")}, "CSV of 7 or more"),
        ("hepmass", {"hepmass": csv(TRAIN, HEAD + ",a,b")}, "CSV of 9 or more numbers"),
    ],
)
def test_members_that_are_not_what_they_should_be(name, changes, match, tmp_path):
    path = tar(tmp_path / "data.tar", members(**changes), "w")
    with pytest.raises(DataError, match=match) as caught:
        prepare(name, out=tmp_path / "out", source=str(path), verify=False, unpickle=True)
    assert str(path) in str(caught.value)
    assert os.listdir(tmp_path / "out") == []


def test_gas_is_read_only_when_asked(archive, tmp_path):
    with pytest.raises(DataError, match="--unpickle"):
        prepare("gas", out=tmp_path, source=str(archive), verify=False)


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("protocol", range(6))
def test_the_allow_list_lets_nothing_else_through(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({"axes": Attack()}, protocol))
    with pytest.raises(DataError, match="system, which is not let through"):
        read_frame(tmp_path / "a.pickle")
    for module, name in (
        ("builtins", "eval"), ("numpy", "load"), ("numpy.core.multiarray", "fromfile"),
        ("pandasx", "DataFrame"), ("builtins", "getattr"),
    ):  # fmt: skip
        (tmp_path / "a.pickle").write_bytes(b"\x80\x02" + Pickle.name(module, name) + b".")
        with pytest.raises(DataError, match=f"{name}, which is not let through"):
            read_frame(tmp_path / "a.pickle")
    assert os.listdir(tmp_path) == ["a.pickle"]


def test_the_frame_comes_back_column_by_column(tmp_path):
    (tmp_path / "a.pickle").write_bytes(gas_pickle())
    found = read_frame(tmp_path / "a.pickle")
    assert list(found) == list(GAS)
    for name, column in GAS.items():
        np.testing.assert_array_equal(found[name], column)
