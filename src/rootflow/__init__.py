"""Normalizing flows you can evaluate, sample and trust; implicit flows first."""

from importlib.metadata import PackageNotFoundError, version

from . import inference
from .errors import CheckpointError, DataError, NotConverged, RootflowError
from .flow import Flow
from .training import FitConfig, History, fit
from .zoo import flow, flows, load

try:
    __version__ = version("rootflow")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

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
    "inference",
    "load",
]
