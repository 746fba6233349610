"""How far to trust draws of q as draws of the target: PSIS, ELBO, evidence, exact KL, a verdict.

Every function here takes log ratios r_s = log p~(x_s) - log q(x_s) at fresh independent draws x_s
of q: never those that q was fitted with, on which q looks better than it is. They are turned into
float64. What draws of q cannot show is a region that q never visits: a missed mode leaves k-hat,
effective sample size and ELBO unharmed. Only reference draws (``compare_draws``) show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..store import plain
from .comparison import Comparison, Estimate
from .target import Box, KnownTarget

__all__ = [
    "GridKL",
    "Smoothed",
    "Verdict",
    "elbo",
    "grid_kl",
    "importance_ess",
    "log_evidence",
    "psis",
    "verdict",
]

GOOD_KHAT = 0.5  # below it, importance sampling has finite variance: q is good as it is
ZEROS = 0.01  # share of draws where the target is zero that weights should take away
LEAST_TAIL = 5  # fewer ratios tell nothing about the shape of their tail


def checked(log_ratios: Tensor, name: str) -> Tensor:
    """The ratios as detached float64 ``(S,)``; -inf stays (weight 0), NaN and +inf are errors."""
    if not isinstance(log_ratios, Tensor):
        raise TypeError(f"{name}: log_ratios must be a tensor, got {type(log_ratios).__name__}")
    r = log_ratios.detach().to(torch.float64)
    if r.ndim != 1 or len(r) == 0:
        raise ValueError(f"{name}: log_ratios must be (draws,), got shape {tuple(r.shape)}")
    for what, bad in (("NaN", r.isnan()), ("+inf", r == math.inf)):
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"{name}: {int(bad.sum())} of {len(r)} log ratios are {what} (the first is draw "
                f"{first}); the target must be finite, or -inf for an impossible point"
            )
    if (r == -math.inf).all():
        raise ValueError(f"{name}: the target is -inf at each of the {len(r)} draws of q")
    return r


@dataclass(frozen=True)
class Smoothed:
    """Pareto-smoothed importance weights.

    ``log_weights`` ``(S,)``: normalised, in the order of the draws. ``khat``: estimated shape of
    the tail of the raw weights; +inf if the tail is too short to tell. ``threshold``: the largest
    khat that S draws can be trusted with. ``constant``: all finite ratios were equal, q is the
    target up to rounding wherever that is not zero. ``tail``: weights smoothed. ``zeros``: draws
    where the target was zero.
    """

    khat: float
    log_weights: Tensor
    threshold: float
    draws: int
    constant: bool
    tail: int
    zeros: int

    @property
    def trusted(self) -> bool:
        """Whether estimates by these weights can be trusted where q has draws."""
        return self.khat < self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Figures without the weights; None instead of an infinite khat."""
        found: dict[str, Any] = plain({
            "khat": self.khat, "threshold": self.threshold, "draws": self.draws,
            "constant_ratios": self.constant, "tail": self.tail, "zero_weights": self.zeros,
            "ess": importance_ess(self.log_weights),
        })  # fmt: skip
        return found


def psis(log_ratios: Tensor) -> Smoothed:
    """Smooth the largest importance weights by a generalised Pareto fit to their tail.

    Shapes: log_ratios ``(S,)`` in nats, larger where q is too small (log weights, not their
    negatives: the wrong sign gives a khat near -1, which looks perfect).
    Draws are taken as independent. Constant ratios give khat 0 and uniform weights.
    Raises: ValueError for NaN, +inf, no draws, or only -inf.
    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, arXiv:1507.02646, with the posterior mean
    of Zhang and Stephens 2009 (Technometrics 51:316) for the shape.
    """
    r = checked(log_ratios, "psis")
    count, zeros = len(r), int((r == -math.inf).sum())
    threshold = min(1 - 1 / math.log10(count), 0.7) if count > 1 else -math.inf
    largest = float(r.max())
    r = r - largest
    spread = float(-r[r > -math.inf].min())
    constant = count > 1 and spread <= 1e-12 * max(1.0, abs(largest))
    log_weights, khat, tail = r, 0.0 if constant else math.inf, 0
    if constant:
        log_weights = torch.where(r > -math.inf, 0.0, r)
    elif count > 1:
        wanted = math.ceil(min(count / 5, 3 * math.sqrt(count)))
        ordered, place = r.sort()
        cutoff = max(float(ordered[-wanted - 1]), math.log(torch.finfo(r.dtype).tiny))
        above = ordered > cutoff
        tail = int(above.sum())
        if tail >= LEAST_TAIL:
            # exp(r) - exp(cutoff), exact also for near ties, which plain subtraction makes zero.
            excess = math.exp(cutoff) * torch.expm1(ordered[above] - cutoff)
            khat, scale = fit_tail(excess)
            if math.isfinite(khat):
                smooth = (pareto_quantiles(tail, khat, scale) + math.exp(cutoff)).log()
                log_weights = r.index_copy(0, place[above], smooth.clamp(max=0.0))
    log_weights = log_weights - log_weights.logsumexp(0)
    return Smoothed(khat, log_weights, threshold, count, constant, tail, zeros)


def fit_tail(excess: Tensor) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution, from ascending positive ``(n,)``."""
    n = len(excess)
    grid = 30 + math.isqrt(n)
    steps = torch.arange(1, grid + 1, dtype=excess.dtype, device=excess.device) - 0.5
    quartile = excess[int(n / 4 + 0.5) - 1]
    b = 1 / excess[-1] + (1 - (grid / steps).sqrt()) / (3 * quartile)
    shapes = torch.log1p(-b.unsqueeze(-1) * excess).mean(-1)
    profile = n * ((-b / shapes).log() - shapes - 1)
    b_mean = (profile.softmax(0) * b).sum()
    shape = float(torch.log1p(-b_mean * excess).mean())
    scale = -shape / float(b_mean) if float(b_mean) else float(excess.mean())  # b = 0: exponential
    khat = (n * shape + 5) / (n + 10)  # ten draws' worth of prior belief in 0.5
    return (khat, scale) if math.isfinite(khat + scale) else (math.inf, math.nan)


def pareto_quantiles(n: int, shape: float, scale: float) -> Tensor:
    """Quantiles at (i - 1/2) / n, i = 1..n, ``(n,)`` ascending."""
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tail = -torch.log1p(-p)
    return scale * (torch.expm1(shape * tail) / shape if shape else tail)


def importance_ess(log_weights: Tensor) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2; weights need not be normalised, ``(S,)``.

    Divide by S for the share. Raises as ``psis`` does.
    """
    r = checked(log_weights, "importance_ess")
    return float((2 * r.logsumexp(0) - (2 * r).logsumexp(0)).exp())


def elbo(log_ratios: Tensor) -> Estimate:
    """Mean of the ratios with its Monte Carlo standard error, in nats; -inf if any ratio is.

    A lower bound on the log evidence, comparable only for one target with the same constants.
    """
    r = checked(log_ratios, "elbo")
    if (r == -math.inf).any():
        return Estimate(-math.inf, math.inf, len(r))
    error = float(r.std()) / math.sqrt(len(r)) if len(r) > 1 else math.inf
    return Estimate(float(r.mean()), error, len(r))


def log_evidence(log_ratios: Tensor) -> Estimate:
    """Log of the mean importance weight, in nats, with the delta method's standard error.

    Biased low: its expectation is a lower bound on log Z that tightens as draws grow. Where
    ``psis(log_ratios).trusted`` is False, neither the value nor its error can be trusted.
    """
    r = checked(log_ratios, "log_evidence")
    n = len(r)
    value = float(r.logsumexp(0)) - math.log(n)
    if n == 1:
        return Estimate(value, math.inf, 1)
    spread = max(1 / importance_ess(r) - 1 / n, 0.0)
    return Estimate(value, math.sqrt(spread * n / (n - 1)), n)


@dataclass(frozen=True)
class GridKL:
    """KL(q || p) in nats by summation over a grid.

    ``error``: change of the value when every second grid line is left out, an upper bound on the
    quadrature error of smooth densities. ``mass`` and ``target_mass``: what the grid holds of q
    and p. ``reliable``: both masses within 0.001 of one and error below 0.001.
    """

    value: float
    error: float
    mass: float
    target_mass: float
    points: int
    reliable: bool


def grid(box: Box, points: int) -> tuple[Tensor, float]:
    """Nodes ``(points^2, 2)`` of a rectangle rule in float64, and the area of a cell."""
    lines = [torch.linspace(a, b, points + 1, dtype=torch.float64)[:-1] for a, b in box]
    return torch.cartesian_prod(*lines), math.prod((b - a) / points for a, b in box)


@torch.no_grad()
def grid_kl(
    log_q: Callable[[Tensor], Tensor], target: KnownTarget, *, points: int = 512
) -> GridKL:
    """Exact KL(q || p) of a two-dimensional q against a built-in target, without sampling noise.

    ``log_q`` maps unconstrained values ``(n, 2)``, float64, to the log of their density ``(n,)``;
    of these the grid has ``points`` per axis, since there densities are smooth and the rectangle
    rule converges faster than any power of the step.
    Raises: ValueError for a target without normaliser or bounds, and for odd or few points.
    """
    if target.log_normaliser is None or target.box is None:
        raise ValueError(f"grid_kl: {target.name} has no normaliser and bounds in two columns")
    if points < 8 or points % 2:
        raise ValueError(f"grid_kl: points must be even and at least 8, got {points}")
    nodes, area = grid(target.box, points)
    parts = torch.split(nodes, 16384)
    at_q = torch.cat([log_q(u).double() for u in parts])
    at_p = torch.cat([target.unconstrained_log_prob(u) for u in parts]) - target.log_normaliser
    q, p = at_q.view(points, points), at_p.view(points, points)
    density = q.exp()
    terms = torch.where(density > 0, density * (q - p), 0.0)  # 0 log 0 = 0
    value = float(terms.sum()) * area
    error = abs(value - float(terms[::2, ::2].sum()) * 4 * area)
    mass, target_mass = float(density.sum()) * area, float(p.exp().sum()) * area
    reliable = abs(mass - 1) < 1e-3 and abs(target_mass - 1) < 1e-3 and error < 1e-3
    return GridKL(value, error, mass, target_mass, points, reliable)


@dataclass(frozen=True)
class Verdict:
    """``level``: "good", "usable with importance weights" or "do not trust"; ``line`` says why."""

    level: str
    line: str

    def __str__(self) -> str:
        return self.line


LEVELS = ("good", "usable with importance weights", "do not trust")


def verdict(smoothed: Smoothed, comparison: Comparison | None = None) -> Verdict:
    """One plain sentence on whether to use the draws.

    Without reference draws: "good" if khat < 0.5, "usable with importance weights" if khat is
    below the threshold, min(1 - 1/log10 S, 0.7), else "do not trust". More than 1 % of draws where
    the target is zero are not "good" either. With reference draws, the worse of this and
    ``comparison.level()``, so that a missed mode cannot pass.
    """
    shown = f"{smoothed.khat:.2f}" if math.isfinite(smoothed.khat) else "unknown (tail too short)"
    trusted = smoothed.trusted or smoothed.constant
    worst = 0 if trusted and smoothed.khat < GOOD_KHAT else 1 if trusted else 2
    share = importance_ess(smoothed.log_weights) / smoothed.draws
    reasons = [
        f"k-hat {shown} at {smoothed.draws:,} draws (trust below {smoothed.threshold:.2f})",
        f"importance weights keep {share:.0%} of the draws",
    ]
    if smoothed.zeros > ZEROS * smoothed.draws:
        worst = max(worst, 1)
    if smoothed.zeros:
        reasons.append(f"the target is zero at {smoothed.zeros:,} draws")
    if comparison is None:
        reasons.append(
            "not checked: regions that the draws never visit, such as a missed mode; this needs "
            "reference draws"
        )
    else:
        level, why = comparison.level()
        worst = max(worst, level)
        reasons.append(why)
    return Verdict(LEVELS[worst], f"{LEVELS[worst]}: {'; '.join(reasons)}.")
