"""Seven posteriors with reference draws: densities, parameters, and the stored draws.

Data and draws come from posteriordb (``posteriordb/LICENSE.txt``). Densities are vectorised over
draws, run in float64, and hold every constant of priors and likelihood, so that evidences mean
something wherever the priors are proper (flat priors of kidscore_momiq and garch11 are not).
"normal" is given by mean and sd, "gamma" by shape and rate; "half" restricts to positive values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from .comparison import Reference
from .supports import ordered
from .target import KnownTarget

__all__ = ["POSTERIORS", "posterior_reference"]

LOG_2PI = math.log(2 * math.pi)
Parameters = dict[str, Tensor]  # each (n, *shape)


@lru_cache
def stored(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and notes of one posterior's file."""
    raw = files(__package__).joinpath("posteriordb", f"{name}.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {key: value.double() for key, value in load(raw).items()}, header["__metadata__"]


def posterior_reference(name: str) -> Reference:
    """Reference draws of one of ``POSTERIORS``, as fresh tensors; 7 digits each."""
    tensors, notes = stored(name)
    draws, means, sds = (tensors[key].clone() for key in ("draws", "means", "sds"))
    return Reference(tuple(notes["names"].split()), draws, means, sds, int(notes["count"]))


def data(name: str) -> dict[str, Tensor]:
    return {
        key.removeprefix("data."): value
        for key, value in stored(name)[0].items()
        if key.startswith("data.")
    }


def normal(x: Tensor, sd: float) -> Tensor:
    """Log-density of each element, centre 0."""
    return -(x / sd).square() / 2 - math.log(sd) - LOG_2PI / 2


def half_normal(x: Tensor, sd: float) -> Tensor:
    return normal(x, sd) + math.log(2)


def half_cauchy(x: Tensor, scale: float) -> Tensor:
    return -torch.log1p((x / scale).square()) + math.log(2 / (math.pi * scale))


class Regression:
    """Log-likelihood of y ~ normal(X beta, sigma) from a QR decomposition of X.

    The sum of squares over all rows is that of as many numbers as there are columns, plus a
    constant: exact, and its cost does not grow with the rows.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        basis, self.triangle = torch.linalg.qr(x)
        self.seen = basis.T @ y
        self.rest, self.rows = float((y - basis @ self.seen).square().sum()), len(y)

    def __call__(self, beta: Tensor, sigma: Tensor) -> Tensor:
        """Log-likelihood ``(...)`` of beta ``(..., d)`` and sigma ``(...)``."""
        misfit: Tensor = (beta @ self.triangle.T - self.seen).square().sum(-1) + self.rest
        return -misfit / (2 * sigma.square()) - self.rows * (sigma.log() + LOG_2PI / 2)


def eight_schools() -> KnownTarget:
    """Eight effects.

    t ~ normal(0, 1); mu ~ normal(0, 5); tau ~ half cauchy(0, 5); y ~ normal(mu + tau t, s).
    """
    given = data("eight_schools_noncentered")
    y, sigma = given["y"], given["sigma"]
    constant = float(sigma.log().sum())

    def log_prob(p: Parameters) -> Tensor:
        t, mu, tau = p["t"], p["mu"], p["tau"]
        theta = mu.unsqueeze(-1) + tau.unsqueeze(-1) * t
        likelihood = normal((y - theta) / sigma, 1).sum(-1) - constant
        return likelihood + normal(t, 1).sum(-1) + normal(mu, 5) + half_cauchy(tau, 5)

    def effects(x: Tensor) -> Tensor:
        """The reference holds theta = mu + tau t where the parameters are t."""
        return torch.cat([x[:, 8:9] + x[:, 9:] * x[:, :8], x[:, 8:]], -1)

    def scores(x: Tensor) -> Tensor:
        return torch.cat([(x[:, :8] - x[:, 8:9]) / x[:, 9:], x[:, 8:]], -1)

    return KnownTarget(
        log_prob, {"t": 8, "mu": (), "tau": ()}, {"tau": constraints.positive},
        name="eight_schools_noncentered", summary="coaching in eight schools, 10 parameters",
        quantities=effects, parameters_of=scores,
    )  # fmt: skip


def blr() -> KnownTarget:
    """Regression: beta ~ normal(0, 10); sigma ~ half normal(0, 10); y ~ normal(X beta, sigma)."""
    given = data("blr")
    likelihood = Regression(given["X"], given["y"])

    def log_prob(p: Parameters) -> Tensor:
        beta, sigma = p["beta"], p["sigma"]
        return likelihood(beta, sigma) + normal(beta, 10).sum(-1) + half_normal(sigma, 10)

    return KnownTarget(
        log_prob, {"beta": 5, "sigma": ()}, {"sigma": constraints.positive},
        name="blr", summary="linear regression, 6 parameters",
    )  # fmt: skip


def kidscore_momiq() -> KnownTarget:
    """Scores: sigma ~ half cauchy(0, 2.5); kid_score ~ normal(beta1 + beta2 mom_iq, sigma)."""
    given = data("kidscore_momiq")
    iq = given["mom_iq"]
    likelihood = Regression(torch.stack([torch.ones_like(iq), iq], -1), given["kid_score"])

    def log_prob(p: Parameters) -> Tensor:
        return likelihood(p["beta"], p["sigma"]) + half_cauchy(p["sigma"], 2.5)

    return KnownTarget(
        log_prob, {"beta": 2, "sigma": ()}, {"sigma": constraints.positive},
        name="kidscore_momiq", summary="children's scores on mothers' IQ, 3 parameters",
    )  # fmt: skip


def ark() -> KnownTarget:
    """Order 5: alpha, beta ~ normal(0, 10); sigma ~ half cauchy(0, 2.5)."""
    y = data("arK")["y"]
    past = y.unfold(0, 5, 1)[:-1].flip(-1)  # row t: y[t-1] ... y[t-5]
    likelihood = Regression(torch.cat([torch.ones_like(past[:, :1]), past], -1), y[5:])

    def log_prob(p: Parameters) -> Tensor:
        beta, sigma = torch.cat([p["alpha"].unsqueeze(-1), p["beta"]], -1), p["sigma"]
        return likelihood(beta, sigma) + normal(beta, 10).sum(-1) + half_cauchy(sigma, 2.5)

    return KnownTarget(
        log_prob, {"alpha": (), "beta": 5, "sigma": ()}, {"sigma": constraints.positive},
        name="arK", summary="autoregression of order 5, 7 parameters",
    )  # fmt: skip


class Recurrence(torch.autograd.Function):
    """v[t] = drive[t] + decay v[t-1] along the last axis; drive ``(n, T)``, decay ``(n, 1)``.

    By doubling: log2 T steps over whole rows instead of T over columns. The derivative is the same
    recurrence run backwards, so that nothing but v is kept.
    """

    @staticmethod
    def forward(ctx: Any, drive: Tensor, decay: Tensor) -> Tensor:
        v, power, lag = drive.clone(), decay, 1
        while lag < v.shape[-1]:
            v[:, lag:] += power * v[:, :-lag]
            power, lag = power.square(), 2 * lag
        ctx.save_for_backward(v, decay)
        return v

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor]:
        v, decay = ctx.saved_tensors
        back: Tensor = Recurrence.apply(outer[0].flip(-1), decay)  # type: ignore[no-untyped-call]
        back = back.flip(-1)
        return back, (back[:, 1:] * v[:, :-1]).sum(-1, keepdim=True)


def garch11() -> KnownTarget:
    """Flat priors; y ~ normal(mu, s).

    s[t]^2 = alpha0 + alpha1 (y[t-1] - mu)^2 + beta1 s[t-1]^2.
    """
    given = data("garch11")
    y, first = given["y"], given["sigma1"].square()

    def log_prob(p: Parameters) -> Tensor:
        mu, alpha0, alpha1, beta1 = (v.unsqueeze(-1) for v in p.values())
        square = (y - mu).square()
        drive = torch.cat([first.expand_as(mu), alpha0 + alpha1 * square[:, :-1]], -1)
        variance: Tensor = Recurrence.apply(drive, beta1)  # type: ignore[no-untyped-call]
        return -((square / variance + variance.log()).sum(-1) + len(y) * LOG_2PI) / 2

    return KnownTarget(
        log_prob, dict.fromkeys(("mu", "alpha0", "alpha1", "beta1"), ()),
        {
            "alpha0": constraints.positive, "alpha1": constraints.unit_interval,
            "beta1": lambda p: constraints.interval(0, 1 - p["alpha1"]),  # type: ignore[no-untyped-call]
        },
        name="garch11", summary="changing volatility of a time series, 4 parameters",
    )  # fmt: skip


def low_dim_gauss_mix() -> KnownTarget:
    """Two Gaussians.

    mu ~ normal(0, 2), mu1 < mu2; sigma ~ half normal(0, 2); theta ~ beta(5, 5);
    y ~ theta normal(mu1, sigma1) + (1 - theta) normal(mu2, sigma2).
    """
    y = data("low_dim_gauss_mix")["y"]
    powers = torch.stack([torch.ones_like(y), y, y.square()])  # (3, rows)
    sums = powers.sum(-1)

    def log_prob(p: Parameters) -> Tensor:
        mu, sigma, theta = p["mu"], p["sigma"], p["theta"]
        weight = torch.stack([theta.log(), torch.log1p(-theta)], -1)
        peak = weight - sigma.log() - LOG_2PI / 2
        if bool((sigma < 0.01).any()):  # so narrow that the terms of a quadratic would cancel
            off = (y - mu.unsqueeze(-1)) / sigma.unsqueeze(-1)
            each = peak.unsqueeze(-1) - off.square() / 2
            likelihood = torch.logaddexp(*each.unbind(-2)).sum(-1)
        else:  # four times as fast: log-densities as quadratics in y, coefficients (n, 2, 3)
            precision = sigma.square().reciprocal()
            level = peak - mu.square() * precision / 2
            quadratic = torch.stack([level, mu * precision, -precision / 2], -1)
            first, second = quadratic.unbind(-2)
            gap = (first - second) @ powers
            likelihood = softplus(gap, threshold=40).sum(-1) + second @ sums
        prior = normal(mu, 2).sum(-1) + half_normal(sigma, 2).sum(-1) + math.log(2)
        return likelihood + prior + 4 * weight.sum(-1) + math.log(630)  # 630 = 1 / B(5, 5)

    return KnownTarget(
        log_prob, {"mu": 2, "sigma": 2, "theta": ()},
        {"mu": ordered, "sigma": constraints.positive, "theta": constraints.unit_interval},
        name="low_dim_gauss_mix", summary="mixture of two Gaussians, 5 parameters",
    )  # fmt: skip


def gp_regr() -> KnownTarget:
    """A Gaussian process.

    rho ~ gamma(25, 4); alpha ~ half normal(0, 2); sigma ~ half normal(0, 1);
    y ~ normal(0, alpha^2 exp(-(x - x')^2 / (2 rho^2)) + sigma I): sigma is a variance here.
    """
    given = data("gp_regr")
    y = given["y"].unsqueeze(-1)
    square = (given["x"].unsqueeze(-1) - given["x"]).square()
    eye = torch.eye(len(y), dtype=torch.float64)
    gamma = 25 * math.log(4) - math.lgamma(25)

    def log_prob(p: Parameters) -> Tensor:
        rho, alpha, sigma = (v[:, None, None] for v in p.values())
        kernel = alpha.square() * torch.exp(-square / (2 * rho.square())) + sigma * eye
        root, info = torch.linalg.cholesky_ex(kernel)
        failed = (info != 0) | ~root.detach().isfinite().flatten(1).all(-1)
        if failed.any():  # sigma lost in the rounding of alpha^2: zero density, no NaN gradients
            root = torch.linalg.cholesky_ex(torch.where(failed[:, None, None], eye, kernel))[0]
        white = torch.linalg.solve_triangular(root, y, upper=False).squeeze(-1)
        likelihood = normal(white, 1).sum(-1) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        rho, alpha, sigma = p.values()
        prior = gamma + 24 * rho.log() - 4 * rho + half_normal(alpha, 2) + half_normal(sigma, 1)
        return torch.where(failed, -math.inf, likelihood + prior)

    return KnownTarget(
        log_prob, dict.fromkeys(("rho", "alpha", "sigma"), ()),
        dict.fromkeys(("rho", "alpha", "sigma"), constraints.positive),
        name="gp_regr", summary="Gaussian process regression, 3 parameters",
    )  # fmt: skip


POSTERIORS: dict[str, Callable[[], KnownTarget]] = {
    "eight_schools_noncentered": eight_schools,
    "blr": blr,
    "kidscore_momiq": kidscore_momiq,
    "garch11": garch11,
    "arK": ark,
    "low_dim_gauss_mix": low_dim_gauss_mix,
    "gp_regr": gp_regr,
}
