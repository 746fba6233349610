"""Figures of a classifier: how far its probabilities can be believed, and what it mixes up."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from .style import BLUES, DATA, FAINT, FLOW, INK, canvas, caption, png

__all__ = ["confusion", "draw", "reliability"]

MOST_NUMBERS = 20  # classes; cells of more are too small for a number


def draw(bins: ArrayLike, table: ArrayLike) -> dict[str, bytes]:
    """Both figures as PNG, from ``reliability`` and ``confusion`` of ``classification.measure``."""
    return {"reliability": png(reliability(bins)), "confusion": png(confusion(table))}


def reliability(bins: ArrayLike) -> Figure:
    """Share of right guesses by confidence; bins (b, 3): images, right guesses, summed confidence.

    Bars are two binomial standard errors. Source: Guo et al. 2017 (arXiv:1706.04599), figure 1.
    """
    table = np.asarray(bins, dtype=float)
    count, right, confidence = table[table[:, 0] > 0].T
    share, at = right / count, confidence / count
    figure, (left, middle) = canvas(1, 2, 2.9)
    left.plot([0, 1], [0, 1], color=FAINT, lw=1.2, label="as sure as right")
    spread = 2 * np.sqrt(share * (1 - share) / count)
    left.errorbar(at, share, spread, fmt="o-", color=FLOW, ms=4, lw=1.2, capsize=2.5)
    left.legend(frameon=False, fontsize=8, labelcolor=INK)
    left.set(xlim=(0, 1.02), ylim=(0, 1.04))
    caption(left, "Accuracy", "confidence", "share of right guesses")
    edges = np.linspace(0, 1, len(table) + 1)
    middle.stairs(table[:, 0] / max(table[:, 0].sum(), 1), edges, fill=True, color=DATA, alpha=0.7)
    middle.set_xlim(0, 1.02)
    caption(middle, "Confidence", "probability of the likeliest class", "share of images")
    return figure


def confusion(table: ArrayLike) -> Figure:
    """Percent of each class, a row, taken for each class, a column; ``table``: counts (k, k)."""
    counts = np.asarray(table, dtype=float)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    k = len(percent)
    figure, (left, right) = canvas(1, 2, 4.2)
    left.imshow(percent, cmap=BLUES, vmin=0, vmax=100)
    right.barh(np.arange(k), 100 - percent.diagonal(), color=DATA, alpha=0.7)
    right.set_ylim(k - 0.5, -0.5)
    if k <= MOST_NUMBERS:
        left.set_xticks(range(k))
        for ax in (left, right):
            ax.set_yticks(range(k))
        for (row, column), value in np.ndenumerate(percent):
            if counts[row, column]:
                colour = "white" if value > 45 else INK
                text = f"{value:.0f}" if value >= 10 else f"{value:.1f}"
                left.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    caption(left, "Percent of each class", "taken for class", "class")
    caption(right, "Errors of each class", "percent of its images", "class")
    return figure
