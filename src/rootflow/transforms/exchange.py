"""Maps exchanged with torch.distributions: theirs inside our flows, ours inside their classes.

In torch.distributions a transform leads from the base towards the data; our ``forward`` leads the
other way. Both adapters keep to that: a call of the torch transform is our ``inverse``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform as TorchTransform

from .base import Transform

__all__ = ["FromTorch", "ToTorch", "moment"]


def moment(module: nn.Module, *tensors: Tensor | None) -> tuple[Any, ...]:
    """What must not change while a result may be reused: weights, ``tensors``, gradient mode."""
    state = [*module.parameters(), *module.buffers(), *(t for t in tensors if t is not None)]
    return (torch.is_grad_enabled(), module.training, *(t._version for t in state))


class FromTorch(Transform):
    """A bijective torch.distributions transform from latent to data, as a map of ours.

    ``theirs``: the transform, whose call is our ``inverse`` and whose ``inv`` our ``forward``, or
    the constraint that the data obey, for which ``biject_to`` is taken. ``event``: shape of one
    sample, which it must keep. log_det is its ``log_abs_det_jacobian``, summed over the event. A
    transform that is an ``nn.Module``, as Pyro's are, trains with the flow. A flow with such a map
    is put together by hand, ``Flow(Compose([...]))``. The support of its distribution is the
    constraint, or what the transform names as its codomain (composed ones may name too much).

    Raises ValueError for a transform that is not bijective or changes the shape.
    """

    def __init__(
        self, theirs: TorchTransform | constraints.Constraint, event: Sequence[int]
    ) -> None:
        super().__init__(event)
        if isinstance(theirs, constraints.Constraint):
            self.codomain, there = theirs, biject_to(theirs)
        else:
            self.codomain, there = theirs.codomain, theirs
        name, domain = type(there).__name__, there.domain
        if not there.bijective:
            raise ValueError(f"theirs: {name} is not bijective, so it gives no density")
        if domain.event_dim > len(self.event) or self.event != tuple(
            there.forward_shape(self.event)
        ):
            raise ValueError(f"theirs: {name} does not keep samples of shape {self.event}")
        self.there: TorchTransform = there

    def image(self, support: constraints.Constraint) -> constraints.Constraint:
        rest = len(self.event) - self.codomain.event_dim
        each = constraints.independent
        return each(self.codomain, rest) if rest else self.codomain  # type: ignore[no-untyped-call]

    def _log_det(self, z: Tensor, x: Tensor) -> Tensor:
        # One number for each event or for each coordinate, whatever the domain says: sum them all.
        log_det: Tensor = self.there.log_abs_det_jacobian(z, x)  # type: ignore[no-untyped-call]
        if not log_det.dim() or log_det.shape != x.shape[: log_det.dim()]:
            raise ValueError(
                f"theirs: {type(self.there).__name__} gives a log-det of shape "
                f"{tuple(log_det.shape)} for samples of shape {tuple(x.shape)}"
            )
        return log_det.reshape(len(x), log_det.shape[1:].numel()).sum(-1)

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z: Tensor = self.there.inv(x)
        return z, -self._log_det(z, x)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x: Tensor = self.there(z)
        return x, self._log_det(z, x)


class ToTorch(TorchTransform, nn.Module):
    """A map of ours, conditioned on ``context``, as a torch.distributions transform.

    Its call leads from latent to data, so that ``TransformedDistribution(base, [ToTorch(f)])`` has
    the density of ``Flow(f)`` with that base; ``inv`` leads from data to latent. It is a module,
    so its parameters train where it is used. With ``cache_size=1`` the last pair and its log_det
    are kept, which saves the second pass when a draw is scored; unlike torch's own transforms it
    forgets them when a weight, the context or the gradient mode has changed since.
    """

    bijective = True
    context: Tensor | None
    __hash__ = nn.Module.__hash__

    def __init__(
        self, transform: Transform, context: Tensor | None = None, cache_size: int = 0
    ) -> None:
        super().__init__(cache_size)
        self.transform = transform
        self.register_buffer("context", context, persistent=False)
        self._moment: tuple[Any, ...] = ()
        self._pair: tuple[Tensor, Tensor, Tensor] | None = None  # latent, data, log_det

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "_moment": (), "_pair": None}  # type: ignore[no-untyped-call]
        return {**state, "_cached_x_y": (None, None)}

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """All of R^n."""
        real, n = constraints.real, len(self.transform.event)
        return constraints.independent(real, n)  # type: ignore[no-untyped-call]

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """R^n, or where a ``FromTorch`` nearest to the data leads."""
        return self.transform.image(self.domain)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of the data for latents of ``shape``, widened by the context's batch."""
        batch = () if self.context is None else self.context.shape[:-1]
        wide = (*batch, *self.transform.event)
        return torch.broadcast_shapes(shape, wide)  # type: ignore[no-untyped-call, no-any-return]

    inverse_shape = forward_shape

    def with_cache(self, cache_size: int = 1) -> ToTorch:
        """The same map with another cache."""
        same = cache_size == self._cache_size
        return self if same else ToTorch(self.transform, self.context, cache_size)

    def _forget(self) -> None:
        if self._cache_size and (now := moment(self)) != self._moment:
            self._moment, self._pair, self._cached_x_y = now, None, (None, None)

    def __call__(self, x: Tensor) -> Tensor:
        self._forget()
        y: Tensor = super().__call__(x)  # type: ignore[no-untyped-call]
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        self._forget()
        x: Tensor = super()._inv_call(y)  # type: ignore[no-untyped-call]
        return x

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self.transform.inverse(x, self.context)
        self._pair = (x, y, log_det) if self._cache_size else None
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x: Tensor
        x, log_det = self.transform(y, self.context)
        self._pair = (x, y, -log_det) if self._cache_size else None
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the call from latent x ``(..., *event)`` to data y, ``(...)`` in nats."""
        self._forget()
        if self._pair is not None and x is self._pair[0] and y is self._pair[1]:
            return self._pair[2]
        back: Tensor = self.transform(y, self.context)[1]
        return back.neg()
