"""The settings of a variational fit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["VIConfig"]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0)]


class VIConfig(BaseModel):
    """How to fit a flow to a target; every field can be given as ``--set name=value``.

    ``objective``: "elbo" (reverse KL), "iw" (the importance-weighted bound of ``particles`` draws)
    or "forward-kl" (with reference draws if given, else self-normalised importance weights).
    ``gradient``: "path" leaves out the score term, whose mean is zero; for "iw" it is the doubly
    reparameterised one; "log-variance" is that of half the variance of log p - log q, for "elbo"
    only; "plain" is the derivative of the estimate itself. By default "path"; for up to four
    unconstrained parameters, where the Gaussian stage finds several modes or a poor match, only in
    the first quarter of the budget, then "log-variance". ``draws``: points in a step, half of them
    with latents ``stretch`` times as wide unless the gradient is "plain" or the objective not
    "elbo", so that tails are learned too. ``anneal``: share of the budget over which the target's
    logarithm is multiplied by 0.01 rising to 1; by default a quarter for "elbo" and more than four
    parameters where that stage finds several modes or a poor match, else 0. ``gaussian``: place the
    flow by that stage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    minutes: Positive | None = None
    steps: Count | None = None
    objective: Literal["elbo", "iw", "forward-kl"] = "elbo"
    gradient: Literal["path", "log-variance", "plain"] | None = None
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

    @model_validator(mode="after")
    def _gradient_fits(self) -> VIConfig:
        if self.gradient == "log-variance" and self.objective != "elbo":
            raise ValueError(
                f"gradient='log-variance' is for objective='elbo', not {self.objective!r}"
            )
        return self
