"""Fitting a flow to samples."""

from .config import FitConfig
from .fit import History, evaluate, fit

__all__ = ["FitConfig", "History", "evaluate", "fit"]
