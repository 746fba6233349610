"""Targets from Stan programs that BridgeStan has compiled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .target import Target

__all__ = ["from_bridgestan"]


def from_bridgestan(model: Any) -> Target:
    """The posterior of a ``bridgestan.StanModel`` over its unconstrained parameters.

    Constants are kept, so that ``log_evidence`` is that of the program, and Stan's Jacobian is
    counted. Draws are unconstrained: ``model.param_constrain`` maps one back. Points that Stan
    rejects have density zero.
    """

    def log_prob(u: Any) -> float:
        try:
            return float(model.log_density(u, propto=False, jacobian=True))
        except RuntimeError:
            return -math.inf

    def gradient(u: Any) -> Any:
        try:
            return model.log_density_gradient(u, propto=False, jacobian=True)[1]
        except RuntimeError:
            return np.full(len(u), math.nan)

    names = list(model.param_unc_names())
    return Target(
        log_prob, len(names), names=names, batched=False, gradient=gradient, name=model.name()
    )
