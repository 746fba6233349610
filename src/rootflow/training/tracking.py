"""Sending the records of a fit to an experiment tracker, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

__all__ = ["TRACKERS", "MLflow", "TensorBoard", "Tracker", "Wandb"]

Record = Mapping[str, Any]


class Tracker(Protocol):
    """What a tracker does; ``log`` is what ``rootflow.fit`` takes as ``on_record``.

    ``start`` gets the settings of the run once, ``log`` every record of ``History.records``,
    ``finish`` the result.
    """

    def start(self, config: Record) -> None: ...

    def log(self, record: Record) -> None: ...

    def finish(self, result: Record) -> None: ...


def _scalars(record: Record) -> dict[str, float]:
    """The numbers of a record, named train/loss, validation/log_prob and so on."""
    kind = record.get("kind", "result")
    return {
        f"{kind}/{name}": float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _flat(settings: Record, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(value)
    return found


def _need(module: str, install: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"this tracker needs {install}; install it first") from None


class TensorBoard:
    """Scalars, settings and result as an event file in ``directory``."""

    def __init__(self, directory: Path | str) -> None:
        _need("tensorboard", "tensorboard")
        self.writer = _need("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(directory))

    def start(self, config: Record) -> None:
        lines = [f"- {name}: {value}" for name, value in _flat(config).items()]
        self.writer.add_text("config", "\n".join(lines))

    def log(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def finish(self, result: Record) -> None:
        for name, value in _scalars(result).items():
            self.writer.add_scalar(name, value, result["steps"])
        self.writer.close()


class MLflow:
    """A run of MLflow, in the experiment and at the address that MLflow is set to."""

    def __init__(self, directory: Path | str) -> None:
        self.mlflow = _need("mlflow", "mlflow-skinny or mlflow")
        self.name = Path(directory).name

    def start(self, config: Record) -> None:
        self.mlflow.start_run(run_name=self.name)
        self.mlflow.log_params({name: value[:500] for name, value in _flat(config).items()})

    def log(self, record: Record) -> None:
        self.mlflow.log_metrics(_scalars(record), step=record["step"])

    def finish(self, result: Record) -> None:
        self.mlflow.log_metrics(_scalars(result), step=result["steps"])
        self.mlflow.end_run()


class Wandb:
    """A run of Weights & Biases, or of trackio, which takes the same calls."""

    def __init__(self, directory: Path | str, module: str = "wandb") -> None:
        self.module, self.name = _need(module, module), Path(directory).name

    def start(self, config: Record) -> None:
        self.module.init(project="rootflow", name=self.name, config=dict(config))

    def log(self, record: Record) -> None:
        self.module.log(_scalars(record), step=record["step"])

    def finish(self, result: Record) -> None:
        self.module.log(_scalars(result), step=result["steps"])
        self.module.finish()


TRACKERS: dict[str, Callable[[Path], Tracker]] = {
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "trackio": lambda directory: Wandb(directory, "trackio"),
    "wandb": Wandb,
}
