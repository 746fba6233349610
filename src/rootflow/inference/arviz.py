"""Handing a fit to ArviZ, before and after its version 1."""

from __future__ import annotations

import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = ["to_arviz"]


def to_arviz(posterior: Posterior) -> Any:
    """One chain of draws with their log q, unnormalised log target and smoothed log weight.

    Raises ModuleNotFoundError without ArviZ.
    """
    try:
        import arviz
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "to_arviz needs ArviZ; install it with: pip install 'rootflow[arviz]'"
        ) from None
    target, own = posterior.target, posterior._own
    named = dict(zip(target.columns, own.x.T, strict=True))
    groups = {
        "posterior": target.split(own.x) if target.by_name else named,
        "sample_stats": {
            "log_q": own.log_q, "lp": own.log_p, "log_weight": posterior.log_weights
        },
    }  # fmt: skip
    data: dict[str, Any] = {
        group: {name: _chain(value) for name, value in values.items()}
        for group, values in groups.items()
    }
    attrs = _attributes(posterior)
    # Up to 0.x groups are arguments and the result is InferenceData; from 1 on there is no such
    # class, and from_dict takes one dictionary of groups.
    if hasattr(arviz, "InferenceData"):
        notes: Any = {f"{group}_attrs": attrs for group in data}
        return arviz.from_dict(**data, **notes)
    return arviz.from_dict(data, attrs=dict.fromkeys(data, attrs))


def _chain(value: Tensor) -> Any:
    """(S, *shape) as an array (1, S, *shape): one chain."""
    return value.detach().cpu().numpy()[None]


def _attributes(posterior: Posterior) -> dict[str, Any]:
    try:
        own = version("rootflow")
    except PackageNotFoundError:  # a source tree on the path, not installed
        own = "unknown"
    elbo, evidence = posterior.elbo, posterior.log_evidence
    return {
        "inference_library": "rootflow", "inference_library_version": own,
        "torch_version": str(torch.__version__),
        "method": f"variational inference, {posterior.config.objective}",
        "target": posterior.target.name,
        "elbo": elbo.value, "elbo_mcse": elbo.se,
        "log_evidence": evidence.value, "log_evidence_mcse": evidence.se,
        "khat": posterior.khat, "khat_threshold": posterior.smoothed.threshold,
        "is_ess": posterior.ess,
        "seed": posterior.seed,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
    }  # fmt: skip
