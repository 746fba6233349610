"""Variational inference from the command line: the run, the targets it can find, failures."""

import json
import signal
import subprocess
import time

import pyarrow.parquet
import pytest

from cli.helpers import call, fails, program, succeeds
from rootflow import inference
from rootflow.data import read_table

SMALL = ("--flow", "realnvp", "--set", "blocks=2", "--set", "hidden=8", "--threads", "1")
TINY = (*SMALL, "--steps", "8", "--set", "draws=16", "--set", "validation_draws=50", "--quiet",
        "-n", "50")  # fmt: skip
RESULT = {
    "target", "flow", "columns", "features", "elbo", "elbo_se", "log_evidence", "log_evidence_se",
    "khat", "ess", "draws", "verdict", "verdict_line", "comparison", "steps", "seconds", "skipped",
    "bad_draws", "stopped", "gaussian_elbo", "seed", "device", "version", "parameters",
    "flow_parameters", "written_draws", "resampled", "objective", "threshold", "undefined_draws",
}  # fmt: skip
MODULE = '''
import torch
from torch.distributions import constraints
from rootflow.inference import Target


def density(x):
    return -x.square().sum(-1) / 2 - x[:, 1].square().square()


density.features = 2
density.names = ["a", "b"]
bare = lambda x: -x.square().sum(-1)
ready = Target(lambda p: -p["rate"], support={"rate": constraints.positive})
number = 3


def make():
    return Target(density, 2)


def wrong():
    return 3


def breaks():
    raise OSError("no data")


class Late:
    features = 2

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        if self.calls > 900:
            raise ConnectionError("the server went away")
        return density(x)


late = Late()
nan = Target(lambda x: x.sum(-1) * float("nan"), 2, name="nan")
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module of targets under a name of its own."""
    name = f"densities_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def read(path):
    return json.loads(path.read_text())


def test_a_run_has_all_its_files(tmp_path):
    out = tmp_path / "run"
    result = succeeds("vi", "banana", *TINY, "--out", out, "--json")
    printed = json.loads(result.stdout)
    assert result.stderr == ""
    assert {path.name for path in out.iterdir()} == {
        "config.json", "draws.parquet", "manifest.json", "metrics.jsonl", "model.safetensors",
        "result.json",
    }  # fmt: skip
    written = read(out / "result.json")
    assert set(written) >= RESULT
    assert {key: printed[key] for key in written} == written
    assert printed["run"] == str(out)
    assert written["comparison"]["reference_draws"] == 10_000
    drawn = pyarrow.parquet.read_table(out / "draws.parquet")
    assert drawn.column_names == written["columns"] == ["x1", "x2"]
    assert len(drawn) == 50
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {record["kind"] for record in records} == {"elbo"}
    assert records[-1]["step"] == 8
    config = read(out / "config.json")
    assert config["command"].startswith("rootflow vi banana --flow realnvp")
    assert config["fit"]["steps"] == 8
    assert config["inference"]["target"] == "banana"
    assert inference.load(out).elbo.value == written["elbo"]
    fails(1, "vi", "banana", *TINY, "--out", out, says=["not empty"])


def test_text_output_names_the_verdict(tmp_path):
    loud = [word for word in TINY if word != "--quiet"]
    words = ("--format", "csv", "--resample", "--seed", "3", "--out", tmp_path / "run")
    result = succeeds("vi", "ring", *loud, *words)
    for word in ("ELBO", "k-hat", "verdict", "weighted mean", "draws.csv"):
        assert word in result.stdout
    assert "judging the fit" in result.stderr
    assert "100%" in result.stderr
    written = read(tmp_path / "run" / "result.json")
    assert written["resampled"]
    assert written["seed"] == 3
    assert read_table(tmp_path / "run" / "draws.csv").values.shape == (50, 2)


def test_the_list_of_targets():
    listed = succeeds("vi", "--list").stdout
    assert all(name in listed for name in inference.TARGETS)
    targets = json.loads(succeeds("vi", "--list", "--json").stdout)["targets"]
    assert [entry["name"] for entry in targets] == list(inference.TARGETS)
    assert all(entry["columns"] and entry["summary"] for entry in targets)


@pytest.mark.parametrize(
    ("attribute", "columns"),
    [("density", ["a", "b"]), ("ready", ["rate"]), ("make", ["x1", "x2"])],
)
def test_targets_of_a_module_in_the_working_directory(here, attribute, columns):
    words = ("--format", "npz", "--out", "run")
    written = json.loads(succeeds("vi", f"{here}:{attribute}", *TINY, *words, "--json").stdout)
    assert written["columns"] == columns
    assert written["comparison"] is None
    assert written["target"] == f"{here}:{attribute}"


def test_the_default_directory_is_named_after_the_target(here):
    written = json.loads(succeeds("vi", f"{here}:make", *TINY, "--json").stdout)
    assert written["run"].startswith(f"runs/{here}-make-realnvp-")


def test_wrong_use(here, tmp_path):
    fails(2, "vi", says=["TARGET is missing"])
    fails(2, "vi", "rings", says=["no built-in target; they are energy1", "MODULE:NAME"])
    fails(2, "vi", "banana", "--flow", "spline", says=["unknown; choose one of"])
    fails(2, "vi", "banana", "--format", "xls", says=["parquet, csv"])
    fails(2, "vi", "banana", "--set", "whiten=true", says=["options of the fit are minutes"])
    fails(2, "vi", "banana", "--set", "objective=alpha", says=["objective='alpha'"])
    fails(2, "vi", "banana", "--minutes", "-1", says=["minutes=-1.0 cannot be used"])
    fails(2, "vi", "nowhere_at_all:f", says=["there is no module nowhere_at_all"])
    fails(2, "vi", "a/density.py:f", says=["give density:f, from the directory of the file"])
    fails(2, "vi", f"{here}:missing", says=["has no missing"])
    fails(2, "vi", f"{here}:number", says=["is int; give a Target or a function"])
    fails(2, "vi", f"{here}:bare", says=["without arguments failed", "attribute features"])
    fails(2, "vi", f"{here}:wrong", says=["returned int; it must return a Target"])
    fails(1, "vi", f"{here}:breaks", says=["raised OSError: no data"])
    (tmp_path / "broken_module.py").write_text("1 / 0")
    fails(1, "vi", "broken_module:f", says=["importing broken_module raised ZeroDivisionError"])


def test_a_density_that_cannot_be_used_leaves_no_run(here, tmp_path):
    fails(1, "vi", f"{here}:nan", *TINY, "--out", "run", says=["nan: none of 52 points"])
    fails(2, "vi", "banana", *TINY, "--set", "base=mixture", "--out", "run", says=["no draws with"])
    assert not (tmp_path / "run").exists()


def test_a_failure_on_the_way_keeps_the_best_state(here, tmp_path):
    words = (*SMALL, "--steps", "100000", "--quiet", "--out", "run")
    fails(1, "vi", f"{here}:late", *words, says=["server went away", "best state so far is kept"])
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    kept = inference.load(tmp_path / "run", inference.Target(lambda x: -x.square().sum(-1), 2))
    assert kept.trace.steps > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_best_state(tmp_path, number):
    out = tmp_path / "run"
    command, environment = program(
        "vi", "banana", *SMALL, "--steps", "100000", "--set", "patience=9999", "--quiet",
        "--out", out,
    )  # fmt: skip
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text():
                break
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, stderr
    assert "the best state so far is kept in" in stderr
    assert not (out / "result.json").exists()
    assert inference.load(out).trace.stopped == "interrupted"


def test_other_commands_say_what_such_a_run_is(tmp_path):
    out = tmp_path / "run"
    succeeds("vi", "banana", *TINY, "--out", out)
    fails(1, "sample", out, "-n", "3", says=["written by rootflow vi"])
    assert "Traceback" not in call("report", out).output

