"""Tables from files of other packages: located by the installer's record, never imported."""

from importlib import metadata

import numpy as np
import pytest
from PIL import Image

from rootflow.data import packaged, read_table
from rootflow.errors import DataError


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder where packages are installed that would break if they were imported."""
    for package, module in (("scikit-image", "skimage"), ("scikit-learn", "sklearn"),
                            ("ISLP", "ISLP")):  # fmt: skip
        info = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_patches_by_hand(site, monkeypatch):
    pictures = {}
    for k, place in enumerate([*packaged.TRAINING, *packaged.TEST]):
        path = site / place.split(":")[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = np.random.default_rng(k).integers(0, 200, (8, 9 + k % 2), dtype=np.uint8) + k
        Image.fromarray(shade if k % 3 else np.dstack([shade] * 3)).save(path, quality=100)
        with Image.open(path) as picture:
            pictures[k] = np.asarray(picture.convert("L")).astype(float)
    monkeypatch.setattr(packaged, "PER_PICTURE", (30, 4, 10))
    table = read_table("patches")
    assert table.parts == (240, 32, 30)
    assert table.columns[0] + table.columns[8] + table.columns[-1] == "p00p10p76"
    rng = np.random.default_rng(0)
    row = 0
    for sources, n in ((range(8), 30), (range(8), 4), (range(8, 11), 10)):
        for k in sources:
            down, right = rng.integers(0, 1, n), rng.integers(0, pictures[k].shape[1] - 7, n)
            noise = rng.random((n, 64))
            for i in range(n):
                patch = pictures[k][down[i] : down[i] + 8, right[i] : right[i] + 8].ravel()
                wanted = (patch + noise[i]) / 256
                wanted -= wanted.sum() / 64
                np.testing.assert_allclose(table.values[row], wanted[:63], atol=1e-15)
                row += 1
    np.testing.assert_array_equal(read_table("patches", seed=5).values, table.values)
    (site / "skimage/data/camera.png").unlink()
    with pytest.raises(DataError, match=r"camera.png is missing"):
        read_table("patches")


def test_nyse_keeps_the_order_of_time(site):
    (site / "ISLP/data").mkdir()
    lines = [f'"d","mon",{k / 10},{k / 7},{-k},"{str(k < 20).upper()}"' for k in range(30)]
    head = '"date","day_of_week","DJ_return","log_volume","log_volatility","train"'
    path = site / "ISLP/data/NYSE.csv"
    path.write_text("\n".join([head, *lines]))
    table = read_table("nyse")
    assert table.parts == (18, 2, 10)
    assert table.columns == ("DJ_return", "log_volume", "log_volatility")
    np.testing.assert_array_equal(table.values[:, 2], -np.arange(30))
    np.testing.assert_array_equal(read_table("nyse:test").values, table.values[20:])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="not the table"):
        read_table("nyse")


@pytest.mark.parametrize(("name", "package"), [("patches", "scikit-learn"), ("nyse", "ISLP")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged.metadata, "distribution", missing)
    with pytest.raises(DataError, match=f"{name}: .* pip install {package}"):
        read_table(name)


def installed(package):
    try:
        return metadata.distribution(package).version
    except metadata.PackageNotFoundError:
        return ""


@pytest.mark.skipif(not installed("scikit-image"), reason="scikit-image is not installed")
def test_a_gaussian_on_the_real_patches():
    table = read_table("patches")
    train, validation, test = (table.values[rows] for rows in table.split())
    mean, root = train.mean(0), np.linalg.cholesky(np.cov(train.T))
    constant = np.log(np.diag(root)).sum() + 31.5 * np.log(2 * np.pi)
    scores = [
        -0.5 * np.square(np.linalg.solve(root, (part - mean).T)).sum(0).mean() - constant
        for part in (validation, test)
    ]
    assert scores == pytest.approx([96.4, 111.3], abs=0.5)
