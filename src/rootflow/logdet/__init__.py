"""Log-determinants of I + J with |J| < 1: exact, truncated with a bound, unbiased; gradients."""

from .exact import exact, inverse_and_log_det, invert
from .series import METHODS, Series, estimated, truncation_bound

__all__ = [
    "METHODS", "Series", "estimated", "exact", "inverse_and_log_det", "invert", "truncation_bound",
]  # fmt: skip
