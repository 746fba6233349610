"""What experiments with fitted flows share: building, fitting within a budget, held-out scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import rootflow

from ..errors import RootflowError
from ..flow import Flow
from ..plots.style import span
from ..plots.zoo import Extent
from ..training import FitConfig, History
from .parts import Job, plain

__all__ = ["build", "cells", "descend", "learn", "log_density", "window"]


def build(
    name: str, size: int | tuple[int, ...], options: Mapping[str, Any], seed: int
) -> Flow:
    """An untrained flow of the registry, its weights drawn from ``seed`` alone.

    ``size``: how many columns, or the shape of images.
    """
    given: dict[str, Any] = {"features" if isinstance(size, int) else "shape": size}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return rootflow.flow(name, **given, **plain(options))


def learn(
    flow: Flow, train: Tensor, validation: Tensor, budget: Mapping[str, Any], seed: int, job: Job,
    **given: Any,
) -> tuple[History, dict[str, Any]]:
    """Fit and save in the part's folder, going on where a stopped fit was; what it took.

    ``budget``: ``seconds``, of processor time, and fields of ``FitConfig``. ``given``: more that
    ``fit`` takes.
    """
    settings = {"clock": "processor", **budget}
    seconds = settings.pop("seconds")
    settings.setdefault("validate_seconds", max(seconds / 10, 0.2))
    history = job.watch(
        rootflow.fit(
            flow, train, validation,
            config=FitConfig(minutes=seconds / 60, seed=seed, **settings),
            checkpoint=job.folder / "resume", should_stop=job.should_stop, **given,
        )
    )  # fmt: skip
    flow.save(job.folder)
    return history, {
        "parameters": sum(p.numel() for p in flow.parameters() if p.requires_grad),
        "steps": history.steps,
        "fit_seconds": round(history.seconds, 3),
    }


def descend(
    loss: Callable[[], Tensor], parameters: Iterable[Tensor], steps: int, lr: float, job: Job
) -> None:
    """Minimise a loss by Adam, the rate falling to zero along a cosine; twenty records of it."""
    optimiser = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(1, steps + 1):
        value = loss()
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if step % max(1, steps // 20) == 0:
            job.records.append({"kind": "train", "step": step, "loss": float(value.detach())})
            job.stop_if_asked()


@torch.no_grad()
def log_density(flow: Flow, x: Tensor, finite: bool = False) -> Tensor:
    """Log-density (n,) in nats at x (n, features), in float64.

    Raises RootflowError if ``finite`` is asked for and a row has none.
    """
    found = torch.cat([flow.log_prob(rows) for rows in torch.split(x, 4096)]).double()
    lost = int((~found.isfinite()).sum())
    if finite and lost:
        raise RootflowError(f"{lost} of {len(x):,} held-out rows have no finite density")
    return found


def window(rows: Tensor) -> Extent:
    """A square window that holds nearly all rows (n, 2)."""
    points = rows.double().numpy()
    (left, right), (bottom, top) = (span(points[:, k], 0.001, 0.999, 0.1) for k in (0, 1))
    half, x, y = max(right - left, top - bottom) / 2, (left + right) / 2, (bottom + top) / 2
    return x - half, x + half, y - half, y + half


def cells(extent: Extent, count: int) -> Tensor:
    """Centres (count^2, 2) of the cells of a grid over the window, first axis to the right."""
    left, right, bottom, top = extent
    middle = (torch.arange(count) + 0.5) / count
    x, y = left + (right - left) * middle, bottom + (top - bottom) * middle
    return torch.cartesian_prod(x, y)
