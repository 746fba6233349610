"""Trackers get the settings, every record and the result, under stable names."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rootflow
from rootflow.training import TRACKERS

CONFIG = {"flow": {"name": "realnvp"}, "threads": 1}
RESULT = {"flow": "realnvp", "steps": 3, "test_log_prob": -1.5, "skipped": None}


def run_with(tracker: Any) -> list[dict[str, Any]]:
    with torch.random.fork_rng():
        flow = rootflow.flow("realnvp", features=2, blocks=1, hidden=(4,))
    rows = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    tracker.start(CONFIG)
    config = rootflow.FitConfig(steps=3, batch_size=8)
    history = rootflow.fit(flow, rows[:32], rows[32:], config=config, on_record=tracker.log)
    tracker.finish(RESULT)
    return history.records


def recorder(calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> Any:
    class Module(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **named: calls.append((name, args, named))

    return Module()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, name, recorder(calls))
    records = run_with(TRACKERS[name](tmp_path / "mine"))
    assert calls[0] == ("init", (), {"project": "rootflow", "name": "mine", "config": CONFIG})
    logged = [(args[0], named["step"]) for _, args, named in calls[1:-2]]
    assert [step for _, step in logged] == [r["step"] for r in records]
    assert logged[0][0]["train/loss"] == records[0]["loss"]
    assert {"validation/log_prob", "validation/log_prob_se"} <= logged[1][0].keys()
    assert calls[-2] == ("log", ({"result/steps": 3.0, "result/test_log_prob": -1.5},), {"step": 3})
    assert calls[-1][0] == "finish"


def test_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "mlflow", recorder(calls))
    records = run_with(TRACKERS["mlflow"](tmp_path / "mine"))
    assert [name for name, _, _ in calls[:2]] == ["start_run", "log_params"]
    assert calls[1][1][0] == {"flow.name": "realnvp", "threads": "1"}
    assert len([c for c in calls if c[0] == "log_metrics"]) == len(records) + 1
    assert calls[-1][0] == "end_run"


def test_tensorboard_writes_what_can_be_read_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = run_with(TRACKERS["tensorboard"](tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert losses == [
        (r["step"], pytest.approx(r["loss"])) for r in records if r["kind"] == "train"
    ]
    assert events.Scalars("result/test_log_prob")[0].value == -1.5


def test_a_missing_tracker_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="needs wandb"):
        TRACKERS["wandb"](tmp_path)
