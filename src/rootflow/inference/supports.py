"""Where parameters live: a support for each, and its smooth map from all real numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform as Bijection

__all__ = ["Parameter", "Support", "layout", "ordered"]

Support = Constraint | Callable[[dict[str, Tensor]], Constraint]


class _Ordered(Constraint):
    """Vectors whose entries increase strictly."""

    is_discrete = False
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value.diff(dim=-1) > 0).all(-1)


class _OrderedBijection(Bijection):
    """The first entry as it is, each further one above its predecessor by an exponential."""

    domain = constraints.real_vector
    codomain = _Ordered()
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :1], x[..., 1:].exp()], -1).cumsum(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., :1], y.diff(dim=-1).log()], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., 1:].sum(-1)


ordered = _Ordered()


def bijection(support: Constraint) -> Bijection:
    """The map from real numbers onto ``support``; the shape of its log-det is checked where used.

    Raises ValueError for supports without such a map, discrete ones above all.
    """
    if isinstance(support, _Ordered):
        return _OrderedBijection()
    try:
        result: Bijection = biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"support {support} has no smooth map from the real numbers; use a continuous "
            "torch.distributions.constraints (real, positive, interval, simplex, ...) or "
            "rootflow.inference.ordered"
        ) from None
    return result


@dataclass(frozen=True)
class Parameter:
    """One named parameter: shape and support, and its place in a row of all parameters.

    ``free_shape``: shape of the real numbers it is mapped from, on a simplex one fewer.
    """

    name: str
    shape: tuple[int, ...]
    support: Support
    free_shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def free_size(self) -> int:
        """How many real numbers it is mapped from."""
        return math.prod(self.free_shape)

    def columns(self) -> list[str]:
        """A name for each number, counted from 1: ``beta[1]``, ``beta[2]``, ``cov[1,2]``."""
        if not self.shape:
            return [self.name]
        grid = torch.cartesian_prod(*(torch.arange(1, n + 1) for n in self.shape))
        return [
            f"{self.name}[{','.join(str(int(i)) for i in row)}]"
            for row in grid.reshape(-1, len(self.shape))
        ]

    def support_given(self, earlier: dict[str, Tensor]) -> Constraint:
        """The support itself, or what it is given the values ``(n, *shape)`` of earlier ones."""
        if isinstance(self.support, Constraint):
            return self.support
        try:
            found = self.support(earlier)
        except KeyError as error:
            raise ValueError(
                f"support of {self.name} asks for {error}; it can use the parameters before it: "
                f"{', '.join(earlier) or 'none'}"
            ) from None
        if not isinstance(found, Constraint) or found.event_dim:
            raise ValueError(
                f"support of {self.name} must return a constraint on single numbers such as "
                f"constraints.interval(0, 1 - p['a']), not {found!r}"
            )
        return found

    def constrain(self, u: Tensor, earlier: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Values ``(n, *shape)`` of u ``(n, free_size)``, and the log-det ``(n,)`` of this map."""
        u = u.reshape(len(u), *self.free_shape)
        there = bijection(self.support_given(earlier))
        x = there(u)
        log_det: Tensor = there.log_abs_det_jacobian(u, x)  # type: ignore[no-untyped-call]
        # Elementwise maps give one number per coordinate, others one per vector: sum what is left.
        if x.shape[1:] != self.shape or log_det.shape != x.shape[: log_det.dim()] or not (
            log_det.dim()
        ):
            raise ValueError(
                f"support of {self.name} maps {tuple(u.shape)} to {tuple(x.shape)} with a log-det "
                f"of shape {tuple(log_det.shape)}; the parameter has shape {self.shape}"
            )
        return x, log_det.flatten(1).sum(-1) if log_det.dim() > 1 else log_det

    def unconstrain(self, x: Tensor, earlier: dict[str, Tensor]) -> Tensor:
        """The way back from values ``(n, *shape)`` to ``(n, free_size)``."""
        there = bijection(self.support_given(earlier))
        result: Tensor = there.inv(x)
        return result.reshape(len(x), self.free_size)

    def inside(self, x: Tensor, earlier: dict[str, Tensor]) -> Tensor:
        """Which of the values ``(n, *shape)`` lie in the support, ``(n,)`` bool."""
        support = self.support_given(earlier)
        ok: Tensor = support.check(x)  # type: ignore[no-untyped-call]
        known: Tensor = torch.isfinite(x).reshape(len(x), self.size).all(-1)
        return known & ok.reshape(len(x), ok.numel() // max(len(x), 1)).all(-1)


def _parameter(name: str, shape: int | Sequence[int], support: Support | None) -> Parameter:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    support = constraints.real if support is None else support
    if any(n < 1 for n in shape):
        raise ValueError(f"features: {name} has shape {shape}; sizes must be at least 1")
    if not isinstance(support, Constraint):
        if not callable(support):
            raise TypeError(
                f"support of {name} is {support!r}; give a constraint of "
                "torch.distributions.constraints, or a function of the earlier parameters"
            )
        return Parameter(name, shape, support, shape)
    if support.event_dim > len(shape):
        raise ValueError(
            f"support of {name} is for vectors or matrices ({support}), "
            f"but {name} has shape {shape}"
        )
    try:
        there: Any = bijection(support)
        free = tuple(there.inverse_shape(shape))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"support of {name} does not match its shape {shape}: {error}") from None
    return Parameter(name, shape, support, free)


def layout(
    features: int | Mapping[str, int | Sequence[int]] | None,
    support: Support | Sequence[Support] | Mapping[str, Support] | None,
    names: Sequence[str] | None,
) -> tuple[list[Parameter], bool]:
    """The parameters that the arguments of ``Target`` describe, and whether they are a mapping.

    Raises ValueError or TypeError where the arguments contradict each other.
    """
    if features is None and isinstance(support, Mapping) and names is None:
        features = dict.fromkeys(support, ())
    if features is None and names is not None:
        features = len(names)
    if isinstance(features, Mapping):
        if names is not None:
            raise ValueError("names: leave it out where features maps names to shapes")
        if support is not None and not isinstance(support, Mapping):
            raise TypeError("support: give a mapping from names to supports, as features is one")
        supports = dict(support or {})
        if unknown := sorted(set(supports) - set(features)):
            raise ValueError(
                f"support names {unknown[0]!r}; the parameters are {', '.join(features)}"
            )
        if not features:
            raise ValueError("features is empty; give at least one parameter")
        return [_parameter(k, v, supports.get(k)) for k, v in features.items()], True
    if not isinstance(features, int) or isinstance(features, bool) or features < 1:
        raise ValueError(
            f"features={features!r}: give the number of parameters, at least 1, or a mapping from "
            "names to shapes"
        )
    columns = [f"x{k + 1}" for k in range(features)] if names is None else list(names)
    if len(columns) != features or len(set(columns)) != features:
        raise ValueError(f"names: {len(columns)} given, {features} different ones are needed")
    if isinstance(support, Mapping):
        if unknown := sorted(set(support) - set(columns)):
            raise ValueError(f"support names {unknown[0]!r}; the names are {', '.join(columns)}")
        each = [support.get(name) for name in columns]
    elif isinstance(support, Sequence):
        if len(support) != features:
            raise ValueError(f"support: {len(support)} given for {features} parameters")
        each = list(support)
    elif isinstance(support, Constraint) and support.event_dim:
        vector = _parameter("x", features, support)
        return [vector], False
    else:
        each = [support] * features
    return [_parameter(k, (), s) for k, s in zip(columns, each, strict=True)], False
