"""Tables with awkward columns from fit to samples: kinds, empty cells, bounds, large tables."""

import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from cli.helpers import TINY, fails, succeeds
from rootflow.cli import tables
from rootflow.data.schema import Schema

LOUD = [word for word in TINY if word != "--quiet"]
N = 600


def awkward():
    """Every kind of column, with empty cells in three of them."""
    rng = np.random.default_rng(0)
    rain = np.where(rng.random(N) < 0.6, 0.0, rng.gamma(2, size=N))
    frame = pd.DataFrame({
        "free": rng.normal(size=N),
        "income": rng.gamma(2, 9, size=N),
        "share": rng.beta(0.5, 0.5, size=N),
        "rain": rain,
        "count": rng.poisson(3, size=N),
        "price": np.round(rng.gamma(3, 15, size=N) * 2) / 2,
        "wind": rng.integers(0, 37, size=N) * 10.0,
        "cut": rng.choice(["Good", "Fair", "Very, very good"], size=N),
        "flag": rng.random(N) < 0.3,
        "day": pd.date_range("2001-02-03", periods=N).strftime("%Y-%m-%d"),
        "year": 2013,
        "again": rain,
        "id": [f"row {k}" for k in range(N)],
    })  # fmt: skip
    for name in ("free", "wind", "cut"):
        frame.loc[rng.random(N) < 0.1, name] = None
    return frame


KINDS = {
    "free": "continuous", "income": "continuous", "share": "continuous", "rain": "continuous",
    "count": "integer", "price": "grid", "wind": "circular", "cut": "category", "flag": "category",
    "day": "integer", "year": "constant", "again": "copy",
}  # fmt: skip


@pytest.fixture(scope="module")
def frame():
    return awkward()


@pytest.fixture(scope="module")
def source(frame, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "awkward.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    patch = pytest.MonkeyPatch()
    patch.setattr("rootflow.cli.train.write_report", lambda *_, **__: None)
    patch.setattr("rootflow.cli.measure.ROWS", 50)
    result = succeeds("fit", source, *LOUD, "--flow", "nsf-coupling", "--out", out)
    patch.undo()
    (out / "said.txt").write_text(result.stderr)
    return out


def scores(run, path, *words):
    result = succeeds("score", run, path, *words)
    return np.array(result.stdout.split()[1:], float), result.stderr


def test_each_column_is_told_and_named(run):
    plan = json.loads((run / "config.json").read_text())
    kinds = {column["name"]: column["kind"] for column in plan["data"]["schema"]["columns"]}
    assert kinds == KINDS
    said = (run / "said.txt").read_text()
    assert "column income: above 0\n" in said
    assert "column share: between 0 and 1\n" in said
    assert "column rain: exactly 0 in " in said
    assert "column wind: an angle, 0 and 360 the same point, on a grid of 10; " in said
    assert "column year: always 2013; left out, put back in samples" in said
    assert "column again: repeats column rain" in said
    assert "column id: 600 different texts in 600 rows, so names, not categories; left out" in said
    assert "column free: " in said
    assert "of the cells empty, a value of its own" in said
    result = json.loads((run / "result.json").read_text())
    assert result["notes"] == [line for line in said.splitlines() if line.startswith("column ")]
    assert result["features"] == 11  # the angle takes two
    assert math.isfinite(result["test_log_prob"])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_samples_have_columns_types_levels_and_bounds_of_the_table(run, frame, tmp_path, kind):
    out = tmp_path / f"drawn.{kind}"
    succeeds("sample", run, "-n", "400", "--out", out)
    drawn = pd.read_csv(out) if kind == "csv" else pd.read_parquet(out)
    assert list(drawn) == list(frame.columns[:-1])
    assert (drawn["income"] > 0).all()
    assert drawn["share"].between(0, 1).all()
    assert (drawn["rain"] >= 0).all()
    assert (drawn["rain"] == 0).any()
    assert (drawn["again"] == drawn["rain"]).all()
    assert set(drawn["count"]) <= set(range(frame["count"].max() + 1))
    np.testing.assert_array_equal(drawn["price"] * 2, (drawn["price"] * 2).round())
    assert set(drawn["wind"].dropna()) <= set(range(0, 360, 10))
    assert set(drawn["cut"].dropna()) <= {"Good", "Fair", "Very, very good"}
    assert set(drawn["flag"]) <= {True, False}
    assert (drawn["year"] == 2013).all()
    assert drawn[["free", "wind", "cut"]].isna().any().all()
    assert not drawn.drop(columns=["free", "wind", "cut"]).isna().any().any()
    assert pd.to_datetime(drawn["day"]).notna().all()
    if kind == "parquet":
        types = parquet.read_schema(out).field
        assert types("day").type == pa.date32()
        assert types("flag").type == pa.bool_()
        assert types("count").type == pa.int64()
        values = json.loads(succeeds("sample", run, "-n", "3", "--json").stdout)["values"]
        assert [type(cell) for cell in values[0][8:11]] == [bool, str, int]
    fails(1, "sample", run, "-n", "3", "--out", tmp_path / "d.npy", says=["cut", ".parquet"])


def test_scores_do_not_depend_on_order_of_columns_or_on_further_ones(run, frame, source, tmp_path):
    plain, _ = scores(run, source)
    assert np.isfinite(plain).all()
    other = frame.assign(more="text")[["more", *frame.columns[::-1]]]
    other.to_csv(tmp_path / "other.csv", index=False)
    turned, said = scores(run, tmp_path / "other.csv")
    np.testing.assert_array_equal(plain, turned)
    assert "columns not needed are ignored: more, id" in said
    frame.assign(day=pd.to_datetime(frame["day"]).dt.date).to_parquet(tmp_path / "other.parquet")
    np.testing.assert_allclose(scores(run, tmp_path / "other.parquet")[0], plain, atol=1e-6)


def test_what_cannot_be_scores_minus_infinity_and_is_counted(run, frame, tmp_path):
    other = frame.head(8).copy()
    other.loc[0, "cut"] = "Superb"
    other.loc[1, "income"] = -1
    other.loc[2, "year"] = 2014
    other.loc[3, "again"] = 77
    other.loc[4, "share"] = 1.5
    other.to_csv(tmp_path / "other.csv", index=False)
    found, said = scores(run, tmp_path / "other.csv")
    assert (found[:5] == -math.inf).all()
    assert np.isfinite(found[5:]).all()
    assert "5 of 8 rows are impossible" in said
    for name in ("cut", "income", "year", "again", "share"):
        assert f"column {name} in 1" in said
    result = json.loads(succeeds("score", run, tmp_path / "other.csv", "--json").stdout)
    assert result["log_prob"][:5] == [None] * 5
    assert result["lower_bound"] is True
    other.loc[0, "income"] = None
    other.to_csv(tmp_path / "hole.csv", index=False)
    fails(1, "score", run, tmp_path / "hole.csv", says=["line 2", "income", "empty"])


def test_a_score_is_a_probability_where_columns_are_discrete(tmp_path):
    """Two coins: the four scores are log-probabilities, whose bound nearly adds up to one."""
    rng = np.random.default_rng(1)
    first = rng.random(2000) < 0.3
    second = np.where(rng.random(2000) < 0.9, first, ~first)
    coins = pd.DataFrame({"a": np.where(first, "heads", "tails"), "b": second.astype(int)})
    coins.to_csv(tmp_path / "coins.csv", index=False)
    words = ["--flow", "nsf-coupling", "--steps", "150", "--set", "blocks=2", "-q"]
    succeeds("fit", tmp_path / "coins.csv", *words, "--out", tmp_path / "run")
    every = coins.value_counts(normalize=True).reset_index()
    every.to_csv(tmp_path / "every.csv", index=False)
    found, _ = scores(tmp_path / "run", tmp_path / "every.csv")
    assert 0.85 < np.exp(found).sum() < 1.05
    np.testing.assert_allclose(np.exp(found), every["proportion"], atol=0.08)


def test_declared_kinds(frame, tmp_path):
    path = tmp_path / "t.csv"
    frame[["income", "share", "count", "wind", "cut"]].dropna().to_csv(path, index=False)
    kinds = ["income=bounded:0,1000", "count=mass:0,3", "wind=grid:5", "share=continuous",
             "cut=ordered:Fair<Good<Very, very good"]  # fmt: skip
    words = [word for kind in kinds for word in ("--kind", kind)]
    words += ["--flow", "realnvp", "--out", tmp_path / "run"]
    result = succeeds("fit", path, *LOUD, *words)
    assert "column income: between 0 and 1000" in result.stderr
    assert "column count: exactly 0 in " in result.stderr
    assert "column cut: 3 ordered categories" in result.stderr
    assert "column share" not in result.stderr
    plan = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "--kind count=mass:0,3" in plan["command"].replace("'", "")
    schema = Schema.from_json(plan["data"]["schema"])
    assert schema.levels["cut"] == ("Fair", "Good", "Very, very good")
    assert schema.columns[3].map.values == tuple(5.0 * k for k in range(73))
    resumed = succeeds("fit", "--resume", "--out", tmp_path / "run")
    assert "finished already" in resumed.stderr


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (2, "income", ["NAME=KIND"]),
        (2, "income=funny", ["funny", "positive"]),
        (2, "income=bounded:3", ["bounded:A,B"]),
        (2, "income=bounded:3,1", ["ascending"]),
        (2, "cut=ordered:a", ["low to high"]),
        (2, "income=grid:0", ["grid:GAP"]),
        (1, "none=positive", ["no column none"]),
        (1, "free=positive", ["column free is declared positive, but holds -"]),
        (1, "income=bounded:0,1", ["ranges from"]),
        (1, "income=integer", ["declared integer, but holds"]),
        (1, "cut=positive", ["holds text", "category"]),
        (1, "cut=ordered:Fair<Good", ["holds other texts"]),
        (1, "income=ordered:Fair<Good", ["holds numbers"]),
    ],
)
def test_kinds_that_do_not_fit(source, tmp_path, code, kind, says):
    fails(code, "fit", source, *TINY, "--kind", kind, "--out", tmp_path / "run", says=says)
    assert not (tmp_path / "run").exists()


def test_empty_cells_are_kept_dropped_or_refused_as_asked(frame, source, tmp_path):
    few = frame[["income", "rain"]].copy()
    few.loc[[7, 9], "rain"] = None
    few.to_csv(tmp_path / "few.csv", index=False)
    fails(1, "fit", tmp_path / "few.csv", *TINY, "--out", tmp_path / "run",
          says=["line 9, column rain: empty", "first of 2", "--missing drop or keep"])  # fmt: skip
    fails(1, "fit", source, *TINY, "--missing", "refuse", "--out", tmp_path / "run", says=["empty"])
    fails(2, "fit", source, *TINY, "--missing", "guess", says=["auto, refuse, drop, keep"])
    words = [*LOUD, "--flow", "realnvp", "--columns", "rain,income"]
    for policy, rows in (("drop", N - 2), ("keep", N)):
        out = tmp_path / policy
        result = succeeds("fit", tmp_path / "few.csv", *words, "--missing", policy, "--out", out)
        done = json.loads((out / "result.json").read_text())
        assert done["n_train"] + done["n_validation"] + done["n_test"] == rows
        assert ("2 of 600 rows have empty cells and are dropped" in result.stderr) == (rows < N)
        assert "no figures" not in succeeds("report", out).stderr


def test_a_large_table_stays_in_a_file(tmp_path, monkeypatch):
    """Training, held-out rows, score and report from a file, with 1 MiB for the table."""
    rng = np.random.default_rng(0)
    n = 60_000
    table = pa.table({"a": rng.normal(3, 2, n), "b": rng.poisson(2, n), "c": rng.gamma(2, size=n)})
    path, limit = tmp_path / "large.parquet", ("--memory", str(1 / 1024))
    parquet.write_table(table, path, row_group_size=7_000)
    monkeypatch.setattr(tables, "MOST_HELD_OUT", 500)
    out = tmp_path / "run"
    result = succeeds("fit", path, *LOUD, "--flow", "realnvp", *limit, "--out", out)
    assert "60,000 rows are kept in a temporary file" in result.stderr
    done = json.loads((out / "result.json").read_text())
    assert (done["n_train"], done["n_validation"], done["n_test"]) == (59_000, 500, 500)
    assert -9 < done["test_log_prob"] < -4
    assert {p.name for p in out.iterdir()} >= {"model.safetensors", "result.json", "resume"}
    small = tmp_path / "small.parquet"
    parquet.write_table(table.slice(0, 300), small)
    scores(out, path, *limit, "--out", tmp_path / "s.csv")
    np.testing.assert_allclose(
        np.loadtxt(tmp_path / "s.csv", skiprows=1)[:300], scores(out, small)[0], atol=1.0
    )
    assert succeeds("report", out, *limit).stderr.count("warning") == 0
