"""Data-parallel training: every process does its share of a batch, all take the same step.

Only what ``torch.distributed`` has initialised is used, so torchrun, SLURM and Ray Train are alike.
Each process holds the whole table and walks through it in the same order; of a batch it works on
its own rows. Gradients are added up, so that they are those of one process on the whole batch, up
to the order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["World"]


class World:
    """The processes that train together; one alone unless torch.distributed is initialised."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of ``rows`` ``(n, ...)``; the parts differ by one row at most."""
        return rows if self.size == 1 else rows.tensor_split(self.size)[self.rank]

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one exchange per dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat)
            for t, part in zip(group, torch.split(flat, [t.numel() for t in group]), strict=True):
                t.copy_(part.view_as(t))

    def largest(self, *values: float, device: torch.device | str = "cpu") -> tuple[float, ...]:
        """The largest of each value over the processes, on which all of them then agree."""
        if self.size == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return tuple(found.tolist())

    def same(self, *values: float, device: torch.device | str = "cpu") -> bool:
        """Whether every process gave the same values."""
        most = self.largest(*values, *(-v for v in values), device=device)
        return all(a == -b for a, b in zip(most, most[len(values) :], strict=False))
