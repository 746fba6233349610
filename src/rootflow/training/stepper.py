"""One optimiser step, as every fit takes it: schedule, clipping, skipping, averaged weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..errors import NotConverged, RootflowError

__all__ = ["Stepper"]

FAILURES = 50  # in a row, after which a fit has failed


class Schedule(Protocol):
    """The settings that a step needs, of whatever configuration has them."""

    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def ema(self) -> float: ...


class Stepper:
    """Adam on ``parameters``, their exponential moving ``average``, and room for the ``best``.

    A step without a finite objective or gradient changes nothing and is counted in ``skipped``;
    ten in a row halve the learning rate, fifty raise what ``stuck`` returns.
    """

    def __init__(
        self, parameters: list[Tensor], schedule: Schedule, weight_decay: float = 0.0
    ) -> None:
        self.parameters, self.schedule = parameters, schedule
        self.average = [p.detach().clone() for p in parameters]
        self.best = [p.detach().clone() for p in parameters]
        self.optimiser = torch.optim.Adam(
            parameters, lr=schedule.lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.step, self.skipped, self.in_a_row, self.lr_factor = 0, 0, 0, 1.0

    def learning_rate(self, along: float) -> float:
        """Rate after that share of the schedule: a linear warm-up, then a cosine to zero."""
        s = self.schedule
        if along < s.warmup:
            return self.lr_factor * s.lr * (along + 1e-3) / (s.warmup + 1e-3)
        rest = (along - s.warmup) / (1 - s.warmup)
        return self.lr_factor * s.lr * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))

    def update(self, along: float, objective: Callable[[], Tensor | None]) -> tuple[float, float]:
        """One step down ``objective``; its value and the norm of its gradient, NaN for none."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(along)
        self.optimiser.zero_grad(set_to_none=True)
        reached = self.parameters[0].new_full((), math.nan)
        with contextlib.suppress(NotConverged):  # then the step counts as skipped
            loss = objective()
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
                reached = loss.detach()
        value, norm = self.gather(reached)
        self.step += 1
        if not (math.isfinite(value) and math.isfinite(norm)):
            self._skip()
            return value, norm
        self.optimiser.step()
        self.in_a_row = 0
        decay = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        return value, norm

    def gather(self, value: Tensor) -> tuple[float, float]:
        """The objective's value and the norm of its gradient, which is clipped."""
        found, norm = float(value), math.nan
        if math.isfinite(found):
            clip = torch.nn.utils.clip_grad_norm_
            norm = float(clip(self.parameters, self.schedule.clip, foreach=True))
        return found, norm

    def _skip(self) -> None:
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == 10:
            self.lr_factor /= 2
        if self.in_a_row >= FAILURES:
            raise self.stuck()

    def stuck(self) -> RootflowError:
        """The error after too many failures in a row."""
        return RootflowError(
            f"{FAILURES} training steps in a row gave a non-finite loss or gradient; "
            "lower lr, or check the data for extreme values"
        )

    @torch.no_grad()
    def put(self, values: list[Tensor]) -> list[Tensor]:
        """Exchange the parameters for ``values``; returns copies of the old ones."""
        old = [p.detach().clone() for p in self.parameters]
        for p, v in zip(self.parameters, values, strict=True):
            p.copy_(v)
        return old
