"""Tables: what can be read comes back exactly, what cannot is one clear line."""

import re
import time

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from rootflow.data import (
    TOYS,
    Table,
    describe_columns,
    read_table,
    require_rows,
    split,
    write_table,
)
from rootflow.errors import DataError

GRID = np.array([[1.5, 2.0], [-3.25, 4.0], [1e-300, 5e20]])


def refused(source, pattern, **options):
    """The one line that reading raises."""
    with pytest.raises(DataError, match=pattern) as caught:
        read_table(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def text(tmp_path):
    def write(content, name="t.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# What can be read


@pytest.mark.parametrize("suffix", ["csv", "parquet", "npz"])
def test_what_is_written_is_read_back_with_names_and_dtypes(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    write_table(GRID, ["a, b", 'say "c"'], ["float64", "float64"], path)
    table = read_table(path)
    assert table.columns == ("a, b", 'say "c"')
    assert table.dtypes == ("float64", "float64")
    np.testing.assert_array_equal(table.values, GRID)
    assert table.values.flags.c_contiguous
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_npy_and_arrow_and_text_variants(tmp_path, text):
    write_table(torch.from_numpy(GRID), ["a", "b"], ["float64"] * 2, tmp_path / "t.npy")
    assert read_table(str(tmp_path / "t.npy")).columns == ("x1", "x2")
    frame = pa.table({"a": GRID[:, 0], "b": GRID[:, 1]})
    for name, kind in (("t.arrow", pa.ipc.new_file), ("t.feather", pa.ipc.new_stream)):
        with kind(str(tmp_path / name), frame.schema) as sink:
            sink.write_table(frame)
        np.testing.assert_array_equal(read_table(tmp_path / name).values, GRID)
    for name in ("w.csv.gz", "w.feather"):
        write_table(GRID, ["a", "b"], ["float64"] * 2, tmp_path / name)
        np.testing.assert_array_equal(read_table(tmp_path / name).values, GRID)
    assert (tmp_path / "w.csv.gz").read_bytes()[:2] == b"\x1f\x8b"
    for content, name in (
        ("\ufeffa,b\r\n1,2\r\n\r\n 3.5 ,4\r\n", "t.csv"),
        ("a;b\n1;2\n3.5;4", "t.CSV"),
        ('"a"\t"b"\n"1"\t2\n3.5\t4\n', "t.tsv"),
        ("\na b\n1 2\n3.5 4\n", "t.txt"),
    ):
        table = read_table(text(content, name))
        assert (table.columns, table.dtypes) == (("a", "b"), ("float64", "int64"))
        np.testing.assert_array_equal(table.values, [[1, 2], [3.5, 4]])


def test_integers_and_booleans_are_numbers_and_go_back_as_such(tmp_path):
    frame = pd.DataFrame({"i": [3, -1], "b": [True, False], "f": [0.5, 1]}, index=[7, 8])
    table = read_table(frame)
    assert table.dtypes == ("int64", "bool", "float64")
    np.testing.assert_array_equal(table.values, [[3, 1, 0.5], [-1, 0, 1]])
    noisy = table.values + np.array([[0.4, -0.3, 0], [1e30, 0.3, 0]])
    write_table(noisy, table.columns, ["int8", "bool", "float64"], tmp_path / "t.csv")
    back = read_table(tmp_path / "t.csv")
    assert back.dtypes == ("int64", "bool", "float64")
    np.testing.assert_array_equal(back.values, [[3, 1, 0.5], [127, 0, 1]])


@pytest.mark.parametrize(
    "source",
    [
        pd.DataFrame(GRID),
        pl.DataFrame(GRID),
        pl.DataFrame(GRID).lazy(),
        pa.table([GRID[:, 0], GRID[:, 1]], names=["x1", "x2"]),
        GRID.astype(">f8"),
        torch.from_numpy(GRID).requires_grad_(),
    ],
    ids=["pandas", "polars", "lazy", "arrow", "big-endian", "tensor"],
)
def test_frames_and_arrays(source):
    np.testing.assert_array_equal(read_table(source).values, GRID)


def test_half_precision_keeps_its_values():
    ones = torch.full((2, 2), 1.5, dtype=torch.bfloat16)
    np.testing.assert_array_equal(read_table(ones).values, np.full((2, 2), 1.5))
    assert read_table(ones.half()).dtypes == ("float16", "float16")


def test_max_rows_takes_the_first(tmp_path, text):
    many = np.arange(200_000.0).reshape(-1, 2)
    for name in ("t.csv", "t.parquet", "t.npy"):
        write_table(many, ["a", "b"], ["float64"] * 2, tmp_path / name)
        np.testing.assert_array_equal(read_table(tmp_path / name).values, many)
        part = read_table(tmp_path / name, max_rows=70_000).values
        np.testing.assert_array_equal(part, many[:70_000])
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        read_table(many, max_rows=0)


def test_builtin_tables():
    galaxies = read_table("galaxies")
    assert galaxies.columns == ("redshift", "u", "g", "r", "i", "z", "y")
    assert galaxies.values.shape == (100_000, 7)
    first = [0.28708659, 26.759261, 25.901778, 25.187710, 24.932318, 24.736903, 24.671623]
    np.testing.assert_allclose(galaxies.values[0], first, rtol=1e-6)
    for name in TOYS:
        table = read_table(f"{name}:50", seed=3)
        assert (table.name, table.columns) == (name, ("x1", "x2"))
        np.testing.assert_array_equal(table.values, read_table(f"{name}:50", seed=3).values)
        assert not np.array_equal(table.values, read_table(f"{name}:50", seed=4).values)
    assert read_table("moons").values.shape == (100_000, 2)
    digits = read_table("digits")
    assert digits.columns == tuple(f"p{j:02d}" for j in range(64))
    assert digits.values.shape == (1797, 64)
    assert set(digits.dtypes) == {"uint8"}
    assert (digits.values.min(), digits.values.max(), digits.values.sum()) == (0, 16, 561718)
    np.testing.assert_array_equal(digits.values[0, :8], [0, 0, 5, 13, 9, 1, 0, 0])
    assert [r.name for r in describe_columns(digits) if r.constant] == ["p00", "p32", "p39"]
    refused("galaxies:10", "only toys take a number of rows; use max_rows=")
    refused("moons:many", "'many' is not a number of rows; write moons:5000")


def test_scoring_orders_columns_by_name(text):
    path = text("c,label,a,b\n3,x,1,2\n")
    with pytest.warns(UserWarning, match=r"columns not needed are ignored: c, label") as caught:
        table = read_table(path, columns=["b", "a"])
    assert caught[0].filename == __file__
    assert table.columns == ("b", "a")
    np.testing.assert_array_equal(table.values, [[2, 1]])
    missing = r"t\.csv: columns d, e are missing; it has c, label, a, b"
    refused(path, missing, columns=["a", "d", "e"])
    unnamed = read_table(GRID, columns=["p", "q"])
    assert unnamed.columns == ("p", "q")
    refused(GRID, "2 columns without names, but 3 are needed: p, q, r", columns=["p", "q", "r"])


def test_split_is_the_documented_permutation():
    parts = split(105, seed=4)
    assert [len(part) for part in parts] == [85, 10, 10]
    np.testing.assert_array_equal(
        np.concatenate(parts), np.random.RandomState(4).permutation(105)
    )
    assert [len(part) for part in split(100_000)] == [80_000, 10_000, 10_000]
    with pytest.raises(ValueError, match="fractions must be >= 0 and add up to 1"):
        split(10, fractions=(0.8, 0.1, 0.2))


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_any_float_survives_a_csv(tmp_path_factory, numbers):
    path = tmp_path_factory.mktemp("any") / "t.csv"
    write_table(np.array(numbers)[:, None], ["x"], ["float64"], path)
    np.testing.assert_array_equal(read_table(path).values[:, 0], numbers)


# What cannot


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("", r"t\.csv: the file is empty"),
        ("\n\n", r"the file is empty"),
        ("a,b\n", r"has columns but no rows"),
        ("a,b\n1,2\n\n3,n/a\n", r"t\.csv, line 4, column b: 'n/a' is not a number"),
        ("a,b\n2020-01-31,2\n", r"line 2, column a: '2020-01-31' is not a number"),
        ("a,b\n1,2\n3,\n,nan\n", r"line 3, column b: empty or NaN \(the first of 3 "),
        ("a,b\n1,2\n3,-inf\n", r"line 3, column b: infinite \(the first of 1 "),
        ("a,b,a\n1,2,3\n", r"column names occur twice: 'a'"),
        (",b\n1,2\n", r"column 1 has no name"),
        ("1.5,2\n3,4\n", r"line 1: '1\.5' is a number; the first line must hold the column names"),
        ("a,b\n1,2\n\n3,4,5\n", r"line 4: 3 cells, but the header has 2"),
        ("a,b\n1,2\n3\n", r"line 3: 1 cells, but the header has 2"),
        (b"a,b\n1,2\n3,\xe9\n", r"line 3, byte 3: 0xe9 is not UTF-8; save .* encoding UTF-8"),
        (b"a,b\n1,2\n3,\xe9,4\n", r"line 3: 3 cells, but the header has 2"),
        (b"a,\xe9\n1,2\n", r"line 1, byte 3: 0xe9 is not UTF-8"),
        ("a\n9007199254740993\n", r"line 2, column a: 9007199254740993 is an integer beyond 2"),
        ("a\n0.5\n123456789012345678901\n", r"line 3, column a: .* is an integer beyond 2\*\*53"),
    ],
)
def test_bad_text(text, content, pattern):
    assert "t.csv" in refused(text(content), pattern)


def test_the_row_is_right_far_into_a_file(text):
    rows = ["a,b"] + [f"{k},{k}.5" for k in range(300_000)]
    rows[250_000] = "oops,1"
    refused(text("\n".join(rows)), r"line 250001, column a: 'oops' is not a number")
    rows[250_000] = "1"
    refused(text("\n".join(rows)), r"line 250001: 1 cells, but the header has 2")
    rows[250_000] = ",1"
    refused(text("\n".join(rows)), r"line 250001, column a: empty or NaN")


def test_bad_places(tmp_path, text):
    refused("none.csv", r"none\.csv: no such file, nor a built-in table \(galaxies, digits, check")
    refused(tmp_path, "is a directory, not a table")
    refused(text("a,b\n1,2\n", "t.xls"), r"unknown kind of file '\.xls'; known are \.csv \.tsv ")
    refused([[1, 2]], "cannot read a table from list; give a path, a data frame, a 2-d array")
    refused(None, "cannot read a table from NoneType")


@pytest.mark.parametrize("suffix", ["parquet", "npy", "npz", "arrow"])
def test_files_cut_short(tmp_path, suffix):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    numbers = np.random.default_rng(0).normal(size=(300_000, 2))
    if suffix == "arrow":
        frame = pa.table({"a": numbers[:, 0]})
        with pa.ipc.new_file(str(whole), frame.schema) as sink:
            sink.write_table(frame)
    else:
        write_table(numbers, ["a", "b"], ["float64"] * 2, whole)
    data = whole.read_bytes()
    for keep in (len(data) // 2, len(data) - 5, 100):
        cut.write_bytes(data[:keep])
        refused(cut, "cannot be read, damaged or cut short: ")


def test_bad_arrays(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([[{}, 1]], dtype=object), allow_pickle=True)
    refused(tmp_path / "pickled.npy", "holds pickled objects, which are never loaded")
    np.savez(tmp_path / "pickled.npz", np.array([[{}]], dtype=object))
    refused(tmp_path / "pickled.npz", "holds pickled objects, which are never loaded")
    np.savez(tmp_path / "two.npz", a=GRID, b=GRID)
    refused(tmp_path / "two.npz", r"exactly one 2-d array; it holds a \(3, 2\), b \(3, 2\)")
    refused(GRID[0], r"array: has shape \(2,\); a table has shape \(rows, columns\)")
    refused(GRID.astype(complex), "its values are complex128; only real numbers can be used")
    refused(torch.ones(2, 2, dtype=torch.complex64), "complex64")
    refused(np.array([["a"]]), "only real numbers can be used")
    refused(np.ones((3, 0)), "array: has no columns")
    refused(np.ones((0, 3)), "array: has columns but no rows")
    holes = np.array([[1, 2], [np.inf, np.nan]])
    refused(holes, r"array, row 2, column x1: infinite \(the first of 2 ")
    large = np.array([[2**53], [-(2**53) - 1]])
    refused(large, r"row 2, column x1: -9007199254740993 is an integer")


def test_bad_frames(tmp_path):
    mixed = pd.DataFrame({"a": [1, "x"]}, dtype=object)
    refused(mixed, "data frame, column a: Could not convert 'x'")
    refused(pd.DataFrame([[1, 2]], columns=["a", "a"]), "data frame: .*unique column names")
    refused(pd.DataFrame(), "data frame: has no columns")
    refused(pl.DataFrame({"a": ["u"]}), r"row 1, column a: holds .*string, not numbers: 'u'")
    refused(pl.DataFrame({"a": [1, None]}), "row 2, column a: empty or NaN")
    refused(pd.DataFrame({"t": pd.to_datetime(["2020-01-01"])}), "column t: holds timestamp")
    refused(pl.Series("a", [1]), "cannot read a table from Series")
    twice = pa.Table.from_arrays([pa.array([1.0])] * 2, names=["a", "a"])
    parquet.write_table(twice, tmp_path / "t.parquet")
    refused(tmp_path / "t.parquet", "column names occur twice: 'a'")
    parquet.write_table(pa.table({}), tmp_path / "t.parquet")
    refused(tmp_path / "t.parquet", "has no columns")


def test_too_large_for_memory_says_what_it_needs(tmp_path):
    for name in ("t.csv", "t.parquet", "t.npy"):
        write_table(np.ones((5000, 3)), list("abc"), ["float64"] * 3, tmp_path / name)
        message = refused(tmp_path / name, "read fewer rows with max_rows=", max_bytes=2**16)
        found = re.search(r"(\d+) rows x 3 columns need (\S+) GiB of memory, the limit is", message)
        assert int(found[1]) in (5000, 5002)  # lines of a text file are only counted
        assert float(found[2]) == pytest.approx(5000 * 24 / 2**30, rel=0.01)
        assert len(read_table(tmp_path / name, max_bytes=2**16, max_rows=100).values) == 100
    refused("moons:100000000000", "100000000000 rows x 2 columns need")


def test_few_rows_can_be_scored_but_not_demanded(text):
    table = read_table(text("a,b\n1,2\n"))
    require_rows(table, 1)
    with pytest.raises(DataError, match=r"t\.csv: 1 rows; at least 20 are needed"):
        require_rows(table, 20)


def test_failed_writes_leave_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    path.write_text("old")
    with pytest.raises(DataError, match=r"cannot write files of kind '\.xls'; known are \.csv"):
        write_table(GRID, ["a", "b"], ["float64"] * 2, tmp_path / "t.xls")
    with pytest.raises(DataError, match="cannot be written"):
        write_table(GRID, ["a", "b"], ["float64"] * 2, tmp_path / "absent" / "t.csv")
    with pytest.raises(DataError, match="cannot be written"):
        write_table(GRID, ["a", "b"], ["float64"] * 2, path / "t.csv")
    with pytest.raises(ValueError, match=r"values have shape \(3, 2\), but there are 1 columns"):
        write_table(GRID, ["a"], ["float64"], path)
    with pytest.raises(DataError, match="column a: NaN or infinity cannot be written as int64"):
        write_table(GRID * np.nan, ["a", "b"], ["int64"] * 2, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rootflow.data.tables._write", full)
    with pytest.raises(DataError, match=r"t\.csv: cannot be written: No space left on device"):
        write_table(GRID, ["a", "b"], ["float64"] * 2, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# Diagnosis


def describe(**columns):
    values = np.column_stack(list(columns.values())).astype(float)
    return describe_columns(Table("t", tuple(columns), values, ("float64",) * len(columns)))


def test_galaxies_are_continuous_and_quick_to_examine():
    table = read_table("galaxies")
    start = time.process_time()
    reports = describe_columns(table)
    assert time.process_time() - start < 0.5
    for report in reports:
        assert not report.constant
        assert not report.quantised
        assert (report.point_mass, report.gap, report.duplicate_of, report.warning) == (None,) * 4
        assert report.unique_share > 0.97
        assert report.smallest_gap > 0


def test_verdicts():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=4000)
    zeros = np.where(rng.random(4000) < 0.05, 0, rng.normal(size=4000))
    reports = describe(
        smooth=normal,
        always=np.full(4000, 7.0),
        grid=np.round(normal, 2),
        tenth=np.float32(np.round(rng.normal(size=4000), 1)),  # stored in single precision
        coin=rng.integers(0, 2, 4000),
        spike=zeros,
        copy=normal,
        uneven=rng.choice(rng.normal(size=1500), 4000),
    )
    smooth, always, grid, tenth, coin, spike, copy, uneven = reports
    assert smooth.warning is None
    assert smooth.n == 4000
    assert smooth.unique_share == 1
    assert (always.constant, always.smallest_gap, always.top_share) == (True, None, 1)
    assert "column always is always 7" in always.warning
    for report, gap in ((grid, 0.01), (tenth, 0.1), (coin, 1)):
        assert report.quantised
        assert report.gap == pytest.approx(gap, rel=1e-6)
        assert f"spaced by {gap:g}" in report.warning
    assert (spike.point_mass, spike.quantised) == (0, False)
    assert spike.top_share == pytest.approx(0.05, abs=0.015)
    assert "exactly 0 in" in spike.warning
    assert copy.duplicate_of == "smooth"
    assert "repeats column smooth" in copy.warning
    assert not uneven.quantised
    assert "unevenly spaced" in uneven.warning
    for report in reports[1:]:
        assert "meaninglessly high" in report.warning
        assert "\n" not in report.warning


def test_small_tables_raise_no_false_alarm():
    for rows in (1, 2, 5, 30):
        (report,) = describe(x=np.random.default_rng(rows).normal(size=rows))
        assert report.constant == (rows == 1)
        assert rows == 1 or report.warning is None
    (report,) = describe(x=np.array([0.0, -0.0, 0.0]))
    assert report.constant
