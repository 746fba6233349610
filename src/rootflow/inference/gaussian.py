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
REFINE_STEPS = 60  # of a round
ROUNDS = 12
LITTLE = 0.1  # nats
EXACT = 1e-4
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
    found: list[Gaussian] = []
    for start in _far_apart(starts):
        if found and late():
            break
        best = climb(target, start, z, late)
        if best is not None:
            found.append(best)
    several = _distinct(target, found)
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
    both = Gaussian(mean, factor, elbo(target, mean, factor, z), len(several))
    return _judged(target, both, generator)


@torch.no_grad()
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
        ratios = target.unconstrained_log_prob(u).double() - log_q
        ratios = torch.where(ratios < math.inf, ratios, -math.inf)  # NaN too
        weights = ratios.softmax(0).clamp(max=COVER_DRAWS**-0.5)
        weights = weights / weights.sum()
        mean = weights @ u
        factor, failed = torch.linalg.cholesky_ex((u - mean).T @ (weights[:, None] * (u - mean)))
        if int(failed) or not float(weights.square().sum()) < 1 / (10 * k):
            break
        found = replace(found, mean=mean, factor=factor)
    return _judged(target, found, generator)


def _round(target: Target, starts: Tensor, z: Tensor) -> Gaussian:
    """The best of some Gaussians of equal sds, around zero and around the best start."""
    eye = torch.eye(starts.shape[1]).to(starts)
    tried = [(m, s * eye) for m in (starts[0], 0 * starts[0]) for s in (0.1, 1.0)]
    return max((Gaussian(m, f, elbo(target, m, f, z)) for m, f in tried), key=lambda g: g.elbo)


def _judged(target: Target, found: Gaussian, generator: torch.Generator) -> Gaussian:
    """The same Gaussian with its ``share``, over fresh draws."""
    z = torch.randn(JUDGED, len(found.mean), generator=generator, dtype=torch.float64)
    z = z.to(found.mean)
    with torch.no_grad():
        value = target.unconstrained_log_prob(found.mean + z @ found.factor.T).double()
    ratios = value + z.square().sum(1) / 2
    ratios = torch.where(ratios < math.inf, ratios, -math.inf)  # NaN and +inf count as zero weight
    if not bool(ratios.isfinite().any()):
        return replace(found, share=0.0)
    return replace(found, share=importance_ess(psis(ratios).log_weights) / len(z))


def _far_apart(starts: Tensor) -> list[Tensor]:
    """The best start, zero, and others each as far as can be from those before.

    Mirror images of the starts count as well, so that no side is left out.
    """
    chosen = [starts[0], torch.zeros_like(starts[0])]
    starts = torch.cat([starts, -starts])
    while len(chosen) < min(CLIMBS, len(starts)):
        gaps = torch.cdist(starts, torch.stack(chosen)).amin(1)
        chosen.append(starts[gaps.argmax()])
    return chosen


def _distinct(target: Target, found: list[Gaussian]) -> list[Gaussian]:
    """Those within 10 nats of the best, one for each mode: apart, with a valley in between."""
    kept: list[Gaussian] = []
    for g in sorted(found, key=lambda g: -g.elbo):
        if kept and g.elbo < kept[0].elbo - 10:
            break
        if all(_apart(target, g, h) for h in kept):
            kept.append(g)
    return kept


@torch.no_grad()
def _apart(target: Target, g: Gaussian, h: Gaussian) -> bool:
    """Whether two means are many sds apart and the density between them is far lower."""
    far = min(torch.linalg.solve(k.factor, g.mean - h.mean).norm() for k in (g, h))
    if far < 3 * math.sqrt(len(g.mean)):
        return False
    way = torch.linspace(0, 1, 17).to(g.mean)[:, None]
    value = target.unconstrained_log_prob(g.mean + way * (h.mean - g.mean)).double()
    return bool(value[1:-1].min() < min(value[0], value[-1]) - VALLEY)


@torch.no_grad()
def elbo(target: Target, mean: Tensor, factor: Tensor, z: Tensor) -> float:
    """ELBO in nats over the given z; -inf if more than a tenth of the points are not finite."""
    value = target.unconstrained_log_prob(mean + z @ factor.T).double()
    good = value.isfinite()
    if float(good.double().mean()) < 0.9:
        return -math.inf
    # log q draw by draw, not its mean: for a Gaussian target the difference then has no noise
    log_scale = torch.linalg.slogdet(factor)[1] + len(mean) / 2 * math.log(2 * math.pi)
    return float((value + z.square().sum(1) / 2)[good].mean() + log_scale)


def curvature(target: Target, u: Tensor, steps: Tensor) -> Tensor | None:
    """The Hessian at u by central differences of the gradient, (k, k); None if not finite."""
    shifts = torch.diag(steps)
    _, g = target.value_and_gradient(torch.cat([u + shifts, u - shifts]))
    k = len(u)
    hessian = (g[:k] - g[k:]).double() / (2 * steps[:, None])
    return (hessian + hessian.T) / 2 if bool(hessian.isfinite().all()) else None


def local_factor(hessian: Tensor) -> Tensor:
    """A factor of |-H|^-1, with eigenvalues taken as absolute and kept from zero; (k, k)."""
    scale = hessian.diagonal().abs()
    scale = torch.where(scale > 0, scale, 1.0).rsqrt()
    values, vectors = torch.linalg.eigh(-hessian * scale * scale[:, None])
    result: Tensor = scale[:, None] * vectors * values.abs().clamp_min(1e-6).rsqrt()
    return result


def climb(
    target: Target, start: Tensor, z: Tensor, late: Callable[[], bool]
) -> Gaussian | None:
    """The best local Gaussian on an uphill path from ``start``; None if there is none."""
    fine = 1e-4 if target.dtype == torch.float64 else 1e-2
    u, steps = start.double(), torch.full_like(start, fine).double()
    lengths = torch.tensor([2.0**-k for k in range(-2, 12)], dtype=u.dtype, device=u.device)
    best, worse = None, 0
    for _ in range(CLIMB_STEPS):
        hessian = curvature(target, u, steps)
        if hessian is None:
            break
        factor = local_factor(hessian)
        here = Gaussian(u, factor, elbo(target, u, factor, z))
        if best is None or here.elbo > best.elbo:
            best, worse = here, 0
        else:
            worse += 1
        value, gradient = target.value_and_gradient(u[None])
        ahead = factor @ (factor.T @ gradient[0].double())
        gain = float(gradient[0].double() @ ahead)
        if gain < 1e-6 or worse >= 10 or late():
            break
        points = u + lengths[:, None] * ahead
        with torch.no_grad():
            values = target.unconstrained_log_prob(points).double().nan_to_num(nan=-math.inf)
        values = torch.where(values == math.inf, -math.inf, values)
        if not float(values.max()) > float(value[0]):
            break
        u = points[values.argmax()]
        sds = factor.square().sum(1).sqrt()
        steps = (1e-2 * sds).clamp(min=fine * 1e-4, max=1.0)
    return None if best is None or not math.isfinite(best.elbo) else best


def refine(
    target: Target, start: Gaussian, generator: torch.Generator, late: Callable[[], bool]
) -> Gaussian:
    """Full-rank Gaussian reverse KL by path gradients, in the coordinates of ``start``."""
    k = len(start.mean)
    shift = torch.zeros(k, dtype=torch.float64, device=start.mean.device)
    lower, log_diagonal = torch.zeros(k, k).to(shift), torch.zeros(k).to(shift)
    parameters = [shift.requires_grad_(), lower.requires_grad_(), log_diagonal.requires_grad_()]
    averages = [p.detach().clone() for p in parameters]
    # Scores are of order one in these coordinates; the large eps keeps Adam from blowing up noise.
    optimiser = torch.optim.Adam(parameters, lr=0.03, betas=(0.9, 0.99), eps=1e-3)
    for step in range(REFINE_STEPS):
        if late():
            break
        for group in optimiser.param_groups:
            group["lr"] = 0.03 * 0.5 * (1 + math.cos(math.pi * step / REFINE_STEPS))
        z = torch.randn(DRAWS // 2, k, generator=generator, dtype=torch.float64).to(shift)
        z = torch.cat([z, -z])
        factor = torch.tril(lower, -1) + torch.diag(log_diagonal.exp())
        w = shift + z @ factor.T
        u = start.mean + w.detach() @ start.factor.T
        _, gradient = target.value_and_gradient(u)
        # d log q / d w = -factor^-T z; the path gradient leaves out how q itself moves
        score = gradient.double() @ start.factor + torch.linalg.solve(factor.detach().T, z.T).T
        good = score.isfinite().all(1)
        if not bool(good.any()):
            break
        norm = score[good].norm(dim=1)
        if float(norm.max()) < EXACT:  # q is the target; path gradients then vanish draw by draw
            break
        score = score[good] * (10 * norm.median() / norm.clamp_min(1e-300)).clamp(max=1)[:, None]
        loss = -(w[good] * score).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10 * math.sqrt(k))
        optimiser.step()
        decay = min(0.98, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - decay)
    mean = start.mean + start.factor @ averages[0]
    factor = start.factor @ (torch.tril(averages[1], -1) + torch.diag(averages[2].exp()))
    z = torch.randn(4 * DRAWS, k, generator=generator, dtype=torch.float64).to(shift)
    candidates = [
        Gaussian(m, f, elbo(target, m, f, z))
        for m, f in ((mean, factor), (start.mean, start.factor))
    ]
    return max(candidates, key=lambda g: g.elbo)
