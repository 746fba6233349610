"""The first stage: a full-rank Gaussian in the unconstrained space, where the flow then starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .diagnostics import importance_ess, psis
from .target import Target

__all__ = ["Gaussian", "cover", "fit_gaussian"]

CLIMBS = 6  # starting points
CLIMB_STEPS = 60
DRAWS = 64  # of each ELBO estimate, with their mirror images, the same for all candidates
JUDGED = 1024  # draws of the final judgement
REFINE_STEPS = 30  # of a round
RATE = 0.3  # of a natural gradient, at first
ROUNDS = 12
LITTLE = 0.1  # nats
VALLEY = 3.0  # nats
COVER_DRAWS, COVER_ROUNDS = 2048, 8
WIDE = 3.0  # times the sds: where half of a round's draws go


@dataclass(frozen=True)
class Gaussian:
    """u = mean + factor z with z standard normal; ``elbo`` in nats. float64, (k,) and (k, k).

    ``modes``: how many it spans; ``share``: effective sample size of its importance weights, as a
    share of the draws, zero if not known.
    """

    mean: Tensor
    factor: Tensor
    elbo: float
    modes: int = 1
    share: float = 0.0

    @property
    def covariance(self) -> Tensor:
        """(k, k)."""
        return self.factor @ self.factor.T


def fit_gaussian(
    target: Target,
    starts: Tensor,
    generator: torch.Generator,
    *,
    seconds: float = math.inf,
    should_stop: Callable[[], bool] | None = None,
) -> Gaussian:
    """A Gaussian to place a flow with, from ``starts`` ``(n, k)`` of finite density, best first.

    From some of them climbs a damped Newton iteration on differences of gradients; the point of its
    path whose local Gaussian has the highest ELBO is kept, which need not be the mode (compare
    Zhang et al. 2022, Pathfinder, arXiv:2108.03782). If all paths end in one region its Gaussian is
    refined by reverse KL; if they end in several, the moments of their mixture are returned, so
    that a flow started there reaches all of them. Ends early after ``seconds``.
    """
    end = time.monotonic() + seconds

    def late() -> bool:
        return time.monotonic() > end or (should_stop is not None and should_stop())

    k = starts.shape[1]
    z = torch.randn(DRAWS, k, generator=generator, dtype=torch.float64).to(starts.device)
    z = torch.cat([z, -z])
    several = _distinct(target, climb(target, _far_apart(starts), z, late))
    best = max([*several[:1], _round(target, starts, z)], key=lambda g: g.elbo)
    for _ in range(ROUNDS):  # each in the coordinates that the one before has found
        refined = refine(target, best, generator, late)
        gain, best = refined.elbo - best.elbo, refined
        if not gain > LITTLE:
            break
    several = [g for g in several if g.elbo > best.elbo - 5]  # no neck of a funnel
    if len(several) < 2:
        return _judged(target, best, generator)
    weights = torch.tensor([g.elbo for g in several], dtype=torch.float64).softmax(0).to(z.device)
    means = torch.stack([g.mean for g in several])
    mean = weights @ means
    inner = torch.einsum("m,mij->ij", weights, torch.stack([g.covariance for g in several]))
    outer = (means - mean).T @ (weights[:, None] * (means - mean))
    factor, failed = torch.linalg.cholesky_ex(inner + outer)
    if int(failed):  # means beyond what float64 resolves: the density is improper
        return best
    both = Gaussian(mean, factor, float(elbo(target, mean, factor, z)), len(several))
    return _judged(target, both, generator)


def cover(target: Target, start: Gaussian, generator: torch.Generator) -> Gaussian:
    """The Gaussian with the target's own mean and covariance, which covers all of its mass.

    Reverse KL would rather stay on one piece of a bent or branching target, narrow and tilted. Each
    round estimates both by importance weights, cut at sqrt(n) times their mean, of draws around the
    Gaussian of the round before and around one ``WIDE`` times as wide. For few parameters: where
    the weights are left with too few draws, the Gaussian of the round before is returned.
    Source: Cappe et al. 2004, Population Monte Carlo (J. Comput. Graph. Statist. 13:907).
    """
    k, found = len(start.mean), start
    for _ in range(COVER_ROUNDS):
        z = torch.randn(COVER_DRAWS, k, generator=generator, dtype=torch.float64).to(found.mean)
        z[COVER_DRAWS // 2 :] *= WIDE
        square = z.square().sum(1) / 2
        log_q = torch.logaddexp(-square, -square / WIDE**2 - k * math.log(WIDE))
        u = found.mean + z @ found.factor.T
        weights = (heights(target, u) - log_q).softmax(0).clamp(max=COVER_DRAWS**-0.5)
        weights = weights / weights.sum()
        mean = weights @ u
        factor, failed = torch.linalg.cholesky_ex((u - mean).T @ (weights[:, None] * (u - mean)))
        if int(failed) or not float(weights.square().sum()) < 1 / (10 * k):
            break
        found = replace(found, mean=mean, factor=factor)
    return _judged(target, found, generator)


def _round(target: Target, starts: Tensor, z: Tensor) -> Gaussian:
    """The best of some Gaussians of equal sds, around the best start and around zero."""
    means = torch.stack([starts[0], 0 * starts[0]]).repeat(2, 1)
    sds = torch.tensor([0.1, 0.1, 1.0, 1.0]).to(starts)
    factors = torch.diag_embed(sds[:, None].expand_as(means))
    bounds = elbo(target, means, factors, z)
    at = int(bounds.argmax())
    return Gaussian(means[at], factors[at], float(bounds[at]))


def _judged(target: Target, found: Gaussian, generator: torch.Generator) -> Gaussian:
    """The same Gaussian with its ``share``, over fresh draws."""
    z = torch.randn(JUDGED, len(found.mean), generator=generator, dtype=torch.float64)
    z = z.to(found.mean)
    ratios = heights(target, found.mean + z @ found.factor.T) + z.square().sum(1) / 2
    if not bool(ratios.isfinite().any()):
        return replace(found, share=0.0)
    return replace(found, share=importance_ess(psis(ratios).log_weights) / len(z))


def _far_apart(starts: Tensor) -> Tensor:
    """The best start, zero, and others each as far as can be from those before.

    Mirror images of the starts count as well, so that no side is left out.
    """
    chosen = [starts[0], torch.zeros_like(starts[0])]
    starts = torch.cat([starts, -starts])
    while len(chosen) < min(CLIMBS, len(starts)):
        gaps = torch.cdist(starts, torch.stack(chosen)).amin(1)
        chosen.append(starts[gaps.argmax()])
    return torch.stack(chosen)


def _distinct(target: Target, found: list[Gaussian]) -> list[Gaussian]:
    """Those within 10 nats of the best, one for each mode: apart, with a valley in between."""
    kept: list[Gaussian] = []
    for g in sorted(found, key=lambda g: -g.elbo):
        if kept and g.elbo < kept[0].elbo - 10:
            break
        if all(_apart(target, g, h) for h in kept):
            kept.append(g)
    return kept


def _apart(target: Target, g: Gaussian, h: Gaussian) -> bool:
    """Whether two means are many sds apart and the density between them is far lower."""
    far = min(torch.linalg.solve(k.factor, g.mean - h.mean).norm() for k in (g, h))
    if far < 3 * math.sqrt(len(g.mean)):
        return False
    way = torch.linspace(0, 1, 17).to(g.mean)[:, None]
    value = heights(target, g.mean + way * (h.mean - g.mean))
    return bool(value[1:-1].min() < min(value[0], value[-1]) - VALLEY)


@torch.no_grad()
def heights(target: Target, u: Tensor) -> Tensor:
    """Log-density ``(n,)`` of u ``(n, k)`` in float64; -inf where it is NaN or +inf."""
    value = target.unconstrained_log_prob(u).double()
    return torch.where(value < math.inf, value, -math.inf)


@torch.no_grad()
def elbo(target: Target, mean: Tensor, factor: Tensor, z: Tensor) -> Tensor:
    """ELBO ``(...)`` in nats of Gaussians ``(..., k)``, ``(..., k, k)`` over z ``(n, k)``.

    -inf if more than a tenth of the points are not finite.
    """
    k = mean.shape[-1]
    points = mean[..., None, :] + z @ factor.mT
    value = target.unconstrained_log_prob(points.reshape(-1, k)).double().view(points.shape[:-1])
    good = value.isfinite()
    # log q draw by draw, not its mean: for a Gaussian target the difference then has no noise
    ratios = torch.where(good, value + z.square().sum(1) / 2, 0.0).sum(-1) / good.sum(-1)
    log_scale = torch.linalg.slogdet(factor)[1] + k / 2 * math.log(2 * math.pi)
    return torch.where(good.double().mean(-1) < 0.9, -math.inf, ratios + log_scale)


def differences(target: Target, u: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value ``(m,)``, gradient ``(m, k)`` and Hessian ``(m, k, k)`` at u ``(m, k)``.

    The Hessian by central differences of the gradient over ``steps`` ``(m, k)``.
    """
    m, k = u.shape
    shifts = torch.diag_embed(steps)
    points = torch.cat([u[:, None] + shifts, u[:, None] - shifts, u[:, None]], 1)
    value, gradient = target.value_and_gradient(points.view(-1, k))
    value, gradient = value.double().view(m, -1), gradient.double().view(m, -1, k)
    hessian = (gradient[:, :k] - gradient[:, k:-1]) / (2 * steps[..., None])
    return value[:, -1], gradient[:, -1], (hessian + hessian.mT) / 2


def local_factors(hessian: Tensor) -> Tensor:
    """Factors of |-H|^-1, with eigenvalues taken as absolute and kept from zero; (m, k, k)."""
    scale = hessian.diagonal(dim1=1, dim2=2).abs()
    scale = torch.where(scale > 0, scale, 1.0).rsqrt()[..., None]
    values, vectors = torch.linalg.eigh(-hessian * scale * scale.mT)
    result: Tensor = scale * vectors * values.abs().clamp_min(1e-6).rsqrt()[:, None]
    return result


def climb(
    target: Target, starts: Tensor, z: Tensor, late: Callable[[], bool]
) -> list[Gaussian]:
    """The best local Gaussian on the uphill path from each of ``starts`` that has one."""
    fine = 1e-4 if target.dtype == torch.float64 else 1e-2
    u, steps = starts, torch.full_like(starts, fine)
    lengths = torch.tensor([2.0**-k for k in range(-2, 12)]).to(u)[:, None]
    mean, factor = u.clone(), torch.diag_embed(steps)
    height = u.new_full((len(u),), -math.inf)
    worse = height.new_zeros(len(u))  # steps since the best
    on = torch.arange(len(u), device=u.device)  # paths that still climb
    for _ in range(CLIMB_STEPS):
        value, gradient, hessian = differences(target, u, steps)
        known = hessian.isfinite().all((1, 2)) & gradient.isfinite().all(1)
        if not bool(known.any()):
            break
        u, value, gradient, on = u[known], value[known], gradient[known], on[known]
        factors = local_factors(hessian[known])
        here = elbo(target, u, factors, z)
        better = here > height[on]
        worse[on] = torch.where(better, 0, worse[on] + 1)
        rows = on[better]
        mean[rows], factor[rows], height[rows] = u[better], factors[better], here[better]
        ahead = (factors @ (factors.mT @ gradient[..., None]))[..., 0]
        points = u[:, None] + lengths * ahead[:, None]
        highest, at = heights(target, points.view(-1, u.shape[1])).view(len(u), -1).max(1)
        going = ((gradient * ahead).sum(1) >= 1e-6) & (worse[on] < 10) & (highest > value)
        if late() or not bool(going.any()):
            break
        u, on = points[going, at[going]], on[going]
        sds = factors[going].square().sum(2).sqrt()
        steps = (1e-2 * sds).clamp(min=fine * 1e-4, max=1.0)
    found = zip(mean, factor, height.tolist(), strict=True)
    return [Gaussian(*g) for g in found if math.isfinite(g[2])]


@torch.no_grad()
def refine(
    target: Target, start: Gaussian, generator: torch.Generator, late: Callable[[], bool]
) -> Gaussian:
    """Full-rank Gaussian reverse KL by natural gradients, estimated by path gradients.

    In coordinates where q is standard normal, with s the gradient of log p - log q: the mean moves
    along E s and the precision I along -E s z^T, a Newton step for a rate of one (compare Khan and
    Rue 2023, The Bayesian learning rule, arXiv:2107.04562). Both vanish draw by draw at a target
    that is Gaussian.
    """
    k = len(start.mean)
    mean, factor = start.mean, start.factor
    for step in range(REFINE_STEPS):
        z = torch.randn(max(DRAWS, 2 * k), k, generator=generator, dtype=torch.float64).to(mean)
        z = torch.cat([z, -z])
        _, gradient = target.value_and_gradient(mean + z @ factor.T)
        score = gradient.double() @ factor + z
        good = score.isfinite().all(1)
        if late() or not bool(good.any()):
            break
        score, z = score[good], z[good]
        norm = score.norm(dim=1)
        score = score * (10 * norm.median() / norm.clamp_min(1e-300)).clamp(max=1)[:, None]
        rate = RATE * 0.5 * (1 + math.cos(math.pi * step / REFINE_STEPS))
        bend = score.T @ z / len(z)
        values, vectors = torch.linalg.eigh((bend + bend.T) / 2)
        stretch = (1 - (rate * values).clamp(max=0.75)).rsqrt()
        factor = factor @ (vectors * stretch)
        shift = rate * stretch * (vectors.T @ score.mean(0))
        mean = mean + factor @ (shift * (math.sqrt(k) / shift.norm()).clamp(max=1))
    z = torch.randn(4 * DRAWS, k, generator=generator, dtype=torch.float64).to(mean)
    candidates = [
        Gaussian(m, f, float(elbo(target, m, f, z)))
        for m, f in ((mean, factor), (start.mean, start.factor))
    ]
    return max(candidates, key=lambda g: g.elbo)
