"""The page of results: rows, words, runs combined by hand; the committed page is the store's."""

import math
from pathlib import Path

import pytest

from rootflow.experiments import Recipe, Result, page, read, recipes
from rootflow.experiments.parts import Row
from rootflow.experiments.results import combine, duration, grids, number, short

DOCS = Path(__file__).resolve().parents[2] / "docs"


def row(name, ours=None, **fields):
    fields = {"measure": "nats", "better": "higher", **fields}
    return Row(labels={"data": "d", "flow": name}, ours=ours, **fields)


def result(*rows, seed=0, scale="small", run="r", **fields):
    return Result(**{
        "run_id": run, "experiment": "e", "scale": scale, "seed": seed, "time": "2026-01-02T03:04",
        "seconds": 90.0, "hardware": "a machine", "threads": 1, "version": "1", "torch": "2",
        "command": f"rootflow reproduce e --seed {seed}", "run": "runs/e", "failed": 0,
        "rows": list(rows), **fields,
    })  # fmt: skip


def known(**fields):
    slopes = {"slope": 10.0, "blocks": [1], "starts": 1, "stairs": [], "most_blocks": 1,
              "steps": 1, "batch": 2}  # fmt: skip
    return Recipe(**{
        "name": "e", "kind": "slopes", "summary": "what it is", "source": "a paper",
        "common": slopes, "smoke": {}, "small": {}, "paper": {}, **fields,
    })  # fmt: skip


def test_a_page():
    rows = [
        row("a", 1.5, se=0.01, published=1.0, more={"gap": 0.123, "gap se": 0.021, "seconds": 7.0}),
        row("b", published=2.0, error="no such flow"),
        row("c", 1.25, measure="bits"),
    ]
    published = {"d/a": 1.0, "d/b": 2.0, "big/a": -3.25}
    text = page([result(*rows, scale="smoke"), result(*rows)],
                [known(published=published, notes={"small": "a tenth of the steps"})])  # fmt: skip
    lines = text.splitlines()
    assert "| data | flow | nats | published | word | gap | seconds |" in lines
    assert "| d | a | 1.500 ± 0.010 | 1 | better by 0.5 | 0.123 ± 0.021 | 7 |" in lines
    assert "| d | b | failed | 2 | – | – | – |" in lines
    assert "| d | c | 1.25 |" in lines
    assert "- failed: d/b: no such flow" in lines
    assert "A tenth of the steps." in lines
    assert "rootflow reproduce e --seed 0" in lines
    assert "2026-01-02, a machine, 1 thread, torch 2, rootflow 1; 2 min in all." in lines
    assert "| big, a | -3.25 |" in lines
    assert text.count("### e, scale") == 1  # nothing of the smoke run


def test_an_experiment_without_results_says_how_to_get_some():
    text = page([], [known(published={"x/y": 4.0})])
    assert "Not run here yet: `rootflow reproduce e`." in text
    assert "| x, y | 4 |" in text


@pytest.mark.parametrize(
    ("ours", "se", "better", "word"),
    [
        (1.0, None, "higher", "equal"), (1.1, 0.06, "higher", "equal"),
        (1.1, 0.04, "higher", "better by 0.1"), (0.9, 0.04, "higher", "worse by 0.1"),
        (1.1, None, "lower", "worse by 0.1"), (1.1, None, None, "differs by 0.1"),
    ],
)  # fmt: skip
def test_the_word_beside_a_published_number(ours, se, better, word):
    (_, [line]), = grids([row("a", ours, se=se, better=better, published=1.0)])
    assert line[4] == word


def test_runs_of_several_seeds_become_one_row():
    runs = [result(row("a", value, se=9.0, more={"k": value, "n": None}), seed=seed, run=str(seed))
            for seed, value in enumerate((1.0, 2.0, 6.0))]  # fmt: skip
    (found,) = combine(runs)
    assert found.ours == 3.0
    assert found.se == pytest.approx(math.sqrt(7 / 3))
    assert found.more == {"k": 3.0, "n": None, "seeds": 3}
    failed = result(row("a", error="x"), seed=3, run="3")
    assert combine([*runs, failed])[0].ours == 3.0
    assert combine([failed])[0].error == "x"


def test_of_one_seed_the_last_run_counts():
    text = page([result(row("a", 1.0)), result(row("a", 2.5), run="later")], [known()])
    assert "| d | a | 2.5 |" in text
    assert "| d | a | 1 |" not in text


def test_numbers_in_words():
    assert [short(x) for x in (None, 3.0, 137292.0, 0.012341, 5.05)] == [
        "–", "3", "137,292", "0.01234", "5.05",
    ]  # fmt: skip
    assert number(153.2834, 0.213) == "153.28 ± 0.21"
    assert number(-18.7123, 0.00149) == "-18.7123 ± 0.0015"
    assert number(12345.6, 213.0) == "12346 ± 213"
    assert number(1.5, 0.0) == number(1.5, 2e-16) == number(1.5) == "1.5"
    assert [duration(m) for m in (0.001, 0.5, 7.4, 300.0)] == ["1 s", "30 s", "7 min", "5 h"]


def test_the_committed_page_is_what_the_store_gives():
    """If not: ``make results``."""
    assert (DOCS / "results.md").read_text() == page(read(DOCS / "results.jsonl"), recipes())
