"""A variational autoencoder of binary images whose posterior may be a flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rootflow

from ..bases import Normal
from ..inference.amortised import AmortisedPosterior

__all__ = ["Activation", "Autoencoder", "autoencoder"]

Activation = Literal["relu", "elu", "maxout"]
WINDOW = 4  # linear maps of which maxout takes the largest


class Autoencoder(nn.Module):
    """p(x | z) Bernoulli with the decoder's logits, p(z) standard normal, q(z | x) amortised.

    ``decoder`` maps z ``(..., features)`` to logits ``(..., pixels)``.
    """

    def __init__(self, posterior: AmortisedPosterior, decoder: nn.Module) -> None:
        super().__init__()
        self.posterior, self.decoder = posterior, decoder
        self.prior = Normal((posterior.features,))

    def forward(
        self, x: Tensor, draws: int = 1, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log p(x, z) and log q(z | x), each ``(draws, n)`` in nats, for zeros and ones x.

        x is ``(n, pixels)``; their difference has the ELBO as its mean.
        """
        z, log_q = self.posterior.rsample_and_log_prob(x, (draws,), generator=generator)
        return self.log_joint(x, z), log_q

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x, z) ``(..., n)`` in nats for x ``(n, pixels)`` and z ``(..., n, features)``."""
        logits: Tensor = self.decoder(z)
        return (x * logits - F.softplus(logits)).sum(-1) + self.prior.log_prob(z)

    def means(self, z: Tensor) -> Tensor:
        """Probabilities of dark pixels ``(..., pixels)``."""
        logits: Tensor = self.decoder(z)
        return logits.sigmoid()


class _Maxout(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.reshape(*h.shape[:-1], -1, WINDOW).amax(-1)


class _Heads(nn.Module):
    """A network, and from its last layer the numbers of the Gaussian, then those of a context."""

    def __init__(self, body: nn.Module, gaussian: nn.Module, context: nn.Module | None) -> None:
        super().__init__()
        self.body, self.gaussian, self.context = body, gaussian, context

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(2 * x - 1)  # pixels centred
        numbers: Tensor = self.gaussian(h)
        return numbers if self.context is None else torch.cat([numbers, self.context(h)], -1)


def autoencoder(
    pixels: int,
    features: int,
    hidden: Sequence[int],
    activation: Activation,
    seed: int,
    flow: str | None = None,
    context: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Autoencoder:
    """An untrained autoencoder, its weights drawn from ``seed`` alone.

    ``features``: width of z; ``hidden``: widths of the encoder's layers, the decoder's turned
    around. ``flow``: a name of the registry, made with ``context`` and ``options``, or None for a
    Gaussian posterior. Equal seeds give equal encoders and decoders whatever the flow.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        body = _layers([pixels, *hidden], activation)
        gaussian = nn.Linear(hidden[-1], 2 * features)
        decoder = _layers([features, *reversed(hidden)], activation)
        decoder.append(nn.Linear(hidden[0], pixels))
        made = rootflow.flow(flow, features, context, **(options or {})) if flow else None
        told = nn.Linear(hidden[-1], context) if made is not None and context else None
        posterior = AmortisedPosterior(_Heads(body, gaussian, told), features, made)
        return Autoencoder(posterior, decoder)


def _layers(widths: Sequence[int], activation: Activation) -> nn.Sequential:
    parts: list[nn.Module] = []
    for ins, outs in pairwise(widths):
        if activation == "maxout":
            parts += [nn.Linear(ins, WINDOW * outs), _Maxout()]
        else:
            parts += [nn.Linear(ins, outs), nn.ReLU() if activation == "relu" else nn.ELU()]
    return nn.Sequential(*parts)
