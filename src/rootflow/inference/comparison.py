"""Draws of q beside reference draws of the target: moments, coverage and two-sample tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..store import plain

__all__ = ["Comparison", "Estimate", "ParameterError", "Reference", "compare_draws"]

# What a comparison calls good, and what it calls wrong; beyond means by more than two MCSEs.
GOOD_SHIFT, WRONG_SHIFT = 0.1, 0.5  # reference standard deviations
GOOD_RATIO, WRONG_RATIO = 0.1, 0.5  # |log(sd of q / sd of the reference)|
GOOD_P = 0.005  # below, the two-sample test tells both sets of draws apart
WRONG_UNCOVERED = 0.01  # share of reference draws where q is smaller than at 99.9 % of its own
UNCOVERED_LEVEL = 0.001


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate, its standard error, and the number of draws behind it."""

    value: float
    se: float
    draws: int

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = plain(vars(self))
        return found


@dataclass(frozen=True)
class Reference:
    """Independent draws ``(n, d)`` of ``names``; ``means`` and ``sds`` ``(d,)`` of ``count`` draws.

    ``draws`` are some of the ``count`` ones. Everything is float64.
    """

    names: tuple[str, ...]
    draws: Tensor
    means: Tensor
    sds: Tensor
    count: int


@dataclass(frozen=True)
class ParameterError:
    """``shift``: (mean of q - reference mean) / reference sd; ``sd_ratio``: sd of q / of it."""

    name: str
    shift: float
    shift_se: float
    sd_ratio: float
    sd_ratio_se: float


@dataclass(frozen=True)
class Comparison:
    """Draws of q against reference draws.

    ``mmd2``: unbiased squared maximum mean discrepancy, Gaussian kernel with bandwidth ``scale``
    (median distance of the pooled draws, in reference sds); may be negative. ``p_value``: its place
    among those of ``permutations`` of the pooled draws.
    ``log_q_on_reference``: mean log q over the reference draws: the cross entropy, negated.
    ``uncovered``: share of reference draws whose log q lies below the 0.1 % quantile of log q at
    q's own draws: about 0.001 if q is right, the mass of the regions that q misses otherwise.
    """

    parameters: tuple[ParameterError, ...]
    draws: int
    reference_draws: int
    mmd2: float
    p_value: float
    scale: float
    permutations: int
    seed: int
    log_q_on_reference: Estimate | None = None
    uncovered: float | None = None

    def worst(self) -> tuple[ParameterError, ParameterError]:
        """The parameters with the largest shift and with the worst ratio of sds."""
        by_ratio = max(self.parameters, key=lambda p: log_size(p.sd_ratio))
        return max(self.parameters, key=lambda p: abs(p.shift)), by_ratio

    def level(self) -> tuple[int, str]:
        """0 good, 1 usable with importance weights, 2 do not trust; and the reasons in words.

        Wrong: a mean off by more than 0.5 sd, an sd by more than a factor exp(0.5), or more than
        1 % of the reference draws where q has none. Good: means within 0.1 sd, sds within 10 %,
        p-value of the MMD test at least 0.005. Each limit is widened by two standard errors.
        """
        level = 0
        for p in self.parameters:
            ratio_se = p.sd_ratio_se / max(p.sd_ratio, 1e-300)
            for size, se, good, wrong in (
                (abs(p.shift), p.shift_se, GOOD_SHIFT, WRONG_SHIFT),
                (log_size(p.sd_ratio), ratio_se, GOOD_RATIO, WRONG_RATIO),
            ):
                over = size - 2 * se
                level = max(level, 2 if over > wrong else 1 if over > good else 0)
        shift, ratio = self.worst()
        words = [
            f"against {self.reference_draws:,} reference draws the worst mean is off by "
            f"{abs(shift.shift):.2f} sd ({shift.name}), the worst sd by a factor "
            f"{ratio.sd_ratio:.2f} ({ratio.name})",
            f"two-sample p-value {self.p_value:.3f}",
        ]
        level = max(level, 1 if self.p_value < GOOD_P else 0)
        if self.uncovered is not None:
            noise = 2 * math.sqrt(UNCOVERED_LEVEL / self.reference_draws)
            missed = self.uncovered > WRONG_UNCOVERED + noise
            if missed:
                words.append(f"{self.uncovered:.1%} of the reference lies where q has no draws")
            level = max(level, 2 if missed else 0)
        return level, "; ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Plain figures; None for what was not computed or is not finite."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def log_size(ratio: float) -> float:
    """|log ratio|, infinite for a collapsed parameter."""
    return abs(math.log(ratio)) if ratio > 0 else math.inf


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, its standard error, sd, its standard error, each ``(d,)``, of rows ``(n, d)``."""
    n, mean, sd = len(x), x.mean(0), x.std(0)
    noise = (x - mean).square().std(0) / math.sqrt(n)  # of the variance
    return mean, sd / math.sqrt(n), sd, noise / (2 * sd).clamp(min=1e-300)


def rows(x: Tensor, name: str, features: int | None = None) -> Tensor:
    if x.ndim != 2 or len(x) < 2 or features not in (None, x.shape[1]):
        wanted = "(n, d)" if features is None else f"(n, {features})"
        raise ValueError(f"compare_draws: {name} must be {wanted} with n > 1, got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"compare_draws: {name} holds NaN or infinity")
    return x.detach().to(torch.float64)


def compare_draws(
    draws: Tensor,
    reference: Tensor | Reference,
    names: Sequence[str] | None = None,
    *,
    log_q_draws: Tensor | None = None,
    log_q_reference: Tensor | None = None,
    seed: int = 0,
    permutations: int = 200,
    most: int = 1000,
) -> Comparison:
    """Compare independent draws ``(n, d)`` of q with reference draws ``(m, d)`` of the target.

    ``names``: of the columns of a tensor. ``log_q_draws`` ``(n,)`` and ``log_q_reference``
    ``(m,)``: log q at both sets, for coverage. The test uses ``most`` draws of each set, chosen by
    ``seed``; time grows with the square of their number. Resampled draws repeat themselves, which
    breaks the permutations: give independent ones.
    Raises: ValueError for wrong shapes, non-finite draws or a constant reference.
    """
    x = rows(draws, "draws")
    if isinstance(reference, Tensor):
        y = rows(reference, "reference", x.shape[1])
        columns = tuple(names or (f"x[{i + 1}]" for i in range(x.shape[1])))
        reference = Reference(columns, y, y.mean(0), y.std(0), len(y))
    y, mean, sd = reference.draws, reference.means, reference.sds
    if len(reference.names) != x.shape[1]:
        raise ValueError(f"compare_draws: {len(reference.names)} names for {x.shape[1]} columns")
    if not (sd > 0).all():
        raise ValueError("compare_draws: a column of reference is constant")
    mean_q, mean_q_se, sd_q, sd_q_se = moments(x)
    shrink = math.sqrt(len(y) / reference.count)  # their moments may be of more draws
    mean_se, sd_se = (shrink * moments(y)[k] for k in (1, 3))
    ratio = sd_q / sd
    errors = torch.stack([
        (mean_q - mean) / sd, torch.hypot(mean_q_se, mean_se) / sd,
        ratio, torch.hypot(sd_q_se / sd, ratio * sd_se / sd),
    ], -1)  # fmt: skip
    parameters = tuple(
        ParameterError(name, *row)
        for name, row in zip(reference.names, errors.tolist(), strict=True)
    )
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.cat([chosen(x, most, generator), chosen(y, most, generator)]) / sd
    first = min(len(x), most)
    groups = shuffled_groups(first, len(pooled) - first, permutations, generator)
    mmds, scale = kernel_discrepancies(pooled, groups)
    p = float((mmds >= mmds[0]).double().mean())
    log_q = None if log_q_reference is None else log_q_reference.detach().double()
    uncovered = None
    if log_q is not None and log_q_draws is not None:
        edge = log_q_draws.detach().double().quantile(UNCOVERED_LEVEL)
        uncovered = float((log_q < edge).double().mean())
    over_reference = None
    if log_q is not None:
        error = float(log_q.std()) / math.sqrt(len(log_q))
        over_reference = Estimate(float(log_q.mean()), error, len(log_q))
    return Comparison(
        parameters, len(x), reference.count, float(mmds[0]), p, scale, permutations, seed,
        over_reference, uncovered,
    )  # fmt: skip


def chosen(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most so many of the rows, whatever order they come in."""
    return x if len(x) <= most else x[torch.randperm(len(x), generator=generator)[:most]]


def shuffled_groups(n: int, m: int, permutations: int, generator: torch.Generator) -> Tensor:
    """Which rows count as the first sample, ``(1 + permutations, n + m)``; row 0 is the truth."""
    truth = torch.cat([torch.ones(n, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)])
    shuffles = [truth[torch.randperm(n + m, generator=generator)] for _ in range(permutations)]
    return torch.stack([truth, *shuffles])


def kernel_discrepancies(pooled: Tensor, groups: Tensor, chunk: int = 256) -> tuple[Tensor, float]:
    """Unbiased MMD^2 for each grouping, ``(groupings,)``, and the bandwidth.

    Gretton et al. 2012 (JMLR 13:723), equation 3. Memory is chunk x rows, whatever the dimension.
    """
    some = pooled[:: max(1, len(pooled) // 1000)]
    scale = float(torch.pdist(some).median())
    scale = scale if scale > 0 else 1.0
    within = torch.zeros_like(groups)  # row sums of the kernel over the first group, without self
    every = torch.zeros_like(pooled[:, 0])
    for start in range(0, len(pooled), chunk):
        part = slice(start, start + chunk)
        kernel = torch.exp(-torch.cdist(pooled[part], pooled).square() / (2 * scale**2))
        kernel[torch.arange(len(kernel)), torch.arange(start, start + len(kernel))] = 0
        within[:, part] = groups @ kernel.T
        every[part] = kernel.sum(1)
    n = groups[0].sum()
    m = groups.shape[1] - n
    first = (groups * within).sum(1)
    across = ((1 - groups) * within).sum(1)
    second = every.sum() - first - 2 * across
    return first / (n * (n - 1)) + second / (m * (m - 1)) - 2 * across / (n * m), scale
