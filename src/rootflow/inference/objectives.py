"""What a step differentiates: reverse KL, the importance-weighted bound, forward KL."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flow import Flow
from .config import VIConfig
from .target import Target

__all__ = ["Loss", "forward_rows", "loss"]

ROW_CLIP = 10.0  # a draw's gradient is shortened to that many medians of the step's draws
FAR = 100.0  # nats from their median within which log ratios are compared


@dataclass
class Loss:
    """A scalar whose gradient is the wanted one; ``bound`` is what is maximised, in nats.

    ``bad``: draws left out because the target, its gradient or log q was not finite there.
    """

    value: Tensor
    bound: float
    bad: int


def loss(
    flow: Flow, target: Target, config: VIConfig, beta: float, generator: torch.Generator,
    *, shorten: bool = True,
) -> Loss | None:
    """One estimate from ``config.draws`` fresh points; None if not one of them can be used.

    ``beta``: power to which the target is raised, Rezende and Mohamed 2015 (arXiv:1505.05770),
    equation 20. ``shorten``: limit the gradients of outlying draws.
    """
    if config.objective == "forward-kl":
        return _self_normalised(flow, target, config, beta, generator)
    if config.objective == "elbo" and config.gradient == "log-variance":
        return _log_variance(flow, target, config, beta, generator, shorten)
    path = config.gradient != "plain"
    z, usual = _latents(flow, config, generator, path and config.objective == "elbo")
    u, log_q, slope, log_ratio, rows = _evaluated(flow, target, z, beta, path)
    if not len(rows):
        return None
    bad = len(z) - len(rows)
    # Linear in u with the target's gradient as slope: the same derivative as through the target
    # itself, but draws can be left out or shortened, and its graph is gone already.
    if config.objective == "iw":
        groups = max(len(rows) // config.particles, 1)
        size = min(config.particles, len(rows)) * groups
        u, log_q, slope, log_ratio = u[:size], log_q[:size], slope[:size], log_ratio[:size]
        table = log_ratio.reshape(groups, -1)
        weights = table.softmax(1).flatten()
        # The doubly reparameterised gradient, Tucker et al. 2019 (arXiv:1810.04152), equation 8.
        weights = (weights.square() if path else weights) / groups
        bound = float(table.logsumexp(1).mean()) - math.log(table.shape[1])
    else:
        weights = torch.full_like(log_ratio, 1 / len(rows))
        bound = float(log_ratio[rows < usual].mean())
    slope = _shortened(slope) if shorten else slope
    moved = (u * slope.to(u.dtype)).sum(1)
    if not path:
        moved = moved - log_q
    return Loss(-(weights.to(u.dtype) * moved).sum(), bound, bad)


def _latents(
    flow: Flow, config: VIConfig, generator: torch.Generator, stretched: bool
) -> tuple[Tensor, int]:
    """Latents ``(draws, k)``, and how many of them, from the first, are draws of the base."""
    z = flow.base.sample((config.draws,), generator)  # type: ignore[operator]
    if not stretched or config.stretch == 1:
        return z, len(z)
    usual = (len(z) + 1) // 2
    return torch.cat([z[:usual], config.stretch * z[usual:]]), usual


def _log_variance(
    flow: Flow, target: Target, config: VIConfig, beta: float, generator: torch.Generator,
    shorten: bool,
) -> Loss | None:
    """Half the variance of log p~ - log q over draws held fixed.

    Richter et al. 2020, VarGrad (arXiv:2010.10436), equation 9: at draws of q its gradient is that
    of KL(q || p), and like the path gradient's its noise vanishes where q is right. It compares
    values and not slopes, so it sees that two regions far apart have the wrong shares. Stretched
    latents change the draws that the variance is taken over, not where it is zero. Draws more than
    ``FAR`` nats off the others say little but their direction, and take the path gradient.
    """
    with torch.no_grad():
        z, usual = _latents(flow, config, generator, True)
        u = flow.inverse(z)[0]
    log_q, log_ratio, rows = _held(flow, target, u, beta)
    if len(rows) < 2:
        return None
    far = (log_ratio - log_ratio.median()).abs() > FAR
    near = ~far if shorten else torch.ones_like(far)
    off = log_ratio[near] - log_ratio[near].mean()
    value = -(off.to(u.dtype) * log_q[near]).sum() / (len(rows) - 1)
    if shorten and bool(far.any()):
        u, _, slope, *_ = _evaluated(flow, target, z[rows[far]], beta, path=True)
        value = value - (u * _shortened(slope).to(u.dtype)).sum() / len(rows)
    return Loss(value, float(log_ratio[rows < usual].mean()), len(z) - len(rows))


def _held(
    flow: Flow, target: Target, u: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """At draws u held fixed: log q to differentiate, log p~ - log q, and the rows where finite."""
    with torch.no_grad():
        height = beta * target.unconstrained_log_prob(u).to(u.device)
    log_q = flow.log_prob(u)
    log_ratio = height - log_q.detach()
    rows = log_ratio.isfinite().nonzero()[:, 0]
    return log_q[rows], log_ratio[rows], rows


def _evaluated(
    flow: Flow, target: Target, z: Tensor, beta: float, path: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draws u, log q, slope of log p~ (less that of log q), log p~ - log q, and rows of z."""
    u, log_det = flow.inverse(z)
    log_q = flow.base.log_prob(z) - log_det  # type: ignore[operator]
    value, slope = target.value_and_gradient(u)
    value, slope = beta * value.to(u.device), beta * slope.to(u.device)
    log_ratio = value - log_q.detach()
    if path:
        slope = slope - _score(flow, u.detach())
    good = log_ratio.isfinite() & slope.isfinite().all(1) & u.detach().isfinite().all(1)
    rows = good.nonzero()[:, 0]
    return u[rows], log_q[rows], slope[rows], log_ratio[rows], rows


def _score(flow: Flow, u: Tensor) -> Tensor:
    """The gradient of log q in u alone, the parameters held fixed; ``(n, k)``.

    Roeder et al. 2017, Sticking the landing (arXiv:1703.09194).
    """
    learned = [p for p in flow.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    try:
        u = u.requires_grad_()
        return torch.autograd.grad(flow.log_prob(u).sum(), u)[0]
    finally:
        for p in learned:
            p.requires_grad_(True)


def _shortened(slope: Tensor) -> Tensor:
    """Rows ``(n, k)``, none longer than ``ROW_CLIP`` times the median length."""
    norm = slope.norm(dim=1)
    limit = ROW_CLIP * norm.median()
    shrink: Tensor = (limit / norm.clamp_min(1e-30)).clamp(max=1.0)
    return slope * shrink[:, None]


def _self_normalised(
    flow: Flow, target: Target, config: VIConfig, beta: float, generator: torch.Generator
) -> Loss | None:
    """KL(p || q) by importance weights of draws of q, cut at sqrt(n) times their mean.

    Truncation as in Ionides 2008 (J. Comput. Graph. Statist. 17:295).
    """
    u = flow.sample((config.draws,), generator=generator)
    log_q, log_ratio, rows = _held(flow, target, u, beta)
    if not len(rows):
        return None
    weights = log_ratio.softmax(0).clamp(max=len(rows) ** -0.5)
    weights = (weights / weights.sum()).to(log_q.dtype)
    return Loss(-(weights * log_q).sum(), float(log_ratio.mean()), len(u) - len(rows))


def forward_rows(flow: Flow, u: Tensor, draws: int, generator: torch.Generator) -> Loss:
    """KL(p || q) up to a constant, from reference rows u ``(n, k)``: maximum likelihood."""
    rows = torch.randint(len(u), (min(draws, len(u)),), generator=generator)
    value = flow.log_prob(u[rows.to(u.device)]).mean()
    return Loss(-value, float(value.detach()), 0)
