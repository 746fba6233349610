"""Figures that compare flows: what one learns layer by layer, and many of them side by side.

Blue is data, orange the flow, dark lines the truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from .style import BLUES, DATA, FAINT, FLOW, INK, ORANGES, WIDTH, Array, canvas, caption, heat, span

__all__ = [
    "Stage", "density", "failed", "flow_1d", "flow_2d", "overview_1d", "overview_2d", "panels",
    "window",
]  # fmt: skip

# Colours after the colour-blind-safe set of Okabe and Ito, closed to a circle: neighbouring angles
# have neighbouring colours, and no two directions share one.
WHEEL_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B0457F", "#E6B800", "#56B4E9")
WHEEL = LinearSegmentedColormap.from_list(
    "wheel", ["#0072B2", "#56B4E9", "#009E73", "#E6B800", "#D55E00", "#B0457F", "#0072B2"]
)
ACROSS = 4  # panels side by side
Extent = tuple[float, float, float, float]


@dataclass(frozen=True)
class Stage:
    """Where the rows are after some layers.

    ``points`` (n, features) in the order of the data. In two dimensions ``lines`` (k, m, 2) are the
    lines of a square grid of the latent plane, pulled back to this stage. In one dimension
    ``curve`` (m, 2) holds inputs and outputs of the layers since the last stage.
    """

    name: str
    points: NDArray[Any]
    lines: NDArray[Any] | None = None
    curve: NDArray[Any] | None = None


def flow_1d(
    data: ArrayLike, latent: ArrayLike, samples: ArrayLike, grid: ArrayLike, true: ArrayLike,
    learned: ArrayLike, stages: Sequence[Stage], title: str = "",
) -> Figure:
    """One flow on one column: data, samples, density and latent; below, the map of each layer.

    ``data``, ``latent`` and ``samples`` (n,), densities ``true`` and ``learned`` (m,) at ``grid``.
    A layer's panel has its input along the bottom and its output upwards, coloured by where in the
    data a point started, with a histogram of the outputs at the left and the identity dotted.
    """
    figure, axes = panels(4 + len(stages), 1.5, title)
    x, p = np.asarray(grid, dtype=np.float64), np.asarray(true, dtype=np.float64)
    top = 1.25 * p.max()
    sides = ((axes[0], data, "data", DATA), (axes[1], samples, "samples", FLOW))
    for ax, rows, name, colour in sides:
        _histogram(ax, rows, (x[0], x[-1]), colour)
        ax.plot(x, p, color=INK, lw=1.1)
        caption(ax, name)
    axes[2].fill_between(x, np.asarray(learned, dtype=np.float64), color=FLOW, alpha=0.35, lw=0)
    axes[2].plot(x, p, color=INK, lw=1.1)
    caption(axes[2], "density; line: exact")
    for ax in axes[:3]:
        ax.set(xlim=(x[0], x[-1]), ylim=(0, top))
    z = np.linspace(-4, 4, 201)
    _histogram(axes[3], latent, (-4, 4), FLOW)
    axes[3].plot(z, np.exp(-z * z / 2) / np.sqrt(2 * np.pi), color=INK, lw=1.1)
    axes[3].set(xlim=(-4, 4), ylim=(0, max(0.5, axes[3].get_ylim()[1])))
    caption(axes[3], "latent; line: normal")
    for ax in axes[:4]:
        ax.set_yticks([])
    start = np.asarray(data, dtype=np.float64).ravel()
    for ax, stage in zip(axes[4:], stages, strict=True):
        _curve(ax, stage, start)
    return figure


def flow_2d(
    data: ArrayLike, samples: ArrayLike, extent: Extent, learned: ArrayLike,
    stages: Sequence[Stage], title: str = "",
) -> Figure:
    """One flow on the plane: data, samples and density; then the rows carried through its layers.

    ``data`` and ``samples`` (n, 2); ``learned`` (m, m) the density on a grid of cells over
    ``extent`` (left, right, bottom, top), first axis to the right. The first of ``stages`` are the
    data, the last the latent. Rows keep the colour of the direction in which they started; thin
    lines are a square grid of the latent plane at the same stage.
    """
    figure, axes = panels(3 + len(stages), 2.04, title, ticks=False)
    sides = ((axes[0], data, "data", DATA), (axes[1], samples, "samples", FLOW))
    for ax, rows, name, colour in sides:
        _scatter(ax, rows, colour)
        window(ax, extent)
        caption(ax, name)
    density(axes[2], learned, extent, ORANGES, float(np.max(np.asarray(learned), initial=0)))
    caption(axes[2], "learned density")
    first = np.asarray(stages[0].points, dtype=np.float64)
    around = first - np.median(first, axis=0)
    colours = WHEEL(np.arctan2(around[:, 1], around[:, 0]) / (2 * np.pi) % 1.0)
    for k, (ax, stage) in enumerate(zip(axes[3:], stages, strict=True)):
        if stage.lines is not None:
            ax.add_collection(LineCollection(list(stage.lines), colors=INK, lw=0.35, alpha=0.4))
        ax.scatter(stage.points[:, 0], stage.points[:, 1], c=colours, s=2.2, lw=0, alpha=0.8)
        window(ax, extent if k == 0 else _square(stage.points))
        caption(ax, stage.name)
    return figure


def overview_1d(
    grid: ArrayLike, true: ArrayLike, learned: Mapping[str, ArrayLike | None], title: str = ""
) -> Figure:
    """The density that each flow learned, over ``grid`` (m,), with the exact one as a line.

    ``learned`` maps the caption of each panel to (m,), or to None for a flow that failed.
    """
    figure, axes = panels(len(learned), 1.5, title)
    x, p = np.asarray(grid, dtype=np.float64), np.asarray(true, dtype=np.float64)
    for ax, (name, found) in zip(axes, learned.items(), strict=True):
        ax.plot(x, p, color=INK, lw=1.0)
        if found is None:
            failed(ax)
        else:
            q = np.asarray(found, dtype=np.float64)
            ax.fill_between(x, q, color=FLOW, alpha=0.35, lw=0)
        ax.set(xlim=(x[0], x[-1]), ylim=(0, 1.25 * p.max()), yticks=[])
        caption(ax, name)
    return figure


def overview_2d(
    extent: Extent, true: ArrayLike, learned: Mapping[str, ArrayLike | None], title: str = "",
    true_name: str = "exact density", across: int = ACROSS,
) -> Figure:
    """The exact density, then those that flows learned, all (m, m) and on one scale of colour.

    ``learned`` maps the caption of each panel to cells over ``extent``, first axis to the right, or
    to None for a flow that failed.
    """
    side = (WIDTH - 0.38) / across - 0.12
    figure, axes = panels(1 + len(learned), side, title, across, ticks=False)
    exact = np.asarray(true, dtype=np.float64)
    # a flow's thin ridges may be far higher than the truth, so the truth sets the scale
    top = float(np.quantile(exact[exact > 1e-3 * exact.max()], 0.995))
    density(axes[0], exact, extent, BLUES, top)
    caption(axes[0], true_name)
    for ax, (name, cells) in zip(axes[1:], learned.items(), strict=True):
        if cells is None:
            failed(ax)
            window(ax, extent)
        else:
            density(ax, cells, extent, ORANGES, top)
        caption(ax, name)
    return figure


def panels(
    count: int, height: float, title: str, across: int = ACROSS, ticks: bool = True
) -> tuple[Figure, list[Axes]]:
    """Equal panels ``height`` inches tall, ``across`` in a row, under one title.

    Places are computed here: matplotlib's own layout would take longer than all the drawing.
    """
    rows, left, above = -(-count // across), 0.38, 0.3 if title else 0.0
    gap, between = (0.42, 0.55) if ticks else (0.12, 0.3)
    figure, axes = canvas(rows, across, height, layout="none", used=count)
    total = above + rows * (height + between)
    figure.set_size_inches(WIDTH, total)
    wide = (WIDTH - left - across * gap) / across
    for k, ax in enumerate(axes):
        row, column = divmod(k, across)
        x = left + column * (wide + gap)
        y = total - above - (row + 1) * (height + between) + between - 0.25
        ax.set_position((x / WIDTH, y / total, wide / WIDTH, height / total))
        ax.tick_params(labelsize=7)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        if not ticks:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(True)
    if title:
        figure.text(left / WIDTH, 1 - 0.05 / total, title, fontsize=10, color=INK, va="top",
                    fontweight="bold", parse_math=False)  # fmt: skip
    return figure, axes


def _histogram(ax: Axes, rows: ArrayLike, between: tuple[float, float], colour: str) -> None:
    """Heights are densities over all rows, drawn inside the window only."""
    values = np.asarray(rows, dtype=np.float64).ravel()
    edges = np.linspace(*between, 61)
    height = np.histogram(values, bins=edges)[0] / (max(values.size, 1) * np.diff(edges))
    ax.stairs(height, edges, fill=True, color=colour, alpha=0.45)


def _curve(ax: Axes, stage: Stage, start: Array) -> None:
    """One layer's map as a line whose colour says where in the data a point came from."""
    assert stage.curve is not None
    given, got = np.asarray(stage.curve, dtype=np.float64).T
    points = np.asarray(stage.points, dtype=np.float64).ravel()
    order = np.argsort(points)
    origin = np.interp(got, points[order], np.sort(start))
    low, high = np.quantile(start, [0.005, 0.995])
    shade = LinearSegmentedColormap.from_list("along", [DATA, "#009E73", "#E6B800", FLOW])
    pieces = np.stack([np.column_stack([given, got])[:-1], np.column_stack([given, got])[1:]], 1)
    colours = shade(np.clip((origin[:-1] - low) / (high - low), 0, 1))
    upright, across = span(got, 0, 1), span(given, 0, 1)
    edges = np.linspace(*upright, 50)
    height = np.histogram(points, bins=edges)[0].astype(np.float64)
    scale = 0.3 * (across[1] - across[0]) / max(height.max(), 1.0)
    ax.stairs(across[0] + height * scale, edges, baseline=across[0], orientation="horizontal",
              fill=True, color=FAINT, alpha=0.7)  # fmt: skip
    ax.plot(across, across, color=INK, lw=0.7, ls=":")
    ax.add_collection(LineCollection(list(pieces), colors=colours, lw=2.0))
    ax.set(xlim=across, ylim=upright)
    caption(ax, stage.name)


def _scatter(ax: Axes, rows: ArrayLike, colour: str) -> None:
    points = np.asarray(rows, dtype=np.float64)
    ax.scatter(points[:, 0], points[:, 1], color=colour, s=1.6, lw=0, alpha=0.45)


def density(ax: Axes, cells: ArrayLike, extent: Extent, colours: Any, top: float) -> None:
    """Cells (m, m) over the extent, first axis to the right, the darkest colour at ``top``."""
    values = np.nan_to_num(np.asarray(cells, dtype=np.float64), posinf=0.0)
    x = np.linspace(extent[0], extent[1], values.shape[0] + 1)
    y = np.linspace(extent[2], extent[3], values.shape[1] + 1)
    heat(ax, x, y, values, colours, top, 0.8)
    window(ax, extent)


def window(ax: Axes, extent: Extent) -> None:
    """Show this part of the plane, both axes on one scale."""
    ax.set(xlim=extent[:2], ylim=extent[2:])
    ax.set_aspect("equal")


def _square(points: ArrayLike) -> Extent:
    """A square window over nearly all points."""
    rows = np.asarray(points, dtype=np.float64)
    (left, right), (bottom, top) = (span(rows[:, k], 0.002, 0.998, 0.08) for k in (0, 1))
    half, x, y = max(right - left, top - bottom) / 2, (left + right) / 2, (bottom + top) / 2
    return x - half, x + half, y - half, y + half


def failed(ax: Axes) -> None:
    """An empty panel that says so."""
    ax.text(0.5, 0.5, "failed", transform=ax.transAxes, ha="center", va="center", color=INK)
    ax.set(xticks=[], yticks=[])
