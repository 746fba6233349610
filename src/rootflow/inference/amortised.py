"""Amortised inference: one network gives the posterior of every x, a conditional flow its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..bases import Normal
from ..flow import Flow
from ..transforms import ActNorm

__all__ = ["AmortisedPosterior", "importance_bound"]


class AmortisedPosterior(nn.Module):
    r"""q(z | x): a Gaussian that depends on x, pushed through a flow that may depend on x too.

    .. math:: z_0 = \mu(x) + \sigma(x)\, \epsilon, \qquad z = f^{-1}(z_0; c(x)), \qquad
        \log q(z | x) = \log N(\epsilon; 0, I) - \textstyle\sum \log \sigma(x) + \log |\det f'(z)|

    with f the flow's direction from its data, here z, to its latent, here z_0. ``encoder`` maps x
    ``(n, ...)`` to ``(n, 2 features + context)``: the mean, log sigma, and the flow's context.
    ``flow``: made for ``features``, with any context; None leaves the Gaussian. Of a flow only the
    map is used, not its base, which must be the normal.

    Drawing goes from latent to data: a formula for planar, iaf and every coupling, a root find for
    implicit, residual and monotone flows. ``log_prob`` goes the other way. All numbers in nats.
    Source: Rezende and Mohamed 2015 (arXiv:1505.05770), section 4.2.

    Raises ValueError for a flow of another size or base, and for an encoder of another width.
    """

    def __init__(self, encoder: nn.Module, features: int, flow: Flow | None = None) -> None:
        super().__init__()
        if flow is not None and flow.event != (features,):
            raise ValueError(f"flow: its samples have shape {flow.event}, but features={features}")
        if flow is not None and not isinstance(flow.base, Normal):
            raise ValueError(
                f"flow: its base is {type(flow.base).__name__}; the encoder's Gaussian takes the "
                "place of the base, so make the flow with base='normal' and linear tails"
            )
        self.encoder, self.features, self.flow = encoder, features, flow
        self.context = 0 if flow is None else flow.context
        self.base = Normal((features,))
        for part in self.modules():
            if isinstance(part, ActNorm):  # no batch of data may reset it
                part.initialised.fill_(True)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean and log sigma ``(n, features)``, context ``(n, context)`` or None."""
        numbers: Tensor = self.encoder(x)
        width = 2 * self.features + self.context
        if numbers.shape[-1] != width:
            raise ValueError(
                f"encoder: gives {numbers.shape[-1]} numbers for each x; this posterior needs "
                f"{width}: mean, log sigma and a context of width {self.context}"
            )
        mean, log_sigma = numbers[..., : self.features], numbers[..., self.features :]
        log_sigma, context = log_sigma[..., : self.features], log_sigma[..., self.features :]
        return mean, log_sigma, context if self.context else None

    def rsample_and_log_prob(
        self,
        x: Tensor,
        sample_shape: Sequence[int] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Differentiable draws ``(*sample_shape, n, features)`` and their log q ``(..., n)``."""
        mean, log_sigma, context = self._encode(x)
        noise = self.base.sample((*sample_shape, *mean.shape[:-1]), generator)
        z = mean + log_sigma.exp() * noise
        log_q = self.base.log_prob(noise) - log_sigma.sum(-1)
        if self.flow is None:
            return z, log_q
        z, log_det = self.flow.inverse(z, context)
        return z, log_q - log_det

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        """Log q(z | x) ``(..., n)`` of z ``(..., n, features)`` for x ``(n, ...)``."""
        mean, log_sigma, context = self._encode(x)
        log_det: Tensor | float = 0.0
        if self.flow is not None:
            z, log_det = self.flow(z, context)
        noise = (z - mean) * (-log_sigma).exp()
        return self.base.log_prob(noise) - log_sigma.sum(-1) + log_det


def importance_bound(log_weights: Tensor) -> Tensor:
    """Log of the mean weight over the first axis: ``(k, ...)`` to ``(...)``, in nats.

    With log weights log p(x, z) - log q(z | x) of k draws its expectation is a lower bound of
    log p(x), the ELBO for k = 1 and never looser for more; Burda et al. 2016 (arXiv:1509.00519),
    equation 8.
    """
    return log_weights.logsumexp(0) - math.log(len(log_weights))
