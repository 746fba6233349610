"""The results store as tables of text: one run for the terminal, all of them for the guide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .catalogue import SCALES, Recipe
from .parts import Row
from .store import Result

__all__ = ["combine", "duration", "grids", "page"]

Grid = tuple[list[str], list[list[str]]]
NOTHING = "–"
ALL = 2.0  # standard errors within which two numbers are called equal

HEAD = """# Results

Every experiment with what this code measured and, where there is one, the published number. The
page is made from `docs/results.jsonl`, one line a run, by `make results`; nothing in it is typed by
hand. How to read the columns: {doc}`experiments`.

- *a ± b*: b is a standard error, over seeds where there are several, else over held-out rows.
- *word*: ours against the published number; *equal* within two standard errors.
- Seconds in a table are those of one fit, in processor time where fits are compared at equal time.
"""


def page(results: Sequence[Result], known: Sequence[Recipe]) -> str:
    """The whole page in Markdown: all experiments, those that were not run too; no smoke runs."""
    lines = [HEAD]
    for recipe in known:
        lines.append(f"## {recipe.name}\n\n{_sentence(recipe.summary)} Source: {recipe.source}.\n")
        shown = set()
        for scale in SCALES[1:]:
            runs = _latest([r for r in results if (r.experiment, r.scale) == (recipe.name, scale)])
            if runs:
                rows = combine(runs)
                shown |= {row.key for row in rows}
                lines += [*_about(recipe.name, runs, recipe.notes.get(scale)), *_tables(rows)]
        if not shown:
            lines.append(f"Not run here yet: `rootflow reproduce {recipe.name}`.\n")
        missing = {key: value for key, value in recipe.published.items() if key not in shown}
        if missing:
            command = f"`rootflow reproduce {recipe.name} --scale paper`"
            lines.append(f"Published, and not run here: {command}.\n")
            grid = [[key.replace("/", ", "), short(value)] for key, value in missing.items()]
            lines.append(_markdown((["row", "published"], grid)))
    return "\n".join(lines)


def combine(runs: Sequence[Result]) -> list[Row]:
    """The rows of one experiment at one scale, averaged over its runs; errors are over the runs."""
    rows: dict[tuple[str, str], list[Row]] = {}
    for run in runs:
        for row in run.rows:
            rows.setdefault((row.measure, row.key), []).append(row)
    return [_mean(same) for same in rows.values()]


def _mean(rows: list[Row]) -> Row:
    good = [row for row in rows if row.ours is not None]
    if len(good) < 2:
        return good[0] if good else rows[0]
    ours = np.array([row.ours for row in good], dtype=np.float64)
    more: dict[str, float | None] = {}
    for key in good[0].more:
        values = [value for row in good if (value := row.more.get(key)) is not None]
        more[key] = float(np.mean(values)) if values else None
    se = float(ours.std(ddof=1) / math.sqrt(len(ours)))
    found = {"ours": float(ours.mean()), "se": se, "more": {**more, "seeds": float(len(good))}}
    return good[-1].model_copy(update=found)


def _latest(results: Sequence[Result]) -> list[Result]:
    """For each seed the last run; of equal run_id the last line."""
    return [r for _, r in sorted({r.seed: r for r in results}.items())]


def _about(name: str, runs: Sequence[Result], note: str | None) -> Iterator[str]:
    last = runs[-1]
    seconds = sum(run.seconds for run in runs)
    threads = f"{last.threads} thread{'s' * (last.threads > 1)}"
    yield f"### {name}, scale {last.scale}\n"
    yield (
        f"{last.time[:10]}, {last.hardware}, {threads}, torch {last.torch}, rootflow "
        f"{last.version}; {duration(seconds / 60)} in all.\n"
    )
    yield "```\n" + "\n".join(run.command for run in runs) + "\n```\n"
    if note is not None:
        yield f"{_sentence(note)}\n"


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    for grid in grids(rows):
        yield _markdown(grid)
    for row in rows:
        if row.error is not None:
            yield f"- failed: {row.key}: {row.error}"
    yield ""


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """A table for each measure, as (head, lines); columns that no row fills are left out.

    Numbers "x" and "x se" share a column.
    """
    for measure in dict.fromkeys(row.measure for row in rows):
        mine = [row for row in rows if row.measure == measure]
        labels = list(dict.fromkeys(label for row in mine for label in row.labels))
        own = [k for k in ("exact", "published") if any(getattr(r, k) is not None for r in mine)]
        keys = list(dict.fromkeys(key for row in mine for key in row.more))
        errors = {f"{key} se" for key in keys}
        more = [key for key in keys if key not in errors]
        lines = []
        for row in mine:
            line = [row.labels.get(label, NOTHING) for label in labels]
            line.append("failed" if row.error is not None else number(row.ours, row.se))
            line += [short(getattr(row, key)) for key in own]
            if "published" in own:
                line.append(_word(row))
            line += [number(row.more.get(key), row.more.get(f"{key} se")) for key in more]
            lines.append(line)
        word = ["word"] if "published" in own else []
        yield [*labels, measure, *own, *word, *more], lines


def _word(row: Row) -> str:
    if row.published is None or row.ours is None:
        return NOTHING
    gap = row.ours - row.published
    if abs(gap) <= ALL * (row.se or 0.0):
        return "equal"
    better = (gap > 0) == (row.better == "higher")
    verdict = "differs" if row.better is None else ("better" if better else "worse")
    return f"{verdict} by {abs(gap):.2g}"


def number(value: float | None, se: float | None = None) -> str:
    """A value with its standard error, both to the error's second digit."""
    if value is None or not se or se < 1e-9 * abs(value):  # a spread of rounding errors is none
        return short(value)
    digits = min(max(1 - math.floor(math.log10(se)), 0), 12)
    return f"{value:.{digits}f} ± {se:.{digits}f}"


def short(value: float | None) -> str:
    """Four digits, or all of a whole number."""
    if value is None:
        return NOTHING
    whole = value == int(value) and abs(value) < 1e12
    return f"{int(value):,}" if whole else f"{value:.4g}"


def duration(minutes: float) -> str:
    """Minutes in words."""
    if minutes < 1:
        return f"{max(round(60 * minutes), 1)} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _markdown(grid: Grid) -> str:
    head, lines = grid
    rule = ["---", *["---:"] * (len(head) - 1)]
    rows = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in (head, rule, *lines))
    return "\n".join(f"| {row} |" for row in rows) + "\n"
