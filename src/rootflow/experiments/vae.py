"""Autoencoders of digits whose posteriors are flows of growing length: what the bound gains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..data import read_table, split
from ..inference.amortised import importance_bound
from ..plots import bounds as plots_bounds
from ..zoo import ZOO
from .autoencoder import Activation, Autoencoder, autoencoder
from .parts import Count, Done, Job, Part, Positive, Row, Settings, Strict, among, plain

__all__ = ["Family", "Vae", "evaluate", "images"]

Shares = NDArray[np.float64]

SHOWN = 14  # images in a row of the picture
AT_ONCE = 2**13  # latents evaluated together
RECORDS = 20  # records of a fit
GAUSSIAN = ("gaussian", 0)  # the name of length 0, whatever the flow

# To announce the time: milliseconds of any fit and of a step without a flow, and how much less a
# row costs in the evaluation, which needs no gradient and takes many rows at once.
OF_A_FIT, OF_A_STEP, OF_A_ROW = 300.0, 3.0, 0.1


class Family(Strict):
    """A flow of the registry: which ``lengths`` (its ``blocks``), with which ``options``.

    ``milliseconds``: what a block adds to a step, to announce the time.
    """

    lengths: tuple[Count, ...]
    options: dict[str, Any] = Field(default_factory=dict)
    milliseconds: Positive


class Vae(Settings):
    """Every flow at every length, and the Gaussian posterior as length 0, from ``seeds`` starts.

    All fits of a scale take ``steps`` steps on the same batches, and from one start have the same
    first encoder and decoder. Training images are drawn anew from their shares of dark at every
    step, ``held_out`` (a share of the images) once. ``features``: width of the latent; ``context``:
    of what the encoder tells the flow; ``hidden``: of encoder and decoder; ``anneal``: over this
    share of the steps the weight of log p(x, z) rises from 0.01 to 1; ``draws``: for the
    importance-weighted bound.
    """

    flows: Annotated[dict[str, Family], Field(min_length=1)]
    features: Count
    context: Count
    hidden: tuple[Count, ...]
    activation: Activation = "relu"
    steps: Count
    seeds: Count
    batch: Count = 128
    optimiser: Literal["adam", "rmsprop"] = "adam"
    lr: Positive
    cosine: bool = True
    clip: Positive = 10.0
    anneal: Annotated[float, Field(ge=0, le=1)] = 0.2
    draws: Annotated[int, Field(ge=2)] = 256
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.25

    @model_validator(mode="after")
    def _names_exist(self) -> Vae:
        among(self.flows, ZOO)
        return self

    def _kinds(self) -> list[tuple[str, int]]:
        """Flow and length, the Gaussian first."""
        found = [(name, n) for name, family in self.flows.items() for n in family.lengths]
        return [GAUSSIAN, *found]

    def minutes(self) -> float:
        rows = self.draws * self.held_out * len(images())
        steps = self.steps + OF_A_ROW * rows / self.batch
        each = [
            OF_A_FIT + steps * (OF_A_STEP + (self.flows[name].milliseconds * n if n else 0.0))
            for name, n in self._kinds()
        ]
        return self.seeds * sum(each) / 60_000

    def parts(self) -> Sequence[Part]:
        shared = self.model_dump(mode="json", exclude={"flows", "seeds"})
        return [
            Part(
                f"{name}-{length}-{start}",
                {
                    **shared, "flow": name, "length": length, "start": start,
                    "options": self.flows[name].options if length else {},
                },
                partial(self._study, name, length, start),
            )
            for start in range(self.seeds)
            for name, length in self._kinds()
        ]  # fmt: skip

    def _study(self, name: str, length: int, start: int, job: Job) -> dict[str, Any]:
        """Train one autoencoder; its bounds for each held-out image."""
        shares = torch.from_numpy(images()).float()
        train, _, test = split(len(shares), 0, (1 - self.held_out, 0.0, self.held_out))
        options = {**plain(self.flows[name].options), "blocks": length} if length else {}
        seed = job.seed + 1000 * start
        model = autoencoder(
            shares.shape[1], self.features, self.hidden, self.activation, seed,
            name if length else None, self.context, options,
        )  # fmt: skip
        skipped = self._train(model, shares[train], seed, job)
        # one draw for every flow, start and seed: all are judged on the same images
        binary = torch.bernoulli(shares[test], generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(seed)
        model.eval()
        elbo, bound = evaluate(model, binary, self.draws, generator)
        with torch.no_grad():
            z = model.posterior.rsample_and_log_prob(binary[:SHOWN], generator=generator)[0]
            latent = torch.randn(SHOWN, self.features, generator=generator)
            job.keep(
                elbo=elbo, bound=bound, shares=shares[test][:SHOWN], binary=binary[:SHOWN],
                rebuilt=model.means(z), drawn=model.means(latent),
            )  # fmt: skip
        return {
            "elbo": float(elbo.mean()), "bound": float(bound.mean()), "skipped": skipped,
            "train_elbo": job.records[-1]["elbo"],
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }  # fmt: skip

    def _train(self, model: Autoencoder, shares: Tensor, seed: int, job: Job) -> int:
        """Maximise the bound in place; the number of steps left out as not finite."""
        batches, noise = (torch.Generator().manual_seed(seed + k) for k in (1, 2))
        parameters = list(model.parameters())
        optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, self.lr)
            if self.optimiser == "adam"
            else torch.optim.RMSprop(parameters, self.lr, momentum=0.9)
        )
        rising = self.anneal * self.steps
        total, count, skipped = 0.0, 0, 0
        for step in range(1, self.steps + 1):
            job.stop_if_asked()
            rows = torch.randint(len(shares), (self.batch,), generator=batches)
            x = torch.bernoulli(shares[rows], generator=batches)
            log_joint, log_q = model(x, 1, noise)
            # Rezende and Mohamed 2015, equation 20
            weight = min(1.0, 0.01 + step / rising) if rising else 1.0
            optimiser.zero_grad()
            (log_q - weight * log_joint).mean().backward()
            if self.cosine:
                for group in optimiser.param_groups:
                    group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))
            if bool(nn.utils.clip_grad_norm_(parameters, self.clip).isfinite()):
                optimiser.step()
                total, count = total + float((log_joint - log_q).detach().mean()), count + 1
            else:
                skipped += 1
            if step * RECORDS % self.steps < RECORDS and count:
                record = {"kind": "train", "step": step, "weight": weight, "elbo": total / count}
                job.records.append({**record, "skipped": skipped})
                total, count = 0.0, 0
        if not job.records:
            raise ArithmeticError("no step had a finite gradient")
        return skipped

    def summarise(self, done: Mapping[str, Done], job: Job) -> Iterator[Row]:
        found = {kind: self._gather(kind, done) for kind in self._kinds()}
        self._draw(found, done, job)
        base = found[GAUSSIAN]
        for (name, length), per_image in found.items():
            labels = {"posterior": name, "length": str(length)}
            measure = "held-out ELBO, nats per image"
            parts = [done[f"{name}-{length}-{start}"] for start in range(self.seeds)]
            errors = [part.error for part in parts if part.error is not None]
            if errors:
                yield Row(labels=labels, measure=measure, error=errors[0])
                continue
            more: dict[str, float | None] = {
                "over seeds": _se(per_image["elbo"].mean(1)),
                "weighted bound": float(per_image["bound"].mean()),
                "its se": _se(per_image["bound"].mean(0)),
            }
            for key, title in (("elbo", "gain"), ("bound", "weighted gain")):
                gain = per_image[key] - base[key] if base and length else None
                more[title] = None if gain is None else float(gain.mean())
                more[f"{title} se"] = None if gain is None else _se(gain.mean(1))
            more["training ELBO"] = float(np.mean([p.result["train_elbo"] for p in parts]))
            more["parameters"] = parts[0].result["parameters"]
            more["seconds"] = float(np.mean([p.result["seconds"] for p in parts]))
            yield Row(
                labels=labels, measure=measure, ours=float(per_image["elbo"].mean()),
                se=_se(per_image["elbo"].mean(0)), more=more,
            )  # fmt: skip

    def _gather(self, kind: tuple[str, int], done: Mapping[str, Done]) -> dict[str, Shares]:
        """Both bounds, each ``(seeds, images)``; nothing if a part failed."""
        parts = [done[f"{kind[0]}-{kind[1]}-{start}"] for start in range(self.seeds)]
        if any(part.error is not None for part in parts):
            return {}
        arrays = [part.shown() for part in parts]
        return {key: np.stack([a[key] for a in arrays]) for key in ("elbo", "bound")}

    def _draw(
        self, found: Mapping[tuple[str, int], Mapping[str, Shares]], done: Mapping[str, Done],
        job: Job,
    ) -> None:
        good = {kind: per_image for kind, per_image in found.items() if per_image}
        if not good:
            return
        panels = {}
        for key, title in (("elbo", "ELBO"), ("bound", f"importance-weighted, {self.draws} draws")):
            means: dict[str, dict[int, Shares]] = {name: {} for name in self.flows}
            for (name, length), per_image in good.items():
                for flow in self.flows if length == 0 else (name,):
                    means[flow][length] = per_image[key].mean(1)
            panels[title] = means
        title = f"held-out bounds in nats per image, {self.seeds} seeds"
        job.draw("bound-by-length", plots_bounds.by_length(panels, title))
        longest = {name: (name, length) for name, length in good}  # the last length of each flow
        rows: dict[str, Any] = {}
        for name, length in longest.values():
            arrays = done[f"{name}-{length}-0"].shown()
            if not rows:
                rows = {"held out": arrays["shares"], "binary": arrays["binary"]}
            label = f"{name} {length}" if length else name
            rows |= {f"{label}: rebuilt": arrays["rebuilt"], f"{label}: drawn": arrays["drawn"]}
        side = math.isqrt(images().shape[1])
        shaped = {label: row.reshape(-1, side, side) for label, row in rows.items()}
        job.draw("images", plots_bounds.images(shaped, "what the longest flows learned"))


@torch.no_grad()
def evaluate(
    model: Autoencoder, x: Tensor, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """ELBO and importance-weighted bound ``(n,)`` in nats of x ``(n, pixels)``, in float64."""
    at_once = max(AT_ONCE // len(x), 1)
    log_weights = []
    for k in range(0, draws, at_once):
        log_joint, log_q = model(x, min(at_once, draws - k), generator)
        log_weights.append((log_joint - log_q).double())
    gathered = torch.cat(log_weights)
    return gathered.mean(0), importance_bound(gathered)


@lru_cache
def images() -> Shares:
    """The digits as shares of dark ``(1797, 64)``: 16 points of a finer bitmap make a pixel."""
    shares: Shares = read_table("digits").values / 16
    return shares


def _se(values: Shares) -> float | None:
    """Standard error of the mean; None for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
