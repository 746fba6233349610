"""Root finding, one verdict per sample, and its derivative."""

from .adjoint import attach
from .bracket import find_increasing
from .methods import METHODS, default_tolerance, find_root
from .result import Problem, Solution

__all__ = [
    "METHODS", "Problem", "Solution", "attach", "default_tolerance", "find_increasing", "find_root",
]  # fmt: skip
