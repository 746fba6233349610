"""What a root find is given and what it gives back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import NotConverged

__all__ = ["REACTIONS", "Problem", "Solution", "choose"]

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """An equation ``residual(z, *tensors) = 0`` in z for each row of a batch by itself.

    ``residual`` maps z ``(batch, d)`` to ``(batch, d)`` and may depend on the rest only through
    ``tensors``: gradients flow to these. ``per_row`` names the positions in ``tensors`` whose first
    axis is the batch, so that finished rows can leave it; None means that rows cannot be chosen.
    ``contraction`` is a certified Lipschitz bound of z -> residual(z) - z where there is one below
    1; it gives ``Solution.bound``. ``jacobian(z, *tensors)``, if given, returns
    d residual_o / d z_i as ``[b, o, i]``.
    """

    residual: Callable[..., Tensor]
    tensors: tuple[Tensor, ...] = ()
    per_row: frozenset[int] | None = None
    contraction: float | Tensor | None = None
    jacobian: Callable[..., Tensor] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """The residual at z."""
        return self.residual(z, *self.tensors)

    def rows(self, index: Tensor) -> Problem:
        """The same equation for some rows of the batch."""
        chosen = self.per_row or frozenset()
        kept = tuple(t[index] if k in chosen else t for k, t in enumerate(self.tensors))
        return replace(self, tensors=kept)

    def detach(self) -> Problem:
        """The same equation without history."""
        return replace(self, tensors=tuple(t.detach() for t in self.tensors))

    def jacobian_at(self, z: Tensor) -> Tensor:
        """Exact Jacobian ``[b, o, i]``, from the given formula or by one gradient per dimension."""
        if self.jacobian is not None:
            return self.jacobian(z, *self.tensors)
        with torch.enable_grad():
            graph = torch.is_grad_enabled() and z.requires_grad
            z = z if z.requires_grad else z.detach().requires_grad_()
            f = self(z)
            rows = [
                torch.autograd.grad(f[:, o].sum(), z, retain_graph=True, create_graph=graph)[0]
                for o in range(f.shape[-1])
            ]
        return torch.stack(rows, 1)


@dataclass(frozen=True)
class Solution:
    """Roots with a verdict for each row.

    ``value`` ``(batch, d)``; ``residual`` ``(batch,)`` its 2-norm; ``bound`` ``(batch,)`` a bound
    on the distance to the exact root in exact arithmetic, residual / (1 - contraction), NaN without
    a contraction; ``steps`` ``(batch,)`` residual evaluations; ``converged`` ``(batch,)``.
    """

    value: Tensor
    residual: Tensor
    bound: Tensor
    steps: Tensor
    converged: Tensor


def _message(s: Solution) -> str:
    missed = int((~s.converged).sum())
    worst = int(torch.where(s.converged, -1.0, s.residual.nan_to_num(torch.inf)).argmax())
    residual = float(s.residual[worst])
    finite = "allow more max_steps, a larger tol, or lower lipschitz"
    return (
        f"{missed:,} of {s.converged.numel():,} samples missed the tolerance in "
        f"{int(s.steps.max())} steps (worst residual {residual:.1e}, sample {worst}); "
        + (finite if math.isfinite(residual) else "look for NaN or infinity in the input")
    )


def _raise(s: Solution) -> Solution:
    raise NotConverged(_message(s))


def _warn(s: Solution) -> Solution:
    warnings.warn(_message(s), RuntimeWarning, stacklevel=4)
    return s


def _nan(s: Solution) -> Solution:
    return replace(s, value=torch.where(s.converged[:, None], s.value, torch.nan))


REACTIONS: dict[str, Callable[[Solution], Solution]] = {"raise": _raise, "warn": _warn, "nan": _nan}


def choose(table: dict[str, T], name: str, argument: str) -> T:
    """Look a name up, or say which names there are."""
    if name not in table:
        raise ValueError(f"{argument}={name!r} is unknown; choose one of {', '.join(table)}")
    return table[name]


