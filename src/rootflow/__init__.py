"""Normalizing flows you can evaluate, sample and trust; implicit flows first."""

from .errors import CheckpointError, DataError, NotConverged, RootflowError
from .flow import Flow
from .training import FitConfig, History, fit
from .zoo import flow, flows, load

__version__ = "0.1.0"

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
    "load",
]
