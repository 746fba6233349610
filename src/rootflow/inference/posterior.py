"""What a fit returns: draws, their weights, and how far to trust them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..flow import Flow
from ..store import FORMAT_VERSION, plain, read_config, write_json
from ..zoo import load as load_flow
from . import diagnostics
from .comparison import Comparison, Estimate, Reference, compare_draws
from .config import Trace, VIConfig
from .diagnostics import Verdict
from .library import TARGETS
from .library import target as builtin
from .target import KnownTarget, Target, TargetError

__all__ = ["Posterior", "load"]

CHUNK = 2048
DRAWS = 10_000  # behind the diagnostics, fresh ones


class Posterior:
    """A fitted approximation q of a target, in the target's own parameters.

    Numbers about quality come from ``draws`` fresh draws of q, made when one is first asked for,
    with the flow's weights in float64; the same seed gives the same numbers. ``trace``: what the
    fit reported. ``flow``: q over the unconstrained parameters.
    """

    def __init__(
        self,
        target: Target,
        flow: Flow,
        trace: Trace | None = None,
        config: VIConfig | None = None,
        *,
        draws: int = DRAWS,
        seed: int | None = None,
    ) -> None:
        self.target, self.flow, self.trace = target, flow, trace
        self.config = VIConfig() if config is None else config
        self.size = draws
        self.seed = self.config.seed + 1_000_003 if seed is None else seed

    def __repr__(self) -> str:
        return f"Posterior({self.target.name}; {', '.join(self.target.columns)})"

    def _exact(self) -> Flow:
        return copy.deepcopy(self.flow).double().eval()

    @torch.no_grad()
    def _draw(self, n: int, generator: torch.Generator) -> _Draws:
        flow, parts = self._exact(), []
        for start in range(0, n, CHUNK):
            size = min(CHUNK, n - start)
            u, log_q = flow.rsample_and_log_prob((size,), generator=generator)
            x, log_det = self.target.constrain(u)
            value = self.target.log_prob(x).to(u)
            parts.append((x, log_q - log_det, value))
        return _Draws(*(torch.cat(p) for p in zip(*parts, strict=True)))

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(next(self.flow.parameters()).device).manual_seed(seed)

    @cached_property
    def _own(self) -> _Draws:
        """The draws behind the diagnostics that have a log-density."""
        found = self._draw(self.size, self._generator(self.seed))
        ratios = found.log_p - found.log_q
        rows = (~ratios.isnan() & (ratios != math.inf)).nonzero()[:, 0]
        if (missing := self.size - len(rows)) > self.size / 10:
            raise TargetError(
                f"{self.target.name}: {missing} of {self.size} draws of q have no log-density "
                "(NaN or +inf); nothing can be said about the fit"
            )
        return _Draws(found.x[rows], found.log_q[rows], found.log_p[rows])

    @property
    def draws(self) -> Tensor:
        """The draws ``(S, features)`` behind the diagnostics, float64.

        Raises TargetError if a tenth of them has no log-density; fewer are left out and counted in
        ``undefined``.
        """
        return self._own.x

    @property
    def log_ratios(self) -> Tensor:
        """Log p~ - log q ``(S,)`` in nats at ``draws``."""
        return self._own.log_p - self._own.log_q

    @property
    def undefined(self) -> int:
        """How many draws were left out because their log-density was NaN or +inf."""
        return self.size - len(self._own.x)

    @property
    def smoothed(self) -> diagnostics.Smoothed:
        """Pareto-smoothed importance weights of ``draws``."""
        return diagnostics.psis(self.log_ratios)

    @property
    def log_weights(self) -> Tensor:
        """Smoothed, normalised log importance weights ``(S,)`` of ``draws``."""
        return self.smoothed.log_weights

    @property
    def khat(self) -> float:
        """Tail shape of the importance weights: below 0.5 good, 0.5 to 0.7 usable."""
        return self.smoothed.khat

    @property
    def ess(self) -> float:
        """How many independent draws the weighted ``draws`` are worth."""
        return diagnostics.importance_ess(self.log_weights)

    @property
    def elbo(self) -> Estimate:
        """E[log p~ - log q] in nats with its standard error: a lower bound on the log evidence."""
        return diagnostics.elbo(self.log_ratios)

    @property
    def log_evidence(self) -> Estimate:
        """Log of the mean importance weight, in nats; as good as ``khat`` allows."""
        return diagnostics.log_evidence(self.log_ratios)

    def compare(self, reference: Tensor | Reference) -> Comparison:
        """Draws beside draws of the target, ``(n, features)``: moments, coverage, tests.

        For a built-in target give ``reference(name)`` of this package.
        """
        own, target = self._own, self.target
        if isinstance(reference, Tensor):
            draws, there = own.x, reference.to(own.x)
            reference = there
        elif isinstance(target, KnownTarget):
            draws, there = target.quantities(own.x), target.parameters_of(reference.draws)
        else:
            raise TypeError("reference: give a tensor of draws (n, features) for this target")
        return compare_draws(
            draws, reference, target.columns,
            log_q_draws=own.log_q, log_q_reference=self.log_prob(there),
        )  # fmt: skip

    def verdict(self, against: Tensor | Reference | Comparison | None = None) -> Verdict:
        """One plain sentence; ``against``: draws known to be of the target, or their comparison.

        Without them it cannot see a part of the target that q never visits.
        """
        if not (against is None or isinstance(against, Comparison)):
            against = self.compare(against)
        result = diagnostics.verdict(self.smoothed, against)
        if not self.undefined:
            return result
        level = diagnostics.LEVELS[-1] if self.undefined > self.size / 1000 else result.level
        rest = result.line.removeprefix(result.level)
        line = f"{level}{rest} {self.undefined} of {self.size} draws had no log-density."
        return Verdict(level, line)

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """Log q ``(n,)`` in nats at parameters x ``(n, features)``; -inf outside the support."""
        flow = self._exact()
        x = x.to(next(flow.parameters()))
        inside = self.target.inside(x)
        result = x.new_full((len(x),), -math.inf)
        rows = inside.nonzero()[:, 0]
        for part in torch.split(rows, CHUNK):
            u = self.target.unconstrain(x[part])
            result[part] = flow.log_prob(u) - self.target.constrain(u)[1]
        return result

    @torch.no_grad()
    def sample(self, n: int, *, resample: bool = False, seed: int = 0) -> Tensor:
        """Draws ``(n, features)`` float64 of q, or corrected ones.

        ``resample``: draw four times as many (10,000 at least), and keep n of them, chosen by their
        smoothed importance weights; a draw of large weight may come more than once.
        """
        if n < 1:
            raise ValueError(f"n={n}: give at least 1")
        generator = self._generator(seed)
        if not resample:
            return self._draw(n, generator).x
        found = self._draw(max(4 * n, DRAWS), generator)
        ratios = found.log_p - found.log_q
        ratios = torch.where(ratios.isnan() | (ratios == math.inf), -math.inf, ratios)
        weights = diagnostics.psis(ratios).log_weights.exp()
        # Systematic: one uniform number and n equal steps, less noisy than independent choices.
        u = torch.rand((), generator=generator, dtype=weights.dtype, device=weights.device)
        at = (torch.arange(n, dtype=weights.dtype, device=weights.device) + u) / n
        rows = torch.searchsorted(weights.cumsum(0), at).clamp(max=len(weights) - 1)
        order = torch.randperm(n, generator=generator, device=weights.device)
        return found.x[rows[order]]

    def create_inits(self, chains: int = 4, *, seed: int = 0) -> list[dict[str, Any]]:
        """Starting points of MCMC chains: for each, resampled values by name, as NumPy arrays."""
        values = self.target.split(self.sample(chains, resample=True, seed=seed))
        return [{k: v[i].cpu().numpy() for k, v in values.items()} for i in range(chains)]

    def summary(self) -> dict[str, Any]:
        """Every number above, for JSON; None for what is not finite."""
        smoothed, x, weights = self.smoothed, self.draws, self.log_weights.exp()
        mean = weights @ x
        moments = torch.stack(
            [x.mean(0), x.std(0), mean, (weights @ (x - mean).square()).sqrt()], -1
        )
        words = ("mean", "sd", "weighted_mean", "weighted_sd")
        found: dict[str, Any] = plain({
            "target": self.target.name,
            "parameters": {
                name: dict(zip(words, row, strict=True))
                for name, row in zip(self.target.columns, moments.tolist(), strict=True)
            },
            "elbo": self.elbo.value, "elbo_se": self.elbo.se,
            "log_evidence": self.log_evidence.value, "log_evidence_se": self.log_evidence.se,
            **smoothed.to_dict(),
            "undefined_draws": self.undefined,
            "seed": self.seed,
            "verdict": self.verdict().level, "verdict_line": self.verdict().line,
        })  # fmt: skip
        return found

    def to_arviz(self) -> Any:
        """``draws`` for ArviZ: InferenceData before version 1, a DataTree from it on.

        Raises ModuleNotFoundError without ArviZ.
        """
        from .arviz import to_arviz

        return to_arviz(self)

    def save(self, directory: str | Path) -> None:
        """Write the flow and what the posterior is of; the target's code is not saved."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        if self.flow.recipe is None:
            raise ValueError("the flow was put together by hand and cannot be saved")
        known = path / "config.json"
        before = json.loads(known.read_bytes()) if known.exists() else {}
        about = {
            "target": self.target.name,
            "columns": list(self.target.columns),
            "free_features": self.target.free_features,
            "config": self.config.model_dump(),
            "draws": self.size,
            "seed": self.seed,
            "fit": None if self.trace is None else self.trace.summary(),
        }
        write_json(known, {**before, "format_version": FORMAT_VERSION, "inference": about})
        self.flow.save(path)


@dataclasses.dataclass(frozen=True)
class _Draws:
    """Parameters (n, features), log q and the unnormalised log p (n,), all of the parameters."""

    x: Tensor
    log_q: Tensor
    log_p: Tensor


def load(directory: str | Path, target: Target | None = None) -> Posterior:
    """Read what ``Posterior.save`` wrote; give the target again unless it is a built-in one.

    Raises CheckpointError for a missing, damaged or foreign directory or another target.
    """
    config = read_config(Path(directory))
    about = config.get("inference")
    if not isinstance(about, dict):
        raise CheckpointError(f"{directory}: holds a flow but no variational posterior")
    try:
        if target is None:
            if about["target"] not in TARGETS:
                raise CheckpointError(
                    f"{directory}: its target {about['target']!r} is not built in; give target="
                )
            target = builtin(about["target"])
        if list(target.columns) != about["columns"] or (
            target.free_features != about["free_features"]
        ):
            raise CheckpointError(
                f"{directory}: was fitted to {', '.join(about['columns'])}; "
                f"target has {', '.join(target.columns)}"
            )
        trace = None if about["fit"] is None else Trace(**about["fit"])
        settings = VIConfig.model_validate(about["config"])
        draws, seed = int(about["draws"]), int(about["seed"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{directory}: config.json is damaged: {error}") from None
    return Posterior(target, load_flow(directory), trace, settings, draws=draws, seed=seed)
