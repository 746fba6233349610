"""Layers and networks whose Lipschitz constants are bounded from above."""

from .activations import ACTIVATIONS
from .networks import LipschitzNet, Weights
from .norms import norm_bound

__all__ = ["ACTIVATIONS", "LipschitzNet", "Weights", "norm_bound"]
