"""Fitting a flow to samples."""

from .config import FitConfig
from .fit import History, fit

__all__ = ["FitConfig", "History", "fit"]
