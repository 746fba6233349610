"""Images from the command line: the same commands, bits per dimension, pictures."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import rootflow
from cli.helpers import fails, succeeds
from rootflow.cli import pictures, train
from rootflow.data import read_images
from rootflow.transforms import Pixels

TINY = ("--steps", "20", "--set", "blocks=1", "--set", "hidden=8", "--threads", "1", "--quiet")
SIZES = {"SHOWN": 3, "PATHS": 1, "BACK": 8}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(pictures, name, value)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Sixty grey images, brighter to the right."""
    generator = np.random.default_rng(0)
    pixels = np.arange(4) * 50 + generator.integers(0, 40, (60, 4, 4))
    path = tmp_path_factory.mktemp("images") / "drawn.npz"
    np.savez(path, pixels=pixels.astype(np.uint8))
    return path


@pytest.fixture(scope="module")
def kept(drawn, tmp_path_factory):
    """A finished run without its report, to be read only."""
    patch = pytest.MonkeyPatch()
    for name, value in SIZES.items():
        patch.setattr(pictures, name, value)
    out = tmp_path_factory.mktemp("runs") / "run"
    patch.setattr(train, "write_report", lambda *_, **__: None)
    succeeds("fit", drawn, "--flow", "glow", *TINY, "--set", "scales=1", "--out", out)
    patch.undo()
    return out


def test_a_run_speaks_of_bits_and_has_pictures(drawn, tmp_path, real_report):
    out = tmp_path / "run"
    text = succeeds("fit", drawn, "--flow", "glow", *TINY, "--set", "scales=1", "--out", out).stdout
    assert "bits per dimension" in text
    assert "48 train, 6 validation, 6 test; 1 x 4 x 4" in text
    result = json.loads((out / "result.json").read_text())
    assert (result["shape"], result["levels"], result["features"]) == ([1, 4, 4], 256, 16)
    bits = 8 - result["test_log_prob"] / (16 * math.log(2))
    assert result["test_bits_per_dim"] == pytest.approx(bits)
    assert result["test_bits_per_dim_se"] == pytest.approx(
        result["test_log_prob_se"] / (16 * math.log(2))
    )
    assert result["test_bits_per_dim_estimator_se"] == 0  # closed formulas
    assert result["inverse_error"] < 1e-3
    assert result["converged_fraction"] == 1
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert figures == {
        "learning", "samples", "training_samples", "reconstructions", "interpolations", "extremes",
        "round_trip",
    }  # fmt: skip
    page = (out / "report.html").read_text()
    assert "Held-out bits per dimension" in page
    assert "glow on drawn.npz" in page
    assert "1 x 4 x 4 · images: 48 train" in page
    (out / "report.html").unlink()
    succeeds("report", out)
    assert (out / "report.html").read_text() == page
    config = json.loads((out / "config.json").read_text())
    assert config["fit"]["batch_size"] == 64
    assert config["flow"]["shape"] == [1, 4, 4]


def test_scores_are_those_of_the_flow(kept, drawn, tmp_path):
    lines = succeeds("score", kept, drawn).stdout.splitlines()
    assert lines[0] == "log_prob,bits_per_dim"
    flow, images = rootflow.load(kept), read_images(drawn)
    k = torch.from_numpy(images.pixels)
    x = Pixels(256).dequantise(k, torch.Generator().manual_seed(0))
    expected = flow.log_prob(x).tolist()
    scores = [tuple(map(float, line.split(","))) for line in lines[1:]]
    assert [s for s, _ in scores] == pytest.approx(expected, rel=1e-5)
    for nats, bits in scores[:3]:
        assert bits == pytest.approx(8 - nats / (16 * math.log(2)))
    out = tmp_path / "scores.csv"
    printed = json.loads(succeeds("score", kept, drawn, "--out", out, "--json").stdout)
    assert printed["bits_per_dim"] == pytest.approx(np.mean([b for _, b in scores]))
    assert out.read_text().splitlines() == lines


def test_samples_become_arrays_or_a_picture(kept, tmp_path):
    for suffix in ("npz", "npy", "png"):
        succeeds("sample", kept, "-n", 5, "--out", tmp_path / f"a.{suffix}")
    k = np.load(tmp_path / "a.npy")
    assert (k.shape, k.dtype) == ((5, 1, 4, 4), np.uint8)
    assert np.array_equal(np.load(tmp_path / "a.npz")["pixels"], k)
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.size, picture.mode) == ((14 * 16, 9 * 16), "L")
        assert picture.getpixel((8, 8)) == k[0, 0, 0, 0]
    # without temperature all draws are the image of the latent origin
    succeeds("sample", kept, "-n", 3, "--temperature", 0, "--out", tmp_path / "b.npy")
    cold = np.load(tmp_path / "b.npy")
    assert np.array_equal(cold[0], cold[1])
    assert np.array_equal(read_images(tmp_path / "a.npz").pixels, k)  # samples are images again


def test_flows_of_images_are_compared_in_bits(drawn):
    words = ("compare", drawn, "--flows", "glow", *TINY, "--set", "scales=1")
    assert "bits per dimension" in succeeds(*words).stdout


def test_digits_are_a_table_and_images(tmp_path):
    out = tmp_path / "run"
    succeeds("fit", "digits-images", "--flow", "glow", *TINY, "--set", "scales=1", "--out", out)
    plan = json.loads((out / "config.json").read_text())["data"]
    assert (plan["shape"], plan["levels"]) == ([1, 8, 8], 17)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--flow", "maf"), "takes no images; choose one of .*glow"),
        (("--flow", "glow", "--columns", "a"), "--columns is for tables"),
        (("--flow", "glow", "--as-is"), "--as-is is for tables"),
        (("--flow", "glow", "--set", "bins=3"), "options of flow glow are scales"),
        (("--flow", "glow", "--set", "scales=3"), "can be halved"),
    ],
)
def test_wrong_use_is_named(drawn, tmp_path, words, says):
    fails(2, "fit", drawn, *words, "--out", tmp_path / "run", says=[says])
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_the_flow_is_named(kept, drawn, tmp_path):
    other = tmp_path / "other.npz"
    np.savez(other, pixels=np.zeros((9, 6, 4), np.uint8))
    fails(1, "score", kept, other, says=["1 x 6 x 4 with 256 levels; .* fitted to 1 x 4 x 4"])
    fails(1, "score", kept, "galaxies", says=["holds no images"])
    fails(1, "fit", other, "--flow", "glow", *TINY, says=["9 images; at least 20"])
    fails(2, "sample", kept, "-n", 3, says=["images are drawn into a .npy, .npz or .png file"])
    run = shutil.copytree(kept, tmp_path / "copy")
    (run / "result.json").unlink()
    plan = json.loads((run / "config.json").read_text())
    plan["data"]["sha256"] = "0"
    (run / "config.json").write_text(json.dumps(plan))
    fails(1, "fit", "--resume", "--out", run, says=["the data have changed"])
