"""Figures of flows of growing length: their densities side by side, and how the error falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from numpy.typing import ArrayLike

from .style import BLUES, FAINT, INK, ORANGES, caption
from .zoo import WHEEL_COLOURS, Extent, density, failed, panels, window

__all__ = ["Strip", "by_length", "strips"]


@dataclass(frozen=True)
class Strip:
    """One row of panels: the exact density (m, m) over ``extent``, then the learned ones.

    ``learned`` maps the caption of a panel to (m, m), or to None for a flow that failed.
    """

    name: str
    extent: Extent
    true: ArrayLike
    learned: Mapping[str, ArrayLike | None]


def strips(rows: Sequence[Strip], title: str = "") -> Figure:
    """Several rows of densities; every row has one scale of colour, that of its exact density."""
    across = 1 + max(len(row.learned) for row in rows)
    figure, axes = panels(len(rows) * across, (9.0 - 0.38) / across - 0.12, title, across, False)
    for k, row in enumerate(rows):
        own = axes[k * across : (k + 1) * across]
        exact = np.asarray(row.true, dtype=np.float64)
        top = 1.15 * float(exact.max())
        density(own[0], exact, row.extent, BLUES, top)
        caption(own[0], row.name)
        for ax, (name, cells) in zip(own[1:], row.learned.items(), strict=False):
            if cells is None:
                failed(ax)
                window(ax, row.extent)
            else:
                density(ax, cells, row.extent, ORANGES, top)
            caption(ax, name)
        for ax in own[1 + len(row.learned) :]:
            ax.set_visible(False)
    return figure


def by_length(values: Mapping[str, Mapping[str, Mapping[int, float]]], label: str) -> Figure:
    """A panel for each target: a positive error by length, both logarithmic, a line for each flow.

    ``values`` maps target, flow and length to the error, whose name is the figure's title.
    """
    figure, axes = panels(len(values), 1.9, label, across=3)
    for k, (ax, (target, flows)) in enumerate(zip(axes, values.items(), strict=True)):
        lengths = sorted({length for found in flows.values() for length in found})
        for (name, found), colour in zip(flows.items(), WHEEL_COLOURS, strict=False):
            known = sorted((n, max(value, 1e-9)) for n, value in found.items())
            if known:
                ax.plot(*zip(*known, strict=True), "o-", color=colour, ms=3.5, lw=1.3, label=name)
        ax.set(xscale="log", yscale="log")
        ax.xaxis.set_major_locator(FixedLocator([float(n) for n in lengths]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        low, high = ax.get_ylim()
        steps = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
        ax.yaxis.set_major_locator(LogLocator(subs=steps, numticks=8))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.grid(axis="y", color=FAINT, lw=0.5, alpha=0.6)
        ax.set_axisbelow(True)
        caption(ax, target, "length" if k + 3 >= len(axes) else "")
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="upper right", ncols=len(names), frameon=False, fontsize=8,
                  labelcolor=INK)  # fmt: skip
    return figure
