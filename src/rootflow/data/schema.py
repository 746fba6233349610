"""The schema of a table: what each column is, how it becomes numbers for a flow, and the way back.

``Schema.encode`` maps rows of a table to rows of the flow, ``decode`` maps them back to the levels,
bounds and types of the table. How kinds are told apart is in ``detect``, the maps are in ``maps``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rootflow.data.cells import Mixed
from rootflow.data.maps import TINY, Circle, Levels, Line, Map
from rootflow.data.rows import pieces
from rootflow.errors import CheckpointError

__all__ = ["ColumnPlan", "Schema"]

MAPS: dict[str, type[Map]] = {"line": Line, "levels": Levels, "circle": Circle}


@dataclass(frozen=True)
class ColumnPlan:
    """One column: its map, or the value it always has, or the column that it repeats.

    ``kind``: one word; ``note``: one plain line for everything but free real numbers. ``texts``:
    the levels of a column of text, whose numbers are their positions.
    """

    name: str
    kind: str
    dtype: str
    map: Map | None = None
    value: float | None = None
    twin: str | None = None
    texts: tuple[str, ...] = ()
    note: str = ""
    holes: bool = False  # whether empty cells are part of the model

    @property
    def plain(self) -> bool:
        """Whether the flow sees the column as it is."""
        return self.map == Line()

    @property
    def continuous(self) -> bool:
        """Whether no single value has positive probability."""
        if isinstance(self.map, Line):
            return not self.map.noise
        return isinstance(self.map, Circle) and not self.map.gap and not self.map.missing


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Whether values are equal, or both empty."""
    return (a == b) | (a.isnan() & b.isnan())


@dataclass(frozen=True)
class Schema:
    """All columns that samples have, and the ones that were left out with the reason."""

    columns: tuple[ColumnPlan, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The columns, in the order of the table."""
        return [column.name for column in self.columns]

    @property
    def features(self) -> int:
        """How many numbers per row the flow sees."""
        return sum(column.map.width for column in self.columns if column.map is not None)

    @property
    def plain(self) -> bool:
        """Whether the flow sees all columns as they are."""
        return all(column.plain for column in self.columns)

    @property
    def noised(self) -> list[str]:
        """Columns whose map draws noise: a score with them is a lower bound."""
        return [c.name for c in self.columns if c.map is not None and c.map.noise]

    @property
    def discrete(self) -> bool:
        """Whether any value has positive probability, so that a score is no pure density."""
        return any(not (c.plain or c.continuous) for c in self.columns)

    def why_impossible(self, values: Any) -> str:
        """Which columns hold values outside the support, and in how many rows."""
        count = dict.fromkeys(self.names, 0)
        generator = torch.Generator().manual_seed(0)
        for block in pieces(values):
            x = torch.from_numpy(block)
            for j, column in enumerate(self.columns):
                alone = Schema((column,))
                if column.twin is None:
                    outside = alone.encode(x[:, j : j + 1], generator)[1] == -torch.inf
                else:
                    outside = ~_same(x[:, j], x[:, self.names.index(column.twin)])
                count[column.name] += int(outside.sum())
        found = (f"column {name} in {rows:,}" for name, rows in count.items() if rows)
        return "values outside the bounds or levels of the fit, " + ", ".join(found)

    @property
    def notes(self) -> list[str]:
        """One plain line per column that is no free real number."""
        return [c.note for c in self.columns if c.note] + list(self.left_out.values())

    @property
    def levels(self) -> dict[str, tuple[str, ...]]:
        """The texts of the columns of text."""
        return {column.name: column.texts for column in self.columns if column.texts}

    def reading(self) -> Mixed:
        """How to read a table that is to be scored under this schema."""
        holes = frozenset(column.name for column in self.columns if column.holes)
        dtypes = {column.name: column.dtype for column in self.columns}
        return Mixed(dtypes=dtypes, levels=self.levels, missing="keep", holes=holes)

    def encode(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows ``(n, columns)`` float64 to y ``(n, features)`` and weight ``(n,)``, in nats.

        With log p the log-density of the flow, the mean over the noise of log p(y) + weight is a
        lower bound on the log-density of the row, which counts continuous columns in their unit
        and discrete values by their probability. -inf for rows outside the support.
        """
        count = sum(c.map.noise for c in self.columns if c.map is not None)
        u = torch.rand(len(x), count, generator=generator, dtype=x.dtype).clamp(TINY, 1 - TINY)
        parts, weight, used = [], x.new_zeros(len(x)), 0
        place = {name: j for j, name in enumerate(self.names)}
        for j, column in enumerate(self.columns):
            if column.map is not None:
                y, w = column.map.encode(x[:, j], u[:, used : used + column.map.noise])
                used += column.map.noise
                parts.append(y)
                weight = weight + w
                continue
            as_ever = x.new_full((), column.value or 0.0)
            other = as_ever if column.twin is None else x[:, place[column.twin]]
            weight = torch.where(_same(x[:, j], other), weight, -torch.inf)
        return torch.cat([x[:, :0], *parts], 1), weight

    def decode(self, y: Tensor) -> Tensor:
        """Rows of the flow ``(n, features)`` to rows of the table ``(n, columns)``, float64."""
        y, used = y.double(), 0
        found: dict[str, Tensor] = {}
        for column in self.columns:
            if column.map is not None:
                found[column.name] = column.map.decode(y[:, used : used + column.map.width])
                used += column.map.width
            elif column.value is not None:
                found[column.name] = y.new_full((len(y),), column.value)
        twins = {c.name: found[c.twin] for c in self.columns if c.twin is not None}
        return torch.stack([{**found, **twins}[name] for name in self.names], 1)

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        words = {kind: word for word, kind in MAPS.items()}
        columns = []
        for column in self.columns:
            entry = {k: v for k, v in vars(column).items() if v or type(v) is float}
            if column.map is not None:
                entry["map"] = {"form": words[type(column.map)], **asdict(column.map)}  # type: ignore[call-overload]
            columns.append(entry)
        return {"columns": columns, "left_out": dict(self.left_out)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Schema:
        """The way back from ``to_json``. Raises CheckpointError."""
        columns = []
        try:
            for entry in content["columns"]:
                entry = dict(entry, texts=tuple(entry.get("texts", ())))
                if (form := dict(entry.pop("map", {}))):
                    kind = MAPS[form.pop("form")]
                    form = {k: tuple(v) if isinstance(v, list) else v for k, v in form.items()}
                    entry["map"] = kind(**form)
                columns.append(ColumnPlan(**entry))
            return cls(tuple(columns), dict(content.get("left_out", {})))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"the schema of the columns is damaged: {error}") from None

    @classmethod
    def of(cls, columns: Sequence[str], dtypes: Sequence[str]) -> Schema:
        """The schema that takes all columns as they are."""
        plans = [ColumnPlan(name, "continuous", dtype, Line())
                 for name, dtype in zip(columns, dtypes, strict=True)]  # fmt: skip
        return cls(tuple(plans))
