"""Log-determinants of I + J with |J| < 1: exact, truncated with a bound, unbiased; gradients."""

from .exact import exact, inverse_and_log_det
from .series import METHODS, Series, estimated, truncation_bound

__all__ = ["METHODS", "Series", "estimated", "exact", "inverse_and_log_det", "truncation_bound"]
