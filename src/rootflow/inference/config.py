"""The settings of a variational fit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["VIConfig"]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0)]


class VIConfig(BaseModel):
    """How to fit a flow to a target; every field can be given as ``--set name=value``.

    ``objective``: "elbo" (reverse KL), "iw" (the importance-weighted bound of ``particles`` draws)
    or "forward-kl" (with reference draws if given, else self-normalised importance weights).
    ``gradient``: "path" leaves out the score term, whose mean is zero; for "iw" it is the doubly
    reparameterised one; "plain" is the derivative of the estimate itself. ``draws``: points in a
    step, half of them with latents ``stretch`` times as wide where the gradient is "path" and the
    objective "elbo", so that tails are learned too. ``anneal``: share of the budget over which the
    target's logarithm is multiplied by 0.01 rising to 1; by default a quarter where the objective
    is "elbo" and the Gaussian stage finds several modes or a poor match, else 0. ``gaussian``:
    place the flow by that stage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    minutes: Positive | None = None
    steps: Count | None = None
    objective: Literal["elbo", "iw", "forward-kl"] = "elbo"
    gradient: Literal["path", "plain"] = "path"
    draws: Annotated[int, Field(gt=1)] = 512
    stretch: Annotated[float, Field(ge=1)] = 1.5
    particles: Annotated[int, Field(gt=1)] = 8
    gaussian: bool = True
    anneal: Share | None = None
    lr: Positive = 5e-3
    warmup: Share = 0.05
    clip: Positive = 5.0
    ema: Share = 0.998
    patience: Count = 12
    validate_seconds: Positive = 5.0
    validation_draws: Annotated[int, Field(gt=1)] = 2000
    seed: int = 0
