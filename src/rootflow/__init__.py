"""Normalizing flows you can evaluate, sample and trust; implicit flows first."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import inference
from .errors import CheckpointError, DataError, NotConverged, RootflowError
from .flow import Flow
from .sharing import from_pretrained, push_to_hub, save_pretrained
from .training import FitConfig, History, fit
from .zoo import flow, flows, load

try:
    __version__ = version("rootflow")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

if TYPE_CHECKING:
    from .estimator import FlowDensity as FlowDensity
    from .estimator import FlowOutlierDetector as FlowOutlierDetector

_ESTIMATORS = ("FlowDensity", "FlowOutlierDetector")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ESTIMATORS])


def __getattr__(name: str) -> Any:
    """Import the estimators when they are asked for: scikit-learn is optional, and heavy."""
    if name in _ESTIMATORS:
        from . import estimator

        return getattr(estimator, name)
    raise AttributeError(f"module 'rootflow' has no attribute {name!r}")


__all__ = [
    "CheckpointError",
    "DataError",
    "FitConfig",
    "Flow",
    "History",
    "NotConverged",
    "RootflowError",
    "__version__",
    "fit",
    "flow",
    "flows",
    "from_pretrained",
    "inference",
    "load",
    "push_to_hub",
    "save_pretrained",
]
