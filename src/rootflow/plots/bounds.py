"""Figures of autoencoders: their bounds by length of the flow, and rows of images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from .style import BLUES, FAINT, INK, WIDTH, Array, canvas, caption
from .zoo import WHEEL_COLOURS

__all__ = ["by_length", "images"]


def by_length(panels: Mapping[str, Mapping[str, Mapping[int, Array]]], title: str) -> Figure:
    """A panel for each kind of bound: every seed a dot, their mean with its standard error.

    ``panels`` maps panel, flow and length to the values of the seeds. Lengths are spaced evenly,
    whatever they are.
    """
    figure, axes = canvas(1, len(panels), 3.2)
    for ax, (name, flows) in zip(axes, panels.items(), strict=True):
        lengths = sorted({length for found in flows.values() for length in found})
        place = {length: k for k, length in enumerate(lengths)}
        offsets = 0.12 * (np.arange(len(flows)) - (len(flows) - 1) / 2)
        for (flow, found), colour, offset in zip(
            flows.items(), WHEEL_COLOURS, offsets, strict=False
        ):
            known = sorted(found)
            if not known:
                continue
            x = np.array([place[n] for n in known]) + offset
            mean = [found[n].mean() for n in known]
            spread = [
                found[n].std(ddof=1) / len(found[n]) ** 0.5 if len(found[n]) > 1 else 0.0
                for n in known
            ]
            ax.errorbar(x, mean, spread, fmt="o-", color=colour, ms=3.5, lw=1.2, capsize=2.5,
                        label=flow)  # fmt: skip
            for at, n in zip(x, known, strict=True):
                ax.plot([at] * len(found[n]), found[n], ".", color=colour, ms=3, alpha=0.4)
        ax.set_xticks(range(len(lengths)), [f"{n}" for n in lengths])
        ax.grid(axis="y", color=FAINT, lw=0.5, alpha=0.6)
        ax.set_axisbelow(True)
        caption(ax, name, "length of the flow", "nats per image")
    axes[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def images(rows: Mapping[str, ArrayLike], title: str) -> Figure:
    """Rows of images ``(n, height, width)`` with values 0 to 1, dark for 1, each row named."""
    shaped = {name: np.asarray(row, dtype=np.float64) for name, row in rows.items()}
    across = max(len(row) for row in shaped.values())
    figure, axes = canvas(len(shaped), 1, (WIDTH - 1.8) / across)
    for ax, (name, row) in zip(axes, shaped.items(), strict=True):
        n, height, width = row.shape
        strip = np.full((height, across * (width + 1) - 1), np.nan)  # one empty column between
        for k in range(n):
            strip[:, k * (width + 1) : k * (width + 1) + width] = row[k]
        ax.imshow(strip, cmap=BLUES, vmin=0, vmax=1, interpolation="nearest")
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8, color=INK)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure
