"""The contract of every invertible map, and how maps are chained and turned around."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

__all__ = ["Compose", "Inverse", "Transform", "event_of", "over_channels"]


def event_of(event: int | Sequence[int]) -> tuple[int, ...]:
    """The event that a number of columns, or a shape whose first entry counts channels, means."""
    return (event,) if isinstance(event, int) else tuple(event)


def over_channels(values: Tensor, x: Tensor) -> Tensor:
    """One value for each column or channel ``(c,)``, to be broadcast over x ``(n, c, ...)``."""
    return values.view(-1, *[1] * (x.dim() - 2))


class Transform(nn.Module):
    """An invertible map between data x and latent z, both with trailing shape ``event``.

    A subclass writes ``to_latent`` and ``to_data`` for one flat batch; the two public directions
    check shapes, flatten leading dimensions and broadcast the context, once for all maps.
    """

    def __init__(self, event: Sequence[int], context: int = 0) -> None:
        super().__init__()
        self.event, self.context = tuple(event), context

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Data ``(batch, *event)`` to latent and log_det ``(batch,)``."""
        raise NotImplementedError

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latent ``(batch, *event)`` to data and log_det ``(batch,)`` of that direction."""
        raise NotImplementedError

    def certificate(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """Bound ``(batch,)`` on the distance of z from the exact image of x; zero for a formula."""
        return x.new_zeros(x.shape[0])

    def image(self, support: Constraint) -> Constraint:
        """Where the data lie when the latent lies in ``support``; by default there, too."""
        return support

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data ``(..., *event)`` to latent of the same shape and log_det ``(...)`` in nats."""
        return self._call("forward", self.to_latent, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent ``(..., *event)`` to data and the log_det of this direction, in nats."""
        return self._call("inverse", self.to_data, z, context)

    def _call(
        self,
        direction: str,
        run: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
        x: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        n = len(self.event)
        if tuple(x.shape[x.dim() - n :]) != self.event or x.dim() < n:
            raise ValueError(
                f"{type(self).__name__}.{direction}: the input has shape {tuple(x.shape)}, "
                f"but its trailing dimensions must be {self.event}"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}.{direction}: the input is {x.dtype}; give floating point"
            )
        batch = tuple(x.shape[: x.dim() - n])
        if (context is None) != (self.context == 0):
            wanted = f"a context of width {self.context}" if self.context else "no context"
            raise ValueError(f"{type(self).__name__}.{direction}: this flow takes {wanted}")
        if context is not None:
            if context.shape[-1] != self.context:
                raise ValueError(
                    f"{type(self).__name__}.{direction}: context has shape {tuple(context.shape)}; "
                    f"its last dimension must be {self.context}"
                )
            try:
                shape = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
                    batch, context.shape[:-1]
                )
                batch = tuple(shape)
            except RuntimeError:
                raise ValueError(
                    f"{type(self).__name__}.{direction}: batch shape {batch} of the input and "
                    f"{tuple(context.shape[:-1])} of the context do not broadcast"
                ) from None
            context = context.expand(*batch, self.context).reshape(-1, self.context)
            x = x.expand(*batch, *self.event)
        rows = math.prod(batch)
        z, log_det = run(x.reshape(rows, *self.event), context)
        return z.reshape(*batch, *self.event), log_det.reshape(batch)


class Compose(Transform):
    """Several maps in a row, the first one nearest to the data."""

    def __init__(self, transforms: Iterable[Transform]) -> None:
        parts = list(transforms)
        if not parts:
            raise ValueError("transforms is empty; give at least one")
        super().__init__(parts[0].event, max(t.context for t in parts))
        self.transforms = nn.ModuleList(parts)

    def _parts(self) -> list[Transform]:
        return [t for t in self.transforms if isinstance(t, Transform)]

    def image(self, support: Constraint) -> Constraint:
        for t in reversed(self._parts()):
            support = t.image(support)
        return support

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for t in self._parts():
            x, log_det = t.to_latent(x, context)
            total = total + log_det
        return x, total

    def certificate(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """The largest certificate among the parts, each for its own input."""
        worst = x.new_zeros(x.shape[0])
        for t in self._parts():
            y, _ = t.to_latent(x, context)
            worst = torch.maximum(worst, t.certificate(x, y, context))
            x = y
        return worst

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[0])
        for t in reversed(self._parts()):
            z, log_det = t.to_data(z, context)
            total = total + log_det
        return z, total


class Inverse(Transform):
    """A map with its two directions exchanged."""

    def __init__(self, transform: Transform) -> None:
        super().__init__(transform.event, transform.context)
        self.transform = transform

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform.to_data(x, context)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform.to_latent(z, context)
