"""How much memory a training step takes, told from a step on few rows before the fit begins."""

from __future__ import annotations

import copy
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import DataError
from ..flow import Flow

__all__ = ["available", "require_memory", "step_memory"]

# What kernels allocate inside and the allocator keeps: Glow took 1.43 times the bytes of its
# tensors, a residual flow 1.17 times (float32, CPU, 28 x 28).
MARGIN = 1.4
PLENTY = 20_000  # numbers that a step holds for each one of the data, more than any flow does


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that operations make, and when they let go of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self.alive:
                    size = storage.nbytes()
                    self.now += size
                    self.alive[id(storage)] = weakref.finalize(
                        storage, self._free, id(storage), size
                    )
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        del self.alive[key]


def step_memory(flow: Flow, x: Tensor, context: Tensor | None = None) -> int:
    """Bytes that one step on the rows x, given context, needs at its height, beside the weights.

    Measured with a copy of the flow, so that nothing of it changes; what kernels allocate inside
    is not seen.
    """
    twin = copy.deepcopy(flow).train()
    with _Peak() as peak:
        (-twin.log_prob(x, context).mean()).backward()  # type: ignore[no-untyped-call]
    return int(peak.peak)


def available(device: torch.device) -> int | None:
    """Bytes that may still be allocated there; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line[:12] == "MemAvailable")
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    return free


def require_memory(flow: Flow, rows: int, context: Tensor | None = None) -> None:
    """Raise DataError if a step on so many images needs more memory than is available.

    The need grows by a constant for each image, told from steps on two and four random ones, with
    the first rows of ``context`` where the flow takes one.
    """
    like = next(flow.parameters())
    free = available(like.device)
    most = rows * math.prod(flow.event) * like.element_size() * PLENTY
    if free is None or rows <= 4 or most < free:
        return
    x = torch.rand(4, *flow.event, generator=torch.Generator().manual_seed(0), dtype=like.dtype)
    x = x.to(like.device)
    few, more = (
        int(MARGIN * step_memory(flow, x[:n], context if context is None else context[:n]))
        for n in (2, 4)
    )
    each = max(more - few, 1) // 2
    need = few + (rows - 2) * each
    if need > free:
        fits = max(2, (free - few) // each + 2)
        shown = " x ".join(map(str, flow.event))
        raise DataError(
            f"batch_size={rows}: a step on so many images of {shown} needs about "
            f"{need / 2**30:.3g} GiB of memory, {free / 2**30:.3g} GiB are available; "
            f"give at most batch_size={fits}"
        )
