"""The errors that rootflow raises on purpose: each carries one line a user can act on."""

__all__ = ["CheckpointError", "DataError", "NotConverged", "RootflowError"]


class RootflowError(Exception):
    """Base of every error below; the command line prints its message and exits with 1."""


class DataError(RootflowError, ValueError):
    """A table cannot be used as it is; the message names the file, row or column."""


class CheckpointError(RootflowError, ValueError):
    """A saved flow is damaged, foreign, or of a newer format."""


class NotConverged(RootflowError, ArithmeticError):
    """A root find missed its tolerance; the message gives the count and the worst residual."""
