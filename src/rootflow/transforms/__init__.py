"""Invertible maps; forward is always data to latent."""

from .actnorm import ActNorm
from .base import Compose, Inverse, Transform
from .implicit import ImplicitBlock, MonotoneBlock, ResidualBlock
from .linear import LULinear
from .mixing import mixing
from .preprocess import Standardise

__all__ = [
    "ActNorm",
    "Compose",
    "ImplicitBlock",
    "Inverse",
    "LULinear",
    "MonotoneBlock",
    "ResidualBlock",
    "Standardise",
    "Transform",
    "mixing",
]
