"""What a variational fit is told, and what it reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Record", "Trace", "VIConfig"]

Record = dict[str, Any]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0)]


class VIConfig(BaseModel):
    """How to fit a flow to a target; every field can be given as ``--set name=value``.

    ``objective``: "elbo" (reverse KL), "iw" (the importance-weighted bound of ``particles`` draws,
    by which its best weights are chosen too) or "forward-kl" (with reference draws if given, else
    self-normalised importance weights).
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


@dataclass
class Trace:
    """What happened: ``records`` as they were reported, and how the fit ended.

    ``stopped`` is "budget", "no improvement", "exact" or "interrupted". ``skipped``: steps without
    a finite gradient; ``bad_draws`` of ``draws``: points left out of steps. ``gaussian_elbo``: of
    the Gaussian that the flow started from, in nats; ``gaussian_share``: effective sample size of
    its importance weights as a share; ``gaussian_modes``: how many modes it spans. ``anneal``: the
    share of the budget that was annealed; ``gradient``: which one it took.
    """

    records: list[Record] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    skipped: int = 0
    draws: int = 0
    bad_draws: int = 0
    best_step: int = 0
    gaussian_elbo: float | None = None
    gaussian_share: float | None = None
    gaussian_modes: int = 0
    anneal: float = 0.0
    gradient: str = "path"
    gaussian_seconds: float = 0.0
    stopped: str = "budget"

    def summary(self) -> dict[str, Any]:
        """Everything but the records."""
        return {k: v for k, v in asdict(self).items() if k != "records"}
