r"""The theory in numbers: slopes that blocks reach, variance of the roulette, what a large c costs.

A coefficient c bounds each of the n linear layers of a network, so rho = c^n bounds the network g
and |J| <= rho for its Jacobian J. Sources: Lu et al. 2021 (arXiv:2103.09527), theorem 2 and
equation 8; Chen et al. 2019 (arXiv:1906.02735), equation 6.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from .. import logdet
from ..data import read_table, split
from ..lipschitz import LipschitzNet
from ..logdet import Series
from ..plots import theory as plots_theory
from ..solvers import METHODS, Problem, find_root
from .fits import build, descend, learn
from .parts import Count, Done, Job, Part, Positive, Row, Settings

__all__ = ["TAILS", "Published", "Theory", "is_finite", "slope_limits", "variance"]

BLOCKS = {"residual": 2, "implicit": 1, "monotone": 1}  # of equal or fewer parameters
BARE = {"actnorm": False, "linear": None}  # the theory is about blocks alone
ROWS = 512  # held-out rows at which a trained block is examined
GROUPS = 20  # of draws, for the standard error of a variance


def slope_limits(name: str, rho: float) -> tuple[float, float]:
    """Least and largest stretch of two residual blocks, or one implicit or monotone block."""
    if name == "residual":
        return (1 - rho) ** 2, (1 + rho) ** 2
    return (1 - rho) / (1 + rho), (1 + rho) / (1 - rho)


@dataclass(frozen=True)
class Published(Series):
    """Published choices of the random number of terms: the same tail for every Lipschitz bound."""

    def survival(self, j: int, lipschitz: float) -> float:
        """P(N >= j), N geometric on 1, 2, ... with success 1/2, or Poisson with mean 2."""
        if self.method == "geometric":
            return 0.5 ** max(j - 1, 0)
        # the tail of a Poisson distribution is an incomplete gamma function
        count, rate = torch.tensor([[j], [2.0]], dtype=torch.float64)
        return float(torch.special.gammainc(count, rate)) if j else 1.0


TAILS: dict[str, Series] = {
    "geometric, ratio from rho": Series("geometric", 2),
    "geometric, ratio 1/2 (published)": Published("geometric", 2),
    "Poisson and geometric": Series("poisson", 10),
    "Poisson, mean 2 (published)": Published("poisson", 10),
}


def variance(jac: Tensor, series: Series | None, rho: float, most: int) -> Tensor:
    r"""Variance (batch,) of one estimate of log det(I + J), in nats squared; J is (batch, d, d).

    With t_k the k-th term for one probe of independent signs and P_k = P(the k-th term is used),
    the second moment is :math:`\sum_{kl} E[t_k t_l] / P_{\min(k, l)}`. The series is cut after
    ``most`` terms. Without a ``series`` all terms are used and only the probe varies.
    """
    k = torch.arange(1, most + 1, dtype=torch.float64)
    used = torch.ones_like(k)
    if series is not None:
        survival = [series.survival(max(j - series.terms, 0), rho) for j in range(1, most + 1)]
        used = torch.tensor(survival, dtype=torch.float64)
        most = int((used > 1e-250).sum())  # beyond, P_k is no longer a number
        k, used = k[:most], used[:most]
    powers = [jac.double()]
    for _ in range(most - 1):
        powers.append(powers[-1] @ powers[0])
    p = torch.stack(powers, 1)  # (batch, k, d, d)
    flat, diagonal = p.flatten(2), p.diagonal(dim1=2, dim2=3)
    trace = diagonal.sum(-1)
    # E[v'Av v'Bv] = tr A tr B + tr AB' + tr AB - 2 sum_i A_ii B_ii for independent signs v
    moment = trace[:, :, None] * trace[:, None] - 2 * diagonal @ diagonal.mT
    moment += flat @ flat.mT + flat @ p.mT.flatten(2).mT
    coefficient = (-1) ** (k + 1) / k
    least = torch.minimum(k[:, None], k).long() - 1
    weighted = moment * coefficient[:, None] * coefficient / used[least]
    found: Tensor = weighted.sum((1, 2)) - (coefficient * trace).sum(1).square()
    return found


def is_finite(series: Series, rho: float, radius: float) -> bool:
    """Whether that variance has a limit: the terms fall faster than the chance of their use.

    ``radius``: spectral radius of J. The ratio of P(N >= j) from j to j + 1 is compared far out,
    where that of a Poisson distribution is nearly zero.
    """
    return radius**2 < series.survival(151, rho) / series.survival(150, rho)


class Theory(Settings):
    """Blocks at each of ``coefficients``: pushed to their slopes, then trained on ``data``.

    ``hidden``: of every network. On the line maps are pushed for ``pushes`` steps to their largest
    and least slope; on the data a flow is fitted for ``seconds``. ``draws`` estimates of
    the log-determinant give its measured variance, ``most`` terms its theory.
    """

    coefficients: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    hidden: tuple[Count, ...]
    activation: str = "sin"
    data: str = "galaxies"
    max_rows: Count = 20_000
    pushes: Count
    seconds: Positive
    steps: Count
    draws: Annotated[int, Field(ge=2 * GROUPS)]
    most: Count = 400
    measuring: Positive = 5.0  # seconds beside a fit, to announce the time

    def minutes(self) -> float:
        each = len(BLOCKS) * (self.seconds + 0.02 * self.pushes + self.measuring)
        return len(self.coefficients) * each / 60

    def parts(self) -> Sequence[Part]:
        shared = self.model_dump(mode="json", exclude={"coefficients"})
        works: tuple[tuple[str, Callable[..., dict[str, Any]]], ...] = (
            ("pushed", self._pushed), ("trained", self._trained)
        )  # fmt: skip
        return [
            Part(
                f"{word}-{name}-{c:g}", {**shared, "part": word, "flow": name, "c": c},
                partial(work, name, c),
            )
            for word, work in works
            for c in self.coefficients
            for name in BLOCKS
        ]  # fmt: skip

    def rho(self, c: float) -> float:
        """Bound of a whole network whose layers are bounded by c."""
        return float(c ** (len(self.hidden) + 1))

    def _options(self, name: str, c: float) -> dict[str, Any]:
        return {**BARE, "blocks": BLOCKS[name], "hidden": self.hidden, "lipschitz": self.rho(c),
                "activation": self.activation}  # fmt: skip

    def _pushed(self, name: str, c: float, job: Job) -> dict[str, Any]:
        """Slopes on a short piece of the line, of a map trained to stretch it and one to shrink it.

        Short, because an image that is sixty times as long must still be where a network is steep.
        """
        x = torch.linspace(-0.01, 0.01, 64).unsqueeze(-1)

        def push(sign: int) -> float:
            flow = build(name, 1, self._options(name, c), job.seed).train()
            descend(lambda: -sign * flow(x)[1].mean(), flow.parameters(), self.pushes, 1e-2, job)
            with torch.no_grad():
                return float((sign * flow.eval()(x)[1].exp()).max() * sign)

        return {"largest": push(1), "least": push(-1)}

    def _trained(self, name: str, c: float, job: Job) -> dict[str, Any]:
        """Fit to the data; stretch of the map, steps of the solvers, variance of the estimates."""
        rows = torch.as_tensor(read_table(self.data, max_rows=self.max_rows).values).float()
        train, validation, test = (rows[part] for part in split(len(rows), 0))
        flow = build(name, rows.shape[1], self._options(name, c), job.seed)
        budget = {"seconds": self.seconds, "steps": self.steps}
        found = learn(flow, train, validation, budget, job.seed, job)[1]
        whiten, *blocks = flow.transform.transforms  # type: ignore[misc]
        with torch.no_grad():
            x = whiten(test[:ROWS])[0]
            begin = time.process_time()
            flow.log_prob(test[:ROWS])
            found["score_ms"] = 1e3 * (time.process_time() - begin)
        z = x.clone().requires_grad_()
        image = z
        for block in blocks:
            image = block(image)[0]
        columns = range(x.shape[1])
        grads = [torch.autograd.grad(image[:, k].sum(), z, retain_graph=True)[0] for k in columns]
        stretch = torch.linalg.svdvals(torch.stack(grads, 1).detach())
        found |= {"least": float(stretch.min()), "largest": float(stretch.max())}
        if name != "implicit":
            return found
        net = blocks[-1].nets[-1]
        methods = [method for method in METHODS if method != "auto"]
        found["solvers"] = {method: _solve(net, x, method) for method in methods}
        found["tails"] = {word: self._vary(net, x[:16], s, job) for word, s in TAILS.items()}
        return found

    @torch.no_grad()
    def _vary(self, net: LipschitzNet, x: Tensor, series: Series, job: Job) -> dict[str, Any]:
        """Measured variance of estimates at x, in float64, beside its theory for the exact J."""
        net, x = deepcopy(net).double(), x.double()
        weights, rho = net.prepare(), net.lipschitz
        jac = net.value_and_jacobian(x, weights)[1].mT
        exact = logdet.exact(net, weights, x, (1,))[1][0]
        finite = is_finite(series, rho, float(torch.linalg.eigvals(jac).abs().max()))
        generator = torch.Generator().manual_seed(job.seed)
        values = []
        for _ in range(self.draws):
            job.stop_if_asked()
            values.append(logdet.estimated(net, weights, x, (1,), series, generator)[1][0])
        estimates = torch.stack(values)  # (draws, rows)
        squares = (estimates - exact).square().mean(1)
        error = (estimates - exact).mean(1)
        means = torch.stack([g.mean() for g in squares.chunk(GROUPS)])
        return {
            "measured": float(squares.mean()), "se": float(means.std() / GROUPS**0.5),
            "theory": float(variance(jac, series, rho, self.most).mean()) if finite else None,
            "probes": float(variance(jac, None, rho, self.most).mean()),
            "bias": float(error.mean()), "bias_se": float(error.std() / self.draws**0.5),
            "norm": float(torch.linalg.matrix_norm(jac, 2).max()),
        }  # fmt: skip

    def summarise(self, done: Mapping[str, Done], job: Job) -> Iterator[Row]:
        good = {key: part.result for key, part in done.items() if part.error is None}
        ranges = {
            (word, name): {
                c: (r["least"], r["largest"])
                for c in self.coefficients
                if (r := good.get(f"{word}-{name}-{c:g}"))
            }
            for word in ("pushed", "trained")
            for name in BLOCKS
        }
        rhos = {c: self.rho(c) for c in self.coefficients}
        job.draw("slopes", plots_theory.slopes(ranges, rhos, slope_limits))
        for word, where in (("pushed", "pushed, on the line"), ("trained", f"fitted: {self.data}")):
            for name, blocks in BLOCKS.items():
                for c in self.coefficients:
                    label = f"{blocks} {name}"
                    yield self._slopes(done[f"{word}-{name}-{c:g}"], where, label, name, c)
        for c in self.coefficients:
            part = good.get(f"trained-implicit-{c:g}")
            if part is not None:
                yield from self._cost(part, c)
                yield from self._variances(part, c)

    def _slopes(self, part: Done, where: str, label: str, name: str, c: float) -> Row:
        labels, measure = {"blocks": label, "map": where, "c": f"{c:g}"}, "largest stretch"
        if part.error is not None:
            return Row(labels=labels, measure=measure, error=part.error)
        low, high = slope_limits(name, self.rho(c))
        r = part.result
        return Row(
            labels=labels, measure=measure, ours=r["largest"],
            more={"limit": high, "least": r["least"], "least limit": low, "rho": self.rho(c)},
        )  # fmt: skip

    def _cost(self, r: Mapping[str, Any], c: float) -> Iterator[Row]:
        """Evaluations until rounding level by method, and the terms that a series needs."""
        rho = self.rho(c)
        terms = next(n for n in range(1, 10**6) if logdet.truncation_bound(1, rho, n) < 1e-3)
        for method, solved in r["solvers"].items():
            yield Row(
                labels={"block": "1 implicit", "c": f"{c:g}", "solver": method},
                measure="evaluations until rounding, mean over rows", ours=solved["mean"],
                more={
                    "most": solved["most"],
                    "bound": solved["bound"] if method == "fixed-point" else None,
                    "ms a 1,000 rows": solved["ms"], "rho": rho,
                    "terms to 0.001 nats a column": float(terms),
                    "score, ms a 1,000 rows": r["score_ms"] * 1000 / ROWS,
                },
            )  # fmt: skip

    def _variances(self, r: Mapping[str, Any], c: float) -> Iterator[Row]:
        rho = self.rho(c)
        worst = torch.full((1, 1, 1), -rho)  # one column; all terms of one sign, as large as can be
        for word, v in r["tails"].items():
            series = TAILS[word]
            yield Row(
                labels={"c": f"{c:g}", "number of terms": word},
                measure="variance of a log-determinant estimate, nats²", ours=v["measured"],
                se=v["se"], exact=v["theory"],
                more={
                    "of the probes alone": v["probes"], "bias": v["bias"], "bias se": v["bias_se"],
                    "norm of J": v["norm"], "rho": rho,
                    "worst J, 50 terms": float(variance(worst, series, rho, 50)),
                    "worst J, 300 terms": float(variance(worst, series, rho, 300)),
                    "worst J finite": float(is_finite(series, rho, rho)),
                },
            )  # fmt: skip


@torch.no_grad()
def _solve(net: LipschitzNet, c: Tensor, method: str) -> dict[str, float]:
    """Evaluations that the rows of y + g(y) = c take, and a bound for the fixed point's."""
    weights = net.prepare()

    def residual(y: Tensor, c: Tensor) -> Tensor:
        return y + net.value(y, weights) - c

    def jacobian(y: Tensor, c: Tensor) -> Tensor:
        return torch.eye(y.shape[1]) + net.value_and_jacobian(y, weights)[1].mT

    problem = Problem(residual, (c,), frozenset({0}), net.lipschitz, jacobian)
    begin = time.process_time()
    found = find_root(problem, c, method=method, adjoint="none")
    spent = time.process_time() - begin
    steps = found.steps.double()
    # |r_k| <= rho^k |r_0|, down to 32 machine epsilons of 1 + |y|
    start = torch.linalg.vector_norm(residual(c, c), dim=1)
    goal = 32 * torch.finfo(c.dtype).eps * (1 + torch.linalg.vector_norm(found.value, dim=1))
    bound = (goal / start).log().div(math.log(net.lipschitz)).ceil().clamp_min(0) + 1
    return {"mean": float(steps.mean()), "most": float(steps.max()), "bound": float(bound.mean()),
            "ms": 1e6 * spent / len(c)}  # fmt: skip
