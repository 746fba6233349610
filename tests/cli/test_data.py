"""``rootflow data`` and what the other commands do with a table that comes with its split."""

import json

import numpy as np
import pytest

from cli.helpers import fails, succeeds
from data.archive_helpers import npy, tar
from rootflow.data import read_table

TINY = ("--flow", "radial", "--steps", "20", "--set", "blocks=1", "--threads", "1", "--quiet")


@pytest.fixture
def archive(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = np.random.default_rng(0).normal(size=(300, 8))
    return tar(tmp_path / "data.tar.gz", {"data/power/data.npy": npy(rows)})


def prepared(archive, *words):
    words = ("data", "prepare", "power", "--from", archive, "--unverified", *words)
    return json.loads(succeeds(*words, "--json", "--quiet").stdout)


def test_the_list_says_where_each_set_comes_from(archive):
    def origins():
        listed = json.loads(succeeds("data", "list", "--json").stdout)
        return {row["name"]: row["from"] for kind in ("images", "data") for row in listed[kind]}

    known = origins()
    assert known["galaxies"] == known["digits"] == "built in"
    assert known["patches"] == "other packages"
    assert known["power"] == known["cifar10"] == "data prepare"
    prepared(archive)
    assert origins()["power"] == "prepared"
    assert "rings" in succeeds("data", "list").stdout


def test_prepare_then_fit_score_and_compare_keep_the_split(archive, tmp_path):
    fails(1, "fit", "power", *TINY, says=["rootflow data prepare power"])
    note = prepared(archive)
    assert note["parts"] == {"train": 243, "validation": 27, "test": 30}
    assert note["verified"] is False
    assert len(note["first_rows"]) == 16
    table = read_table("power")
    run = tmp_path / "run"
    for seed in ("0", "1"):  # the seed does not move the split
        out = run.with_name(f"run{seed}")
        words = ("fit", "power", *TINY, "--seed", seed, "--out", out, "--json")
        result = json.loads(succeeds(*words).stdout)
        sizes = [result[f"n_{part}"] for part in ("train", "validation", "test")]
        assert sizes == [243, 27, 30]
        score = json.loads(succeeds("score", out, "power:test", "--json").stdout)
        assert score["rows"] == 30
        assert score["mean"] == pytest.approx(result["test_log_prob"], abs=1e-9)
    values = np.array(json.loads(succeeds("score", out, "power", "--json").stdout)["log_prob"])
    np.testing.assert_allclose(values[table.split()[2]], score["log_prob"])
    words = ("compare", "power", "--flows", *TINY[1:], "--json")
    assert json.loads(succeeds(*words).stdout)["results"][0]["n_test"] == 30


def test_a_set_prepared_elsewhere_is_read_by_its_path(archive, tmp_path):
    folder = prepared(archive, "--out", tmp_path / "mine")["folder"]
    assert folder == str(tmp_path / "mine" / "power")
    again = succeeds("data", "prepare", "power", "--out", tmp_path / "mine").stdout
    assert "243 train, 27 validation, 30 test" in again
    assert f"rootflow fit {folder}" in again
    result = json.loads(
        succeeds("fit", folder, *TINY, "--out", tmp_path / "run", "--json").stdout
    )
    assert result["n_test"] == 30
    assert len(read_table(f"{folder}:validation").values) == 27


def test_what_prepare_refuses(archive, tmp_path):
    fails(1, "data", "prepare", "power", "--from", archive, "-q", says=["MD5 is .* as published"])
    fails(1, "data", "prepare", "gas", says=["--unpickle"])
    fails(1, "data", "prepare", "imagenet64", says=["imagenet64-old"])
    fails(1, "data", "prepare", "powr", says=["power"])
    prepared(archive)
    fails(1, "fit", "galaxies:test", *TINY, says=["comes without a split"])
