"""The figures that show whether a fitted flow can be trusted, to save or to embed in a report.

Rows with NaN or infinity are not drawn; where they would mislead, the figure counts them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from . import style
from .style import BLUES, DATA, FAINT, FLOW, INK, ORANGES, Array, canvas, caption, heat, span

__all__ = ["density_2d", "latent", "learning_curve", "marginals", "pairs", "round_trip"]

CORNER: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 8, "color": INK}
MOST_PANELS = 64  # more small panels than this cannot be read
MOST_NAMES = 8  # of levels on an axis


def learning_curve(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Training objective and validation log-likelihood by step, in nats per row of the data.

    ``metrics`` are the lines of metrics.jsonl. One is the noisy objective of the raw weights, the
    other an exact likelihood of the averaged weights, so they never share an axis.
    """
    figure, (left, right) = canvas(1, 2, 2.9)
    step, loss = _series(metrics, "train", "loss")
    missing = "" if loss.size else ": not recorded"
    caption(left, "Training objective" + missing, "step", "loss (nats per row)")
    if loss.size:
        window = max(1, loss.size // 20)
        padded = np.pad(loss, (window // 2, (window - 1) // 2), mode="edge")
        smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)
        left.plot(step, loss, color=DATA, lw=0.8, alpha=0.4, label="each log line")
        dot = "." if loss.size == 1 else None  # of which no line can be drawn
        left.plot(step, smooth, color=DATA, lw=1.8, marker=dot, label="running median")
        left.set_ylim(*span(loss, 0.0, 0.98, pad=0.08))  # the first steps may be astronomical
        left.legend(frameon=False, fontsize=8)
    step, value = _series(metrics, "validation", "log_prob")
    missing = "" if value.size else ": not recorded"
    caption(right, "Validation log-likelihood" + missing, "step", "log-likelihood (nats per row)")
    if value.size:
        at, error = _series(metrics, "validation", "log_prob_se")
        error = np.interp(step, at, error) if at.size else np.zeros_like(value)
        low, high, best = value - error, value + error, int(value.argmax())
        right.fill_between(step, low, high, color=FLOW, alpha=0.2, lw=0, label="± standard error")
        right.plot(step, value, color=FLOW, lw=1.6, marker=".")
        right.plot(step[best], value[best], "*", color=INK, ms=9, label="best")
        right.set_ylim(*span(np.concatenate([low, high]), 0.05, 1.0, pad=0.1))
        right.legend(frameon=False, fontsize=8)
    return figure


def marginals(
    data: ArrayLike, samples: ArrayLike, columns: Sequence[str],
    levels: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """One histogram per column, in its unit: data (n, d) filled, samples (m, d) as a line.

    ``levels``: names of the whole numbers that a column holds. NaN is not drawn. The window holds
    the inner 99.8 % of the data. Heights are densities over all rows, so what lies outside is
    missing from the picture; above 1 % of the samples it is named.
    """
    d = len(columns)
    shown = min(d, MOST_PANELS)
    figure, axes = canvas(*_shape(shown), 1.75, used=shown)
    for i, ax in enumerate(axes):
        x, y = (_table(np.reshape(table, (-1, d))[:, i], 1)[:, 0] for table in (data, samples))
        edges = _edges(x if len(x) else y, 60)
        _overlay(ax, x, y, edges)
        caption(ax, _short(columns[i], 28, ax.xaxis))
        if names := (levels or {}).get(columns[i], ())[:MOST_NAMES]:
            ax.set_xticks(range(len(names)), [_cut(name, 12) for name in names], rotation=25)
        outside = np.mean((y < edges[0]) | (y > edges[-1])) if len(y) else 0.0
        if outside > 0.01:
            ax.text(1, 0.97, f"{outside:.1%} of samples\noutside", transform=ax.transAxes, **CORNER)
    _legend(figure, shown, len(columns))
    return figure


def pairs(
    data: ArrayLike, samples: ArrayLike, columns: Sequence[str], max_columns: int = 8
) -> Figure:
    """Every pair of the first columns as 2-D histograms: data (n, d) below, samples (m, d) above.

    Mirrored panels share limits and colours (the root of the share of rows per cell). The diagonal
    holds the marginals.
    """
    x, y = (np.reshape(table, (-1, len(columns))) for table in (data, samples))
    d = min(len(columns), max_columns)
    bins = int(np.clip(math.sqrt(max(len(x), len(y))) / 2, 10, 48))
    alone = [[_table(table[:, i], 1)[:, 0] for i in range(d)] for table in (x, y)]
    edges = [_edges(a if len(a) else b, bins) for a, b in zip(*alone, strict=True)]
    figure, axes = canvas(d, d, style.WIDTH / d, layout="none")
    figure.subplots_adjust(0.09, 0.09, 0.985, 0.95, wspace=0.07, hspace=0.07)
    for place, ax in enumerate(axes):
        i, j = divmod(place, d)  # column i of the table runs upwards, column j to the right
        ax.yaxis.set_major_locator(MaxNLocator(3, prune="both"))
        if i == j:
            _overlay(ax, alone[0][i], alone[1][i], edges[i])
        else:
            share = [_share(_table(rows[:, [j, i]], 2), edges[j], edges[i]) for rows in (x, y)]
            colours = ORANGES if i < j else BLUES
            heat(ax, edges[j], edges[i], share[i < j], colours, max(map(np.max, share)), 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
        ax.tick_params("x", labelbottom=i == d - 1, rotation=30, labelsize=7)
        ax.tick_params("y", labelleft=j == 0, labelsize=7)
        names = [_short(columns[k], 13, a) for k, a in ((j, ax.xaxis), (i, ax.yaxis))]
        caption(ax, "", names[0] if i == d - 1 else "", names[1] if j == 0 else "")
    figure.align_labels()
    _legend(figure, d, len(columns))
    return figure


def latent(z: ArrayLike) -> Figure:
    """How far latents (n, d) of held-out rows are from independent standard normals.

    Per dimension: observed minus expected quantile by expected quantile (a QQ plot laid flat, so
    that small errors show) with the band that holds 95 % of normal draws at each point. Last panel:
    squared length against the chi-square density of d degrees of freedom.
    """
    given = np.asarray(z, dtype=np.float64)
    d = max(given.shape[-1], 1)
    table = _table(given, d)
    n, lost, shown = len(table), given.size // d - len(table), min(d, MOST_PANELS - 1)
    rows, across = _shape(shown + 1)
    figure, axes = canvas(rows, across, 1.75, used=shown + 1)
    expected, rank, low, high = _normal_order(n)
    for i, ax in enumerate(axes[:-1]):
        off = np.sort(table[:, i])[rank - 1] - expected
        ax.fill_between(expected, low - expected, high - expected, color=FAINT, alpha=0.6, lw=0)
        ax.axhline(0, color=INK, lw=0.8)
        ax.plot(expected, off, color=FLOW, lw=1.5)
        widest = max(0.25, np.abs(low - expected).max(initial=0), np.abs(off).max(initial=0))
        ax.set_ylim(-1.1 * min(widest, 3), 1.1 * min(widest, 3))
        x_label = "expected quantile" if i + across > shown else ""
        caption(ax, f"z{i + 1}", x_label, "" if i % across else "observed − expected")
    _chi_square(axes[-1], (table**2).sum(axis=1), d)
    more = [f"first {shown} of {d} dimensions"] * (shown < d)
    more += [f"{lost:,} of {lost + n:,} rows are not finite and left out"] * (lost > 0)
    if more:
        figure.suptitle(" · ".join(more), fontsize=9, color=FLOW)
    return figure


def round_trip(errors: ArrayLike, bounds: ArrayLike) -> Figure:
    """Histograms of log10 of round-trip error (n,) and of certified bound (n,), each in its panel.

    Errors are distances between x and inverse(forward(x)) in the unit of the data; bounds limit the
    distance between the computed latent and the exact one. Zeros cannot be drawn and are counted.
    """
    figure, axes = canvas(1, 2, 2.6)
    for ax, values, title, label in (
        (axes[0], errors, "Round-trip error", "log10 |x − inverse(forward(x))|, data units"),
        (axes[1], bounds, "Certified bound", "log10 bound on |z − exact z|, latent units"),
    ):
        given = np.asarray(values, dtype=np.float64).ravel()
        known = given[np.isfinite(given)]
        drawn = np.log10(known[known > 0])
        if drawn.size:
            ax.hist(drawn, bins=np.linspace(*span(drawn, 0, 1), 41).tolist(), color=DATA)
            ax.axvline(drawn.max(), color=INK, lw=1, ls="--")
        else:
            ax.set(xticks=[], yticks=[])
        notes = [f"largest {known.max():.2g}"] if known.size else []
        notes += [f"{zeros:,} rows exactly 0"] if (zeros := int((known <= 0).sum())) else []
        notes += [f"{lost:,} rows not finite"] if (lost := given.size - known.size) else []
        caption(ax, f"{title}: {', '.join(notes) or 'not measured'}", label, "rows")
    return figure


def density_2d(
    data: ArrayLike,
    log_prob_fn: Callable[[Array], ArrayLike],
    extent: tuple[float, float, float, float] | None = None,
    samples: ArrayLike = (),
    columns: Sequence[str] = ("x1", "x2"),
) -> Figure:
    """Data (n, 2), samples (m, 2) if any, and the density of a 2-D flow on one scale.

    ``log_prob_fn`` maps (k, 2) points to (k,) nats; it is called once, with 150 x 150 cell centres.
    ``extent`` is (left, right, bottom, top), by default the robust range of the data. Titles give
    the share of rows and the integral of the density inside it; all should agree.
    """
    x, y = _table(data, 2), _table(samples, 2)
    left, right, bottom, top = extent or (*span(x[:, 0]), *span(x[:, 1]))
    edges = np.linspace(left, right, 151), np.linspace(bottom, top, 151)
    grid = np.stack(np.meshgrid(*[(e[1:] + e[:-1]) / 2 for e in edges], indexing="ij"), axis=-1)
    area = (right - left) * (top - bottom)
    with np.errstate(over="ignore"):
        model = np.exp(np.asarray(log_prob_fn(grid.reshape(-1, 2)), dtype=np.float64))
    model = np.nan_to_num(model, posinf=0.0).reshape(150, 150)
    panels: list[tuple[str, Any, tuple[Array, Array], Array]] = []  # title, colours, edges, share
    for title, colours, rows in (("data", BLUES, x), ("samples", ORANGES, y)):
        if len(rows):
            thin = 2 if len(rows) > 20_000 else 3 if len(rows) > 5_000 else 5
            coarse = edges[0][::thin], edges[1][::thin]
            panels.append((title, colours, coarse, _share(rows, *coarse)))
    panels.append(("model density", ORANGES, edges, model * area / model.size))
    scale = max(float(np.quantile(share, 0.995)) * share.size / area for *_, share in panels)
    figure, axes = canvas(1, len(panels), 3.7)
    for ax, (title, colours, cells, share) in zip(axes, panels, strict=True):
        drawn = heat(ax, *cells, share * share.size / area, colours, scale, 1.0)
        ax.set_aspect("equal" if 0.5 < (right - left) / (top - bottom) < 2 else "auto")
        x_label, y_label = _short(columns[0], 28, ax.xaxis), _short(columns[1], 28, ax.yaxis)
        caption(ax, f"{title}: {share.sum():.1%} inside", x_label, y_label)
        bar = figure.colorbar(drawn, ax=ax, location="bottom", aspect=30, ticks=MaxNLocator(4))
        bar.outline.set_visible(False)
        bar.set_label("density per unit area", fontsize=8, color=INK)
        bar.ax.tick_params(labelsize=7, labelcolor=INK)
    return figure


def _shape(count: int) -> tuple[int, int]:
    """Rows and columns of a grid for ``count`` panels."""
    columns = 2 if count in (2, 4) else 3 if count <= 9 else 4 if count <= 24 else 6
    return -(-count // columns), columns


def _legend(figure: Figure, shown: int, total: int) -> None:
    words = [("data", DATA), ("samples", FLOW)]
    words += [(f"first {shown} of {total} columns", "none")] * (shown < total)
    where = "upper left" if figure.get_layout_engine() is None else "outside upper left"
    handles = [Patch(color=colour, label=word) for word, colour in words]
    options: dict[str, Any] = {"loc": where, "ncols": 3, "frameon": False, "fontsize": 8}
    figure.legend(handles=handles, **options)


def _short(name: str, most: int, axis: Axis) -> str:
    """The name to show, with the power of ten or offset that would else sit in the axis' corner."""
    formatter = axis.get_major_formatter()
    formatter.set_locs(list(axis.get_majorticklocs()))
    axis.get_offset_text().set_visible(False)
    offset = f" ({formatter.get_offset()})" if formatter.get_offset() else ""
    most -= len(offset) // 2
    return _cut(name, most) + offset


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _table(values: ArrayLike, columns: int) -> Array:
    """The finite rows as (n, columns) float64; an empty input of any shape has no rows."""
    table = np.asarray(values, dtype=np.float64).reshape(-1, columns)
    return table[np.isfinite(table).all(axis=1)]


def _series(metrics: Sequence[Mapping[str, Any]], kind: str, key: str) -> tuple[Array, Array]:
    """Steps and finite values of one quantity; a step logged again after a resume counts once."""
    known = {m["step"]: m[key] for m in metrics if m.get("kind") == kind and m.get(key) is not None}
    steps, values = _table(sorted(known.items()), 2).T
    return steps, values


def _edges(values: Array, bins: int) -> Array:
    """Bin edges over the robust range; a column of few distinct levels gets one bin per level."""
    start, stop = span(values)
    levels = np.unique(values[(values >= start) & (values <= stop)])
    if 1 < levels.size <= 60 and levels.size * 5 <= values.size:
        middle = (levels[1:] + levels[:-1]) / 2
        return np.array([2 * levels[0] - middle[0], *middle, 2 * levels[-1] - middle[-1]])
    return np.linspace(start, stop, bins + 1)


def _overlay(ax: Axes, data: Array, samples: Array, edges: Array) -> None:
    """Both histograms as densities over all rows, drawn inside ``edges`` only."""
    for values, fill, colour in ((data, True, DATA), (samples, False, FLOW)):
        height = np.histogram(values, bins=edges)[0] / (max(values.size, 1) * np.diff(edges))
        ax.stairs(height, edges, fill=fill, color=colour, alpha=0.45 if fill else 1, lw=1.4)
    ax.set(xlim=(edges[0], edges[-1]), yticks=[])


def _share(rows: Array, x_edges: Array, y_edges: Array) -> Array:
    """The share of all rows (n, 2) in each cell."""
    return np.histogram2d(rows[:, 0], rows[:, 1], bins=[x_edges, y_edges])[0] / max(len(rows), 1)


def _normal_order(n: int) -> tuple[Array, NDArray[np.int64], Array, Array]:
    """Expected values of chosen order statistics of n normals, their ranks, and 95 % limits.

    The limits are quantiles of 2,000 exact draws (ratios of sums of gammas) with a fixed seed.
    """
    normal = NormalDist()
    wanted = np.array([normal.cdf(t) for t in np.linspace(-5, 5, 241)])
    rank = np.unique(np.clip(np.ceil(n * wanted), 1, n).astype(np.int64))[: max(n, 0)]
    gaps = np.diff(rank, prepend=0, append=n + 1)
    sums = np.random.default_rng(0).gamma(gaps, size=(2000, gaps.size)).cumsum(axis=1)
    low, high = np.quantile(sums[:, :-1] / sums[:, -1:], [0.025, 0.975], axis=0)
    quantile = np.vectorize(normal.inv_cdf, otypes=[np.float64])
    return quantile((rank - 0.375) / (n + 0.25)), rank, quantile(low), quantile(high)


def _chi_square(ax: Axes, squared: Array, d: int) -> None:
    top = max(np.quantile(squared, 0.995) if squared.size else 0.0, d + 4 * math.sqrt(2 * d))
    edges = np.linspace(max(0.0, d - 6 * math.sqrt(2 * d)), top, 51)
    height = np.histogram(squared, bins=edges)[0] / (max(squared.size, 1) * np.diff(edges))
    t = np.linspace(edges[0], top, 400)[1:]
    log_density = (d / 2 - 1) * np.log(t) - t / 2 - d / 2 * math.log(2) - math.lgamma(d / 2)
    ax.stairs(height, edges, fill=True, color=FLOW, alpha=0.45)
    ax.plot(t, np.exp(log_density), color=INK, lw=1.4)
    ax.set_ylim(0, 1.3 * height.max() if squared.size else None)
    caption(ax, f"|z|², chi-square({d})", "squared length")
