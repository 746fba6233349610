"""What a fitted flow does with held-out rows: exact likelihood, round trip, samples."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import rootflow
from rootflow.bases import Normal
from rootflow.cli.run import gaps
from rootflow.errors import NotConverged
from rootflow.lipschitz.networks import LipschitzNet
from rootflow.plots.images import Pictures
from rootflow.report import Evidence
from rootflow.training.scores import by_rows

__all__ = ["Measured", "log_density", "measure"]

ROWS = 10_000  # of the round trip, the figures and the samples


@dataclass(frozen=True)
class Measured:
    """Numbers for result.json, rows for the report, and the log-density in float64 for its maps."""

    numbers: dict[str, Any]
    evidence: Evidence
    log_prob: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None
    pictures: Pictures | None = None


def _array(t: Tensor) -> NDArray[np.float64]:
    result: NDArray[np.float64] = t.double().cpu().numpy()
    return result


@torch.no_grad()
def log_density(
    flow: rootflow.Flow, x: Tensor, data: Mapping[str, Any], draws: int = 1
) -> tuple[Tensor, Tensor]:
    """Log-density ``(n,)`` of the rows, nats, and the rows ``(n, d)`` it was evaluated at last.

    With dequantised columns this is, per row, E log p(x + gap u) + log gap over ``draws`` draws of
    u: a lower bound on the log-probability of the row's cell. NaN where a solve failed.
    """
    width, total = gaps(data), x.new_zeros(len(x))
    at, generator = x, torch.Generator().manual_seed(data.get("seed", 0))
    draws = 1 if width is None else draws
    for _ in range(draws):
        if width is not None:
            noise = torch.rand(x.shape, generator=generator, dtype=torch.float64)
            at = x + (width * noise).to(x)
        total += by_rows(lambda part: flow.log_prob(part)[:, None], at, 1)[:, 0] / draws
    if width is not None:
        total += float(width[width > 0].log().sum())
    return total, at


@torch.no_grad()
def measure(
    flow: rootflow.Flow, rows: NDArray[np.float64], data: Mapping[str, Any], seed: int
) -> Measured:
    """Evaluate the flow on the held-out ``rows`` ``(n, d)``, in the units of the data.

    Likelihoods: the float32 weights in float64 arithmetic. Round trip: in float32, x to z and back.
    """
    own = next(flow.parameters())
    exact = copy.deepcopy(flow).double()
    test = torch.as_tensor(rows, device=own.device)
    values, test = log_density(exact, test, data)
    d, some = test.shape[1], test[:ROWS].to(own.dtype)
    latent = by_rows(lambda x: flow.forward(x)[0], some, d)
    error = (by_rows(lambda z: flow.inverse(z)[0], latent, d) - some).abs().amax(1)
    converged = values.isfinite()
    converged[: len(error)] &= error.isfinite()
    bound = error[:0]
    if (certificates := getattr(flow, "certificates", None)) is not None:
        bound = by_rows(lambda x: certificates(x)[:, None], some, 1)[:, 0]
    try:
        generator = torch.Generator(own.device).manual_seed(seed)
        samples = flow.sample((ROWS,), generator=generator)
    except NotConverged:
        samples = some[:0]
    good, fine = values[values.isfinite()], error[error.isfinite()]
    se = float(good.std()) / math.sqrt(len(good)) if len(good) > 1 else None
    numbers = {
        "test_log_prob": float(good.mean()) if len(good) else None,
        "test_log_prob_se": se,
        "inverse_error": float(fine.max()) if len(fine) else None,
        "converged_fraction": float(converged.double().mean()),
        "lipschitz": [float(m.bound()) for m in exact.modules() if isinstance(m, LipschitzNet)],
    }
    if not isinstance(flow.base, Normal):  # the figure compares latents with a standard normal
        latent = latent[:0]
    shown = (test[:ROWS], samples, latent, error, bound, values[:ROWS])
    evidence = Evidence(data["columns"], *map(_array, shown))

    def density(x: NDArray[np.float64]) -> NDArray[np.float64]:
        points = torch.as_tensor(x, dtype=torch.float64, device=own.device)
        with torch.no_grad():
            return _array(by_rows(lambda part: exact.log_prob(part)[:, None], points, 1)[:, 0])

    return Measured(numbers, evidence, density)
