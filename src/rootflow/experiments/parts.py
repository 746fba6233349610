"""What an experiment is made of: settings, parts that can be done one by one, rows of a table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor

from ..plots import png
from ..store import write_atomically
from ..training import History

__all__ = [
    "Count", "Done", "Job", "Part", "Positive", "Row", "Settings", "Stopped", "Strict", "among",
    "plain",
]  # fmt: skip

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Strict(BaseModel):
    """A frozen record that takes no unknown field and changes no type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Stopped(Exception):
    """The run was asked to stop; what is done so far is kept."""


class Row(Strict):
    """One line of a results table.

    ``labels`` name it; ``measure`` says what ``ours`` is, in which unit, and ``better`` which way;
    ``exact`` is what a perfect answer would give, ``published`` what a paper reports. ``more``
    holds further numbers of the same line. A row that failed has an ``error`` and no number.
    """

    labels: dict[str, str]
    measure: str
    ours: FiniteFloat | None = None
    se: FiniteFloat | None = None
    exact: FiniteFloat | None = None
    published: FiniteFloat | None = None
    better: Literal["higher", "lower"] | None = None
    more: dict[str, FiniteFloat | None] = Field(default_factory=dict)
    error: str | None = None

    @property
    def key(self) -> str:
        """The labels joined by a slash."""
        return "/".join(self.labels.values())


@dataclass
class Job:
    """What a part gets to work with: where to put its files, its seed, when to stop."""

    folder: Path
    figures: Path
    seed: int
    should_stop: Callable[[], bool] = lambda: False
    records: list[dict[str, Any]] = field(default_factory=list)

    def stop_if_asked(self) -> None:
        """Raise Stopped if the user wants the run to end."""
        if self.should_stop():
            raise Stopped

    def watch(self, history: History) -> History:
        """Keep the records of a fit. Raises Stopped if it was interrupted."""
        if history.stopped == "interrupted":
            raise Stopped
        self.records += history.records
        return history

    def draw(self, name: str, figure: Figure) -> None:
        """Write ``figures/NAME.png``."""
        write_atomically(self.figures / f"{name}.png", png(figure))

    def keep(self, **arrays: Tensor | NDArray[Any]) -> None:
        """Write arrays for the pictures that show several parts."""
        out = BytesIO()
        plain_arrays: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
        np.savez_compressed(out, **plain_arrays)
        write_atomically(self.folder / "shown.npz", out.getvalue())


@dataclass(frozen=True)
class Part:
    """One piece of work with a result of its own; equal ``key`` and ``recipe`` mean equal result.

    ``key`` is a file name. ``work`` returns what JSON can hold.
    """

    key: str
    recipe: Mapping[str, Any]
    work: Callable[[Job], dict[str, Any]]


@dataclass(frozen=True)
class Done:
    """A part that has run: its result, with ``error`` if it failed, and where its arrays lie."""

    result: Mapping[str, Any]
    folder: Path

    @property
    def error(self) -> str | None:
        """Why it failed, or None."""
        error: str | None = self.result.get("error")
        return error

    def shown(self) -> dict[str, NDArray[Any]]:
        """The arrays that the part kept."""
        with np.load(self.folder / "shown.npz", allow_pickle=False) as arrays:
            return dict(arrays)


class Settings(Strict):
    """Settings of one experiment at one scale, and how such an experiment is done."""

    @abstractmethod
    def minutes(self) -> float:
        """How long it takes at most on an idle core, announced before it starts."""

    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """The work, in order."""

    @abstractmethod
    def summarise(self, done: Mapping[str, Done], job: Job) -> Iterator[Row]:
        """The rows of the table; draws the pictures that show several parts."""


def among(given: Iterable[Any], known: Collection[Any]) -> None:
    """Raise ValueError with the known names if one given is none of them."""
    for name in given:
        if name not in known:
            raise ValueError(f"{name!r} is unknown; choose among {', '.join(map(str, known))}")


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a flow as the registry wants them: lists as tuples, the word "none" as None."""
    words = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    return {key: None if v == "none" else v for key, v in words.items()}
