"""The training loop: maximum likelihood on rows held in memory, within a budget, resumable."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, DataError, NotConverged, RootflowError
from ..flow import Flow
from ..transforms import Pixels, Standardise
from .checkpoint import read_state, write_state
from .config import FitConfig
from .memory import require_memory
from .parallel import World
from .rows import Feed, Rows
from .stepper import Stepper

__all__ = ["History", "evaluate", "fit", "reseed", "rows_at_once"]

Record = dict[str, Any]


@dataclass
class History:
    """What happened: ``records`` as written to metrics.jsonl, and how it ended.

    ``stopped`` is "budget", "early stopping" or "interrupted". ``best_log_prob`` is the validation
    mean in nats per row, in data units, of the weights that the flow holds after the fit.
    """

    records: list[Record] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best_step: int = 0
    best_log_prob: float = -math.inf
    stopped: str = "budget"


def reseed(flow: Flow, key: int) -> None:
    """Let random terms and probes follow from ``key`` and their place in the flow alone."""
    module: Any
    for k, module in enumerate(flow.modules()):
        if hasattr(module, "draws"):
            module.draws = (key * 65_536 + 8 * k) % 2**63


def rows_at_once(event: tuple[int, ...]) -> int:
    """Rows that are evaluated together: 2048 of a table, of images as many as memory bears."""
    return 2048 if len(event) == 1 else max(1, 2**17 // math.prod(event))


@torch.no_grad()
def evaluate(
    flow: Flow, x: Tensor, context: Tensor | None = None, weight: Tensor | None = None
) -> tuple[float, float]:
    """(Weighted) mean log-density of the rows of x and its standard error, in nats per row.

    Processes that train together share the work; NaN if a root find failed in one of them.
    """
    world, chunk = World(), rows_at_once(flow.event)
    weight = x.new_ones(len(x)) if weight is None else weight
    mass = weight.double().sum()
    x, weight = world.share(x), world.share(weight).double()
    context = None if context is None else world.share(context)
    try:
        parts = [
            flow.log_prob(x[k : k + chunk], None if context is None else context[k : k + chunk])
            for k in range(0, len(x), chunk)
        ]
        values = torch.cat([x.new_zeros(0), *parts]).double()
    except NotConverged:  # these weights are no candidates
        values = torch.full_like(weight, torch.nan)
    total = (weight * values).sum()
    world.add_([total])
    squares = (weight * (values - total / mass)).square().sum()
    world.add_([squares])
    return float(total / mass), float(squares.sqrt() / mass)


def _check(x: Tensor, name: str, flow: Flow, pixels: Pixels | None) -> None:
    if x.dim() != 1 + len(flow.event) or tuple(x.shape[1:]) != flow.event:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; "
            f"the flow wants (rows, {', '.join(map(str, flow.event))})"
        )
    if not len(x):
        raise DataError(f"{name} has no rows")
    if pixels is not None:
        if x.dtype != torch.uint8 or int(x.max()) >= pixels.levels:
            raise ValueError(
                f"{name} is {x.dtype} up to {float(x.max()):g}; with pixels={pixels} it must be "
                f"torch.uint8 up to {pixels.levels - 1}"
            )
        return
    bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero()
    if len(bad):
        raise DataError(
            f"{name}: row {int(bad[0])} holds NaN or infinity ({len(bad)} such rows); "
            "remove or impute them"
        )


def _check_spread(x: Tensor, gaps: Tensor | None) -> None:
    same = x.amin(0) == x.amax(0)
    if gaps is not None:
        same &= gaps.to(x.device) == 0
    if bool(same.any()):
        raise DataError(
            f"train: column {int(same.nonzero()[0])} holds one value in {x.dtype}; "
            "there is no density over it"
        )


class _Trainer(Stepper):
    """State of one fit and what a step does to it."""

    def __init__(self, flow: Flow, rows: Rows, config: FitConfig) -> None:
        self.flow, self.rows, self.config = flow, rows, config
        self.names = [n for n, p in flow.named_parameters() if p.requires_grad]
        learned: list[Tensor] = [p for p in flow.parameters() if p.requires_grad]
        super().__init__(learned, config, config.weight_decay)
        self.world = World()
        self.compiled: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def advance(self, progress: float) -> tuple[float, float]:
        """One optimiser step; the mean objective and the gradient norm."""
        if self.step == 0 and self.world.size > 1:
            self._initialise()
        batch = self.rows.batch(self.step, self.world.share)
        self._reseed()

        def objective() -> Tensor:
            log_prob = self._log_prob(batch.x, batch.context)
            weighted = log_prob if batch.weight is None else batch.weight * log_prob
            return -weighted.sum() / batch.total

        return self.update(progress, objective)

    def gather(self, value: Tensor) -> tuple[float, float]:
        """Over all processes; NaN where the solve of one failed."""
        if self.world.size > 1:
            for p in self.parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            self.world.add_([value, *(p.grad for p in self.parameters if p.grad is not None)])
        return super().gather(value)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Let layers that initialise from the data see the whole batch, as one process would."""
        batch = self.rows.batch(0)
        self._reseed()
        with contextlib.suppress(NotConverged):
            self.flow.log_prob(batch.x, batch.context)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Of one batch; compiled if the config says so, after a first step that may initialise."""
        if not self.config.compile or self.step == 0:
            return self.flow.log_prob(x, context)
        if self.compiled is not None:
            return self.compiled(x, context)
        self.compiled = torch.compile(self.flow.log_prob, fullgraph=True, dynamic=False)
        distribution = torch.distributions.Distribution
        validated = distribution._validate_args
        try:
            return self.compiled(x, context)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise RootflowError(
                f"compile=True: this flow cannot be compiled here ({reason}); use compile=False"
            ) from error
        finally:  # torch switches validation off for good when it first compiles
            distribution._validate_args = validated

    def _reseed(self) -> None:
        of_step = self.config.seed * 1_000_003 + self.step
        reseed(self.flow, of_step * self.world.size + self.world.rank)

    def _groups(self) -> dict[str, list[Tensor]]:
        return {"parameter": self.parameters, "average": self.average, "best": self.best}

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed fit needs, by name."""
        out = {f"buffer.{k}": b for k, b in self.flow.named_buffers()}
        for group, values in self._groups().items():
            out |= {f"{group}.{n}": v for n, v in zip(self.names, values, strict=True)}
        for n, p in zip(self.names, self.parameters, strict=True):
            out |= {f"adam.{key}.{n}": v for key, v in self.optimiser.state.get(p, {}).items()}
        return out

    @torch.no_grad()
    def restore(self, saved: dict[str, Tensor]) -> None:
        """The way back from ``tensors``."""
        own = {k: v for k, v in self.tensors().items() if not k.startswith("adam.")}
        for k, v in own.items():
            if k not in saved or saved[k].shape != v.shape:
                raise CheckpointError(f"the saved fit belongs to another flow: {k} does not fit")
        for k, b in self.flow.named_buffers():
            b.copy_(saved[f"buffer.{k}"])
        for group, values in self._groups().items():
            for n, v in zip(self.names, values, strict=True):
                v.copy_(saved[f"{group}.{n}"])
        for n, p in zip(self.names, self.parameters, strict=True):
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"adam.{k}.{n}" in saved]
            if keys:
                self.optimiser.state[p] = {k: saved[f"adam.{k}.{n}"] for k in keys}


def fit(
    flow: Flow,
    train: Tensor | Feed,
    validation: Tensor | None = None,
    *,
    config: FitConfig | None = None,
    context: Tensor | None = None,
    validation_context: Tensor | None = None,
    sample_weight: Tensor | None = None,
    validation_weight: Tensor | None = None,
    gaps: Tensor | None = None,
    pixels: Pixels | None = None,
    checkpoint: Path | None = None,
    on_record: Callable[[Record], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_validation: Callable[[Flow, Record], None] | None = None,
) -> History:
    """Train ``flow`` on the rows of ``train`` ``(n, *event)``, or of a Feed, by maximum likelihood.

    Standardises (or whitens) inside the flow first, keeps an exponential moving average of the
    weights, validates it, and leaves the best validated average in the flow. ``gaps``
    ``(features,)``: width of the uniform noise added afresh to quantised columns. ``pixels``: the
    rows are images of type uint8, dequantised batch by batch. ``checkpoint``: a directory from
    which an unfinished fit resumes and to which it saves; after a kill the same call ends with the
    weights of an undisturbed run (to the bit, for a budget in steps and the same
    thread count). ``on_record`` sees every record of ``History.records``, ``on_validation`` also
    the flow with the weights that were validated, which it must leave as they are.

    Where torch.distributed is initialised the processes train together: call this in each of them
    with the same arguments and the whole table; ``batch_size`` is that of all together, the first
    process writes the checkpoints and calls ``on_record``, and all end with the same weights.

    Raises: ValueError for wrong shapes or no budget, DataError for non-finite rows or images that
    memory cannot hold a batch of, RootflowError if training diverges.
    """
    config = FitConfig(minutes=5) if config is None else config
    if not isinstance(config, FitConfig):
        raise TypeError(f"config is {type(config).__name__}; give a rootflow.FitConfig")
    if config.minutes is None and config.steps is None:
        raise ValueError("config has no budget; give minutes or steps")
    if config.flip and len(flow.event) != 3:
        raise ValueError("config.flip mirrors images; this flow is of tables")
    extra = (context, sample_weight, gaps, pixels)
    if isinstance(train, Tensor):
        _check(train, "train", flow, pixels)
        if len(flow.event) == 1:
            _check_spread(train, gaps)
    elif not hasattr(train, "moments"):
        raise TypeError(f"train is {type(train).__name__}; give a torch.Tensor or a Feed")
    elif any(one is not None for one in extra):
        raise ValueError("train is a Feed: context, sample_weight, gaps and pixels cannot be given")
    for name, given in (("context", context), ("sample_weight", sample_weight)):
        if given is not None and len(given) != len(train):
            raise ValueError(f"{name} has shape {tuple(given.shape)}; train has {len(train)} rows")
    for name, given in (("sample_weight", sample_weight), ("validation_weight", validation_weight)):
        if given is None:
            continue
        if bool((given < 0).any()) or not 0 < float(given.sum()) < math.inf:
            raise ValueError(f"{name} must hold finite numbers from zero on, not all of them zero")
    if validation is not None:
        _check(validation, "validation", flow, pixels)
        validation = validation[: config.validation_rows]
        if validation_context is not None:
            validation_context = validation_context[: len(validation)]
        if validation_weight is not None:
            validation_weight = validation_weight[: len(validation)]
    for part in flow.modules():
        if isinstance(part, Standardise) and not bool(part.known):
            if isinstance(train, Tensor):
                part.set(train, config.whiten)
            else:
                whiten = config.whiten and len(train) > 2 * part.event[0]
                part.place(*train.moments(config.seed), whiten)
    like = next(flow.parameters())
    rows = Rows(train, context, sample_weight, gaps, pixels, like, config)
    trainer = _Trainer(flow, rows, config)
    if len(flow.event) == 3:
        require_memory(flow, -(-rows.size // trainer.world.size), context)
    world, where = trainer.world, like.device
    if trainer.rows.size % world.size:
        raise ValueError(
            f"batch_size={trainer.rows.size} does not divide among {world.size} processes; "
            f"give a multiple of {world.size}"
        )
    mark = sum(float(p.detach().double().sum()) for p in trainer.parameters)
    total = float(train.sum(dtype=torch.float64)) if isinstance(train, Tensor) else 0.0
    if not world.same(len(train), total, mark, device=where):
        raise ValueError(
            "train and flow must be the same in every process; "
            "give each the whole table and seed the weights alike"
        )
    history = History()
    spent, waited, since = 0.0, 0, 0.0
    saved = read_state(checkpoint) if checkpoint is not None else None
    if saved is not None:
        tensors, facts = saved
        trainer.restore(tensors)
        trainer.step, trainer.skipped = facts["step"], facts["skipped"]
        trainer.in_a_row, trainer.lr_factor = facts["in_a_row"], facts["lr_factor"]
        spent, waited = facts["seconds"], facts["waited"]
        history.best_step, history.records = facts["best_step"], facts["records"]
        history.best_log_prob = facts["best"] if facts["best"] is not None else -math.inf
    generator = torch.Generator().manual_seed(config.seed)
    # the noise of validation is one fixed draw, so that its curve is smooth
    if validation is not None and pixels is not None:
        validation = pixels.dequantise(validation, generator, like.dtype).to(like.device)
    elif validation is not None and gaps is not None:
        noise = torch.rand(validation.shape, generator=generator, dtype=validation.dtype)
        validation = validation + gaps * noise.to(validation.device)

    clock = time.monotonic if config.clock == "wall" else time.process_time
    begin = clock() - spent
    losses: list[float] = []
    flow.train()

    def progress() -> float:
        (seconds,) = world.largest(clock() - begin, device=where)
        by_time = 0.0 if config.minutes is None else seconds / (60 * config.minutes)
        by_step = 0.0 if config.steps is None else trainer.step / config.steps
        return max(by_time, by_step)

    def record(entry: Record) -> None:
        history.records.append(entry)
        if on_record is not None and world.rank == 0:
            on_record(entry)

    def save() -> None:
        if checkpoint is None or world.rank:
            return
        best = history.best_log_prob if math.isfinite(history.best_log_prob) else None
        facts = {
            "step": trainer.step, "skipped": trainer.skipped, "in_a_row": trainer.in_a_row,
            "lr_factor": trainer.lr_factor, "seconds": clock() - begin, "waited": waited,
            "best_step": history.best_step, "best": best, "records": history.records,
        }  # fmt: skip
        write_state(checkpoint, trainer.tensors(), facts)

    def validate() -> None:
        nonlocal waited
        seconds = clock() - begin
        last = history.records[-1] if history.records else {}
        if last.get("kind") == "validation" and last["step"] == trainer.step:
            return
        if validation is None:
            trainer.best = [v.clone() for v in trainer.average]
            history.best_step = trainer.step
            return
        own = trainer.put(trainer.average)
        flow.eval()
        mean, error = evaluate(flow, validation, validation_context, validation_weight)
        entry: Record = {
            "kind": "validation", "step": trainer.step, "seconds": seconds,
            "log_prob": mean, "log_prob_se": error,
        }  # fmt: skip
        if math.isfinite(mean):
            if pixels is not None:
                entry["bits_per_dim"] = pixels.bits_per_dim(mean, flow.event)
            if on_validation is not None and world.rank == 0:
                on_validation(flow, entry)
        flow.train()
        trainer.put(own)
        if not math.isfinite(mean):
            return
        record(entry)
        waited += 1
        if mean > history.best_log_prob:
            history.best_log_prob, history.best_step, waited = mean, trainer.step, 0
            trainer.best = [v.clone() for v in trainer.average]

    every = None  # steps between two reports, where the budget is in steps
    if config.minutes is None and config.steps is not None:
        every = max(5, config.steps // 40)
    while (done := progress()) < 1:
        if waited >= config.patience:
            history.stopped = "early stopping"
            break
        try:
            loss, norm = trainer.advance(done)
        except RootflowError:  # training diverged: leave the best weights so far in the flow
            trainer.put(trainer.best if history.best_step else trainer.average)
            flow.eval()
            raise
        losses.append(loss)
        asked = should_stop is not None and should_stop()
        seconds, stop = world.largest(clock() - begin, asked, device=where)
        if every is None:
            due = seconds - since > config.validate_seconds
        else:
            due = trainer.step % every == 0
        if trainer.step == 1 or due:
            since = seconds
            mean = sum(losses) / len(losses)
            record({
                "kind": "train", "step": trainer.step, "seconds": seconds,
                "loss": mean if math.isfinite(mean) else None,
                "lr": trainer.optimiser.param_groups[0]["lr"],
                "grad_norm": norm if math.isfinite(norm) else None, "skipped": trainer.skipped,
            })  # fmt: skip
            losses.clear()
            if due:
                validate()
                save()
        if stop:
            history.stopped = "interrupted"
            save()
            break
    if history.stopped == "budget":
        validate()
    if history.stopped != "interrupted":
        save()
    trainer.put(trainer.best if history.best_step else trainer.average)
    flow.eval()
    history.steps, history.skipped = trainer.step, trainer.skipped
    history.seconds = clock() - begin
    return history
