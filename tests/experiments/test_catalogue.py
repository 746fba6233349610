"""Experiment files: those that ship are whole, and a wrong one says where it is wrong."""

import json
import tomllib

import pytest

from rootflow.errors import DataError
from rootflow.experiments import SCALES, Recipe, catalogue, names, recipe, recipes

GOOD = """
name = "one"
kind = "slopes"
summary = "s"
source = "s"
[common]
slope = 10.0
blocks = [1]
starts = 1
stairs = []
most_blocks = 1
steps = 1
batch = 2
[smoke]
[small]
[paper]
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "folder", lambda: tmp_path)

    def read(text):
        (tmp_path / "one.toml").write_text(text)
        return recipe("one")

    return read


def test_the_experiments_that_ship():
    assert {"one-d-fit", "vi-planar", "zoo-1d", "zoo-2d"} <= set(names())
    for found in recipes():
        assert set(found.settings) == set(SCALES)
        assert found.summary
        assert found.source
        times = [found.settings[scale].minutes() for scale in SCALES]
        assert times == sorted(times)
        assert times[0] < 1.5
        keys = [part.key for part in found.settings["smoke"].parts()]
        assert len(keys) == len(set(keys)) > 1


def test_parts_are_told_apart_by_what_their_result_depends_on():
    for found in recipes():
        parts = found.settings["small"].parts()
        marks = {json.dumps(part.recipe, sort_keys=True) for part in parts}
        assert len(marks) == len(parts)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"experiment 'nothing' is unknown; choose .*zoo-1d"):
        recipe("nothing")


def test_a_good_file(read):
    assert read(GOOD).settings["paper"].blocks == (1,)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("slope = 10.0", 'slope = "10"', r"one\.toml, smoke: slope: .*number"),
        ("slope = 10.0", "slope = 0.5", r"smoke: slope: .*greater than 1"),
        ("starts = 1", "starts = true", r"smoke: starts: .*integer"),
        ("batch = 2", "batch = 2\nbatches = 3", r"smoke: batches: extra"),
        ("batch = 2", "", r"smoke: batch: field required"),
        ("[small]", "[small]\nsteps = 0", r"small: steps"),
        ('kind = "slopes"', 'kind = "os.system"', r"one\.toml, kind: .*slopes"),
        ('name = "one"', 'name = "two"', r"named after it"),
        ('name = "one"', "name = ", r"not a TOML file"),
        ('name = "one"', 'name = "one"\nday = 2020-01-01', r"not a TOML file of plain values"),
        ("[paper]", "", r"one\.toml, paper: field required"),
    ],
)
def test_a_wrong_file_says_where(read, old, new, says):
    with pytest.raises(DataError, match=says):
        read(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"toys": ["nothing"]}, "'nothing' is unknown; choose among checkerboard"),
        ({"flows": ["nothing"]}, "'nothing' is unknown; choose among .*implicit"),
        ({"fit": {"nothing": 1}}, "'nothing' is unknown; choose among minutes"),
        ({"mixtures": {}}, "there is no density"),
        ({"mixtures": {"m": {"weights": [1.0], "means": [[0.0]], "sds": []}}}, "one entry for"),
        ({"mixtures": {"m": {"weights": [0.5], "means": [[0.0]], "sds": [1.0]}}}, "add up to one"),
        (
            {"mixtures": {"m": {"weights": [0.5, 0.5], "means": [[0.0], [0.0, 1.0]],
                                "sds": [1.0, 1.0]}}},
            "all have one number, or all have two",
        ),
    ],
)  # fmt: skip
def test_wrong_settings_of_a_zoo(change, says):
    from experiments.helpers import zoo_recipe

    with pytest.raises(DataError, match=says):
        zoo_recipe(**change).settings  # noqa: B018


def test_names_that_the_other_kinds_do_not_know():
    found = recipe("vi-planar")
    for change, says in (
        ({"targets": {"nothing": 1.0}}, "'nothing' is unknown; choose among"),
        ({"flows": {"nothing": {}}}, "'nothing' is unknown"),
        ({"shown": [3]}, "3 is unknown; choose among 2, 4"),
    ):
        with pytest.raises(DataError, match=says):
            Recipe(**{**found.model_dump(), "smoke": {**found.smoke, **change}}).settings  # noqa: B018


def test_files_are_plain_toml():
    for path in catalogue.folder().glob("*.toml"):
        assert tomllib.loads(path.read_text())["name"] == path.stem
