"""Log-densities of held-out images, and bits per dimension with everything uncertain in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotConverged
from ..flow import Flow
from ..transforms import Pixels
from .fit import reseed, rows_at_once

__all__ = ["Scores", "by_rows", "score_images"]

SUMMARY = (
    "log_prob", "log_prob_se", "bits_per_dim", "bits_per_dim_se", "bits_per_dim_estimator_se"
)  # fmt: skip


def by_rows(f: Callable[[Tensor], Tensor], x: Tensor, *shape: int) -> Tensor:
    """Map ``(n, *event)`` to ``(n, *shape)`` in chunks; NaN where a solve did not converge."""

    def attempt(part: Tensor) -> Tensor:
        try:
            return f(part)
        except NotConverged:
            if len(part) == 1:
                return part.new_full((1, *shape), torch.nan)
            half = len(part) // 2
            return torch.cat([attempt(part[:half]), attempt(part[half:])])

    parts = [attempt(part) for part in torch.split(x, rows_at_once(tuple(x.shape[1:])))]
    return torch.cat(parts) if len(x) else x.new_zeros(0, *shape)


@dataclass(frozen=True, eq=False)
class Scores:
    """What a flow says of images (c, h, w) with ``pixels``.

    ``log_prob`` (n,), nats of x = (k + u) / levels, float64, NaN where a solve failed; ``variance``
    (n,) of each as an estimate, given x: zero where log-determinants are exact. Less the logarithm
    of the levels for each value it is a lower bound on log P(k), tight in the mean over u.
    """

    log_prob: Tensor
    variance: Tensor
    event: tuple[int, ...]
    pixels: Pixels

    def summary(self) -> dict[str, float | None]:
        """Means over the images that converged, with standard errors; None for what is unknown.

        ``log_prob`` in nats per image, ``bits_per_dim``, and for each ``_se``: the standard error
        over images, estimates included. ``bits_per_dim_estimator_se``: the part of it that only
        comes from estimated log-determinants, zero where they are exact.
        """
        good = self.log_prob.isfinite()
        values, count = self.log_prob[good], int(good.sum())
        if not count:
            return dict.fromkeys(SUMMARY)
        mean, bits = float(values.mean()), self.pixels.bits(self.event)
        se = float(values.std()) / math.sqrt(count) if count > 1 else None
        own = float(self.variance[good].sum().sqrt()) / count
        found = (
            mean, se, self.pixels.bits_per_dim(mean, self.event),
            None if se is None else se * bits, own * bits,
        )  # fmt: skip
        return dict(zip(SUMMARY, found, strict=True))


@torch.no_grad()
def score_images(
    flow: Flow,
    k: Tensor,
    pixels: Pixels,
    *,
    seed: int = 0,
    probes: int = 0,
    draws: int = 1,
    repeats: int = 2,
) -> Scores:
    """Score images k ``(n, c, h, w)``, uint8, each the mean over ``draws`` of dequantisation.

    Where the flow estimates log-determinants in evaluation too, each is the mean of ``repeats``
    independent estimates, from whose scatter ``Scores.variance`` comes. The noise follows from
    ``seed``, the estimates from ``probes``.
    """
    like = next(flow.parameters())
    noise, key = torch.Generator().manual_seed(seed), probes * 1_000_003
    parts: list[Tensor] = []

    def estimated(x: Tensor) -> Tensor:
        return torch.stack(flow.log_prob_and_error(x, draws=repeats), 1)

    def exact(x: Tensor) -> Tensor:
        return torch.stack([log_prob := flow.log_prob(x), torch.zeros_like(log_prob)], 1)

    one = pixels.dequantise(k[:1], torch.Generator().manual_seed(seed), like.dtype).to(like.device)
    score = estimated if bool(by_rows(estimated, one, 2)[0, 1] > 0) else exact
    for chunk in torch.split(k, rows_at_once(flow.event)):
        total = torch.zeros(len(chunk), 2, dtype=torch.float64)
        for _ in range(draws):
            key += 1
            reseed(flow, key)
            x = pixels.dequantise(chunk, noise, like.dtype).to(like.device)
            log_prob, error = by_rows(score, x, 2).double().cpu().unbind(1)
            total += torch.stack([log_prob / draws, error.square() / draws**2], 1)
        parts.append(total)
    log_probs, variances = torch.cat(parts).unbind(1)
    return Scores(log_probs, variances, flow.event, pixels)
