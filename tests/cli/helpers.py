"""Calling the command line from a test, and what a success or a failure must look like."""

import os
import re
import sys
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from rootflow.cli import app

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
