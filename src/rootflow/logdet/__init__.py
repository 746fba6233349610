"""Log-determinants of I + J, |J| < 1, and their gradients: exact, truncated with bound, unbiased."""

from .exact import exact, inverse_and_log_det
from .series import METHODS, Series, estimated, truncation_bound

__all__ = ["METHODS", "Series", "estimated", "exact", "inverse_and_log_det", "truncation_bound"]
