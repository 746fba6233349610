"""What is seen of a running fit on stderr, and how a signal ends it after the step at hand."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from rootflow.cli.common import say

__all__ = ["Progress", "Signals", "watching"]


Record = dict[str, Any]


class Budget(Protocol):
    """What a progress bar needs to know of the settings of a fit."""

    @property
    def minutes(self) -> float | None: ...

    @property
    def steps(self) -> int | None: ...


class Signals:
    """While active, the first SIGINT or SIGTERM is noted in ``received``; the second one exits."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number

    def __enter__(self) -> Self:
        self.before = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Progress:
    """A bar on a terminal, a line every tenth elsewhere, nothing if ``quiet`` or CI is set.

    ``step`` and ``seconds``: what a resumed fit has behind it. Call ``tick`` after each step.
    """

    def __init__(self, config: Budget, quiet: bool, step: int = 0, seconds: float = 0.0) -> None:
        self.config, self.step = config, step
        processor = getattr(config, "clock", "wall") == "processor"
        self.clock = time.process_time if processor else time.monotonic
        self.start, self.begin, self.spent = step, time.monotonic(), self.clock()
        self.before, self.validation = seconds, ""
        self.offset = self.done = self._fraction()
        self.shown = self.begin
        self.silent = quiet or bool(os.environ.get("CI"))
        self.bar: Bar | None = None
        if not self.silent and sys.stderr.isatty():
            columns = (BarColumn(30), TextColumn("{task.percentage:>3.0f} %  {task.description}"))
            self.bar = Bar(*columns, console=Console(stderr=True), auto_refresh=False)
            self.task = self.bar.add_task("", total=1.0)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | object) -> None:
        if self.bar is not None:
            self._show()
            self.bar.stop()

    def _fraction(self) -> float:
        seconds = self.before + self.clock() - self.spent
        by_time = seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        by_step = self.step / self.config.steps if self.config.steps else 0.0
        return min(max(by_time, by_step), 1.0)

    def note(self, record: dict[str, Any]) -> None:
        """Remember the validation likelihood or the bound of a record."""
        if record["kind"] == "validation":
            bits, nats = record.get("bits_per_dim"), record["log_prob"]
            known = f"{nats:.4f} nats" if bits is None else f"{bits:.3f} bits per dimension"
            self.validation = f", validation {known}"
        elif record["kind"] == "elbo" and record["elbo"] is not None:
            self.validation = f", ELBO {record['elbo']:.4f} nats"

    def tick(self) -> None:
        """One more step is done."""
        self.step += 1
        if self.silent:
            return
        tenth, self.done = int(self.done * 10), self._fraction()
        if self.bar is None:
            if int(self.done * 10) > tenth:
                say(f"{self.done:4.0%}  {self._words()}")
        elif time.monotonic() - self.shown > 0.1:
            self._show()

    def _show(self) -> None:
        assert self.bar is not None
        self.shown = time.monotonic()
        self.bar.update(self.task, completed=self.done, description=self._words(), refresh=True)

    def _words(self) -> str:
        seconds = time.monotonic() - self.begin
        rate = (self.step - self.start) / max(seconds, 1e-9)
        left = seconds * (1 - self.done) / max(self.done - self.offset, 1e-9)
        minutes, rest = divmod(round(min(left, 359_999)), 60)
        return f"step {self.step:,}, {rate:.3g}/s, {minutes}:{rest:02d} left{self.validation}"


@contextmanager
def watching(
    run: Path, config: Budget, quiet: bool, step: int = 0, seconds: float = 0.0,
    log: Callable[[Record], None] = lambda _: None,
) -> Iterator[tuple[Callable[[Record], None], Callable[[], bool], Signals]]:
    """``on_record`` and ``should_stop`` of a fit: metrics.jsonl, ``log``, progress; the signals."""
    with (
        Signals() as signals,
        Progress(config, quiet, step, seconds) as progress,
        (run / "metrics.jsonl").open("a", encoding="utf-8") as metrics,
    ):

        def on_record(record: Record) -> None:
            metrics.write(json.dumps(record, allow_nan=False) + "\n")
            metrics.flush()
            progress.note(record)
            log(record)

        def should_stop() -> bool:
            progress.tick()
            return signals.received is not None

        yield on_record, should_stop, signals
