"""Batches of a table for a fit: rows in memory or in a file, mapped by a schema with fresh noise.

What a batch holds follows from seed and step alone, so a resumed fit sees the same. Rows in memory
are shuffled as a whole. Rows in a file are read in blocks of BLOCK neighbouring rows, in random
order; as many blocks as BUFFER bytes hold are shuffled together.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rootflow.data.rows import DiskRows, pieces
from rootflow.data.schema import Schema

__all__ = ["Feed", "encoded"]

BLOCK = 4096  # rows
BUFFER = 2**26  # bytes


class Feed:
    """The training rows ``(n, columns)`` as batches ``(size, features)`` that a flow can see."""

    def __init__(
        self, rows: NDArray[np.float64] | DiskRows, schema: Schema, like: Tensor
    ) -> None:
        self.rows, self.schema, self.like = rows, schema, like
        self.block = min(BLOCK, len(rows))
        self.held: tuple[int, ...] = ()  # which rows ``buffer`` holds, in which order

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """The rows of one step of a fit with that seed, in the dtype and on the device wanted."""
        noise = torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)
        rows = torch.from_numpy(self._plain(step, size, seed))
        return self.schema.encode(rows, noise)[0].to(self.like)

    def _plain(self, step: int, size: int, seed: int) -> NDArray[np.float64]:
        if isinstance(self.rows, np.ndarray):
            epoch, at = divmod(step, len(self.rows) // size)
            self._shuffle((seed, epoch), len(self.rows))
            return np.asarray(self.rows[self.order[at * size : (at + 1) * size]])
        blocks = len(self.rows) // self.block
        size = min(size, blocks * self.block)
        together = max(1, BUFFER // (8 * self.rows.columns * self.block), -(-size // self.block))
        together = min(together, blocks)
        per_buffer = together * self.block // size
        epoch, at = divmod(step, blocks // together * per_buffer)
        which, at = divmod(at, per_buffer)
        if self._shuffle((seed, epoch, which), together * self.block):
            order = self._generator(seed, epoch)
            places = torch.randperm(blocks, generator=order)[which * together :][:together]
            spare = len(self.rows) - blocks * self.block  # a new start in each epoch reaches all
            first = int(torch.randint(spare + 1, (1,), generator=order))
            starts = (first + self.block * places.sort().values).tolist()
            self.buffer = np.concatenate([self.rows[k : k + self.block] for k in starts])
        return np.asarray(self.buffer[self.order[at * size : (at + 1) * size]])

    def _shuffle(self, key: tuple[int, ...], count: int) -> bool:
        """Make ``order`` the permutation that belongs to the key; whether it is a new one."""
        if key == self.held:
            return False
        self.held = key
        self.order = torch.randperm(count, generator=self._generator(*key)).numpy()
        return True

    def _generator(self, seed: int, epoch: int, which: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 65_537 + which)

    def moments(self, seed: int) -> tuple[Tensor, Tensor]:
        """Mean ``(features,)`` and covariance of the mapped rows, in one pass; float64."""
        noise = torch.Generator().manual_seed(seed)
        d, n = self.schema.features, 0
        total, products = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d).double()
        shift = total
        for block in pieces(self.rows):
            y = self.schema.encode(torch.from_numpy(block), noise)[0]
            shift = y.mean(0) if n == 0 else shift  # so that squares stay small
            n += len(y)
            total += (y - shift).sum(0)
            products += (y - shift).T @ (y - shift)
        mean = total / n
        return mean + shift, products / n - mean[:, None] * mean


def encoded(
    rows: NDArray[np.float64] | DiskRows, schema: Schema, like: Tensor, seed: int
) -> Tensor:
    """All rows mapped once, with one draw of the noise: ``(n, features)``."""
    noise = torch.Generator().manual_seed(seed)
    parts = [schema.encode(torch.from_numpy(block), noise)[0].to(like) for block in pieces(rows)]
    return torch.cat(parts)
