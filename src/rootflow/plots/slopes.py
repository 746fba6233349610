"""Figures of fits of one variable: curves, errors beside their lower bounds, the staircase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from .style import BLUES, DATA, FAINT, FLOW, INK, canvas, caption
from .zoo import panels

__all__ = ["errors", "fits", "staircase"]


def fits(
    x: ArrayLike, true: ArrayLike, found: Mapping[str, ArrayLike], notes: Mapping[str, str],
    title: str = "",
) -> Figure:
    """Each fit (m,) over ``x`` (m,), with the function as a grey line under it and a note."""
    figure, axes = panels(len(found), 1.5, title, across=3)
    exact = np.asarray(true, dtype=np.float64)
    low, high = exact.min(), exact.max()
    for ax, (name, image) in zip(axes, found.items(), strict=True):
        ax.plot(x, exact, color=INK, lw=3.2, alpha=0.35)
        ax.plot(x, image, color=FLOW, lw=1.5)
        ax.set(xlim=(-1, 1), ylim=(low - 0.12 * (high - low), high + 0.08 * (high - low)))
        ax.text(-0.95, 0.9 * high, notes[name], va="top", fontsize=8, color=INK)
        caption(ax, name)
    return figure


def errors(
    slope: float,
    residual: Mapping[int, float],
    others: Mapping[str, float],
    bound: Callable[[float, int], tuple[float, float]],
) -> Figure:
    """Largest error by number of residual blocks, above the bounds that no such flow can beat.

    ``bound(slope, blocks)`` gives the bound of the theorem and a sharper one. ``others`` are single
    implicit or monotone blocks, drawn as levels.
    """
    figure, (ax,) = canvas(1, 1, 3.6)
    count = np.array(sorted(residual))
    smallest = min([*residual.values(), *others.values(), 0.1])
    floor = max(smallest, 1e-8) / 4
    every = np.arange(1, max(count, default=1) + 1)
    theorem, sharp = np.array([bound(slope, int(k)) for k in every]).T
    for height, style, name in (
        (sharp, "--", "bound from the two ends of [0, 1]"), (theorem, "-", "bound of theorem 3")
    ):  # fmt: skip
        known = height > 0
        ax.fill_between(every[known], floor, height[known], color=DATA, alpha=0.12, lw=0)
        ax.plot(every[known], height[known], style, color=DATA, lw=1.4, label=name)
    values = [max(residual[int(k)], floor) for k in count]
    ax.plot(count, values, "o-", color=FLOW, ms=5, lw=1.2, label="residual flow, trained")
    marks = iter(("-.", ":", (0, (6, 2)), (0, (3, 1, 1, 1))))
    for name, value in others.items():
        words = f"{name}: {value:.2g}"
        ax.axhline(max(value, 2 * floor), color=INK, lw=1.1, ls=next(marks), label=words)
    ax.axvline(np.log2(slope), color=FAINT, lw=1.2)
    ax.text(np.log2(slope), 0.98, " log2 L", transform=ax.get_xaxis_transform(), va="top",
            fontsize=8, color=INK)  # fmt: skip
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # plain: no formula fonts needed
    ax.set(ylim=(floor, 3 * slope), xlim=(every[0] - 0.3, every[-1] + 0.3))
    ax.xaxis.set_major_locator(FixedLocator([float(k) for k in every]))
    caption(ax, f"Largest error on [-1, 1], slopes {1 / slope:g} and {slope:g}",
            "residual blocks", "largest error")  # fmt: skip
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def staircase(slopes: Sequence[float], shares: NDArray[np.float64]) -> Figure:
    """Largest error divided by L, (slopes, blocks), of residual flows with 1, 2, ... blocks.

    Cells left of the steps are those that the theorem rules out: L > 2^blocks. A cell without a
    number failed.
    """
    figure, (ax,) = canvas(1, 1, 0.36 * len(slopes) + 1.2)
    rows, columns = shares.shape
    edges = np.arange(columns + 1) + 0.5, np.arange(rows + 1) - 0.5
    drawn = ax.pcolormesh(*edges, np.ma.masked_invalid(shares), cmap=BLUES, vmin=0, vmax=0.5)
    for i, j in np.ndindex(rows, columns):
        if np.isfinite(shares[i, j]):
            dark = shares[i, j] > 0.25
            ax.text(j + 1, i, f"{shares[i, j]:.3f}", ha="center", va="center", fontsize=8,
                    color="white" if dark else INK)  # fmt: skip
    steps = np.clip(np.floor(np.log2(np.asarray(slopes) * (1 - 1e-12))), 0, columns) + 0.5
    corners = [(steps[0], -0.5)]
    for i, step in enumerate(steps):  # blocks < log2 L cannot do it
        corners += [(step, i - 0.5), (step, i + 0.5)]
    ax.plot(*np.array(corners).T, color=FLOW, lw=2.4, solid_joinstyle="miter", clip_on=False)
    ax.yaxis.set_major_locator(FixedLocator(np.arange(rows).tolist()))
    ax.set_yticklabels([f"{slope:g}" for slope in slopes])
    ax.xaxis.set_major_locator(FixedLocator(np.arange(1, columns + 1).tolist()))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlim=(0.5, columns + 0.5), ylim=(-0.5, rows - 0.5))
    caption(ax, "Largest error divided by L; left of the line, fewer than log2 L blocks",
            "residual blocks", "slope L")  # fmt: skip
    bar = figure.colorbar(drawn, ax=ax, aspect=18, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, labelcolor=INK, color=FAINT)
    return figure
