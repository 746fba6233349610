"""Figure of classifiers: test errors by the bound on their convolutions."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from .style import FAINT, INK, canvas, caption
from .zoo import WHEEL_COLOURS

__all__ = ["by_restriction"]

Errors = Mapping[float | None, tuple[float, float]]


def by_restriction(panels: Mapping[str, Mapping[str, Errors]], title: str) -> Figure:
    """A panel for each set of images: percent and standard error of each block by c.

    ``panels`` maps images, block and c to (error, standard error); c is None for a block that is
    not restricted, which is a line across.
    """
    figure, axes = canvas(1, len(panels), 3.2)
    for ax, (name, blocks) in zip(axes, panels.items(), strict=True):
        for (block, found), colour in zip(blocks.items(), WHEEL_COLOURS, strict=False):
            if None in found:
                ax.axhline(found[None][0], color=INK, lw=1, ls="--", label=block)
                continue
            known = sorted(c for c in found if c is not None)
            errors, spread = zip(*(found[c] for c in known), strict=True)
            ax.errorbar(known, errors, spread, fmt="o-", color=colour, ms=3.5, lw=1.2, capsize=2.5,
                        label=block)  # fmt: skip
        ax.grid(axis="y", color=FAINT, lw=0.5, alpha=0.6)
        ax.set_axisbelow(True)
        caption(ax, name, "c, bound on each convolution", "test error, %")
    axes[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure
