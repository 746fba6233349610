"""``rootflow reproduce``: list, table, JSON, resuming, wrong use."""

import importlib
import json
import signal
import subprocess

import pytest

from cli.helpers import call, fails, program, succeeds
from experiments import helpers
from rootflow import experiments

reproduce = importlib.import_module("rootflow.cli.reproduce")  # the file, not the command in it


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """One experiment called tiny, run in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "names", lambda: ["tiny"])
    monkeypatch.setattr(reproduce, "recipe", lambda _: helpers.counting("one", "three", one=3.5))
    helpers.CALLS.clear()
    helpers.BROKEN.clear()
    return tmp_path


def test_list():
    text = succeeds("reproduce", "--list").stdout
    for name in experiments.names():
        assert f"\n{name}: " in f"\n{text}"
    assert text.count("source: ") == text.count("smoke ") == len(experiments.names())
    printed = json.loads(succeeds("reproduce", "--list", "--json").stdout)
    assert [e["name"] for e in printed["experiments"]] == experiments.names()
    assert set(printed["experiments"][0]["minutes"]) == {"smoke", "small", "paper"}


def test_a_run_announces_its_time_and_prints_a_table(tiny):
    result = succeeds("reproduce", "tiny", "--scale", "smoke")
    assert "tiny at scale smoke: at most about 1 s" in result.stderr
    assert "1/2 one: done" in result.stderr
    assert "letters" in result.stdout
    assert "published" in result.stdout
    assert (tiny / "runs" / "tiny-smoke-0" / "result.json").exists()
    lines = (tiny / "runs" / "results.jsonl").read_text().splitlines()
    command = "rootflow reproduce tiny --scale smoke --seed 0"
    assert [json.loads(line)["command"] for line in lines] == [command]
    again = succeeds("reproduce", "tiny", "--scale", "smoke")
    assert "done before" in again.stderr
    assert helpers.CALLS == ["one", "three"]


def test_json_and_options(tiny):
    result = succeeds(
        "reproduce", "tiny", "--out", "here", "--store", "kept.jsonl", "--seed", "3", "--json", "-q"
    )
    printed = json.loads(result.stdout)
    assert result.stderr == ""
    assert (printed["scale"], printed["seed"], printed["failed"]) == ("small", 3, 0)
    assert printed["rows"][0]["published"] == 3.5
    assert (tiny / "kept.jsonl").exists()
    assert (tiny / "here" / "config.json").exists()
    assert not (tiny / "runs").exists()


def test_a_failed_part_is_told_and_the_rest_is_printed(tiny):
    helpers.BROKEN.add("one")
    result = call("reproduce", "tiny", "--scale", "smoke")
    assert result.exit_code == 0
    assert "failed: one: this one is broken" in result.stderr
    assert "failed" in result.stdout
    helpers.BROKEN.add("three")
    assert call("reproduce", "tiny", "--scale", "smoke", "--out", "b").exit_code == 1


def test_wrong_use(tiny):
    fails(2, "reproduce", says=["--list"])
    fails(2, "reproduce", "nothing", says=["experiment nothing", "tiny"])
    fails(2, "reproduce", "tiny", "--scale", "huge", says=["smoke, small, paper"])
    (tiny / "full").mkdir()
    (tiny / "full" / "letter.txt").write_text("dear")
    fails(1, "reproduce", "tiny", "--scale", "smoke", "--out", "full", "-q", says=["not empty"])


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(tmp_path):
    words = ["reproduce", "one-d-fit", "--scale", "smoke", "--threads", "1", "--out", "run"]
    command, environment = program(*words)
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "trained-0: done" in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert "goes on from here: rootflow reproduce one-d-fit" in rest
    assert (tmp_path / "run" / "parts" / "by-hand" / "result.json").exists()
    assert not (tmp_path / "run" / "result.json").exists()


def test_results_are_a_page(tiny):
    fails(2, "reproduce", "--results", says=["runs/results.jsonl", "no such file"])
    succeeds("reproduce", "tiny", "-q")
    text = succeeds("reproduce", "--results").stdout
    assert text.startswith("# Results\n")
    assert all(f"## {found.name}\n" in text for found in experiments.recipes())
