"""What the tests of the command line share: calling it, a small table, a small fitted run."""

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rootflow.cli import app, measure, train

TINY = ("--steps", "20", "--set", "blocks=1", "--set", "hidden=8", "--threads", "1", "--quiet")
SOURCES = Path(__file__).resolve().parents[2] / "src"


def call(*words):
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def succeeds(*words):
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result


def fails(code, *words, says=()):
    """The call ends with this code, nothing on stdout, and one line of error that has the words."""
    result = call(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in says:
        assert re.search(str(word), lines[0]), lines[0]
    return lines[0]


def program(*words):
    """The same command line as a program of its own."""
    environment = os.environ | {"PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "rootflow", *map(str, words)], environment


def write_csv(path, values, names="abcdefgh"):
    head = ",".join(names[: values.shape[1]])
    np.savetxt(path, values, delimiter=",", header=head, comments="", fmt="%.17g")
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """No figures and few samples, unless a test asks for the real thing."""
    if "real_report" not in request.fixturenames:
        monkeypatch.setattr(train, "write_report", lambda *_, **__: None)
        monkeypatch.setattr(measure, "ROWS", 50)
    monkeypatch.delenv("CI", raising=False)


@pytest.fixture
def real_report():
    """Ask for figures and full samples."""


@pytest.fixture(scope="session")
def rows():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 3)) @ generator.normal(size=(3, 3)) + [10, 0, -5]
    return np.where(x > 0, x, x / 2)


@pytest.fixture(scope="session")
def table(rows, tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "table.csv", rows)


@pytest.fixture(scope="session")
def fitted(table, tmp_path_factory):
    """A finished run over ``table``, to be read only."""
    out = tmp_path_factory.mktemp("runs") / "run"
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "write_report", lambda *_, **__: None)
    succeeds("fit", table, *TINY, "--out", out)
    patch.undo()
    return out


@pytest.fixture
def run(fitted, tmp_path):
    """A copy of the finished run, to be spoilt."""
    return shutil.copytree(fitted, tmp_path / "run")
