"""A variational autoencoder of binary images whose posterior may be a flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rootflow

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

    def forward(
        self, x: Tensor, draws: int = 1, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p(x, z) and log q(z | x), each ``(draws, n)`` in nats, for zeros and ones x.

        x is ``(n, pixels)``; their difference has the ELBO as its mean.
        """
        z, log_q = self.posterior.rsample_and_log_prob(x, (draws,), generator=generator)
        return self.log_joint(x, z), log_q

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) ``(..., n)`` in nats for x ``(n, pixels)`` and z ``(..., n, features)``."""
        logits: Tensor = self.decoder(z)
        likelihood = (x * logits - F.softplus(logits)).sum(-1)
        prior = torch.distributions.Normal(torch.zeros_like(z), 1.0, validate_args=False)
        return likelihood + prior.log_prob(z).sum(-1)  # type: ignore[no-untyped-call]

    def means(self, z: Tensor) -> Tensor:
        """Probabilities of dark pixels ``(..., pixels)``."""
        return torch.sigmoid(self.decoder(z))


class _Maxout(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (-1, WINDOW)).amax(-1)


class _Heads(nn.Module):
    """A network, and from its last layer the code of the Gaussian and a context side by side."""

    def __init__(self, body: nn.Module, code: nn.Module, context: nn.Module) -> None:
        super().__init__()
        self.body, self.code, self.context = body, code, context

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(2 * x - 1)  # pixels centred
        return torch.cat([self.code(h), self.context(h)], -1)


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
        code = nn.Linear(hidden[-1], 2 * features)
        decoder = _layers([features, *reversed(hidden)], activation)
        decoder.append(nn.Linear(hidden[0], pixels))
        context = context if flow else 0
        made = rootflow.flow(flow, features, context, **(options or {})) if flow else None
        # no output for a context that no flow takes: torch has linear maps to nothing, and warns
        heads = nn.Linear(hidden[-1], context) if context else _Nothing()
        return Autoencoder(AmortisedPosterior(_Heads(body, code, heads), features, made), decoder)


class _Nothing(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h[..., :0]


def _layers(widths: Sequence[int], activation: Activation) -> nn.Sequential:
    parts: list[nn.Module] = []
    for ins, outs in zip(widths, widths[1:], strict=False):
        if activation == "maxout":
            parts += [nn.Linear(ins, WINDOW * outs), _Maxout()]
        else:
            parts += [nn.Linear(ins, outs), nn.ReLU() if activation == "relu" else nn.ELU()]
    return nn.Sequential(*parts)
