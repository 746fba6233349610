r"""Power-series log-determinants for many dimensions: truncated with a bound, or unbiased.

.. math:: \log\det(I + sJ) = \sum_{k \ge 1} \frac{(-1)^{k+1} s^k}{k} \mathrm{tr}\, J^k, \qquad
          \mathrm{tr}\, J^k = E[v^\top J^k v]

for probes v of independent signs; the number of terms is fixed or drawn (roulette). The gradient is
the Neumann form :math:`E[(\sum_k a_k (-1)^{k+1} s^k v^\top J^{k-1})\, dJ\, v]` with the same
weights a_k, so neither value nor gradient keeps more than one evaluation of the network in memory,
however many terms there are.

On images in float32 the estimates are computed in bfloat16 where that is faster, without bias: a
row's estimate is r, or with probability p (one over ``SHARE``) f / p - (1 / p - 1) r, where f is
that of float32. Multiplying by 1 / p - 1, a power of two, commutes with rounding, so the mean over
the coin is f for the series and, by a second coin, for the gradient, which is linear in what it is
given.

Sources: Chen et al. 2019 (arXiv:1906.02735), theorems 1 and 2; Lu et al. 2021 (arXiv:2103.09527),
equations 8 and 9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..lipschitz import CertifiedNet, Tape, Weights, bfloat16_gains
from ..solvers import Problem, find_root
from .exact import Solve, chunks, gather, inverse_and_log_det, polish, pull, transposed_product

__all__ = ["METHODS", "Series", "estimated", "truncation_bound"]

METHODS = ("probe", "truncated", "geometric", "poisson")
RATE = 2.0  # mean of the Poisson part
SHARE = 17  # a row in so many is computed in float32 as well; one more than a power of two


def truncation_bound(features: int, lipschitz: float, terms: int) -> float:
    """Largest error in nats of log det(I + J) cut after ``terms``, J of norm ``lipschitz``."""
    return features * lipschitz ** (terms + 1) / ((terms + 1) * (1 - lipschitz))


@dataclass(frozen=True)
class Series:
    """Which terms of the series are summed, and with which weights.

    ``method``:

    - "probe": no series. The value is exact, and only the gradient is an unbiased estimate, from
      the exact inverse and the probes; a backward pass then costs as much as in one dimension.
    - "truncated": ``terms`` terms, biased by at most ``truncation_bound``.
    - "geometric" and "poisson": ``terms`` leading terms always, then a random number N of further
      ones, term j of them weighted 1 / P(N >= j), which is unbiased. Geometric tail:
      P(N >= j) = q^j with q between rho^2 and 1, where rho is the certified bound; the variance is
      finite exactly because q > rho^2. A Poisson tail alone has infinite variance for every
      rho > 0, so one draw in ten is taken from that geometric tail instead, and the weights are
      those of the mixture.

    ``probes`` are random signs for each row. With ``save_memory`` the backward pass evaluates the
    network once more, so that nothing of it is held until then; without, everything that its
    gradient needs is built in the forward pass and kept. ``rounded`` lets images with
    ``save_memory`` be estimated in bfloat16 where that is faster, without bias.
    """

    method: str = "geometric"
    terms: int = 4
    probes: int = 1
    save_memory: bool = True
    rounded: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        if self.method not in METHODS:
            raise ValueError(
                f"logdet={self.method!r} is unknown; "
                f"choose one of auto, exact, {', '.join(METHODS)}"
            )
        if self.terms < 1 or self.probes < 1:
            raise ValueError(f"terms={self.terms} and probes={self.probes} must be at least 1")

    @staticmethod
    def leading(lipschitz: float) -> int:
        """The first term that, by the bound, is at most 0.3 nats per dimension."""
        k = 1
        while lipschitz**k / k > 0.3:
            k += 1
        return k

    def evaluation(self, lipschitz: float) -> Series:
        """The same without bias and with so many terms that the rest stays below 1e-4 nats a row.

        Per dimension, and by ``truncation_bound``; what remains is the noise of the probes.
        """
        terms = 1
        while truncation_bound(1, lipschitz, terms) > 1e-4:
            terms += 1
        terms = max(terms, self.terms)
        return replace(self, method="geometric", terms=terms, rounded=False)

    @staticmethod
    def geometric_ratio(lipschitz: float) -> float:
        """The q of the geometric tail, rho^1.5: little work, since real terms shrink faster."""
        return math.pow(lipschitz, 1.5)

    def survival(self, j: int, lipschitz: float) -> float:
        """P(N >= j)."""
        geometric = self.geometric_ratio(lipschitz) ** j
        if self.method == "geometric":
            return geometric
        log_rate = math.log(RATE)
        below = sum(math.exp(-RATE + i * log_rate - math.lgamma(i + 1)) for i in range(min(j, 40)))
        return 0.9 * max(0.0, 1 - below) + 0.1 * geometric

    def draw(self, lipschitz: float, generator: torch.Generator) -> list[float] | None:
        """Weights a_1, a_2, ... of the terms to sum; None for "probe"."""
        if self.method == "probe":
            return None
        weights = [1.0] * self.terms
        if self.method == "truncated":
            return weights
        uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
        j = 1  # N is the largest j with P(N >= j) > uniform
        while (p := self.survival(j, lipschitz)) > uniform:
            weights.append(1 / p)
            j += 1
        return weights


def _adjoint(tape: Tape, root: int, lipschitz: float, v: Tensor) -> Tensor:
    """The u with u + root J^T u = v, by the safeguarded solver, to a relative tolerance."""
    size: Tensor = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    size = size.clamp_min(torch.finfo(v.dtype).tiny)

    def residual(u: Tensor, v: Tensor, *slopes: Tensor) -> Tensor:
        return torch.add(u - v, tape.pull(u, slopes), alpha=root)

    tensors = (v / size, *tape.slopes)
    problem = Problem(residual, tensors, frozenset(range(len(tensors))), lipschitz)
    tol = None if tape.dtype == v.dtype else torch.finfo(tape.dtype).eps
    return find_root(problem, v / size, method="anderson", tol=tol, adjoint="none").value * size


def _summed(
    tape: Tape, probes: Tensor, signs: Sequence[int], coefficients: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Series ``(sign, rows)``, and the u ``(sign, *probes.shape)`` of its gradient u^T dJ v."""
    log_dets = probes.new_zeros(len(signs), len(probes))
    left = probes.new_zeros(len(signs), *probes.shape)
    power = probes
    for k, a in enumerate(coefficients, 1):
        factors = [a * s**k * (-1) ** (k + 1) for s in signs]
        for u, f in zip(left, factors, strict=True):
            u.add_(power, alpha=f)
        power = tape.pull(power)
        trace = (power * probes).sum(-1).mean(-1)
        for out, f in zip(log_dets, factors, strict=True):
            out.add_(trace, alpha=f / k)
    return log_dets, left


class _Estimated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        net: CertifiedNet,
        root: int,
        signs: tuple[int, ...],
        solve: Solve | None,
        coefficients: list[float] | None,
        keep: bool,
        picked: tuple[Tensor, Tensor] | None,
        probes: Tensor,
        at: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights = Weights.rebuild(tensors)
        y = at if solve is None else solve(at, weights)
        rows = chunks(len(at), net, probes.shape[1])
        ctx.inverse, ctx.tapes = None, [None] * len(rows)
        if coefficients is None:  # exact value, only the gradient is probed
            out, jacobian = net.jacobian(y, weights)
            inverses, log_dets = inverse_and_log_det(jacobian, signs)
            pairs = zip(signs, inverses, strict=True)
            left = torch.stack([s * torch.einsum("oib,bpi->bpo", a, probes) for s, a in pairs])
        else:
            values, summed = [], []
            for k, r in enumerate(rows):
                seeds = probes[r] if keep else None
                tape = net.record(y[r], weights.rows(r), seeds, pulls_only=not keep)
                values.append(tape.value)
                ctx.tapes[k] = tape if keep else None
                tape = tape if picked is None else tape.rounded(torch.bfloat16)
                summed.append(_summed(tape, probes[r], signs, coefficients))
            out = torch.cat(values)
            log_dets, left = (torch.cat(part, 1) for part in zip(*summed, strict=True))
            if picked is not None and len(some := picked[0]):
                tape = net.record(y[some], weights.rows(some), pulls_only=True)
                exact = _summed(tape, probes[some], signs, coefficients)
                for part, better in zip((log_dets, left), exact, strict=True):
                    part[:, some] = SHARE * better - (SHARE - 1) * part[:, some]
        if solve is not None:
            if coefficients is None:
                ctx.inverse = inverses[signs.index(root)]
                out = y = polish(y, at, out, root, ctx.inverse)
            else:  # g at y is at hand: one more step of the contraction
                out = y = torch.sub(at, out, alpha=root)
        ctx.net, ctx.root, ctx.implicit, ctx.rows = net, root, solve is not None, rows
        ctx.picked = None if picked is None else picked[1]
        ctx.save_for_backward(y, probes, left, *tensors)
        return out, log_dets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, probes, left, *tensors = ctx.saved_tensors
        grad_out, grad_logs = gradients
        cotangent = (left * grad_logs[..., None, None]).sum(0) / probes.shape[1]
        weights = Weights.rebuild(tensors)

        def part(r: Any, weights: Weights, kept: Tape | None, share: Tensor) -> list[Tensor]:
            tape: Tape = kept or ctx.net.record(y[r], weights.rows(r), probes[r])
            adjoint = None
            if ctx.inverse is not None:
                adjoint = partial(transposed_product, ctx.inverse[..., r])
            elif ctx.implicit:
                adjoint = partial(_adjoint, tape, ctx.root, ctx.net.lipschitz)
            pulled = tape.pull_jacobian(cotangent[r] * share[..., None])
            found = pull(tape, grad_out[r] * share, *pulled, ctx.root, adjoint)
            return [g.to(y.dtype) for g in found]

        some, share, rough = ctx.picked, y.new_ones(len(y), 1), weights
        if some is not None:
            share[some], rough = 1 - SHARE, weights.to(torch.bfloat16)
        pairs = zip(ctx.rows, ctx.tapes, strict=True)
        parts = [part(r, rough, kept, share[r]) for r, kept in pairs]
        if some is None or not len(some):
            return *(None,) * 8, *gather(weights, parts)
        parts.append(part(some, weights, None, share.new_full((1, 1), SHARE)))
        return *(None,) * 8, *gather(weights, parts, some)


def estimated(
    net: CertifiedNet,
    weights: Weights,
    at: Tensor,
    signs: Sequence[int],
    series: Series,
    generator: torch.Generator,
    *,
    root: int = 1,
    solve: Solve | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``logdet.exact``, with the series for the determinant: same arguments, shapes and units.

    All signs share probes and number of terms. Correct for any per-sample weighting of the loss.
    Differentiable once. Work: one vector-Jacobian product per term, about 6 (1 + probes)
    evaluations for the gradient; memory independent of the number of terms and of solver steps.
    """
    coefficients = series.draw(net.lipschitz, generator)
    shape = (at.shape[0], series.probes, at.shape[1])
    coin = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    probes = (2 * coin - 1).to(at)
    picked = None
    images = len(net.grid) > 1
    if coefficients and series.save_memory and series.rounded and images and bfloat16_gains(at):
        draws = torch.randint(SHARE, (2, len(at)), generator=generator, device=generator.device)
        forward, backward = (draws == 0).to(at.device)
        picked = forward.nonzero()[:, 0], backward.nonzero()[:, 0]
    out, log_dets = _Estimated.apply(  # type: ignore[no-untyped-call]
        net, root, tuple(signs), solve, coefficients, not series.save_memory, picked, probes, at,
        *weights.tensors(),
    )  # fmt: skip
    return out, log_dets
