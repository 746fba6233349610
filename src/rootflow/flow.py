"""A flow: a base distribution seen through an invertible transform."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bases import Normal
from .store import load_directory, save_directory
from .transforms.base import Transform

__all__ = ["Flow", "FlowDistribution"]


class Flow(nn.Module):
    """Density of x with z = transform(x) and z distributed as ``base``.

    ``recipe`` is the plain dictionary that the registry can build the same flow from again; a flow
    made by hand has none and cannot be saved by ``save``. All densities are in nats per sample, in
    units of x.
    """

    def __init__(
        self,
        transform: Transform,
        base: nn.Module | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.base = Normal(transform.event) if base is None else base
        self.recipe = recipe

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.transform.event

    @property
    def context(self) -> int:
        """Width of the context, 0 for an unconditional flow."""
        return self.transform.context

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data ``(..., *event)`` to latent, with log_det ``(...)`` in nats."""
        result: tuple[Tensor, Tensor] = self.transform(x, context)
        return result

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data, with the log_det of that direction."""
        return self.transform.inverse(z, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density ``(...)`` in nats of x ``(..., *event)``; differentiable."""
        z, log_det = self(x, context)
        result: Tensor = self.base.log_prob(z) + log_det  # type: ignore[operator]
        return result

    def rsample_and_log_prob(
        self,
        sample_shape: Sequence[int] = (),
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Differentiable draws ``(*sample_shape, *context batch, *event)``, their log-densities."""
        batch = () if context is None else tuple(context.shape[:-1])
        z = self.base.sample((*sample_shape, *batch), generator)  # type: ignore[operator]
        x, log_det = self.inverse(z, context)
        return x, self.base.log_prob(z) - log_det  # type: ignore[operator]

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Differentiable draws, see ``rsample_and_log_prob``."""
        return self.rsample_and_log_prob(sample_shape, context, generator=generator)[0]

    @torch.no_grad()
    def sample(
        self,
        sample_shape: Sequence[int] = (),
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws without gradient, ``(*sample_shape, *context batch, *event)``."""
        return self.rsample(sample_shape, context, generator=generator)

    @torch.no_grad()
    def certificates(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Certified bound ``(rows,)`` on the error of roots found from x ``(rows, *event)`` to z.

        The largest over the blocks of (residual + rounding) / (1 - Lipschitz bound), each for the
        block's own input and in its units; zero for closed formulas.
        """
        return self.transform.certificate(x, x, context)

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """This flow as a ``torch.distributions.Distribution``, conditioned on ``context``."""
        return FlowDistribution(self, context)

    def save(self, directory: str | Path) -> None:
        """Write config.json, model.safetensors and manifest.json for ``rootflow.load``."""
        if self.recipe is None:
            raise ValueError(
                "this flow was put together by hand; only flows made by rootflow.flow can be saved"
            )
        save_directory(Path(directory), self.recipe, self.state_dict())

    def restore(self, directory: str | Path) -> None:
        """Load the tensors of ``directory`` into this flow, strictly."""
        load_directory(Path(directory), self)


class FlowDistribution(torch.distributions.Distribution):
    """A conditioned flow for use wherever torch.distributions is expected."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self, flow: Flow, context: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        self.flow, self.context = flow, context
        batch = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch, torch.Size(flow.event), validate_args=validate_args)

    @property
    def support(self) -> torch.distributions.constraints.Constraint:
        """That of the base, which every map of the registry keeps: R^n, or a bounded interval."""
        support: torch.distributions.constraints.Constraint = self.flow.base.support  # type: ignore[assignment]
        return support

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, ``sample_shape + batch_shape``."""
        if self._validate_args:
            self._validate_sample(value)
        return self.flow.log_prob(value, self.context)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Differentiable draws."""
        return self.flow.rsample(tuple(sample_shape), self.context)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws without gradient."""
        return self.flow.sample(tuple(sample_shape), self.context)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """The same flow with its context expanded to ``batch_shape``."""
        if self.context is None:
            if tuple(batch_shape):
                raise NotImplementedError("a flow without context has no batch to expand")
            return FlowDistribution(self.flow)
        context = self.context.expand(*batch_shape, self.context.shape[-1])
        return FlowDistribution(self.flow, context)
