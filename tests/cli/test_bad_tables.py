"""Tables that cannot be fitted: one line that says where and what, and no run left behind."""

import numpy as np
import pytest

from cli.helpers import TINY, fails, succeeds, write_csv

GOOD = np.random.default_rng(1).normal(size=(60, 2)).round(4)
LINES = "".join(f"{a},{b}\n" for a, b in GOOD.tolist())
HEAD = "mass,speed\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param("", ["empty|no columns|no header"], id="empty"),
        pytest.param(HEAD, ["no rows|0 rows"], id="header only"),
        pytest.param(HEAD + "1,2\n", ["1 row", "20"], id="one row"),
        pytest.param(HEAD + LINES + "3,fast\n", ["line 62", "speed", "fast"], id="text"),
        pytest.param(HEAD + LINES + "nan,1\n", ["line 62", "mass"], id="NaN"),
        pytest.param(HEAD + LINES + "1,inf\n", ["line 62", "speed"], id="infinity"),
        pytest.param(HEAD + LINES + "1,\n", ["line 62", "speed"], id="missing value"),
        pytest.param(HEAD + LINES + "1,2,3\n", ["line 62"], id="ragged"),
    ],
)
def test_bad_text(tmp_path, content, says):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    fails(1, "fit", path, *TINY, "--out", tmp_path / "run", says=["bad.csv", *says])
    assert not (tmp_path / "run").exists()


def test_missing_file(tmp_path):
    fails(1, "fit", tmp_path / "none.csv", *TINY, "--out", tmp_path / "run", says=["none.csv"])
    assert not (tmp_path / "run").exists()


def test_columns_that_cannot_be_chosen(tmp_path):
    path = write_csv(tmp_path / "good.csv", GOOD)
    fails(1, "fit", path, *TINY, "--columns", "a,b,a", says=["columns a are asked for"])
    fails(2, "fit", path, *TINY, "--columns", "a,,b", says=["a name is empty"])


def test_directory_and_unknown_suffix(tmp_path):
    fails(1, "fit", tmp_path, *TINY, says=["holds no pictures"])
    (tmp_path / "x.docx").write_bytes(b"PK")
    fails(1, "fit", tmp_path / "x.docx", *TINY, "--out", tmp_path / "run", says=[".csv"])


def test_text_in_another_encoding(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes(("größe,speed\n" + LINES).encode("latin-1"))
    fails(1, "fit", path, *TINY, "--out", tmp_path / "run", says=["latin.csv", "UTF-8"])


def test_truncated_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "cut.parquet"
    parquet.write_table(pa.table({"a": GOOD[:, 0], "b": GOOD[:, 1]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    fails(1, "fit", path, *TINY, "--out", tmp_path / "run", says=["cut.parquet"])


def test_constant_column(tmp_path):
    path = write_csv(tmp_path / "t.csv", np.column_stack([GOOD, np.full(60, 7.0)]))
    out = tmp_path / "run"
    says = ["column c", "always 7", "--columns"]
    fails(1, "fit", path, *TINY, "--out", out, "--as-is", says=says)
    assert not out.exists()
    succeeds("fit", path, *TINY, "--out", out, "--columns", "b,a", "--as-is")


def test_repeated_column(tmp_path):
    path = write_csv(tmp_path / "t.csv", np.column_stack([GOOD, GOOD[:, 0]]))
    says = ["column c repeats column a"]
    fails(1, "fit", path, *TINY, "--out", tmp_path / "run", "--as-is", says=says)


def test_a_column_far_from_zero_gets_a_warning(tmp_path):
    path = write_csv(tmp_path / "t.csv", GOOD + np.array([1e7, 0]))
    result = succeeds("fit", path, *TINY, "--out", tmp_path / "run", "--as-is")
    assert "warning: column a varies little" in result.stderr
    assert "column b" not in result.stderr
    path = write_csv(tmp_path / "t.csv", GOOD + np.array([1e10, 0]))  # one value in float32
    says = ["column 0 holds one value in torch.float32"]
    fails(1, "fit", path, *TINY, "--out", tmp_path / "far", "--as-is", says=says)
