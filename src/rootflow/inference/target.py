"""What is to be approximated: an unnormalised log-density, its parameters and their supports."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RootflowError
from .supports import Support, layout

__all__ = ["Target", "TargetError"]


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
        """Rows ``(n, features)`` as a dictionary of tensors ``(n, *shape)``."""
        pieces = torch.split(x, [p.size for p in self.parameters], -1)
        parts = zip(self.parameters, pieces, strict=True)
        return {p.name: part.reshape(len(x), *p.shape) for p, part in parts}

    def free_columns(self) -> list[str]:
        """A name for each unconstrained coordinate."""
        names = []
        for p in self.parameters:
            own = p.columns()
            same = p.free_size == p.size
            names += own if same else [f"{p.name}~{k + 1}" for k in range(p.free_size)]
        if len(names) == len(self.columns):
            names = list(self.columns)
        return names

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

    def _call(self, x: Tensor) -> Any:
        if self.batched:
            return self.function(self.split(x) if self.by_name else x)
        if not self._loop:
            try:
                return torch.vmap(lambda row: self.function(self._point(row)))(x)
            except Exception:  # vmap cannot follow it, or the function itself fails: then once more
                self._loop = True
        rows = [self.function(self._point(row)) for row in x]
        wrong = next((r for r in rows if not isinstance(r, Tensor) or r.numel() != 1), None)
        if wrong is not None:
            return wrong
        return torch.stack([r.reshape(()) for r in rows])

    def _point(self, row: Tensor) -> Any:
        if not self.by_name:
            return row
        return {name: value[0] for name, value in self.split(row[None]).items()}

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

    def numpy_call(self, f: Callable[[Any], Any], x: Tensor, wanted: str) -> Tensor:
        """Values ``(n,)`` or gradients ``(n, features)`` of a function of NumPy arrays."""
        import numpy as np

        points: list[Any]
        parts = self.split(x) if self.by_name else {"x": x}
        arrays = {k: v.detach().cpu().numpy() for k, v in parts.items()}
        if self.batched:
            points = [arrays]
        else:
            points = [{k: v[i] for k, v in arrays.items()} for i in range(len(x))]
        rows = [f(p if self.by_name else p["x"]) for p in points]
        if wanted == "gradient" and self.by_name:
            axis = (len(x),) if self.batched else (1,)
            rows = [
                np.concatenate([np.reshape(r[p.name], (*axis, -1)) for p in self.parameters], 1)
                for r in rows
            ]
        joined = np.asarray(rows[0] if self.batched else rows, dtype=float)
        shape = (len(x),) if wanted == "log_prob" else (len(x), self.features)
        if joined.size != len(x) * (self.features if wanted == "gradient" else 1):
            raise TargetError(
                f"{self.name}: {wanted} returned shape {joined.shape} for {len(x)} rows of "
                f"{self.features} parameters; return {shape}"
            )
        return torch.tensor(joined.reshape(shape), dtype=self.dtype, device=x.device)


class _Supplied(torch.autograd.Function):
    """A function of NumPy arrays, differentiable once through the gradient supplied with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Target) -> Tensor:
        ctx.save_for_backward(x)
        ctx.target = target
        value: Tensor = target._run(
            lambda t: target.numpy_call(target.function, t, "log_prob"), x
        )
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        target = ctx.target
        assert target.supplied_gradient is not None
        inner = target._run(
            lambda t: target.numpy_call(target.supplied_gradient, t, "gradient"), x
        )
        return outer[0][:, None] * inner, None


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


def as_target(value: Any, **arguments: Any) -> Target:
    """A Target as it is; a callable with the arguments that ``Target`` needs.

    Raises TypeError for anything else.
    """
    if isinstance(value, Target):
        if arguments:
            raise TypeError(f"{next(iter(arguments))}: the target says this already")
        return value
    if not callable(value) or inspect.isclass(value):
        raise TypeError(f"target is {type(value).__name__}; give a Target or a log-density")
    return Target(value, **arguments)
