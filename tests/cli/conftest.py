"""What the tests of the command line share: a small table and a small fitted run."""

import shutil

import numpy as np
import pytest

from cli.helpers import TINY, succeeds, write_csv
from rootflow.cli import measure, train


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
