"""Figures, one file for each purpose, in one style.

Every function returns a new ``matplotlib.figure.Figure`` on an Agg canvas; no state of pyplot or of
matplotlib's settings is touched. Blue is data and orange the flow, apart for colour-blind eyes too.
"""

from . import classes, images
from .style import png
from .trust import density_2d, latent, learning_curve, marginals, pairs, round_trip

__all__ = [
    "classes", "density_2d", "images", "latent", "learning_curve", "marginals", "pairs", "png",
    "round_trip",
]  # fmt: skip
