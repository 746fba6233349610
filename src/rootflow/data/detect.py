"""What each column of a table is: told by the numbers themselves, or declared by the user.

The rules run in float64 on at most SAMPLE rows, levels and ranges on all; each is one function.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from rootflow.data.cells import MOST_LEVELS, UNKNOWN
from rootflow.data.columns import SPIKE, SPIKE_ROWS, TIED, grid
from rootflow.data.maps import Circle, Levels, Line, Map
from rootflow.data.rows import pieces
from rootflow.data.schema import ColumnPlan, Schema
from rootflow.data.tables import Table
from rootflow.errors import DataError

__all__ = ["KINDS", "Declared", "declare", "detect"]

Floats = NDArray[np.float64]
SAMPLE = 1_000_000  # rows
LARGEST = 1e30  # numbers that a fit in single precision can bear
MOST_VALUES = 4096  # distinct numbers that can be levels
MOST_CELLS = 256  # of a grid whose cells all become levels, seen or not
REST = 20  # rows beside points of mass that can show a continuous part
HEAVY = 0.1  # a level of a longer grid with a larger share is a point of mass
LATITUDES = ("lat", "latitude")  # a bound that the numbers alone do not show
NAMES = 0.5  # text with more levels per row (and more than 20) is taken for names
KINDS = {
    "continuous": "a real number, as it is",
    "positive": "a number above 0",
    "bounded:A,B": "a number from A to B",
    "circular:A,B": "an angle or time of day; A and B are the same point",
    "integer": "whole numbers; or grid:GAP, for any other spacing",
    "mass:A": "a number with points of mass at A (or A,B,...), such as many zeros",
    "category": "one of the values or texts that occur",
    "ordered:a<b<c": "categories in this order",
    "skip": "leave the column out",
}


@dataclass(frozen=True)
class Declared:
    """A kind as the user gave it: the word before the colon, numbers, texts."""

    kind: str
    numbers: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()


def declare(text: str) -> tuple[str, Declared]:
    """Column and kind of NAME=KIND. Raises ValueError that says what would be right."""
    name, equals, words = text.rpartition("=")
    kind, _, rest = words.partition(":")
    wanted = {"continuous": 0, "positive": 0, "bounded": 2, "circular": 2, "integer": 0, "grid": 1,
              "mass": -1, "category": 0, "ordered": 0, "skip": 0}  # fmt: skip
    if not equals or kind not in wanted:
        raise ValueError(f"{text!r}: give it as NAME=KIND with one of {', '.join(KINDS)}")
    if kind == "ordered":
        texts = tuple(part.strip() for part in rest.split("<"))
        if len(set(texts)) < 2 or len(set(texts)) < len(texts):
            raise ValueError(f"{text!r}: give the levels from low to high: {name}=ordered:a<b<c")
        return name, Declared(kind, (), texts)
    try:
        numbers = tuple(float(part) for part in rest.split(",")) if rest else ()
    except ValueError:
        numbers = (math.nan,)
    ascending = list(numbers) == sorted(set(numbers))
    right = len(numbers) == wanted[kind] or (kind == "mass" and numbers)
    if not right or not ascending or not np.isfinite(numbers).all() or (
        kind == "grid" and numbers[0] <= 0
    ):
        form = next(form for form in [*KINDS, "grid:GAP"] if form.partition(":")[0] == kind)
        raise ValueError(f"{text!r}: give it as {name}={form}, numbers in ascending order")
    return name, Declared(kind, numbers)


@dataclass
class Facts:
    """One column: its filled cells in a sample, its levels, and what all rows together say."""

    name: str
    dtype: str
    sample: Floats  # sorted
    levels: Floats  # all distinct values, or those of the sample if there are too many
    counts: NDArray[np.int64]  # in the training rows, where all levels are known
    rows: int
    missing: int
    digest: bytes  # of all cells in their order

    @property
    def n(self) -> int:
        return self.rows - self.missing

    @property
    def tied(self) -> bool:
        """Whether the values share levels, those beside points of mass considered."""
        times = np.unique(self.sample, return_counts=True)[1]
        rest = times[times <= max(SPIKE * len(self.sample), SPIKE_ROWS - 1)]
        rest = rest if rest.sum() > max(SPIKE * len(self.sample), REST) else times
        return bool(len(rest) < TIED * rest.sum())

    def share(self, k: int) -> float:
        return float(self.counts[k] / max(self.counts.sum(), 1))


def detect(
    table: Table, parts: Sequence[Floats], declared: Mapping[str, Declared] | None = None
) -> Schema:
    """The schema of a table cut into ``parts``: the training rows, then held-out ones.

    How often a level occurs is counted in the training rows alone; which levels there are, in all.
    Raises DataError if a declared kind does not fit the column, or no column is left.
    """
    declared = dict(declared or {})
    if unknown := [name for name in declared if name not in table.columns]:
        raise DataError(f"{table.name}: there is no column {', '.join(unknown)} to declare; "
                        f"it has {', '.join(table.columns)}")
    plans: list[ColumnPlan] = []
    left_out: dict[str, str] = {}
    seen: dict[tuple[bytes, tuple[str, ...]], str] = {}
    for facts in _survey(table, parts):
        name, given = facts.name, declared.get(facts.name)
        texts = table.levels.get(name, ())
        twin = seen.setdefault((facts.digest, tuple(texts)), name)
        reason = _useless(facts, texts, given)
        if reason:
            left_out[name] = f"column {name}: {reason}; left out"
        elif twin != name and given is None and any(plan.name == twin for plan in plans):
            plans.append(ColumnPlan(
                name, "copy", facts.dtype, twin=twin, texts=texts, holes=facts.missing > 0,
                note=f"column {name}: "
                f"repeats column {twin}; left out, put back in samples"))  # fmt: skip
        else:
            plans.append(_plan(table.name, facts, texts, given))
    schema = Schema(tuple(plans), left_out)
    if not schema.features:
        raise DataError(f"{table.name}: no column is left to fit; " + "; ".join(schema.notes))
    return schema


def _useless(facts: Facts, texts: Sequence[str], given: Declared | None) -> str:
    if given is not None and given.kind == "skip":
        return "declared so"
    if not facts.n:
        return "always empty"
    many = len(texts) > MOST_LEVELS or len(texts) > max(20, NAMES * facts.n)
    if many and given is None:
        count = f"more than {MOST_LEVELS:,}" if len(texts) > MOST_LEVELS else f"{len(texts):,}"
        return f"{count} different texts in {facts.n:,} rows, so names, not categories"
    return ""


def _survey(table: Table, parts: Sequence[Floats]) -> list[Facts]:
    """One pass over all rows."""
    rows = sum(len(part) for part in parts)
    stride = -(-rows // SAMPLE)
    gathered = [_Gathered() for _ in table.columns]
    for k, part in enumerate(parts):
        for block in pieces(part):
            for j, column in enumerate(gathered):
                column.add(block[:, j] + 0.0, stride, trained=k == 0)  # -0.0 becomes 0.0
    heads = zip(table.columns, table.dtypes, gathered, strict=True)
    return [column.facts(name, dtype, rows) for name, dtype, column in heads]


class _Gathered:
    """What is kept of a column while its rows pass by."""

    def __init__(self) -> None:
        self.train: list[Floats] = [np.empty(0)]
        self.rest: list[Floats] = [np.empty(0)]
        self.missing, self.digest = 0, hashlib.sha256()
        self.known: tuple[Floats, NDArray[np.int64]] | None = np.empty(0), np.empty(0, np.int64)
        self.ends = [math.inf, -math.inf]

    def add(self, cells: Floats, stride: int, trained: bool) -> None:
        self.digest.update(cells.data)
        filled = cells[~np.isnan(cells)]
        self.missing += len(cells) - len(filled)
        if not len(filled):
            return
        (self.train if trained else self.rest).append(filled[::stride].copy())
        self.ends = [min(self.ends[0], filled.min()), max(self.ends[1], filled.max())]
        if stride > 1 and self.known is not None:
            self.known = _merged(*self.known, filled, trained)
            self.known = self.known if len(self.known[0]) <= MOST_VALUES else None

    def facts(self, name: str, dtype: str, rows: int) -> Facts:
        train, rest = np.concatenate(self.train), np.concatenate(self.rest)
        if self.known is None or not len(self.known[0]):  # all rows are in the sample, or too many
            known = _merged(np.empty(0), np.empty(0, np.int64), train, True)
            ends = np.array([end for end in self.ends if math.isfinite(end)])
            self.known = _merged(*known, np.append(rest, ends), False)
        sample = np.sort(np.append(train, rest))
        return Facts(name, dtype, sample, *self.known, rows, self.missing, self.digest.digest())


def _merged(
    levels: Floats, counts: NDArray[np.int64], cells: Floats, counted: bool
) -> tuple[Floats, NDArray[np.int64]]:
    new, times = np.unique(cells, return_counts=True)
    merged = np.union1d(levels, new)
    total = np.zeros(len(merged), np.int64)
    total[np.searchsorted(merged, levels)] = counts
    total[np.searchsorted(merged, new)] += times if counted else 0
    return merged, total


def _plan(table: str, facts: Facts, texts: Sequence[str], given: Declared | None) -> ColumnPlan:
    """The map of one column and the line that says why."""
    name, levels = facts.name, facts.levels
    empty = _percent(facts.missing / facts.rows)
    holes = f"{empty} of the cells empty, a value of its own" if facts.missing else ""

    def plan(kind: str, words: str, form: Map | None, value: float | None = None) -> ColumnPlan:
        said = "; ".join(part for part in (words, holes) if part)
        note = f"column {name}: {said}" if said else ""
        return ColumnPlan(name, kind, facts.dtype, form, value, texts=tuple(texts), note=note,
                          holes=facts.missing > 0)  # fmt: skip

    exactly = given is not None and given.kind == "continuous"
    if given is not None:
        _fits(table, facts, texts, given)
    elif len(levels) == 1 and not facts.missing:
        shown = texts[int(levels[0])] if texts else f"{levels[0]:g}"
        value = float(levels[0])
        return plan("constant", f"always {shown}; left out, put back in samples", None, value)
    else:
        given = _guess(facts, texts)
    kind, numbers = given.kind, given.numbers
    if kind in ("category", "ordered"):
        count = len(texts) if given.texts else len(levels)
        said = "categories" if texts or kind == "ordered" else "values"
        words = f"{count} {'ordered ' if kind == 'ordered' else ''}{said}, each with a cell"
        all_levels = np.arange(float(count)) if given.texts else levels
        return plan(kind, words, _levels(facts, all_levels))
    if kind == "values":
        words = f"{len(levels):,} distinct values, unevenly spaced, each with a cell"
        return plan(kind, words, _levels(facts, levels))
    low, high = float(levels[0]), float(levels[-1])
    if max(-low, high) > LARGEST or high - low < 1 / LARGEST:
        raise DataError(f"{table}: column {name} ranges from {low:g} to {high:g}, out of reach of "
                        f"single precision; change its unit or leave it out")
    if kind == "circular":
        gap = _gap(facts)
        words = f"an angle, {numbers[0]:g} and {numbers[1]:g} the same point"
        words += f", on a grid of {gap:g}" if gap else ""
        digits = _digits(levels) if gap else None
        form = Circle(numbers[0], numbers[1] - numbers[0], gap or 0.0, digits, facts.missing > 0)
        return plan(kind, words, form)
    if kind in ("integer", "grid"):
        gap = numbers[0] if numbers else 1.0
        cells = np.rint((levels[-1] - levels[0]) / gap) + 1
        days = facts.dtype == "date" and gap == 1
        words = "days, " if days else "whole numbers, " if gap == 1 else f"a grid of {gap:g}, "
        digits = _digits(levels)
        if cells <= MOST_CELLS and digits is not None:
            grid_levels = np.round(levels[0] + gap * np.arange(cells), digits)
            words += f"{levels[0]:g} to {levels[-1]:g}, each with a cell"
            return plan(kind, words, _levels(facts, np.union1d(grid_levels, levels)))
        if len(levels) <= MOST_CELLS and digits is None:
            words += f"{len(levels)} of them, each with a cell"
            return plan(kind, words, _levels(facts, levels))
        line, more = _grid_line(facts, gap, digits)
        return plan(kind, f"{words}spread over cells{more}", line)
    line, words = _line(facts, given, exactly)
    return plan(kind, words, line)


def _guess(facts: Facts, texts: Sequence[str]) -> Declared:
    levels = facts.levels
    if texts or facts.dtype == "bool" or len(levels) <= 2:
        return Declared("category")
    start = 0.0 if levels[0] >= 0 else -180.0
    if _round(facts, start):
        return Declared("circular", (start, start + 360.0))
    if gap := _gap(facts):
        return Declared("integer" if gap == 1 and _digits(levels) == 0 else "grid", (gap,))
    if facts.tied and len(levels) <= MOST_VALUES:
        return Declared("category" if len(levels) <= 20 else "values")
    if facts.name.lower() in LATITUDES and -90 <= levels[0] <= levels[-1] <= 90:
        return Declared("bounded", (-90.0, 90.0))
    return Declared("continuous")


def _round(facts: Facts, start: float) -> bool:
    """Whether the column fills a full circle in degrees, alike on both sides of the seam."""
    low, high = facts.levels[0], facts.levels[-1]
    gap = min(_gap(facts) or 0.0, 45.0)
    if low < start or high > start + 360 or high - low < 360 - max(gap, 5.0):
        return False
    near = np.searchsorted(facts.sample, [start + 30, start + 330])
    sides = near[0], len(facts.sample) - near[1]
    return bool(min(sides) >= 5 and max(sides) <= 20 * min(sides))


def _gap(facts: Facts) -> float | None:
    """The spacing of the grid on which all values lie."""
    whole = re.match(r"u?int|date", facts.dtype) is not None
    if not (facts.tied or whole or facts.dtype.startswith("timestamp")):
        return None
    if whole:
        steps = np.diff(facts.levels)
        return float(np.gcd.reduce(steps.astype(np.int64))) if len(steps) else 1.0
    gap = grid(facts.levels, 1.0)
    if gap is not None and abs(gap - float(f"{gap:.6g}")) < 1e-9 * gap:
        gap = float(f"{gap:.6g}")
    return gap


def _digits(levels: Floats) -> int | None:
    """The decimals that all levels have; None if more than nine."""
    return next((d for d in range(10) if np.array_equal(np.round(levels, d), levels)), None)


def _levels(facts: Facts, levels: Floats) -> Levels:
    """Cells as wide as the shares in the training rows, a half added to each count."""
    counts = np.full(len(levels), 0.5)
    counts[np.searchsorted(levels, facts.levels)] += facts.counts
    weights = [*counts, max(facts.missing, 0.5)] if facts.missing else counts
    shares = np.asarray(weights) / np.sum(weights)
    return Levels(tuple(levels.tolist()), tuple(shares.tolist()))


def _grid_line(facts: Facts, gap: float, digits: int | None) -> tuple[Line, str]:
    levels, n = facts.levels, max(facts.counts.sum(), 1)
    top = int(facts.counts.argmax())
    heavy = facts.counts[top] > HEAVY * n
    atoms = (float(levels[top]),) if heavy else ()
    middle = facts.sample[len(facts.sample) // 2]
    lower = 0.0 if levels[0] >= 0 and facts.dtype[:4] not in ("date", "time") else None
    spread = float(facts.sample.std())
    share = max(facts.share(top) if heavy else 0.0, facts.missing / facts.rows)
    upper = 100.0 if lower == 0 and levels[-1] == 100 else None
    line = Line(lower, upper, atoms, None, gap, float(middle), digits,
                cell=_cell(spread / gap, share))  # fmt: skip
    if facts.missing:
        lowest = float(line.place(torch.tensor([levels[0]], dtype=torch.float64)))
        line = replace(line, absent=lowest - math.ceil(spread / 2 / gap))
    more = f"; exactly {levels[top]:g} in {_percent(facts.share(top))} of the rows" if heavy else ""
    return line, more


def _line(facts: Facts, given: Declared, exactly: bool) -> tuple[Line, str]:
    """A continuous column: its bounds and points of mass; ``exactly``: taken as it is."""
    levels, counts, n = facts.levels, facts.counts, max(int(facts.counts.sum()), 1)
    low, high, spread = float(levels[0]), float(levels[-1]), float(facts.sample.std())
    lower, upper, spikes = None, None, []
    if not exactly:
        spikes = levels[(counts > SPIKE * n) & (counts >= SPIKE_ROWS)].tolist()
        spikes = sorted({*spikes, *(given.numbers if given.kind == "mass" else ())})
        if given.kind == "bounded":
            lower, upper = given.numbers
        elif given.kind == "positive" or (low >= 0 and (low < spread / 2 or low in spikes)):
            lower = 0.0
        if given.kind == "continuous" and lower == 0:
            fraction = low <= 0.01 and 0.99 <= high <= 1
            upper = 1.0 if fraction else 100.0 if high == 100 else None
        lower = low if lower is None and low in spikes else lower
        upper = high if upper is None and high in spikes else upper
    atoms = tuple(sorted({*spikes, *({lower, upper} & {low, high})}))
    shares = [float(counts[levels == a].sum()) / n for a in atoms]
    rest = facts.sample[~np.isin(facts.sample, atoms)]
    spread = float(rest.std()) if len(rest) and rest.std() > 0 else spread or 1.0
    share = max([*shares, facts.missing / facts.rows])
    line = Line(lower, upper, atoms, scale=spread / 4, cell=_cell(spread, share))
    if facts.missing:
        lowest = line.place(torch.tensor([rest.min() if len(rest) else low], dtype=torch.float64))
        line = replace(line, absent=min(float(lowest), lower or math.inf) - spread / 2)
    words = [f"exactly {a:g} in {_percent(s)} of the rows"
             for a, s in zip(atoms, shares, strict=True)]  # fmt: skip
    otherwise = "else " if atoms else ""
    if lower is not None and upper is not None:
        words.append(f"{otherwise}between {lower:g} and {upper:g}")
    elif lower is not None or upper is not None:
        words.append(f"{otherwise}{'below' if lower is None else 'above'} "
                     f"{upper if lower is None else lower:g}")  # fmt: skip
    elif abs(low) * np.finfo(np.float32).eps > 1e-3 * spread and not exactly:
        line = replace(line, origin=float(np.median(facts.sample)))
        words.append("far from zero beside its spread, so centred")
    if not (line.noise or line.origin or line.lower is not None or line.upper is not None):
        line = Line()
    return line, ", ".join(words)


def _cell(spread: float, share: float) -> float:
    """Width of the cell of a point of mass with that share beside values of that spread."""
    return spread * min(max(2 * share / max(1 - share, 1e-3), 0.5), 5.0)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _fits(table: str, facts: Facts, texts: Sequence[str], given: Declared) -> None:
    """Raise DataError if the column holds what its declared kind does not allow."""
    levels, kind, numbers = facts.levels, given.kind, given.numbers

    def refuse(problem: str) -> None:
        raise DataError(f"{table}: column {facts.name} is declared {kind}, but {problem}")

    if texts and kind not in ("category", "ordered"):
        refuse(f"holds text such as {texts[0]!r}; declare it category or skip it")
    if given.texts and not texts:
        refuse(f"holds numbers such as {levels[0]:g}, no text; declare it category")
    if UNKNOWN in levels and given.texts:
        refuse(f"holds other texts than {', '.join(given.texts)}")
    if kind == "positive" and levels[0] < 0:
        refuse(f"holds {levels[0]:g}")
    if kind == "bounded" and not numbers[0] <= levels[0] <= levels[-1] <= numbers[1]:
        refuse(f"ranges from {levels[0]:g} to {levels[-1]:g}")
    if kind in ("integer", "grid"):
        gap = numbers[0] if numbers else 1.0
        off = np.abs((levels - levels[0]) / gap - np.rint((levels - levels[0]) / gap))
        if off.max(initial=0) > 0.01:
            refuse(f"holds {levels[int(off.argmax())]:g} beside {levels[0]:g}")
