"""What a fitted flow does with held-out rows: exact likelihood, round trip, samples."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import rootflow
from rootflow.bases import Normal
from rootflow.data.schema import Schema
from rootflow.errors import NotConverged
from rootflow.lipschitz.networks import CertifiedNet
from rootflow.plots.images import Pictures
from rootflow.report import Evidence
from rootflow.training.scores import by_rows

__all__ = ["DRAWS", "Measured", "log_density", "measure"]

ROWS = 10_000  # of the round trip, the figures and the samples
DRAWS = 8  # of the noise in the score of a row


@dataclass(frozen=True)
class Measured:
    """Numbers for result.json, rows for the report, and the log-density in float64 for its maps.

    No log-density where a column has values of positive probability.
    """

    numbers: dict[str, Any]
    evidence: Evidence
    log_prob: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None
    pictures: Pictures | None = None


def _array(t: Tensor) -> NDArray[np.float64]:
    result: NDArray[np.float64] = t.double().cpu().numpy()
    return result


@torch.no_grad()
def log_density(
    flow: rootflow.Flow, x: Tensor, schema: Schema, seed: int = 0, draws: int = DRAWS
) -> tuple[Tensor, Tensor]:
    """Log-density ``(n,)`` of rows of the table ``(n, columns)``, nats, and what the flow saw last.

    Exact where no column draws noise. Else, with K draws of it, log mean exp(log p(y) + weight):
    a lower bound on average, the tighter the more draws (Burda et al. 2016, arXiv:1509.00519).
    -inf outside the support, NaN where a solve failed.
    """
    own = next(flow.parameters())
    generator, terms = torch.Generator().manual_seed(seed), []
    y = x
    for _ in range(draws if schema.noised else 1):
        y, weight = schema.encode(x, generator)
        y, inside = y.to(own), weight > -math.inf
        value = torch.full_like(weight, -math.inf)
        log_prob = by_rows(lambda part: flow.log_prob(part)[:, None], y[inside.to(y.device)], 1)
        value[inside] = log_prob[:, 0].double().cpu() + weight[inside]
        terms.append(value)
    stacked = torch.stack(terms)
    return stacked.logsumexp(0) - math.log(len(terms)), y


@torch.no_grad()
def measure(
    flow: rootflow.Flow, rows: NDArray[np.float64], schema: Schema, seed: int
) -> Measured:
    """Evaluate the flow on the held-out ``rows`` ``(n, columns)``, in the units of the data.

    Likelihoods: the float32 weights in float64 arithmetic. Round trip: in float32, from what the
    flow sees to z and back.
    """
    own = next(flow.parameters())
    exact = copy.deepcopy(flow).double()
    test = torch.as_tensor(rows)
    values, seen = log_density(exact, test, schema, seed, draws=1)
    d, some = seen.shape[1], seen[:ROWS].to(own.dtype)
    latent = by_rows(lambda x: flow.forward(x)[0], some, d)
    error = (by_rows(lambda z: flow.inverse(z)[0], latent, d) - some).abs().amax(1)
    converged = ~values.isnan()
    converged[: len(error)] &= error.isfinite().cpu()
    bound = error[:0]
    if (certificates := getattr(flow, "certificates", None)) is not None:
        bound = by_rows(lambda x: certificates(x)[:, None], some, 1)[:, 0]
    try:
        generator = torch.Generator(own.device).manual_seed(seed)
        samples = schema.decode(flow.sample((ROWS,), generator=generator).cpu())
    except NotConverged:
        samples = test[:0]
    good, fine = values[values.isfinite()], error[error.isfinite()]
    se = float(good.std()) / math.sqrt(len(good)) if len(good) > 1 else None
    numbers = {
        "test_log_prob": float(good.mean()) if len(good) else None,
        "test_log_prob_se": se,
        "inverse_error": float(fine.max()) if len(fine) else None,
        "converged_fraction": float(converged.double().mean()),
        "lipschitz": [float(m.bound()) for m in exact.modules() if isinstance(m, CertifiedNet)],
    }
    if not isinstance(flow.base, Normal):  # the figure compares latents with a standard normal
        latent = latent[:0]
    evidence = Evidence(
        schema.names, _array(test[:ROWS]), _array(samples), _array(latent), _array(error),
        _array(bound), _array(values[:ROWS]), levels=schema.levels,
    )  # fmt: skip

    def density(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return _array(log_density(exact, torch.as_tensor(x), schema, seed, draws=1)[0])

    return Measured(numbers, evidence, None if schema.discrete else density)
