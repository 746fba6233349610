"""The built-in targets by name: formulas with exact draws, and posteriors with reference draws."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .comparison import Reference
from .energies import ENERGIES
from .posteriors import POSTERIORS, posterior_reference
from .target import KnownTarget

__all__ = ["TARGETS", "KnownTarget", "Reference", "reference", "target"]

TARGETS: dict[str, Callable[[], KnownTarget]] = {**ENERGIES, **POSTERIORS}

EXACT_DRAWS, KEPT = 10_000, 2_000  # as the stored posteriors: so many draws, so many kept


def known(name: str, who: str) -> str:
    if name not in TARGETS:
        raise ValueError(f"{who}: unknown target {name!r}; valid: {', '.join(TARGETS)}")
    return name


def target(name: str) -> KnownTarget:
    """A built-in target. Raises ValueError, listing the names, for an unknown one."""
    return TARGETS[known(name, "target")]()


def reference(name: str, seed: int = 0) -> Reference:
    """2,000 independent reference draws of a built-in target, and moments of 10,000.

    For the posteriors these are the published long runs (``seed`` has no effect); for targets
    with a formula, exact draws by ``seed``. Compare with ``target(name).quantities(draws)``.
    Raises ValueError, listing the names, for an unknown one.
    """
    if known(name, "reference") in POSTERIORS:
        return posterior_reference(name)
    it = target(name)
    assert it.sampler is not None
    draws = it.sampler(EXACT_DRAWS, torch.Generator().manual_seed(seed))
    return Reference(it.columns, draws[:KEPT].clone(), draws.mean(0), draws.std(0), EXACT_DRAWS)
