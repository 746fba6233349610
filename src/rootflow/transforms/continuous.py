r"""Continuous flows: the map follows a learned velocity field for a unit of time.

Chen et al. 2018 (arXiv:1806.07366), Grathwohl et al. 2019 (arXiv:1810.01367): with
dx/dt = f(x, t), the density changes along the way by d ln p / dt = -tr df/dx. For a network
f = W_3 s(W_2 s(W_1 x + b_1) + b_2) + b_3 the trace is a sum over pairs of units,

.. math:: \mathrm{tr} = \sum_{ij} s'_i\, (W_2)_{ji} (W_1 W_3)_{ij}\, s'_j,

one more product of the size of the middle layer in any number of columns, so no estimator is
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import NotConverged
from .base import Transform
from .conditioners import check_hidden, start
from .ridge import Numbers, stacked

__all__ = ["FIXED", "ContinuousTransform", "ffjord"]

FIXED = {"midpoint": 2, "heun3": 3, "rk4": 4}  # solvers of equal steps, and their order
ADAPTIVE = ("dopri5", "dopri8", "bosh3")


class ContinuousTransform(Transform):
    """z = x(1) with dx/dt = f(x, t) from x(0) = x, f a network of tanh units.

    ``hidden``: widths of f; time enters every layer's bias linearly, a context by a network of the
    same widths. The trace is exact, for one or two hidden layers at the price of one product,
    for more at that of one pass for each column.

    ``solver`` "rk4", "heun3" or "midpoint" takes ``steps`` equal steps: then no row depends on
    another. The adaptive "dopri5", "dopri8" and "bosh3" hold each row's error of a step below
    ``tol`` times (1 + its size), but the steps are those of the batch's hardest row, so that
    results depend on the others within that tolerance. Neither direction nor log_det is exact: the
    error falls as the power 4, 3 or 2 of the length of a step, and so does what a round trip
    misses. ``certificate`` estimates it. Gradients are those of the steps taken.
    Raises: ValueError for an unknown solver, no step or a tolerance that is not positive;
    ModuleNotFoundError without torchdiffeq; NotConverged where an adaptive solver's steps vanish.
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        hidden: Sequence[int] = (64, 64),
        *,
        solver: str = "rk4",
        steps: int = 4,
        tol: float = 1e-5,
    ) -> None:
        super().__init__((features,), context)
        if solver not in (*FIXED, *ADAPTIVE):
            known = ", ".join((*FIXED, *ADAPTIVE))
            raise ValueError(f"solver={solver!r} is unknown; choose one of {known}")
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        if not tol > 0:
            raise ValueError(f"tol={tol} must be positive")
        try:
            from torchdiffeq import odeint
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "ffjord needs torchdiffeq: pip install 'rootflow[ffjord]'"
            ) from None
        self.odeint, self.solver, self.steps, self.tol = odeint, solver, steps, tol
        self.sizes = [*check_hidden(hidden), features]
        self.weights = nn.ParameterList(
            start(torch.empty(after, before), before)
            for before, after in zip((features, *hidden), self.sizes, strict=True)
        )
        nn.init.zeros_(self.weights[-1])
        self.rates = nn.Parameter(torch.zeros(sum(self.sizes)))  # of the biases, with time
        biases = torch.cat([start(torch.empty(sum(hidden)), 1), torch.zeros(features)])
        self.numbers = Numbers(biases, context, hidden, "silu")

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._flow(x, context, 0, 1, self.steps, self.tol)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._flow(z, context, 1, 0, self.steps, self.tol)

    def certificate(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """An estimate, not a bound, of the larger error of z (2-norm) and log_det.

        What halving the steps, or a hundredth of the tolerance, changes.
        """
        z, log_det = self.to_latent(x, context)
        finer = self._flow(x, context, 0, 1, 2 * self.steps, self.tol / 100)
        moved = torch.linalg.vector_norm(z - finer[0], dim=-1)
        return torch.maximum(moved, (log_det - finer[1]).abs())

    def _flow(
        self, x: Tensor, context: Tensor | None, begin: float, end: float, steps: int, tol: float
    ) -> tuple[Tensor, Tensor]:
        """From time ``begin`` to ``end``: the points and the integral of the trace."""
        n = len(x)
        fixed = self.solver in FIXED
        times = x.new_tensor([begin, end])
        grid = torch.linspace(begin, end, steps + 1, dtype=x.dtype, device=x.device)
        options = {"grid_constructor": lambda f, y, t: grid} if fixed else {"norm": _worst_row}
        state = torch.cat([x, x.new_zeros(n, 1)], 1)
        if not n:
            return x, x.sum(1)
        try:
            path = self.odeint(
                self._field(context), state, times,
                rtol=tol, atol=tol, method=self.solver, options=options,
            )  # fmt: skip
        except AssertionError as error:  # torchdiffeq's word for a step of length zero
            raise NotConverged(
                f"{self.solver} found no step that meets tol={tol:g} ({error}); "
                "allow a larger tol or use solver='rk4'"
            ) from None
        return path[-1, :, :-1], path[-1, :, -1]

    def _field(self, context: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The velocity and its trace ``(n, d + 1)`` as a function of time and state."""
        first, *middle, last = self.weights
        numbers, sizes = self.numbers(context), self.sizes
        if not middle:
            pairs = (first * last.mT).sum(1)
        elif len(middle) == 1:
            pairs = middle[0].mT * (first @ last)

        def field(t: Tensor, state: Tensor) -> Tensor:
            moved = torch.addcmul(numbers, self.rates, t)
            biases = torch.split_with_sizes(moved, sizes, -1)
            h, slopes = state[:, :-1], []
            for w, b in zip((first, *middle), biases, strict=False):
                h = torch.tanh(torch.addmm(b, h, w.mT))
                slopes.append(1 - h * h)
            if not middle:
                trace = (slopes[0] @ pairs)[:, None]
            elif len(middle) == 1:
                trace = ((slopes[0] @ pairs) * slopes[1]).sum(1, keepdim=True)
            else:
                tangents = slopes[0][:, None] * first.mT
                for s, w in zip(slopes[1:], middle, strict=True):
                    tangents = (tangents @ w.mT) * s[:, None]
                trace = (tangents * last).sum((1, 2))[:, None]
            return torch.cat([torch.addmm(biases[-1], h, last.mT), trace], 1)

        return field


def _worst_row(state: Tensor) -> Tensor:
    """The largest root mean square of a row, so that no row hides behind the others."""
    return state.square().mean(-1).sqrt().max()


def ffjord(
    features: int,
    context: int = 0,
    *,
    blocks: int = 2,
    hidden: Sequence[int] = (64, 64),
    solver: str = "rk4",
    steps: int = 4,
    tol: float = 1e-5,
    actnorm: bool = True,
    linear: str | None = "lu",
) -> list[Transform]:
    """A continuous flow of ``blocks`` fields, each for a unit of time."""
    return stacked(
        lambda: ContinuousTransform(
            features, context, hidden, solver=solver, steps=steps, tol=tol
        ),
        features, blocks, actnorm, linear,
    )  # fmt: skip
