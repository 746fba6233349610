"""Fitting from the command line: the run directory, the options, ties, what is refused."""

import json
import math

import numpy as np
import pytest

import rootflow
from cli.helpers import TINY, call, fails, succeeds, write_csv

RESULT = {
    "flow", "data", "n_train", "n_validation", "n_test", "features", "columns", "parameters",
    "steps", "seconds", "test_log_prob", "test_log_prob_se", "inverse_error",
    "converged_fraction", "device", "version", "seed", "stopped", "skipped_steps", "lipschitz",
    "best_step", "torch_threads", "dequantised",
}  # fmt: skip


def read(path):
    return json.loads(path.read_text())


def test_a_run_has_all_its_files(table, tmp_path, real_report):
    out = tmp_path / "run"
    result = succeeds("fit", table, *TINY, "--out", out, "--json")
    printed = json.loads(result.stdout)
    assert result.stderr == ""
    assert printed["schema_version"] == 1
    assert printed["run"] == str(out)
    names = {"config.json", "manifest.json", "metrics.jsonl", "model.safetensors"}
    names |= {"report.html", "result.json", "resume", "figures"}
    assert {path.name for path in out.iterdir()} == names
    written = read(out / "result.json")
    assert set(written) >= RESULT
    assert {key: printed[key] for key in written} == written
    assert (written["n_train"], written["n_validation"], written["n_test"]) == (320, 40, 40)
    assert written["steps"] == 20
    assert math.isfinite(written["test_log_prob"])
    assert written["inverse_error"] < 1e-3
    assert written["converged_fraction"] == 1
    assert all(0 < bound < 1 for bound in written["lipschitz"])
    kinds = {json.loads(line)["kind"] for line in (out / "metrics.jsonl").read_text().splitlines()}
    assert kinds == {"train", "validation"}
    config = read(out / "config.json")
    options = config["flow"]["options"]
    assert (options["blocks"], options["hidden"]) == (1, [8])
    assert config["data"]["columns"] == ["a", "b", "c"]
    assert config["command"].startswith("rootflow fit ")
    page = (out / "report.html").read_text()
    assert "monotone on table.csv" in page
    before = page.encode()
    (out / "report.html").unlink()
    assert succeeds("report", out).stdout == f"{out / 'report.html'}\n"
    assert (out / "report.html").read_bytes() == before


def test_the_score_is_that_of_the_saved_flow_on_the_test_rows(fitted, rows):
    import torch

    from rootflow.data import split

    test = rows[split(len(rows), 0)[2]]
    with torch.no_grad():
        expected = rootflow.load(fitted).double().log_prob(torch.as_tensor(test)).mean()
    assert read(fitted / "result.json")["test_log_prob"] == pytest.approx(float(expected), abs=1e-9)


def test_text_output_names_the_score(table, tmp_path):
    result = succeeds("fit", table, *TINY, "--out", tmp_path / "run")
    assert "nats per row" in result.stdout
    assert "report.html" in result.stdout


def test_progress_is_lines_away_from_a_terminal(table, tmp_path, monkeypatch):
    loud = [word for word in TINY if word != "--quiet"]
    lines = succeeds("fit", table, *loud, "--out", tmp_path / "run").stderr.splitlines()
    assert sum(" left" in line for line in lines) == 10
    assert "validation" in lines[-2]
    monkeypatch.setenv("CI", "true")
    assert " left" not in succeeds("fit", table, *loud, "--out", tmp_path / "ci").stderr


def test_one_column(tmp_path):
    path = write_csv(tmp_path / "t.csv", np.random.default_rng(0).gamma(3, size=(200, 1)))
    succeeds("fit", path, *TINY, "--out", tmp_path / "run")
    scores = succeeds("score", tmp_path / "run", path).stdout.split()
    assert scores[0] == "log_prob"
    assert len(scores) == 201


@pytest.mark.parametrize("flow", list(rootflow.zoo.ZOO))
def test_every_flow_of_the_registry(flow, tmp_path):
    succeeds("fit", "moons:60", "--flow", flow, *TINY, "--steps", "3", "--out", tmp_path / "run")
    assert read(tmp_path / "run" / "result.json")["flow"] == flow


def test_default_place_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeeds("fit", "moons:60", *TINY)
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name.startswith("moons-60-monotone-2")


@pytest.fixture
def tied(tmp_path):
    generator = np.random.default_rng(0)
    counts, spread = generator.poisson(20, size=400), generator.normal(size=400)
    return write_csv(tmp_path / "tied.csv", np.column_stack([counts, spread]))


def test_ties_are_warned_of_and_left_alone_if_columns_are_taken_as_they_are(tied, tmp_path):
    result = succeeds("fit", tied, *TINY, "--out", tmp_path / "run", "--as-is")
    assert result.stderr.count("warning: ") == 1
    assert "column a has only" in result.stderr
    assert read(tmp_path / "run" / "result.json")["dequantised"] == []
    assert " --as-is" in read(tmp_path / "run" / "config.json")["command"]


def test_ties_get_cells(tied, tmp_path):
    out = tmp_path / "run"
    loud = [word for word in TINY if word != "--quiet"]
    assert "column a: whole numbers, " in succeeds("fit", tied, *loud, "--out", out).stderr
    result = read(out / "result.json")
    assert result["dequantised"] == ["a"]
    assert [c["kind"] for c in read(out / "config.json")["data"]["schema"]["columns"]] == [
        "integer", "continuous"
    ]  # fmt: skip
    assert -8 < result["test_log_prob"] < -3  # near that of a discrete and a normal column
    drawn = tmp_path / "drawn.csv"
    succeeds("sample", out, "-n", "50", "--out", drawn)
    numbers = np.loadtxt(drawn, delimiter=",", skiprows=1)
    assert (numbers[:, 0] == numbers[:, 0].round()).all()
    assert not (numbers[:, 1] == numbers[:, 1].round()).any()
    assert succeeds("score", out, tied).stdout == succeeds("score", out, tied).stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--flow", "nothing"], ["nothing", "monotone", "implicit"]),
        (["--set", "blcks=2"], ["blcks", "blocks", "batch_size"]),
        (["--set", "fit.blocks=2"], ["fit.blocks"]),
        (["--set", "blocks"], ["key=value"]),
        (["--set", "blocks=two"], ["blocks", "two", "whole number"]),
        (["--set", "blocks=0"], ["blocks=0"]),
        (["--set", "hidden=[8,-1]"], ["hidden"]),
        (["--set", "lipschitz=1.5"], ["lipschitz=1.5"]),
        (["--set", "activation=step"], ["step"]),
        (["--set", "solver=guess"], ["guess", "newton"]),
        (["--set", "actnorm=1"], ["true or false"]),
        (["--set", "lr=-1"], ["lr=-1"]),
        (["--set", "lr=inf"], ["finite"]),
        (["--set", "steps=3"], ["contradict"]),
        (["--minutes", "-1"], ["minutes"]),
        (["--device", "abacus"], ["abacus"]),
        (["--nothing"], ["--nothing"]),
        (["--threads", "0"], ["threads"]),
    ],
)
def test_wrong_use(table, tmp_path, words, says):
    fails(2, "fit", table, *TINY, "--out", tmp_path / "run", *words, says=says)
    assert not (tmp_path / "run").exists()


def test_data_must_be_given():
    fails(2, "fit", *TINY, says=["DATA"])
    fails(2, "fit", "galaxies", "--resume", says=["--out"])


@pytest.mark.parametrize(
    "words",
    [
        ["--set", "hidden=8,8", "--set", "flow.blocks=2", "--set", "fit.lr=1e-3"],
        ["--set", "hidden=[8, 8]", "--set", "blocks=2", "--set", "lr=0.001"],
        ["--set", "hidden=(8,8)", "--set", "blocks= 2", "--set", "lr=1E-3"],
    ],
)
def test_spellings_of_settings(words, tmp_path):
    succeeds("fit", "moons:60", "--steps", "2", *words, "--out", tmp_path / "run", "-q")
    config = read(tmp_path / "run" / "config.json")
    options = config["flow"]["options"]
    assert (options["blocks"], options["hidden"]) == (2, [8, 8])
    assert config["fit"]["lr"] == 1e-3


def test_five_minutes_is_the_budget_if_none_is_given():
    from rootflow.cli.settings import fit_config

    assert fit_config({}, None, None, None).minutes == 5
    assert fit_config({"steps": 3}, None, None, None).minutes is None
    assert fit_config({}, None, 3, 7).seed == 7


def test_an_existing_run_is_not_touched(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    fails(1, "fit", "moons:60", *TINY, "--out", run, says=["--resume"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", tmp_path / "file", "/proc/none/run"):
        fails(1, "fit", "moons:60", *TINY, "--out", out, says=[str(out), "cannot be written"])


def test_debug_shows_the_traceback(tmp_path):
    result = call("fit", tmp_path / "none.csv", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_several_processes_need_a_common_run(table, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(2, "fit", table, *TINY, says=["say which run with --out"])
    words = ("fit", table, *TINY, "--set", "batch_size=65", "--out", tmp_path / "run")
    fails(2, *words, says=["batches of 65 rows do not divide among 2", "multiple of 2"])
    monkeypatch.setenv("RANK", "1")
    assert call(*words).output == ""  # the first process has said it
    assert not (tmp_path / "run").exists()


def test_records_go_to_a_tracker_too(table, tmp_path):
    fails(2, "fit", table, *TINY, "--track", "paper", says=["tensorboard"])
    succeeds("fit", table, *TINY, "--out", tmp_path / "run", "--track", "tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
