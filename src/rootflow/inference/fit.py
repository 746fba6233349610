"""The loop: fit a flow to an unnormalised density within a budget."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..bases import Mixture
from ..errors import NotConverged
from ..flow import Flow
from ..training.stepper import Stepper
from ..transforms import ActNorm, Standardise
from ..zoo import flow as build_flow
from .amortised import importance_bound
from .config import Record, Trace, VIConfig
from .examine import examine, require_proper
from .gaussian import cover, fit_gaussian
from .library import target as builtin
from .objectives import Loss, forward_rows, loss
from .posterior import Posterior
from .target import Target, TargetError

__all__ = ["fit"]

LEAST_BETA = 0.01
POOR, POOR_COVER = 0.4, 0.5  # of a Gaussian's draws left by importance weights: below, anneal
GAUSSIAN_SHARE = 0.2  # of the minutes, at most
ANNEAL = 0.25  # of the budget
APPROACH = 0.25  # of the budget: path gradients before those of the log-variance
FEW = 4  # unconstrained parameters up to which the log-variance gradient is not too noisy
COOLING = 0.25  # of the time so far: what the learning rate gets to fall to zero after a plateau
EXACT = 1e-6  # variance of log p - log q below which nothing is left to gain
RUNAWAY = 1e4  # spread of q, in that of the Gaussian it started from, beyond which it diverges
COARSE = 1e4  # mean in standard deviations beyond which float32 is too coarse


class _Fitter(Stepper):
    """State of one fit and what a step does to it."""

    def __init__(
        self, flow: Flow, target: Target, config: VIConfig, rows: Tensor | None, trace: Trace,
        begin: float,
    ) -> None:
        self.flow, self.target, self.config, self.rows = flow, target, config, rows
        self.trace, self.begin = trace, begin
        self.seen: list[float] = []  # objectives since the last record
        start = "path" if config.gradient is None else config.gradient
        self.gradients = start, trace.gradient  # before and after the approach
        learned: list[Tensor] = [p for p in flow.parameters() if p.requires_grad]
        if not learned:
            raise ValueError("flow has no parameters to fit")
        super().__init__(learned, config)
        self.device = learned[0].device
        self.best_bounds: Tensor | None = None
        self.anchor: Tensor | None = None
        self.generator = torch.Generator(self.device).manual_seed(config.seed * 2 + 1)
        self.waited = 0

    def beta(self, progress: float) -> float:
        """Power of the target after that share of the budget."""
        anneal = self.trace.anneal
        return min(1.0, LEAST_BETA + progress / anneal) if anneal else 1.0

    def advance(self, along: float, progress: float) -> None:
        """One optimiser step."""
        trace, c = self.trace, self.config

        def objective() -> Tensor | None:
            found: Loss | None
            if self.rows is not None:
                found = forward_rows(self.flow, self.rows, c.draws, self.generator)
            else:
                now = c.model_copy(update={"gradient": self.gradients[progress >= APPROACH]})
                found = loss(self.flow, self.target, now, self.beta(progress), self.generator)
            trace.draws += c.draws
            trace.bad_draws += c.draws if found is None else found.bad
            if found is None or found.bad > c.draws / 2 or not math.isfinite(found.bound):
                return None
            self.seen.append(found.bound)
            return found.value

        try:
            self.update(along, objective)
        finally:
            trace.steps, trace.skipped = self.step, self.skipped

    def bounds(self, ratios: Tensor) -> Tensor:
        """What the fit raises, of each draw or group of draws, from log ratios ``(draws,)``."""
        if self.config.objective != "iw":
            return ratios
        size = min(self.config.particles, len(ratios))
        return importance_bound(ratios[: len(ratios) // size * size].view(size, -1))

    def stuck(self) -> TargetError:
        share = self.trace.bad_draws / max(self.trace.draws, 1)
        return TargetError(
            f"{self.target.name}: {self.in_a_row} steps in a row failed; of all draws so far "
            f"{share:.0%} had no finite log-density or gradient: check the density where "
            "parameters are large or at the edge of their support, or lower lr"
        )

    def evaluate(self) -> tuple[float, float, float] | None:
        """ELBO of the averaged weights, its standard error, and the variance of the log ratios.

        The latents are the same each time, so that two evaluations differ by the weights alone;
        keeps the best weights and counts evaluations since the bound rose by more than the standard
        error of the difference. None if the flow could not be evaluated.
        """
        own = self.put(self.average)
        self.flow.eval()
        generator = torch.Generator(self.device).manual_seed(self.config.seed * 2)
        try:
            ratios, spread = log_ratios(
                self.flow, self.target, self.config.validation_draws, generator
            )
        except NotConverged:
            return None
        finally:
            self.flow.train()
            average = self.put(own)
        if spread > RUNAWAY and self.rows is None:
            raise TargetError(
                f"{self.target.name}: the ELBO runs away: q has grown to {spread:.2g} times its "
                "start; the density probably cannot be normalised: add a prior, or bound the "
                "parameters by support"
            )
        good = ratios.isfinite()
        if not bool(good.any()):
            return None
        mean, variance = float(ratios[good].mean()), float(ratios[good].var())
        self.waited += 1
        bounds = self.bounds(ratios)
        if _gain(bounds, self.best_bounds)[0] > 0:
            self.best, self.best_bounds = average, bounds
            self.trace.best_step = self.trace.steps
        gain, error = _gain(bounds, self.anchor)
        if gain > error:  # against the last such gain, so that small ones add up
            self.anchor, self.waited = bounds, 0
        return mean, math.sqrt(variance / int(good.sum())), variance

    def run(
        self, on_record: Callable[[Record], None] | None, should_stop: Callable[[], bool] | None
    ) -> None:
        """Steps until the budget is spent, nothing is gained, or ``should_stop`` says so."""
        config, trace = self.config, self.trace
        since = time.monotonic()
        every = None if config.minutes or not config.steps else max(1, config.steps // 40)
        from_along = from_progress = 0.0
        end = 1.0  # where the schedule ends, as a share of the budget
        self.flow.train()
        self.report(0.0, on_record)
        while (done := self.progress()) < end:
            along = from_along + (1 - from_along) * (done - from_progress) / (end - from_progress)
            self.advance(along, done)
            now = time.monotonic()
            if trace.steps % every == 0 if every else now - since > config.validate_seconds:
                since = now
                annealed = self.beta(done) < 1
                if annealed:
                    self.best_bounds = self.anchor = None  # of another density
                if self.report(done, on_record) and not annealed:
                    trace.stopped = "exact"
                    return
                if self.waited >= config.patience and end == 1.0:
                    from_along, from_progress, end = along, done, min(1.0, done * (1 + COOLING))
                    trace.stopped = "no improvement" if end < 1 else trace.stopped
            if should_stop is not None and should_stop():
                trace.stopped = "interrupted"
                return
        self.report(1.0, on_record)

    def progress(self) -> float:
        """Which share of the budget is spent."""
        c = self.config
        seconds = time.monotonic() - self.begin
        by_time = 0.0 if c.minutes is None else seconds / (60 * c.minutes)
        return max(by_time, 0.0 if c.steps is None else self.trace.steps / c.steps)

    def report(self, done: float, on_record: Callable[[Record], None] | None) -> bool:
        """Evaluate and record; whether nothing is left to gain."""
        mean = sum(self.seen) / len(self.seen) if self.seen else None
        elbo, error, variance = self.evaluate() or (None, None, math.inf)
        record: Record = {
            "kind": "elbo", "step": self.trace.steps, "seconds": time.monotonic() - self.begin,
            "objective": mean, "beta": self.beta(done), "elbo": elbo, "elbo_se": error,
            "lr": self.optimiser.param_groups[0]["lr"], "skipped": self.trace.skipped,
            "bad_draws": self.trace.bad_draws,
        }  # fmt: skip
        self.seen.clear()
        self.trace.records.append(record)
        if on_record is not None:
            on_record(record)
        return variance < EXACT

    def finish(self) -> None:
        """Leave the flow with the best weights, ready for use."""
        self.put(self.best if self.best_bounds is not None else self.average)
        self.flow.eval()
        self.trace.seconds = time.monotonic() - self.begin


def _gain(ratios: Tensor, before: Tensor | None) -> tuple[float, float]:
    """Rise of the bound from one evaluation to another at the same latents, its standard error."""
    if before is None:
        return math.inf, 0.0
    change = ratios - before
    change = change[change.isfinite()]
    if len(change) < 2:
        return 0.0, math.inf
    return float(change.mean()), float(change.std()) / len(change) ** 0.5


@torch.no_grad()
def log_ratios(
    flow: Flow, target: Target, draws: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Log p~ - log q ``(draws,)`` at draws of q, and their spread in whitened coordinates."""
    u, log_q = flow.rsample_and_log_prob((draws,), generator=generator)
    value = target.unconstrained_log_prob(u).to(u.device)
    white = u
    for part in flow.modules():
        if isinstance(part, Standardise):
            white = part.to_latent(u, None)[0]
            break
    spread = float(white.abs().median(0).values.max())
    return value - log_q.double(), spread if math.isfinite(spread) else math.inf


def _prepare(
    flow: str | Flow, options: Mapping[str, Any], target: Target, seed: int
) -> Flow:
    """The flow to fit: a copy of the one given, or a new one. Raises ValueError."""
    k = target.free_features
    if isinstance(flow, Flow):
        if options:
            raise ValueError("options: they are for a flow given by name")
        if flow.event != (k,) or flow.context:
            raise ValueError(
                f"flow is over {flow.event} with context {flow.context}; the target has {k} "
                "unconstrained parameters and no context"
            )
        ready = copy.deepcopy(flow)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            ready = build_flow(flow, k, **options)
    if isinstance(ready.base, Mixture):
        raise ValueError("base='mixture' has no draws with a gradient; use 'normal' or 'student'")
    for part in ready.modules():
        if isinstance(part, ActNorm):  # whitened already; a first batch must not reset it
            part.initialised.fill_(True)
    return ready


def fit(
    target: Target | str,
    flow: str | Flow = "nsf-coupling",
    *,
    config: VIConfig | None = None,
    options: Mapping[str, Any] | None = None,
    reference: Tensor | None = None,
    device: str | torch.device = "cpu",
    on_record: Callable[[Record], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **settings: Any,
) -> Posterior:
    """Fit a flow to ``target`` and return it with its diagnostics.

    ``target``: a Target or the name of a built-in one. ``flow``: a name of the registry, with
    ``options``, or a Flow over the unconstrained parameters, which is copied. Settings are those of
    ``VIConfig``, as ``config`` or as keywords (``minutes=2``); without a budget three minutes.
    ``reference`` ``(n, features)``: draws of the target, for objective "forward-kl".
    ``on_record`` sees every record of the trace; ``should_stop`` ends the fit after a step.

    Raises: TargetError if the density cannot be used or fails on the way; the best state so far is
    its attribute ``posterior``. ValueError for wrong settings.
    """
    if isinstance(target, str):
        target = builtin(target)
    if not isinstance(target, Target):
        raise TypeError(f"target is {type(target).__name__}; give a Target, or a built-in name")
    if config is not None and settings:
        raise ValueError(f"give {next(iter(settings))} in config, or leave config out")
    config = VIConfig(**settings) if config is None else config
    if config.minutes is None and config.steps is None:
        config = VIConfig(**{**config.model_dump(), "minutes": 3.0})
    if reference is not None and config.objective != "forward-kl":
        raise ValueError(
            f"reference draws are for objective='forward-kl', not {config.objective!r}"
        )
    device = torch.device(device)
    begin = time.monotonic()
    ready = _prepare(flow, options or {}, target, config.seed).to(device)
    trace = Trace()
    generator = torch.Generator().manual_seed(config.seed * 2 + 1)
    starts = examine(target, generator, device)
    rows = None
    if reference is not None:
        rows = target.unconstrain(reference.to(device, torch.float64))
    poor = _place(ready, target, starts, rows, config, generator, trace, should_stop)
    few = poor and target.free_features <= FEW  # q covers the target: nothing to find by annealing
    by_default = ANNEAL if poor and not few else 0.0
    trace.anneal = by_default if config.anneal is None else config.anneal
    trace.gradient = config.gradient or ("log-variance" if few else "path")
    trace.gaussian_seconds = time.monotonic() - begin
    if rows is not None:
        rows = rows.to(next(ready.parameters()).dtype)
    fitter = _Fitter(ready, target, config, rows, trace, begin)
    posterior = Posterior(target, ready, trace, config)
    try:
        fitter.run(on_record, should_stop)
    except TargetError as error:
        error.posterior = posterior
        raise
    finally:
        fitter.finish()
    return posterior


def _place(
    flow: Flow, target: Target, starts: Tensor, rows: Tensor | None, config: VIConfig,
    generator: torch.Generator, trace: Trace, should_stop: Callable[[], bool] | None,
) -> bool:
    """Set the flow's fixed first map from a Gaussian stage, or from reference rows.

    Returns whether the fit is one by ELBO from a poor Gaussian.
    """
    first = next((m for m in flow.modules() if isinstance(m, Standardise)), None)
    if first is None or bool(first.known) or not config.gaussian:
        return False
    if rows is not None:
        first.set(rows, whiten=True)
        return False
    seconds = math.inf if config.minutes is None else GAUSSIAN_SHARE * 60 * config.minutes
    found = fit_gaussian(target, starts, generator, seconds=seconds, should_stop=should_stop)
    require_proper(target, found.mean, found.factor)
    trace.gaussian_elbo = found.elbo if math.isfinite(found.elbo) else None
    trace.gaussian_modes, trace.gaussian_share = found.modes, found.share
    poor = found.modes > 1 or found.share < POOR
    if config.objective == "elbo" and target.free_features <= FEW:
        wide = cover(target, found, generator)
        trace.gaussian_share = wide.share  # a narrow one's own draws see but the piece it sits on
        poor = found.modes > 1 or wide.share < POOR_COVER
        found = wide if poor else found
    sds = found.factor.square().sum(1).sqrt()
    if bool((found.mean.abs() > COARSE * sds).any()):
        flow.double()  # in float32 such draws would lie on a grid
    first.place(found.mean, found.covariance)
    return poor and config.objective == "elbo"
