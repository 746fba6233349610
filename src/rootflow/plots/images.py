"""Figures of image flows: samples, reconstructions, interpolations, likely and unlikely images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .style import INK, WIDTH, canvas

__all__ = ["Pictures", "draw", "grid", "sheet"]

Images = NDArray[Any]


def sheet(images: Images, across: int, gap: int = 1) -> NDArray[np.float64]:
    """Images ``(n, c, h, w)`` side by side, ``across`` in a row, as ``(height, width, c)``.

    Between them and after the last one is NaN.
    """
    n, c, h, w = images.shape
    down = -(-n // across)
    out = np.full((down * (h + gap) - gap, across * (w + gap) - gap, c), np.nan)
    for k, image in enumerate(images):
        top, left = (k // across) * (h + gap), (k % across) * (w + gap)
        out[top : top + h, left : left + w] = image.transpose(1, 2, 0)
    return out


def grid(
    rows: Mapping[str, Images], title: str, levels: int, notes: Mapping[str, Any] | None = None
) -> Figure:
    """Named rows of images ``(n, c, h, w)`` with values 0 to ``levels`` - 1.

    Grey images are light on black, as photographs are. ``notes`` writes a text under each image of
    the rows it names.
    """
    across = max(len(row) for row in rows.values())
    _, h, w = next(iter(rows.values())).shape[1:]
    height = (WIDTH - 1.4) / across * h / w + (0.16 if notes else 0.02)
    figure, axes = canvas(len(rows), 1, min(height, 2.5))
    for ax, (name, row) in zip(axes, rows.items(), strict=True):
        strip = sheet(np.asarray(row, dtype=np.float64), across) / (levels - 1)
        paper = np.isnan(strip).all(-1)
        strip = np.clip(np.nan_to_num(strip), 0, 1)
        strip = np.repeat(strip, 3, -1) if strip.shape[-1] == 1 else strip
        strip[paper] = 1
        ax.imshow(strip, interpolation="nearest")
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8, color=INK)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        for k, text in enumerate((notes or {}).get(name, ())):
            middle = k * (w + 1) + (w - 1) / 2
            ax.text(middle, h + 0.2, text, ha="center", va="top", fontsize=7, color=INK)
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


@dataclass(frozen=True, eq=False)
class Pictures:
    """What an image flow did, in values 0 to ``levels`` - 1; whatever was not done stays empty.

    ``test`` and ``rebuilt`` (n, c, h, w): held-out images, dequantised, before and after the round
    trip. ``samples``: by temperature. ``paths`` (k, steps, c, h, w): between two held-out images
    each. ``likely`` and ``unlikely``: held-out images with their bits per dimension (n,).
    ``training``: samples from the same latents, by training step.
    """

    levels: int
    test: Images = field(default_factory=lambda: np.zeros(0))
    rebuilt: Images = field(default_factory=lambda: np.zeros(0))
    samples: Mapping[float, Images] = field(default_factory=dict)
    paths: Images = field(default_factory=lambda: np.zeros(0))
    unlikely: tuple[Images, Images] | None = None
    likely: tuple[Images, Images] | None = None
    training: Mapping[int, Images] = field(default_factory=dict)


def draw(p: Pictures) -> dict[str, Figure]:
    """The figures for which there is something to show, by name."""
    figures: dict[str, Figure] = {}
    if p.samples:
        rows = {f"T = {t:g}": images for t, images in p.samples.items()}
        figures["samples"] = grid(rows, "samples at temperature T", p.levels)
    if p.training:
        rows = {f"step {step:,}": images for step, images in p.training.items()}
        figures["training_samples"] = grid(rows, "the same latents during training", p.levels)
    if p.test.size:
        error = np.abs(p.rebuilt - p.test)
        worst = np.nanmax(error, (1, 2, 3))
        top = float(np.nanmax(worst)) or 1.0
        rows = {
            "held out": p.test,
            "rebuilt": p.rebuilt,
            "error, enlarged": error / top * (p.levels - 1),
        }
        notes = {"error, enlarged": [f"{e:.1e}" for e in worst]}
        title = "there and back: the largest error of each, in levels"
        figures["reconstructions"] = grid(rows, title, p.levels, notes)
    if p.paths.size:
        rows = {f"path {k + 1}": path for k, path in enumerate(p.paths)}
        figures["interpolations"] = grid(rows, "between held-out images, in the latent", p.levels)
    if p.unlikely is not None and p.likely is not None:
        pairs = {"least likely": p.unlikely, "most likely": p.likely}
        notes = {name: [f"{b:.2f}" for b in bits] for name, (_, bits) in pairs.items()}
        rows = {name: images for name, (images, _) in pairs.items()}
        figures["extremes"] = grid(rows, "held-out images, bits per dimension", p.levels, notes)
    return figures
