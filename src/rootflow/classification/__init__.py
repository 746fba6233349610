"""Classification of images by networks whose blocks have certified Lipschitz constants."""

from .fit import DEFAULTS, fit, load, make, save
from .measure import calibration_error, measure
from .network import BLOCKS, Classifier

__all__ = [
    "BLOCKS", "DEFAULTS", "Classifier", "calibration_error", "fit", "load", "make", "measure",
    "save",
]  # fmt: skip
