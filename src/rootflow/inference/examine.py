"""Before a fit: does the callable behave as a log-density, and where might its mass lie?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .target import Target, TargetError

__all__ = ["examine", "require_proper"]

ROWS = 13
HUGE = 1e30  # unconstrained coordinates beyond which nothing can be resolved
SPREADS = (1.0, 0.1, 10.0, 0.01)  # of the first points around zero, in unconstrained units


def examine(target: Target, generator: torch.Generator, device: torch.device) -> Tensor:
    """Try the target at random points; the good ones, ``(n, free_features)`` float64, best first.

    Raises TargetError for whatever is no log-density: values that are not numbers, constant, those
    of a probability, mixed between rows, without gradient, or with a wrong supplied one.
    """
    shape = (ROWS, target.free_features)
    z = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    good, values, near = z[:0], z[:0, 0], 0
    for spread in SPREADS:
        u = spread * z
        with torch.no_grad():
            value = target.unconstrained_log_prob(u).double()
        finite = value.isfinite()
        good, values = torch.cat([good, u[finite]]), torch.cat([values, value[finite]])
        near += int((~finite).sum()) if spread <= 1 else 0
        if spread == 1.0:
            _same_alone(target, u, value)
    if not len(good):
        with torch.no_grad():
            inner, outer = target.log_prob(target.constrain(z)[0]), target.constrain(z)[1]
        kinds = f"{int(inner.isnan().sum())} NaN, {int(inner.isinf().sum())} infinite"
        raise TargetError(
            f"{target.name}: none of {ROWS * len(SPREADS)} points has a finite log-density (of "
            f"{ROWS}: {kinds}, {int((~outer.isfinite()).sum())} outside the map of the support); "
            "check the density there, and that support says where parameters live"
        )
    if near > ROWS * (len(SPREADS) - 1) / 4:
        raise TargetError(
            f"{target.name}: {near} of {ROWS * (len(SPREADS) - 1)} points around zero have no "
            "finite log-density; does support say where the parameters live (positive, an interval "
            "...)?"
        )
    with torch.no_grad():
        own = target.log_prob(target.constrain(good)[0])
        far = target.log_prob(target.constrain(30 * good[:ROWS])[0])
    value, gradient = target.value_and_gradient(good)
    if bool((own == own[0]).all()) and bool((far == own[0]).all()):
        unbounded = bool((gradient.abs().sum(0) == 0).any())
        if unbounded or not float(own[0]):
            raise TargetError(
                f"{target.name}: log_prob is {float(own[0]):g} at all points tried; a constant is "
                "no density (was a probability returned, and rounded to zero, instead of its log?)"
            )
    if bool((own >= 0).all()) and bool((far >= 0).all()) and float(far.max()) < 0.1 * float(
        own.max()
    ):
        raise TargetError(
            f"{target.name}: log_prob is never negative and falls to zero far out, from "
            f"{float(own.max()):.3g} to {float(far.max()):.3g}; it looks like a probability "
            "density: return its logarithm"
        )
    if not bool(gradient.isfinite().all(1).any()):
        raise TargetError(
            f"{target.name}: the gradient of log_prob is NaN or infinite at each of {len(good)} "
            "points where the value is finite (a square root or norm at zero, a where with a bad "
            "branch?)"
        )
    if bool((gradient == 0).all()):
        raise TargetError(f"{target.name}: the gradient of log_prob is zero at all points tried")
    if target.supplied_gradient is not None:
        _same_slope(target, good[: min(3, len(good))])
    return good[values.argsort(descending=True)]


def _same_alone(target: Target, u: Tensor, value: Tensor) -> None:
    """Raise if the value of a row depends on the rows beside it."""
    with torch.no_grad():
        alone = torch.cat([target.unconstrained_log_prob(row[None]) for row in u[:3]])
    both = value[:3].isfinite() & alone.isfinite()
    if not torch.allclose(alone[both].double(), value[:3][both], rtol=1e-3, atol=1e-3):
        raise TargetError(
            f"{target.name}: the value of a row changes with the other rows of the batch, from "
            f"{float(value[0]):.6g} to {float(alone[0]):.6g}; sum over parameters (dim=-1), not "
            "over rows, or give batched=False for single points"
        )


def _same_slope(target: Target, u: Tensor) -> None:
    """Raise if a supplied gradient is not that of the value."""
    _, gradient = target.value_and_gradient(u)
    step = 1e-5 if target.dtype == torch.float64 else 1e-2
    with torch.no_grad():
        for k in range(u.shape[1]):
            shift = torch.zeros_like(u)
            shift[:, k] = step
            ends = [target.unconstrained_log_prob(u + s * shift) for s in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * step)
            if not torch.allclose(slope, gradient[:, k].to(slope), rtol=0.05, atol=0.05):
                raise TargetError(
                    f"{target.name}: gradient= does not fit log_prob: along "
                    f"{target.free_columns()[k]} it gives {float(gradient[0, k]):.4g}, differences "
                    f"of the value give {float(slope[0]):.4g}"
                )


@torch.no_grad()
def require_proper(target: Target, mean: Tensor, factor: Tensor) -> None:
    """Raise if the density does not fall off far from the Gaussian mean + factor z.

    Along a ray of length t, a density that can be normalised must fall faster than 1 / t. It does
    not if the sum of its logarithm and log t still rises, and no lower than in the centre.
    """
    k = len(mean)
    if not bool((mean.abs() < HUGE).all() and factor.isfinite().all()):
        at = int(mean.abs().nan_to_num(nan=math.inf).argmax())
        raise TargetError(
            f"{target.name}: the density still rises where {target.free_columns()[at]} is "
            f"{float(mean[at]):.2g}; it cannot be normalised: is the sign of log_prob right?"
        )
    reach = torch.tensor([1e2, 1e4, 1e6, 1e8], dtype=mean.dtype, device=mean.device)
    # The Gaussian's own axes, and those of the coordinates at its sds: rounding tilts the former.
    axes = torch.cat([factor.T, torch.diag(factor.square().sum(1).sqrt())])
    axes = torch.cat([axes, -axes])  # (4k, k), one ray each
    points = mean + reach[:, None, None] * axes
    value = target.unconstrained_log_prob(points.reshape(-1, k)).double().reshape(4, -1)
    height = value + reach.log()[:, None]
    centre = target.unconstrained_log_prob(mean[None])[0]
    for ray in range(len(axes)):
        known = height[:, ray][~height[:, ray].isnan()]
        rises = len(known) > 1 and bool(known[-1] > known[-2] + 1 and known[-1] > centre - 50)
        if rises or bool((known == math.inf).any()):
            k = int(axes[ray].abs().argmax())
            way = "rises" if axes[ray][k] > 0 else "falls"
            raise TargetError(
                f"{target.name}: the density does not fall off as {target.free_columns()[k]} "
                f"{way}; it cannot be normalised, and the ELBO would grow for ever: add a prior, "
                "or bound the parameter by support"
            )
