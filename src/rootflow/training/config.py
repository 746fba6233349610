"""The settings of a fit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["FOR_IMAGES", "FitConfig"]

Positive = Annotated[float, Field(gt=0)]


class FitConfig(BaseModel):
    """How to train; every field can be given as ``--set name=value`` on the command line.

    The fit ends at the first of ``minutes`` and ``steps``. The learning rate warms up over the
    first ``warmup`` of the budget and falls to zero along a cosine. ``clock``: what the minutes and
    all reported seconds are, "wall" or "processor" time of this process, with which several fits
    compare fairly on a busy machine (for one thread and no accelerator). ``compile`` runs the
    training steps through torch.compile: for flows of closed formulas, and where a C++ compiler is
    at hand. ``flip`` mirrors each image of a batch with probability 1/2, left to right.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    minutes: Positive | None = None
    steps: Annotated[int, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(gt=1)] = 512
    lr: Positive = 1e-2
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Positive = 5.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.998
    patience: Annotated[int, Field(gt=0)] = 20
    validate_seconds: Positive = 10.0
    validation_rows: Annotated[int, Field(gt=0)] = 10_000
    whiten: bool = True
    clock: Literal["wall", "processor"] = "wall"
    compile: bool = False
    flip: bool = False
    seed: int = 0

# Settings that suit images better, whose rows are long and costly.
FOR_IMAGES = {"batch_size": 64, "lr": 3e-3, "validation_rows": 500, "validate_seconds": 30.0}
