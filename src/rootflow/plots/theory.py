"""Figure of the slopes that single blocks reach, beside those that their bounds allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.figure import Figure

from .style import DATA, FLOW, INK, canvas, caption

__all__ = ["slopes"]

Range = tuple[float, float]


def slopes(
    ranges: Mapping[tuple[str, str], Mapping[float, Range]],
    rhos: Mapping[float, float],
    limits: Callable[[str, float], Range],
) -> Figure:
    """A panel for each kind of block: stretches by c, within the region that rho = c^n allows.

    ``ranges`` maps (how it was trained, block) and c to the least and largest stretch.
    """
    names = list(dict.fromkeys(name for _, name in ranges))
    words = list(dict.fromkeys(word for word, _ in ranges))
    figure, axes = canvas(1, len(names), 3.0)
    c = np.array(sorted(rhos))
    for ax, name in zip(axes, names, strict=True):
        low, high = np.array([limits(name, rhos[k]) for k in c]).T
        ax.fill_between(c, low, high, color=DATA, alpha=0.14, lw=0, label="allowed")
        for word, colour, mark in zip(words, (INK, FLOW), "os", strict=False):
            found = ranges[word, name]
            for end in (0, 1):
                points = [(k, found[k][end]) for k in c if k in found]
                if points:
                    label = None if end else word
                    ax.plot(*zip(*points, strict=True), mark, color=colour, ms=4, label=label)
        ax.set_yscale("log")
        ax.set_ylim(5e-4, 100)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        caption(ax, name, "bound c of a layer", "stretch" if ax is axes[0] else "")
    axes[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower left")
    return figure
