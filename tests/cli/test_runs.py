"""Using a finished run: scores, samples, comparison, and runs that are damaged or foreign."""

import json
import os

import numpy as np
import pytest
import torch

import rootflow
from cli.helpers import TINY, call, fails, succeeds, write_csv


def scores(run, data, *words):
    lines = succeeds("score", run, data, *words).stdout.splitlines()
    assert lines[0] == "log_prob"
    return np.array(lines[1:], dtype=float)


def test_columns_are_matched_by_name(fitted, table, rows, tmp_path):
    plain = scores(fitted, table)
    assert len(plain) == 400
    turned = write_csv(tmp_path / "turned.csv", rows[:, ::-1], "cba")
    np.testing.assert_array_equal(scores(fitted, turned), plain)
    more = write_csv(tmp_path / "more.csv", np.column_stack([rows[:, 0] * 2, rows]), "zabc")
    result = succeeds("score", fitted, more)
    assert result.stderr.startswith("warning: ")
    assert "z" in result.stderr
    np.testing.assert_array_equal(np.array(result.stdout.split()[1:], float), plain)
    fewer = write_csv(tmp_path / "fewer.csv", rows[:, :2], "ab")
    fails(1, "score", fitted, fewer, says=["fewer.csv", "c"])


def test_scoring_refuses_nan(fitted, rows, tmp_path):
    spoilt = rows.copy()
    spoilt[4, 1] = np.nan
    path = write_csv(tmp_path / "nan.csv", spoilt)
    fails(1, "score", fitted, path, says=["line 6", "b"])


def test_score_into_a_file_and_as_json(fitted, table, tmp_path):
    plain, out = scores(fitted, table), tmp_path / "scores.csv"
    assert succeeds("score", fitted, table, "--out", out).stdout == ""
    np.testing.assert_array_equal(np.loadtxt(out, skiprows=1), plain)
    content = json.loads(succeeds("score", fitted, table, "--json").stdout)
    assert content["schema_version"] == 1
    assert content["log_prob"] == plain.tolist()
    assert content["mean"] == pytest.approx(plain.mean())
    fails(1, "score", fitted, table, "--out", tmp_path / "no" / "x.csv", says=["no/x.csv: No such"])


def test_a_pipe_is_written_to_and_stays_one(fitted, table, tmp_path):
    plain, pipe = scores(fitted, table), tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    succeeds("score", fitted, table, "--out", pipe)
    lines = os.read(reader, 2**16).decode().splitlines()
    os.close(reader)
    assert [float(line) for line in lines[1:]] == plain.tolist()
    assert pipe.is_fifo()


def test_a_row_out_of_all_bounds_is_scored_low(fitted, rows, tmp_path):
    wild = write_csv(tmp_path / "wild.csv", np.vstack([rows[:2], [1e12, 0, 0]]))
    content = json.loads(succeeds("score", fitted, wild, "--json").stdout)
    assert content["log_prob"][2] is None or content["log_prob"][2] < -1e6


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
def test_samples_have_the_columns_of_the_table(fitted, tmp_path, suffix):
    from rootflow.data import read_table

    out = tmp_path / f"drawn{suffix}"
    succeeds("sample", fitted, "-n", "30", "--out", out)
    drawn = read_table(str(out))
    assert drawn.columns == ("a", "b", "c")
    assert drawn.values.shape == (30, 3)


def test_samples_follow_the_seed(fitted):
    first = succeeds("sample", fitted, "-n", "5").stdout
    assert len(first.splitlines()) == 6
    assert succeeds("sample", fitted, "-n", "5", "--seed", "0").stdout == first
    assert succeeds("sample", fitted, "-n", "5", "--seed", "1").stdout != first
    content = json.loads(succeeds("sample", fitted, "-n", "2", "--json").stdout)
    assert np.shape(content["values"]) == (2, 3)


def test_sample_refuses(fitted, tmp_path):
    fails(2, "sample", fitted, "-n", "0")
    fails(1, "sample", fitted, "-n", "3", "--out", tmp_path / "drawn.xls", says=[".parquet"])
    fails(1, "sample", fitted, "-n", "3", "--out", tmp_path / "no" / "d.csv", says=["d.csv"])


def test_a_flow_saved_from_python(tmp_path):
    with torch.random.fork_rng():
        rootflow.flow("residual", features=2, blocks=1, hidden=(8,)).save(tmp_path / "saved")
    drawn = succeeds("sample", tmp_path / "saved", "-n", "3").stdout.splitlines()
    assert drawn[0].replace('"', "") == "x1,x2"
    assert len(scores(tmp_path / "saved", "moons:25")) == 25


def test_report_without_its_table(rows, tmp_path, real_report):
    path, run = write_csv(tmp_path / "t.csv", rows), tmp_path / "run"
    succeeds("fit", path, *TINY, "--out", run)
    path.write_text(path.read_text().replace("1", "2", 1))
    (run / "report.html").unlink()
    assert "have changed" in succeeds("report", run).stderr
    path.unlink()
    result = succeeds("report", run, "--json")
    assert "t.csv" in result.stderr
    assert json.loads(result.stdout)["report"] == str(run / "report.html")
    assert "nats per row" in (run / "report.html").read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_byte(run, table, name):
    content = bytearray((run / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run / name).write_bytes(content)
    fails(1, "score", run, table, says=[name, "checksum|not a rootflow|damaged"])


def test_a_format_of_the_future(run, table):
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"format_version": 1', '"format_version": 99'))
    fails(1, "score", run, table, says=["99", "newer"])
    (run / "result.json").unlink()
    fails(1, "fit", "--resume", "--out", run, says=["99", "newer"])


def test_not_a_run(table, tmp_path):
    for command, *rest in (["score", table], ["report"], ["sample", "-n", "1"]):
        fails(1, command, tmp_path, *rest, says=[str(tmp_path)])
    fails(1, "score", tmp_path / "none", table, says=["none"])


def test_compare(table, tmp_path):
    words = ["compare", table, "--flows", "residual,monotone", *TINY]
    content = json.loads(succeeds(*words, "--json").stdout)
    assert [entry["flow"] for entry in content["results"]] == ["residual", "monotone"]
    assert all(entry["steps"] == 20 for entry in content["results"])
    result = succeeds(*words, "--out", tmp_path / "both")
    assert "held-out nats" in result.stdout
    assert (tmp_path / "both" / "residual" / "model.safetensors").exists()
    fails(2, "compare", table, "--flows", "residual,none", *TINY, says=["none"])
    fails(2, "compare", table, "--flows", " ,", *TINY, says=["--flows: give names"])
    fails(1, *words, "--out", tmp_path / "both", says=["not empty"])


def test_lists():
    text = succeeds("flows").stdout
    flows = json.loads(succeeds("flows", "--json").stdout)["flows"]
    assert {entry["name"] for entry in flows} == set(rootflow.zoo.ZOO)
    assert all(f"{entry['name']}: " in text for entry in flows)
    data = json.loads(succeeds("data", "list", "--json").stdout)["data"]
    assert {"galaxies", "checkerboard"} <= {entry["name"] for entry in data}
    assert "checkerboard" in succeeds("data", "list").stdout
    assert succeeds("--version").stdout == f"rootflow {rootflow.__version__}\n"
    assert "error" not in call("data").output
    fails(2, "nonsense", says=["nonsense"])
