"""Invertible maps; forward is always data to latent."""

from .actnorm import ActNorm
from .autoregressive import AutoregressiveTransform, iaf, maf, nsf_ar
from .base import Compose, Inverse, Transform
from .coupling import Coupling, glow, nice, nsf_coupling, realnvp
from .exchange import FromTorch, ToTorch
from .images import ImageCoupling, glow_images
from .implicit import ImplicitBlock, MonotoneBlock, ResidualBlock
from .linear import LULinear, Scale
from .mixing import Permute, Reverse, mixing
from .multiscale import FirstChannels, Squeezed, multiscale
from .pixels import Logit, Pixels
from .planar import Planar
from .preprocess import Standardise
from .radial import Radial
from .spline import Spline
from .sylvester import Sylvester
from .univariate import Affine, Shift, Univariate

__all__ = [
    "ActNorm",
    "Affine",
    "AutoregressiveTransform",
    "Compose",
    "Coupling",
    "FirstChannels",
    "FromTorch",
    "ImageCoupling",
    "ImplicitBlock",
    "Inverse",
    "LULinear",
    "Logit",
    "MonotoneBlock",
    "Permute",
    "Pixels",
    "Planar",
    "Radial",
    "ResidualBlock",
    "Reverse",
    "Scale",
    "Shift",
    "Spline",
    "Squeezed",
    "Standardise",
    "Sylvester",
    "ToTorch",
    "Transform",
    "Univariate",
    "glow",
    "glow_images",
    "iaf",
    "maf",
    "mixing",
    "multiscale",
    "nice",
    "nsf_ar",
    "nsf_coupling",
    "realnvp",
]
