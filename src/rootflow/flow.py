"""A flow: a base distribution seen through an invertible transform."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .bases import Normal
from .store import save_directory
from .transforms.base import Transform
from .transforms.exchange import moment

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
        self._same_dtype(x, context)
        result: tuple[Tensor, Tensor] = self.transform(x, context)
        return result

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data, with the log_det of that direction."""
        self._same_dtype(z, context)
        return self.transform.inverse(z, context)

    def _same_dtype(self, *given: Tensor | None) -> None:
        """Raise TypeError for an input in another precision than the weights."""
        if torch.compiler.is_compiling():
            return
        own = next((p.dtype for p in self.parameters()), None)
        for t in given:
            if t is not None and not isinstance(t, Tensor):
                raise TypeError(f"the input is {type(t).__name__}; give a torch.Tensor")
            if t is not None and own is not None and t.is_floating_point() and t.dtype != own:
                raise TypeError(
                    f"the input is {t.dtype}, the flow's weights are {own}; convert the input by "
                    f".to({own}) or the flow by .to({t.dtype})"
                )

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density ``(...)`` in nats of x ``(..., *event)``; differentiable."""
        z, log_det = self(x, context)
        result: Tensor = self.base.log_prob(z) + log_det  # type: ignore[operator]
        return result

    @torch.no_grad()
    def log_prob_and_error(
        self, x: Tensor, context: Tensor | None = None, *, draws: int = 8
    ) -> tuple[Tensor, Tensor]:
        """Log-density in nats and its standard error, each ``(...)``, from independent estimates.

        The mean over ``draws`` calls of ``log_prob``, unbiased if each is. Where two calls agree
        the log-determinant is exact and the error zero.
        """
        if draws < 2:
            raise ValueError(f"draws={draws} must be at least 2 for a standard error")
        first, second = self.log_prob(x, context), self.log_prob(x, context)
        if torch.equal(first, second):
            return first, torch.zeros_like(first)
        rest = [self.log_prob(x, context) for _ in range(draws - 2)]
        found = torch.stack([first, second, *rest])
        return found.mean(0), found.std(0) / draws**0.5

    def rsample_and_log_prob(
        self,
        sample_shape: Sequence[int] = (),
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Differentiable draws ``(*sample_shape, *context batch, *event)``, their log-densities."""
        if isinstance(sample_shape, int) or any(n < 0 for n in sample_shape):
            raise ValueError(f"sample_shape={sample_shape}: give a tuple of numbers such as (5,)")
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

    def distribution(
        self, context: Tensor | None = None, *, validate_args: bool | None = None
    ) -> FlowDistribution:
        """This flow as a ``torch.distributions.Distribution``, conditioned on ``context``.

        ``validate_args``: as for every Distribution. Where Pyro is in use it is one of Pyro's, too.
        """
        return _distribution(self, context, validate_args)

    def save(self, directory: str | Path) -> None:
        """Write config.json, model.safetensors and manifest.json for ``rootflow.load``."""
        if self.recipe is None:
            raise ValueError(
                "this flow was put together by hand; only flows made by rootflow.flow can be saved"
            )
        save_directory(Path(directory), self.recipe, self.state_dict())


class FlowDistribution(torch.distributions.Distribution):
    """A conditioned flow for use wherever torch.distributions is expected.

    ``batch_shape`` is that of the context, widened by ``expand``; an unconditional flow has none
    until it is expanded. Draws come from torch's global generator, as those of every Distribution.
    ``log_prob`` of the tensor that ``rsample`` returned last costs nothing more, unless a weight or
    the context has changed since.
    """

    has_rsample = True

    def __init__(
        self,
        flow: Flow,
        context: Tensor | None = None,
        validate_args: bool | None = None,
        batch_shape: Sequence[int] | None = None,
    ) -> None:
        width = None if context is None else context.shape[-1]
        if width != (flow.context or None):
            wanted = f"a context of width {flow.context}" if flow.context else "no context"
            raise ValueError(f"context has width {width}; this flow takes {wanted}")
        if context is not None and batch_shape is not None:
            context = context.expand(*batch_shape, flow.context)
        self.flow, self.context = flow, context
        self._drawn: tuple[Any, ...] = ()
        batch = tuple(batch_shape or ()) if context is None else context.shape[:-1]
        super().__init__(torch.Size(batch), torch.Size(flow.event), validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """The context, where there is one, holds no NaN."""
        return {} if self.context is None else {"context": constraints.real_vector}

    @property
    def support(self) -> constraints.Constraint:
        """Where the density is positive: the base's support, carried to the data by the map."""
        base: constraints.Constraint = self.flow.base.support  # type: ignore[assignment]
        return self.flow.transform.image(base)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, ``sample_shape + batch_shape``.

        Outside the support a ValueError, or -inf with ``validate_args=False``.
        """
        if self._drawn and value is self._drawn[0] and self._drawn[2] == self._moment():
            known: Tensor = self._drawn[1]
            return known
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.flow.log_prob(value, self.context)
        if not self._validate_args:
            inside: Tensor = self.support.check(value)  # type: ignore[no-untyped-call]
            lost = value.isnan().flatten(value.dim() - len(self.event_shape)).any(-1)
            log_prob = torch.where(inside | lost, log_prob, -math.inf)
        shape = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
            log_prob.shape, self.batch_shape
        )
        return log_prob.expand(shape)

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Differentiable draws and their log-densities, in one pass."""
        shape = tuple(sample_shape) + (tuple(self.batch_shape) if self.context is None else ())
        return self.flow.rsample_and_log_prob(shape, self.context)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Differentiable draws ``sample_shape + batch_shape + event_shape``."""
        x, log_prob = self.rsample_and_log_prob(sample_shape)
        self._drawn = (x, log_prob, self._moment())
        return x

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws without gradient."""
        return self.rsample_and_log_prob(sample_shape)[0]

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """The same flow for a larger batch, with independent draws in it."""
        return type(self)(self.flow, self.context, self._validate_args, batch_shape)

    def __reduce__(self) -> tuple[Any, ...]:
        settings = (self.context, self._validate_args, tuple(self.batch_shape))
        return _distribution, (self.flow, *settings)

    def _moment(self) -> tuple[Any, ...]:
        return moment(self.flow, self.context)


@functools.cache
def _distribution_class(pyro: ModuleType | None) -> type[FlowDistribution]:
    """FlowDistribution, with the methods by which Pyro calls a distribution where it is in use."""
    if pyro is None:
        return FlowDistribution
    mixin = pyro.torch_distribution.TorchDistributionMixin
    return type("FlowDistribution", (FlowDistribution, mixin), {"__module__": __name__})


def _distribution(flow: Flow, *settings: Any) -> FlowDistribution:
    return _distribution_class(sys.modules.get("pyro.distributions"))(flow, *settings)
