"""What is to be approximated: an unnormalised log-density, its parameters and their supports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import RootflowError
from .supports import Support, layout

__all__ = ["Box", "KnownTarget", "Target", "TargetError"]


class TargetError(RootflowError):
    """The log-density cannot be used; ``posterior`` holds the best state of a fit, if any."""

    posterior: Any = None


class Target:
    """An unnormalised log-density over named parameters, each with its support.

    ``log_prob`` takes points in their own units and returns nats ``(n,)``, up to a constant:

    - with ``features=3``, or ``names`` alone, it gets a tensor ``(n, features)``;
    - with ``features={"mu": 2, "tau": ()}``, a mapping from names to shapes, it gets a dictionary
      of tensors ``(n, *shape)``.

    ``support``: a constraint of torch.distributions for all, a sequence or a mapping from names;
    what is missing is real. A support that depends on earlier parameters is a function of them,
    ``{"beta": lambda p: constraints.interval(0, 1 - p["alpha"])}``. ``ordered`` of this package is
    a constraint too. ``names``: of the columns, where ``features`` is a number.

    ``batched=False``: ``log_prob`` takes a single point, without the n, and returns one number.
    ``gradient``: for callables outside torch; both then take NumPy arrays (or dictionaries of
    them), and ``gradient`` returns the same shapes as it is given. ``dtype``: what ``log_prob``
    gets; float64 unless its own tensors are float32, because sums over data lose digits.

    Points are evaluated in chunks of the size they come in; the value of a row must not depend on
    the other rows. Raises ValueError or TypeError for arguments that contradict each other.
    """

    def __init__(
        self,
        log_prob: Callable[[Any], Any],
        features: int | Mapping[str, int | Sequence[int]] | None = None,
        support: Support | Sequence[Support] | Mapping[str, Support] | None = None,
        names: Sequence[str] | None = None,
        *,
        batched: bool = True,
        gradient: Callable[[Any], Any] | None = None,
        dtype: torch.dtype = torch.float64,
        name: str | None = None,
    ) -> None:
        if not callable(log_prob):
            raise TypeError(f"log_prob is {type(log_prob).__name__}; give a function")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype}: give torch.float64 or torch.float32")
        self.function, self.supplied_gradient = log_prob, gradient
        self.batched, self.dtype = batched, dtype
        self.parameters, self.by_name = layout(features, support, names)
        own = getattr(log_prob, "__name__", type(log_prob).__name__)
        self.name = name or own.replace("<lambda>", "target")
        self.features = sum(p.size for p in self.parameters)
        self.free_features = sum(p.free_size for p in self.parameters)
        flat = [column for p in self.parameters for column in p.columns()]
        if not self.by_name and len(self.parameters) == 1 and self.features > 1:
            flat = list(names) if names else [f"x{k + 1}" for k in range(self.features)]
        self.columns = tuple(flat)
        self._loop = False  # single points are looped over once torch.vmap has failed

    def __repr__(self) -> str:
        return f"Target({self.name}: {', '.join(self.columns)})"

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """Points ``(..., features)`` as a dictionary of tensors ``(..., *shape)``."""
        pieces = torch.split(x, [p.size for p in self.parameters], -1)
        parts = zip(self.parameters, pieces, strict=True)
        return {p.name: part.reshape((*x.shape[:-1], *p.shape)) for p, part in parts}

    def free_columns(self) -> list[str]:
        """A name for each unconstrained coordinate."""
        if self.free_features == self.features:
            return list(self.columns)
        return [f"{p.name}~{k + 1}" for p in self.parameters for k in range(p.free_size)]

    def constrain(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters ``(n, features)`` of unconstrained ``(n, free_features)``, and log-det."""
        if u.dim() != 2 or u.shape[1] != self.free_features:
            raise ValueError(f"u has shape {tuple(u.shape)}; give (n, {self.free_features})")
        values: dict[str, Tensor] = {}
        total = u.new_zeros(len(u))
        pieces = torch.split(u, [p.free_size for p in self.parameters], -1)
        for p, piece in zip(self.parameters, pieces, strict=True):
            values[p.name], log_det = p.constrain(piece, values)
            total = total + log_det
        flat = [values[p.name].reshape(len(u), p.size) for p in self.parameters]
        return torch.cat(flat, -1), total

    def unconstrain(self, x: Tensor) -> Tensor:
        """Parameters ``(n, features)`` to unconstrained ``(n, free_features)``.

        Raises ValueError naming the first row and parameter outside the support.
        """
        self._check_rows(x)
        values, parts = self.split(x), []
        for p in self.parameters:
            inside = p.inside(values[p.name], values)
            if not bool(inside.all()):
                row = int((~inside).nonzero()[0])
                raise ValueError(
                    f"x: row {row}, {p.name} = {values[p.name][row].tolist()} is outside its "
                    f"support {p.support_given(values)}"
                )
            parts.append(p.unconstrain(values[p.name], values))
        return torch.cat(parts, -1)

    def inside(self, x: Tensor) -> Tensor:
        """Which rows of x ``(n, features)`` lie in the support, ``(n,)`` bool."""
        self._check_rows(x)
        values = self.split(x)
        checks = [p.inside(values[p.name], values) for p in self.parameters]
        return torch.stack(checks).all(0)

    def _check_rows(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"x has shape {tuple(x.shape)}; give (n, {self.features})")

    def log_prob(self, x: Tensor) -> Tensor:
        """The user's log-density ``(n,)`` at parameters ``(n, features)``, checked.

        Raises TargetError if the callable fails or returns something else than one floating-point
        number per row.
        """
        self._check_rows(x)
        x = x.to(self.dtype)
        if self.supplied_gradient is not None:
            result: Tensor = _Supplied.apply(x, self)  # type: ignore[no-untyped-call]
            return result
        return self._checked(self._run(self._call, x), x)

    def unconstrained_log_prob(self, u: Tensor) -> Tensor:
        """Log-density ``(n,)`` of the unconstrained ``(n, free_features)``, the log-det counted."""
        x, log_det = self.constrain(u.to(self.dtype))
        return self.log_prob(x) + log_det

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``unconstrained_log_prob`` and its gradient ``(n, free_features)``, both detached."""
        with torch.enable_grad():
            u = u.detach().to(self.dtype).requires_grad_()
            value = self.unconstrained_log_prob(u)
            total = value.sum()
            if not total.requires_grad:
                raise TargetError(f"{self.name}: {NO_GRADIENT}")
            gradient = self._run(lambda t: torch.autograd.grad(t, u)[0], total, "differentiating ")
        return value.detach(), gradient

    def _given(self, x: Tensor) -> Any:
        """What the function gets for points ``(..., features)``."""
        return self.split(x) if self.by_name else x

    def _call(self, x: Tensor) -> Any:
        if self.batched:
            return self.function(self._given(x))
        if not self._loop:
            try:
                return torch.vmap(lambda row: self.function(self._given(row)))(x)
            except Exception:  # vmap cannot follow it, or the function itself fails: then once more
                self._loop = True
        rows = [self.function(self._given(row)) for row in x]
        wrong = next((r for r in rows if not isinstance(r, Tensor) or r.numel() != 1), None)
        return torch.stack([r.reshape(()) for r in rows]) if wrong is None else wrong

    def _run(self, f: Callable[[Tensor], Any], x: Tensor, doing: str = "") -> Any:
        try:
            return f(x)
        except RootflowError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            hint = ""
            if "dtype" in text or "Float" in text or "Double" in text:
                hint = f"; it was called with {self.dtype}: convert its tensors or give dtype="
            if "numpy" in text.lower():
                hint = f"; {NO_GRADIENT}"
            raise TargetError(
                f"{self.name}: {doing}log_prob raised {type(error).__name__}: {text[:400]}{hint}"
            ) from error

    def _checked(self, out: Any, x: Tensor) -> Tensor:
        if not isinstance(out, Tensor):
            raise TargetError(
                f"{self.name}: log_prob returned {type(out).__name__}; return a tensor of shape "
                "(n,), or give gradient= for a function outside torch"
            )
        if not out.is_floating_point():
            raise TargetError(
                f"{self.name}: log_prob returned {out.dtype}; return floating-point log-densities"
            )
        if out.shape != x.shape[:1]:
            raise TargetError(f"{self.name}: {_shape_advice(out, x, self.batched)}")
        return out.to(self.dtype)

    def outside(self, name: str, x: Tensor) -> Tensor:
        """"log_prob" ``(n,)`` or "gradient" ``(n, features)``, functions of NumPy arrays."""
        function = {"log_prob": self.function, "gradient": self.supplied_gradient}[name]
        assert function is not None
        shape = x.shape[:1] if name == "log_prob" else x.shape

        def called(points: Tensor) -> Any:
            given = tree_map(Tensor.numpy, self._given(points.detach().cpu()))
            found = function(given)
            if isinstance(found, Mapping):
                parts = [found[p.name] for p in self.parameters]
                parts = [np.reshape(part, (*points.shape[:-1], -1)) for part in parts]
                found = np.concatenate(parts, -1)
            return np.asarray(found, dtype=float)

        def all_of(x: Tensor) -> Any:
            return called(x) if self.batched else np.stack([called(row) for row in x])

        found = self._run(all_of, x)
        if found.size != shape.numel():
            raise TargetError(
                f"{self.name}: {name} returned shape {found.shape} for {len(x)} rows of "
                f"{self.features} parameters; return {tuple(shape)}"
            )
        return torch.from_numpy(found.reshape(shape)).to(x)


class _Supplied(torch.autograd.Function):
    """A function of NumPy arrays, differentiable once through the gradient supplied with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Target) -> Tensor:
        ctx.save_for_backward(x)
        ctx.target = target
        return target.outside("log_prob", x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        return outer[0][:, None] * ctx.target.outside("gradient", *ctx.saved_tensors), None


NO_GRADIENT = (
    "log_prob has no gradient: it must compute with torch from its argument; for a function "
    "outside torch give gradient="
)


def _shape_advice(out: Tensor, x: Tensor, batched: bool) -> str:
    n, got = len(x), tuple(out.shape)
    text = f"log_prob returned shape {got} for {n} rows; it must be ({n},)"
    if got == (n, 1):
        return f"{text}: squeeze the last dimension"
    if got == tuple(x.shape):
        return f"{text}: sum over the parameters, sum(-1)"
    if not got and batched:
        return f"{text}: return one number per row, or give batched=False for single points"
    return text


Box = tuple[tuple[float, float], tuple[float, float]]


class KnownTarget(Target):
    """A built-in target.

    ``summary``: one line. ``log_normaliser``: log of the integral of exp(log_prob) over the
    support, in nats; None if unknown. ``box``: bounds in unconstrained space that hold all of a
    two-dimensional target but less than 1e-8. ``view``: what a picture of it should show, in its
    own units; the box if nothing else is said. ``sampler(n, generator)``: exact independent draws
    ``(n, features)``, float64; None if there is no way. ``quantities`` and ``parameters_of``: from
    parameters ``(n, features)`` to what ``reference(name)`` holds and back, where these differ.
    """

    def __init__(
        self,
        log_prob: Callable[[Any], Any],
        features: Any = None,
        support: Any = None,
        names: Any = None,
        *,
        name: str,
        summary: str,
        log_normaliser: float | None = None,
        box: Box | None = None,
        view: Box | None = None,
        sampler: Callable[[int, torch.Generator], Tensor] | None = None,
        quantities: Callable[[Tensor], Tensor] = lambda x: x,
        parameters_of: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__(log_prob, features, support, names, name=name)
        self.summary, self.log_normaliser = summary, log_normaliser
        self.box, self.view, self.sampler = box, view or box, sampler
        self.quantities, self.parameters_of = quantities, parameters_of
