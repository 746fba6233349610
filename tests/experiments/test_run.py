"""Running: parts once each, failures as rows, resuming, one line in the store."""

import json

import pytest

from experiments import helpers
from rootflow.errors import CheckpointError, RootflowError
from rootflow.experiments import Stopped, read, run
from rootflow.experiments.parts import Job


@pytest.fixture(autouse=True)
def fresh():
    helpers.CALLS.clear()
    helpers.BROKEN.clear()


def test_a_run_has_all_its_files_and_one_line_in_the_store(tmp_path):
    out, store = tmp_path / "run", tmp_path / "deep" / "results.jsonl"
    result = run(helpers.counting("one", "three", three=4.5), "smoke", out, seed=7, store=store,
                 command="as typed")  # fmt: skip
    assert {path.name for path in out.iterdir()} == {
        "config.json", "figures", "metrics.jsonl", "parts", "result.json",
    }  # fmt: skip
    assert [(row.key, row.ours, row.published) for row in result.rows] == [
        ("one", 3.0, None), ("three", 5.0, 4.5),
    ]  # fmt: skip
    assert read(store) == [result]
    assert json.loads((out / "result.json").read_text()) == result.model_dump()
    assert (result.experiment, result.scale, result.seed) == ("count", "smoke", 7)
    assert result.command == "as typed"
    assert result.hardware
    assert result.threads == 1
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["part"] for record in metrics] == ["one", "three"]
    config = json.loads((out / "config.json").read_text())
    assert config["settings"] == {"names": ["one", "three"]}
    assert config["run_id"] == result.run_id


def test_what_is_done_is_not_repeated_and_adds_no_line(tmp_path):
    out, store = tmp_path / "run", tmp_path / "results.jsonl"
    recipe = helpers.counting("a", "b")
    first = run(recipe, "smoke", out, store=store)
    second = run(recipe, "smoke", out, store=store)
    assert helpers.CALLS == ["a", "b"]
    assert first.rows == second.rows
    assert first.run_id == second.run_id
    assert len(read(store)) == 1
    more = run(helpers.counting("a", "b", "c"), "smoke", out, store=store)
    assert helpers.CALLS == ["a", "b", "c"]
    assert [len(line.rows) for line in read(store)] == [2, 3]
    assert more.run_id == first.run_id


def test_a_failed_part_is_a_row_and_is_tried_again(tmp_path):
    helpers.BROKEN.add("b")
    recipe = helpers.counting("a", "b", "c")
    result = run(recipe, "smoke", tmp_path / "run")
    assert [row.error for row in result.rows] == [None, "this one is broken", None]
    assert result.failed == 1
    helpers.BROKEN.clear()
    assert run(recipe, "smoke", tmp_path / "run").failed == 0
    assert helpers.CALLS == ["a", "b", "c", "b"]


def test_a_number_that_is_not_finite_is_a_failure(tmp_path):
    result = run(helpers.counting("nan", "fine"), "smoke", tmp_path / "run")
    assert [row.error for row in result.rows] == ["value is nan", None]


def test_stopping_keeps_what_is_done(tmp_path):
    recipe = helpers.counting("a", "b", "c")
    with pytest.raises(Stopped):
        run(recipe, "smoke", tmp_path / "run", should_stop=lambda: len(helpers.CALLS) == 2)
    assert not (tmp_path / "run" / "result.json").exists()
    run(recipe, "smoke", tmp_path / "run")
    assert helpers.CALLS == ["a", "b", "c"]


def test_other_settings_or_another_seed_are_not_mixed(tmp_path):
    recipe = helpers.counting("a")
    run(recipe, "smoke", tmp_path / "run")
    for scale, seed in (("small", 0), ("smoke", 1)):
        with pytest.raises(CheckpointError, match="holds count at scale smoke, seed 0; give"):
            run(recipe, scale, tmp_path / "run", seed=seed)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds no experiment"):
        run(recipe, "smoke", tmp_path / "full")
    (tmp_path / "full" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not written by rootflow reproduce"):
        run(recipe, "smoke", tmp_path / "full")


def test_a_damaged_or_foreign_part_is_done_anew(tmp_path):
    recipe = helpers.counting("a", "b")
    run(recipe, "smoke", tmp_path / "run")
    (tmp_path / "run" / "parts" / "a" / "result.json").write_text("{")
    (tmp_path / "run" / "parts" / "b" / "result.json").write_text('{"mark": "other"}')
    (tmp_path / "run" / "parts" / "b" / "old.npz").write_bytes(b"old")
    run(recipe, "smoke", tmp_path / "run")
    assert helpers.CALLS == ["a", "b", "a", "b"]
    assert not (tmp_path / "run" / "parts" / "b" / "old.npz").exists()


def test_a_path_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RootflowError, match="file"):
        run(helpers.counting("a"), "smoke", tmp_path / "file" / "run")


def test_the_store_survives_half_a_line(tmp_path):
    store = tmp_path / "results.jsonl"
    run(helpers.counting("a"), "smoke", tmp_path / "one", store=store)
    with store.open("a") as file:
        file.write('{"format_version": 1, "run_')
    with pytest.warns(UserWarning, match="line 2: not a result"):
        run(helpers.counting("a"), "smoke", tmp_path / "two", store=store)
    with pytest.warns(UserWarning, match="line 2"):
        assert len({result.run_id for result in read(store)}) == 2


def test_a_fit_is_resumed_within_its_part(tmp_path):
    """Stopped in the middle of a fit, it ends with the numbers of an undisturbed one."""
    recipe = helpers.zoo_recipe(steps=8, seconds=1e6, flows=["residual"])
    whole = run(recipe, "smoke", tmp_path / "whole")
    steps = iter(range(100))
    with pytest.raises(Stopped):
        run(recipe, "smoke", tmp_path / "cut", should_stop=lambda: next(steps) == 4)
    assert list((tmp_path / "cut" / "parts" / "m-residual" / "resume").glob("state-*"))
    again = run(recipe, "smoke", tmp_path / "cut")
    # to float32 rounding: a product may round differently where memory is aligned differently
    assert again.rows[0].ours == pytest.approx(whole.rows[0].ours, abs=1e-6)


def test_pictures_are_written_whole(tmp_path):
    from rootflow.plots import zoo

    job = Job(tmp_path, tmp_path, 0)
    job.draw("picture", zoo.overview_1d([0.0, 1.0], [1.0, 1.0], {"a": None}))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
