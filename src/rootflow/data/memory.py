"""Whether data fit into memory, asked before they are read."""

import os

from rootflow.errors import DataError

__all__ = ["require_memory"]


def require_memory(what: str, size: int, limit: int | None, advice: str) -> None:
    """Raise DataError if so many bytes exceed the limit (default: half of the machine's memory)."""
    if limit is None:
        try:
            limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, ValueError, OSError):  # not known on this system
            return
    if size > limit:
        need, have = (f"{number / 2**30:.3g} GiB" for number in (size, limit))
        raise DataError(f"{what} need {need} of memory, the limit is {have}; {advice}")
