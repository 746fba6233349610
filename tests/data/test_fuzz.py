"""Hostile tables in every format: each ends in a result or one clear line, nothing half-written.

Reading, telling columns apart, mapping there and back and writing run on each table. Ten made by
hand per format are explicit cases; Hypothesis draws the rest.
"""

import json
import math
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather, parquet

from rootflow.data import Mixed, Schema, detect, read_table, write_table
from rootflow.errors import DataError

NAN, INF = math.nan, math.inf
GRID = np.random.default_rng(0).normal(size=(40, 2))
MANY = 30


def outcome(source, folder):
    """Take a table from its source to samples; DataError is the only way out, and one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(ignored|dropped)", category=UserWarning)
        try:
            table = read_table(source, mixed=Mixed())
            parts = [table.values[rows] for rows in table.split()]
            schema = detect(table, parts)
        except DataError as refusal:
            line = str(refusal)
            return line if line.strip() and "\n" not in line else pytest.fail(repr(line))
        table = table.only(schema.names)
        x = torch.as_tensor(table.values)
        y, weight = schema.encode(x, torch.Generator().manual_seed(0))
        assert y.shape == (len(x), schema.features)
        assert y.isfinite().all()
        assert weight.isfinite().all()
        back = schema.decode(y)
        spread = np.nanmax(np.abs(table.values), axis=0, initial=0)
        np.testing.assert_allclose(back, x, rtol=1e-6, atol=1e-6 * spread.max())
        assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
        seeded = torch.Generator().manual_seed(0)
        z = torch.randn(50, schema.features, generator=seeded, dtype=torch.float64)
        drawn = schema.decode(20 * z)
        assert schema.encode(drawn, torch.Generator().manual_seed(1))[1].isfinite().all()
        out = folder / "drawn.parquet"
        write_table(drawn, table.columns, table.dtypes, out, levels=schema.levels)
        again = read_table(out, mixed=schema.reading())
        assert again.columns == table.columns
        assert [path.name for path in folder.glob("drawn*")] == ["drawn.parquet"]
        return schema


LINES = "".join(f"{a},{b}\n" for a, b in GRID.tolist())
CSV = {
    "nothing": b"",
    "only a header": b"a,b\n",
    "zero bytes": b"a,b\n\0\0,1\n" * 30,
    "nested quotes": b'a,b\n"1,""x""",2\n' * 3 + b'"un,closed\n',
    "a newline in a cell": b'a,b\n"one\ntwo",2\n' * 30,
    "windows ends and a mark": ("\ufeffa,b\r\n" + LINES.replace("\n", "\r\n")).encode(),
    "numbers become text": ("a,b\n" + LINES + "3,fast\n" * 5).encode(),
    "huge and tiny": ("a,b\n" + LINES + "1e308,5e-324\n-1e308,1e-320\n").encode(),
    "overflow": ("a,b\n" + LINES + "1e400,2\n").encode(),
    "names repeat": b"a,a\n1,2\n",
    "no utf-8": "größe,b\n1,2\n".encode("latin-1"),
    "mostly empty": ("a,b\n" + ",1\n" * 50 + "2,1\n").encode(),
    "formula and script": ("<b>,=1+1\n" + LINES).encode(),
    "a date among texts": b"a\n" + b"2020-02-30\n2020-01-01\n" * 20,
    "thousands of columns": (",".join(f"c{j}" for j in range(2000)) + "\n" + "1," * 1999 + "1\n"
                             ).encode(),
}  # fmt: skip


@pytest.mark.parametrize("content", CSV.values(), ids=CSV)
def test_csv_by_hand(content, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    outcome(tmp_path / "t.csv", tmp_path)


def columns_by_hand():
    """Arrow columns that have met real readers badly."""
    text = pa.array(["x", None, ""] * 20)
    yield "ints beyond 2**53", pa.array([2**53 + 1, 1] * 30)
    yield "unsigned 64", pa.array([2**64 - 1, 0] * 30, pa.uint64())
    yield "decimals", pa.array(["1.5", "2.25", "-3.125"] * 20).cast(pa.decimal128(20, 3))
    yield "half floats", pa.array(np.float16([1, 2, NAN] * 20))
    yield "infinite", pa.array([1.0, INF] * 30)
    yield "all null", pa.nulls(60)
    yield "null integers", pa.array([1, None, 3] * 20)
    yield "dictionary", text.dictionary_encode()
    yield "dictionary of numbers", pa.array([1.5, None, 2.5] * 20).dictionary_encode()
    yield "nested", pa.array([[1], [2, 3]] * 30)
    yield "structs", pa.array([{"a": 1}] * 60)
    yield "binary", pa.array([b"\xff\x00"] * 60)
    yield "nanoseconds", pa.array(range(60), pa.timestamp("ns", "Europe/Vienna"))
    yield "far dates", pa.array([-700_000, 2_000_000] * 30, pa.int32()).cast(pa.date32())
    yield "durations", pa.array(range(60), pa.duration("s"))
    yield "views", pa.array(["x", "y"] * 30).cast(pa.string_view())
    yield "large strings", pa.array(["ä\0", "\U0001f600", " "] * 20, pa.large_string())
    yield "negative zero", pa.array([0.0, -0.0] * 30)
    yield "one odd one out", pa.array([5.0] * 59 + [6.0])
    yield "subnormal", pa.array(np.linspace(1, 60, 60) * 5e-324)
    yield "far from zero", pa.array(1e15 + np.arange(60) / 8 + (np.arange(60) % 7) / 64)
    yield "wide range", pa.array(10.0 ** np.linspace(-300, 300, 60))


HAND = dict(columns_by_hand())


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow", "frame", "pandas", "polars"])
@pytest.mark.parametrize("column", HAND.values(), ids=HAND)
def test_arrow_columns_by_hand(column, kind, tmp_path):
    table = pa.table({"odd": column, "free": np.random.default_rng(0).normal(size=60)})
    path = tmp_path / f"t.{kind}"
    try:
        if kind == "parquet":
            parquet.write_table(table, path, row_group_size=7)
        elif kind == "feather":
            feather.write_feather(table, path)
        elif kind == "arrow":
            with pa.ipc.new_stream(str(path), table.schema) as sink:
                sink.write_table(table)
        else:
            to = {"frame": lambda: table, "pandas": table.to_pandas,
                  "polars": lambda: pl.from_arrow(table)}  # fmt: skip
            path = to[kind]()
    except Exception as error:  # the writer cannot hold it, so no reader meets it
        pytest.skip(f"{kind} cannot hold it: {error}")
    outcome(path, tmp_path)


ARRAYS = {
    "no dimension": np.float64(3.0),
    "one dimension": GRID[:, 0],
    "three dimensions": GRID[None],
    "no rows": GRID[:0],
    "no columns": GRID[:, :0],
    "text": np.array([["a", "b"]] * 30),
    "objects": np.array([[{}, 1]] * 30, dtype=object),
    "complex": GRID + 1j,
    "fortran order, big-endian": np.asfortranarray(GRID).astype(">f4"),
    "records": np.array([(1, 2.0)] * 30, dtype=[("a", int), ("b", float)]),
    "booleans": GRID > 0,
    "long doubles": GRID.astype(np.longdouble),
    "all NaN": GRID * NAN,
    "dates": np.array([["2020-01-01"]] * 30, dtype="datetime64[D]"),
    "constant": np.ones((30, 3)),
    "copies": GRID[:, [0, 0, 0]],
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_by_hand(array, tmp_path):
    np.save(tmp_path / "t.npy", array, allow_pickle=True)
    np.savez(tmp_path / "t.npz", array)
    np.savez(tmp_path / "two.npz", a=array, columns=np.array(["x", "y"]))
    for name in ("t.npy", "t.npz", "two.npz"):
        outcome(tmp_path / name, tmp_path)
    outcome(array, tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "npy", "npz", "arrow", "feather"])
@given(data=st.data())
def test_bytes_changed_at_random(suffix, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    path = folder / f"t.{suffix}"
    if suffix in ("arrow", "feather"):
        with pa.ipc.new_file(str(path), pa.schema({"a": pa.float64()})) as sink:
            sink.write_table(pa.table({"a": GRID[:, 0]}))
    else:
        write_table(GRID, ["a", "b"], ["float64"] * 2, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    outcome(path, folder)


CELLS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(-(2**60), 2**60), st.none(),
    st.sampled_from([0.0, 1.0, 1e-300, 360.0, -180.0, 100.0]),
)  # fmt: skip


@st.composite
def frames(draw):
    """A few columns, each of one manner: free, tied, rounded, text, with holes."""
    columns = {}
    for j in range(draw(st.integers(1, 3))):
        seed, n = draw(st.integers(0, 9)), MANY
        rng = np.random.default_rng(seed)
        scale = 10.0 ** draw(st.integers(-12, 12))
        manner = draw(st.sampled_from(["free", "round", "zeros", "few", "angle", "text", "cells"]))
        column = {
            "free": rng.normal(size=n) * scale,
            "round": np.round(rng.normal(size=n) * 5) * scale,
            "zeros": rng.gamma(1, size=n) * (rng.random(n) < 0.5) * scale,
            "few": rng.choice(rng.normal(size=3) * scale, n),
            "angle": rng.uniform(0, 360, n).round(seed % 3),
        }.get(manner)  # fmt: skip
        if column is None:
            cells = CELLS if manner == "cells" else st.text(max_size=3)
            column = draw(st.lists(cells, min_size=n, max_size=n))
        holes = draw(st.sampled_from([0.0, 0.0, 0.3]))
        values = [None if hole else value for value, hole in
                  zip(list(column), rng.random(n) < holes, strict=True)]  # fmt: skip
        columns[draw(st.sampled_from(["a", "b", "größe", "<c>"])) + str(j)] = values
    return columns


@given(columns=frames(), kind=st.sampled_from(["csv", "parquet", "arrow", "pandas", "polars"]))
def test_frames_at_random(columns, kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    frame = pd.DataFrame(columns)
    source = folder / f"t.{kind}"
    try:
        if kind == "csv":
            frame.to_csv(source, index=False)
        elif kind == "pandas":
            source = frame
        else:
            table = pa.Table.from_pandas(frame, preserve_index=False)
            if kind == "polars":
                source = pl.from_arrow(table)
            elif kind == "parquet":
                parquet.write_table(table, source)
            else:
                feather.write_feather(table, source)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, ValueError):
        return  # no writer can hold it
    outcome(source, folder)


@given(content=st.binary(max_size=200), suffix=st.sampled_from(["csv", "tsv", "txt"]))
def test_any_bytes_as_text(content, suffix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / f"t.{suffix}").write_bytes(content)
    outcome(folder / f"t.{suffix}", folder)


def test_the_command_line_leaves_nothing_of_a_table_it_refuses(tmp_path, monkeypatch):
    from cli.helpers import TINY, call

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rootflow.cli.train.write_report", lambda *_, **__: None)
    monkeypatch.setattr("rootflow.cli.measure.ROWS", 20)
    for k, content in enumerate(list(CSV.values())[:-1]):
        (tmp_path / "t.csv").write_bytes(content)
        result = call("fit", tmp_path / "t.csv", *TINY, "--steps", "2", "--flow", "nice",
                      "--set", "blocks=2", "--out", tmp_path / f"run{k}")  # fmt: skip
        assert result.exit_code in (0, 1, 2), result.output
        assert "Traceback" not in result.output
        if result.exit_code:
            assert "unexpected" not in result.stderr
            assert not (tmp_path / f"run{k}").exists()
    assert not list(tmp_path.glob("*.part"))
