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


def to_arviz(posterior: Posterior, *, resample: bool) -> Any:
    """One chain of draws with their log q, unnormalised log target and smoothed log weight.

    With ``resample`` the draws are importance-resampled and carry no statistics of their own.
    Raises ModuleNotFoundError without ArviZ.
    """
    try:
        import arviz
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "to_arviz needs ArviZ; install it with: pip install 'rootflow[arviz]'"
        ) from None

    target = posterior.target
    if resample:
        x = posterior.sample(posterior.size, resample=True, seed=posterior.seed)
        stats: dict[str, Tensor] = {}
    else:
        x = posterior.draws
        stats = posterior.statistics()
    if target.by_name:
        groups = target.split(x)
    else:
        groups = {name: x[:, k] for k, name in enumerate(target.columns)}
    data: dict[str, Any] = {"posterior": {name: _chain(value) for name, value in groups.items()}}
    if stats:
        data["sample_stats"] = {name: _chain(value) for name, value in stats.items()}
    attrs = _attributes(posterior, resample)
    # Up to 0.x groups are arguments and the result is InferenceData; from 1 on there is no such
    # class, and from_dict takes one dictionary of groups.
    if hasattr(arviz, "InferenceData"):
        own: Any = {f"{group}_attrs": attrs for group in data}
        return arviz.from_dict(**data, **own)
    return arviz.from_dict(data, attrs=dict.fromkeys(data, attrs))


def _chain(value: Tensor) -> Any:
    """(S, *shape) as an array (1, S, *shape): one chain."""
    return value.detach().cpu().numpy()[None]


def _attributes(posterior: Posterior, resample: bool) -> dict[str, Any]:
    smoothed, elbo = posterior.smoothed, posterior.elbo
    evidence = posterior.log_evidence
    try:
        own = version("rootflow")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "inference_library": "rootflow",
        "inference_library_version": own,
        "torch_version": str(torch.__version__),
        "method": f"variational inference, {posterior.config.objective}"
        + (", importance resampled" if resample else ""),
        "target": posterior.target.name,
        "elbo": elbo.value, "elbo_mcse": elbo.se,
        "log_evidence": evidence.value, "log_evidence_mcse": evidence.se,
        "khat": smoothed.khat, "khat_threshold": smoothed.threshold,
        "is_ess": posterior.ess,
        "seed": posterior.seed,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
    }  # fmt: skip
