"""The one style of all figures: colours, sizes, panels and captions."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

__all__ = [
    "BLUES", "DATA", "FAINT", "FLOW", "INK", "ORANGES", "WIDTH", "Array", "canvas", "caption",
    "heat", "png", "span",
]  # fmt: skip

Array = NDArray[np.float64]
DATA, FLOW, INK, FAINT = "#0072B2", "#D55E00", "#33373d", "#c9ced6"
BLUES = LinearSegmentedColormap.from_list("data", ["#ffffff", "#9fd0ee", DATA, "#00263d"])
ORANGES = LinearSegmentedColormap.from_list("flow", ["#ffffff", "#f7bd8f", FLOW, "#431d00"])
WIDTH = 9.0  # inches, the same for every figure, so that text has one size down the page


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; equal figures give equal bytes."""
    out = BytesIO()
    with warnings.catch_warnings():  # a column name in a script that the font lacks shows as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(out, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    return out.getvalue()


def canvas(
    rows: int, columns: int, height: float, layout: Any = "constrained", used: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of calm panels ``height`` inches tall: the first ``used`` of a grid."""
    figure = Figure(figsize=(WIDTH, rows * height + 0.3), layout=layout)
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, k + 1) for k in range(used or rows * columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[:].set_color(FAINT)
        ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def caption(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    """Title and axis labels in the one style of all panels."""
    # parse_math=False: a column called "$_per_$" is a name, not a formula
    ax.set_title(title, fontsize=9, color=INK, loc="left", fontweight="bold", parse_math=False)
    ax.set_xlabel(x, fontsize=8, color=INK, parse_math=False)
    ax.set_ylabel(y, fontsize=8, color=INK, parse_math=False)


def span(
    values: Array, low: float = 0.001, high: float = 0.999, pad: float = 0.04
) -> tuple[float, float]:
    """A window (start, stop) over the quantiles ``low`` to ``high``, never empty."""
    start, stop = np.quantile(values, [low, high]) if values.size else (-1.0, 1.0)
    if not stop > start:
        start, stop = values.min(), values.max()
    margin = (stop - start) * pad or max(0.5, abs(start) * 0.01)
    return float(start - margin), float(stop + margin)


def heat(
    ax: Axes, x: Array, y: Array, cells: Array, colours: Any, top: float, power: float
) -> Any:
    """Cells (columns, rows) between the edges x and y, the colour by ``(cell / top) ** power``."""
    norm = PowerNorm(power, 0.0, top or 1.0)
    return ax.pcolormesh(x, y, cells.T, cmap=colours, norm=norm)
