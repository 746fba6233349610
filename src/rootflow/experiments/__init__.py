"""The experiments of the papers: files that say what to do, run and kept beside the published."""

from .catalogue import SCALES, Recipe, Scale, names, recipe, recipes
from .parts import Stopped
from .results import duration, grids, page
from .runner import run
from .store import Result, read

__all__ = [
    "SCALES", "Recipe", "Result", "Scale", "Stopped", "duration", "grids", "names", "page", "read",
    "recipe", "recipes", "run",
]  # fmt: skip
