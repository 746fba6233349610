"""Layers and networks whose Lipschitz constants are bounded from above."""

from .activations import ACTIVATIONS, Activation
from .conv import conv_bound
from .layers import bfloat16_gains
from .networks import CertifiedNet, LipschitzConvNet, LipschitzNet
from .norms import norm_bound
from .tape import Tape, Weights, value_and_jacobian

__all__ = [
    "ACTIVATIONS", "Activation", "CertifiedNet", "LipschitzConvNet", "LipschitzNet", "Tape",
    "Weights", "bfloat16_gains", "conv_bound", "norm_bound", "value_and_jacobian",
]  # fmt: skip
