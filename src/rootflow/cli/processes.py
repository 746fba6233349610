"""Running a command in several processes that torchrun, or a scheduler like it, has started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import typer
from torch import distributed as dist

from rootflow.cli.common import WrongUse

__all__ = ["joined", "wait"]


@contextmanager
def joined(device: torch.device, out: Path | None, batch: int) -> Iterator[int]:
    """Join the other processes, if there are any; yields this one's rank. Only the first one talks.

    The environment says so, as torchrun sets it. Raises WrongUse without ``out``, on which all
    processes must agree, and for a ``batch`` (rows) of which they cannot take equal shares.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        yield 0
        return
    if out is None or batch % size:
        if int(os.environ.get("RANK", "0")):
            raise typer.Exit(2)
        raise WrongUse(
            "several processes train together: say which run with --out RUN" if out is None else
            f"batches of {batch} rows do not divide among {size} processes; "
            f"give a multiple of {size} by --set batch_size="
        )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank()
    try:
        if rank == 0:
            yield rank
        else:
            with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                yield rank
    finally:
        dist.destroy_process_group()


def wait() -> None:
    """Let every process come this far."""
    if dist.is_initialized():
        dist.barrier()
