"""Signals, kill -9, a full disk, closed pipes: a resumed fit ends as an undisturbed one."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from cli.helpers import fails, program, succeeds
from rootflow import store
from rootflow.cli import progress
from rootflow.cli.progress import Progress, Signals
from rootflow.training import FitConfig
from rootflow.training.checkpoint import read_state

LONG = ("--steps", "240", "--set", "blocks=2", "--set", "hidden=8", "--threads", "1", "--quiet")


@pytest.fixture(scope="module")
def undisturbed(table, tmp_path_factory):
    from rootflow.cli import train

    out = tmp_path_factory.mktemp("undisturbed") / "run"
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "write_report", lambda *_, **__: None)
    succeeds("fit", table, *LONG, "--out", out)
    patch.undo()
    return out


def states(run):
    return {path.name for path in run.glob("resume/state-*")}


def disturb(run, number, *words):
    """Start a fit, send the signal once it has saved a new state; its exit code and stderr."""
    before = states(run)
    command, environment = program(*words)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while states(run) <= before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, stderr


def test_resumed_fits_end_as_if_nothing_had_happened(table, undisturbed, tmp_path):
    out = tmp_path / "run"
    code, stderr = disturb(out, signal.SIGINT, "fit", table, *LONG, "--out", out)
    assert code == 130
    assert re.fullmatch(r"interrupted after step \d+; go on with: .*--resume.*\n", stderr)
    assert not (out / "result.json").exists()
    resume = ("fit", "--resume", "--out", out, "--quiet")
    assert "was interrupted" in succeeds("score", out, table).stderr
    code, _ = disturb(out, signal.SIGTERM, *resume)
    assert code == 143
    code, _ = disturb(out, signal.SIGKILL, *resume)
    assert code == -signal.SIGKILL
    assert not (out / "result.json").exists()
    (out / "resume" / ".state-1.safetensors.1.tmp").write_bytes(b"half a file")
    succeeds(*resume)
    same = (out / "model.safetensors").read_bytes()
    assert same == (undisturbed / "model.safetensors").read_bytes()
    ours, theirs = (json.loads((run / "result.json").read_text()) for run in (out, undisturbed))
    assert ours["test_log_prob"] == theirs["test_log_prob"]
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert not list(out.rglob(".*.tmp"))
    assert "finished already" in succeeds(*resume).stderr


def test_resume_refuses(undisturbed, tmp_path, table):
    fails(1, "fit", "--resume", "--out", tmp_path / "none", says=["no run to resume"])
    fails(2, "fit", table, "--resume", "--out", undisturbed, says=["only --out"])
    out = shutil.copytree(undisturbed, tmp_path / "run")
    (out / "result.json").unlink()
    (state,) = out.glob("resume/state-*")
    content = bytearray(state.read_bytes())
    content[-9] ^= 4
    state.write_bytes(content)
    fails(1, "fit", "--resume", "--out", out, "--quiet", says=["damaged"])
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"sha256": "', '"sha256": "0'))
    fails(1, "fit", "--resume", "--out", out, "--quiet", says=["changed"])


def test_an_unfinished_run_says_so(run, table):
    (run / "manifest.json").unlink()
    fails(1, "score", run, table, says=["not finished", "--resume"])


def test_the_second_signal_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(SystemExit, match="130"):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_disk_leaves_the_last_state_whole(table, undisturbed, tmp_path, monkeypatch):
    out, calls, fsync = tmp_path / "run", [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", full)
        fails(1, "fit", table, *LONG, "--out", out, says=["run", "No space left", "--resume"])
    assert read_state(out / "resume")[1]["step"] > 1
    assert not list(out.rglob(".*.tmp"))
    succeeds("fit", "--resume", "--out", out, "--quiet")
    same = (out / "model.safetensors").read_bytes()
    assert same == (undisturbed / "model.safetensors").read_bytes()


def test_a_reader_that_stops_reading(fitted):
    command, environment = program("sample", fitted, "-n", "20000")
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_standard_output_on_a_full_disk():
    command, environment = program("data", "list")
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*No space left.*\n", result.stderr)

def test_progress_follows_the_clock_of_the_fit(monkeypatch):
    seconds = {"monotonic": 0.0, "process_time": 0.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds["monotonic"])
    monkeypatch.setattr(progress.time, "process_time", lambda: seconds["process_time"])
    bars = [Progress(FitConfig(minutes=1, clock=clock), False) for clock in ("wall", "processor")]
    seconds.update(monotonic=45.0, process_time=15.0)
    monkeypatch.delenv("CI", raising=False)
    for bar, done in zip(bars, (0.75, 0.25), strict=True):
        bar.silent = False
        bar.tick()
        assert bar.done == done
