"""Fitting a flow to samples."""

from .config import FitConfig
from .fit import History, fit
from .tracking import TRACKERS, Tracker

__all__ = ["TRACKERS", "FitConfig", "History", "Tracker", "fit"]
