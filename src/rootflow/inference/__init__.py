"""Variational inference: approximate an unnormalised density by a flow, and judge the result."""

from .amortised import AmortisedPosterior
from .comparison import Comparison, compare_draws
from .config import Trace, VIConfig
from .diagnostics import Smoothed, Verdict, grid_kl, importance_ess, psis, verdict
from .fit import fit
from .library import TARGETS, reference, target
from .posterior import Posterior, load
from .stan import from_bridgestan
from .supports import ordered
from .target import Target, TargetError

__all__ = [
    "TARGETS",
    "AmortisedPosterior",
    "Comparison",
    "Posterior",
    "Smoothed",
    "Target",
    "TargetError",
    "Trace",
    "VIConfig",
    "Verdict",
    "compare_draws",
    "fit",
    "from_bridgestan",
    "grid_kl",
    "importance_ess",
    "load",
    "ordered",
    "psis",
    "reference",
    "target",
    "verdict",
]
