"""Classifiers: certified constants, implicit gradients, training that resumes, honest scores."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cli.helpers import call, fails, succeeds
from rootflow import classification
from rootflow.classification import BLOCKS, Classifier, calibration_error
from rootflow.classification.network import _Branch, _Implicit, _Residual
from rootflow.data import read_images
from rootflow.errors import CheckpointError, DataError
from rootflow.experiments import recipe
from rootflow.experiments.classify import Classify
from rootflow.experiments.parts import Done, Job
from rootflow.training import FitConfig, memory


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of grey images that differ in brightness."""
    draws = np.random.default_rng(0)
    labels = np.arange(240) % 3
    pixels = draws.integers(0, 120, (240, 8, 8)) + labels[:, None, None] * 60
    path = tmp_path_factory.mktemp("images") / "x.npz"
    np.savez(path, x=pixels.astype(np.uint8), labels=labels)
    return path


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def jacobian_norm(f, x):
    """The 2-norm of the Jacobian of f at one image."""
    n = x.numel()
    jacobian = torch.autograd.functional.jacobian(lambda y: f(y.view(1, *x.shape)), x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, n), 2))


def test_a_batch_beyond_the_memory_is_refused_before_training(images, monkeypatch):
    data = read_images(images)
    model = classification.make(data, "vanilla", width=0.1)
    monkeypatch.setattr(memory, "available", lambda device: 10**6)
    with pytest.raises(DataError, match=r"batch_size=64: .* 1 x 8 x 8 .* at most batch_size=\d+"):
        classification.fit(model, data, FitConfig(steps=1, batch_size=64))


@pytest.mark.parametrize("seed", range(3))
def test_the_norm_of_every_convolution_is_at_most_c(seed):
    branch = seeded(lambda: _Branch(2, 3, (4, 5), 0.7), seed).double()
    with torch.no_grad():
        branch.inner.mul_(5)
        branch.outer.mul_(0.01)  # is below c already, so it must stay as it is
    with torch.no_grad():
        inner, outer = branch.kernels()
    torch.testing.assert_close(outer, branch.outer)
    for kernel, channels in ((inner, 2), (outer, 3)):
        units = torch.eye(channels * 20, dtype=torch.float64).view(-1, channels, 4, 5)
        matrix = F.conv2d(units, kernel, padding=1).flatten(1)
        norm = float(torch.linalg.matrix_norm(matrix, 2))
        assert norm <= 0.7
        assert kernel is outer or norm > 0.6


@pytest.mark.parametrize("kind", [_Residual, _Implicit])
def test_a_block_stretches_no_distance_more_than_its_bound(kind):
    block = seeded(lambda: kind(2, 3, (4, 4), 0.9)).double()
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bound = float(block.bound().detach())
    assert bound <= (1 + 0.81) * (1 + 0.81 if kind is _Residual else 1 / (1 - 0.81)) + 1e-6
    for one in x:
        assert jacobian_norm(block, one) <= bound


def test_the_bound_of_a_vanilla_branch_holds_with_its_normalisation():
    branch = seeded(lambda: _Branch(2, 3, (4, 4), None)).double()
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        branch(torch.randn(8, 2, 4, 4, dtype=torch.float64, generator=generator))
    branch.eval()
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64, generator=generator)
    found = max(jacobian_norm(branch, one) for one in x)
    assert 0.2 * float(branch.bound().detach()) < found <= float(branch.bound().detach())


def test_implicit_blocks_solve_their_equation_and_know_its_derivative():
    block = seeded(lambda: _Implicit(2, 3, (4, 4), 0.95)).double()
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(3)  # beyond the bound, so that it acts
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator).requires_grad_()
    z = block(x)
    residual = z + block.g_z(z) - x - block.g_x(x)
    assert float(residual.detach().abs().max()) < 1e-13
    alone = torch.cat([block(x[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(z, alone, rtol=0, atol=1e-12)
    names = [name for name, _ in block.named_parameters()]

    def f(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), x)

    inputs = (x, *block.parameters())
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True, check_undefined_grad=False)


def test_the_published_network_has_the_published_number_of_parameters():
    counts = {}
    for block in BLOCKS:
        model = seeded(lambda b=block: Classifier((3, 32, 32), 10, b))
        counts[block] = sum(p.numel() for p in model.parameters())
    assert counts["implicit"] == counts["residual"] == 6_521_418
    assert 0 < counts["vanilla"] - 6_521_418 < 6000


@pytest.mark.parametrize("block", BLOCKS)
def test_probabilities_add_up_and_evaluation_is_image_by_image(block):
    model = seeded(lambda: Classifier((3, 12, 8), 4, block, width=0.05, pool=2)).double().eval()
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 12, 8), dtype=np.uint8))
    scores = model(x)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(scores[2:3], model(x[2:3]), rtol=0, atol=1e-10)
    labels = torch.tensor([0, 3, 1, 1, 2])
    torch.testing.assert_close(model.log_prob(x, labels), scores[range(5), labels])


def test_training_images_are_moved_within_their_frame():
    model = seeded(lambda: Classifier((1, 16, 16), 2, "vanilla", width=0.05))
    x = torch.zeros(200, 1, 16, 16)
    x[:, 0, 7, 5] = 1.0
    model.draws = 5
    moved = model._crop(x)
    places = (moved == 1).nonzero()[:, 2:]
    assert len(places) == 200
    assert sorted(set((places[:, 0] - 7).tolist())) == [-2, -1, 0, 1, 2]
    assert sorted(set((places[:, 1] - 5).tolist())) == [-2, -1, 0, 1, 2]
    torch.testing.assert_close(model._crop(x), moved)


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.95, 0.97, 0.51, 0.52, 1.0])
    correct = torch.tensor([True, False, True, True, True])
    # bins above 14/15: 0.95, 0.97, 1.0, two of three right; 7/15 to 8/15: both right
    wanted = (abs(2 - 2.92) + abs(2 - 1.03)) / 5
    assert calibration_error(confidence, correct) == pytest.approx(wanted, abs=1e-6)


CONFIG = {"batch_size": 32, "lr": 1e-2, "ema": 0.9, "validation_rows": 24, "flip": False}


@pytest.mark.parametrize("block", BLOCKS)
def test_three_shades_are_told_apart(block, images):
    shades = read_images(images)
    model = classification.make(shades, block, 0, c=0.9, width=0.05)
    history = classification.fit(model, shades, FitConfig(steps=24, **CONFIG))
    found = classification.measure(model, shades)
    assert found["test_error"] < 20
    assert history.best_log_prob > -0.9
    pixels, labels = (torch.from_numpy(a[shades.test]) for a in (shades.pixels, shades.labels))
    with torch.no_grad():
        wrong = (model(pixels).argmax(1) != labels).double().mean()
        nats = model.log_prob(pixels, labels).double().mean()
    assert found["test_error"] == pytest.approx(100 * float(wrong))
    table = torch.tensor(found["confusion"])
    assert 1 - table.trace() / table.sum() == pytest.approx(float(wrong))
    assert table.sum(1).tolist() == labels.bincount().tolist()
    assert sum(images for images, *_ in found["reliability"]) == len(labels)
    assert found["test_log_prob"] == pytest.approx(float(nats), abs=1e-6)
    if block != "vanilla":
        assert max(found["lipschitz"]) <= 0.81 * (1 + 1e-5)


def test_what_cannot_be_classified(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((30, 8, 8), np.uint8))
    with pytest.raises(DataError, match="without labels"):
        classification.make(read_images(tmp_path / "x.npz"), "residual")
    np.savez(tmp_path / "x.npz", x=np.zeros((30, 8, 8), np.uint8), labels=np.zeros(30, int))
    with pytest.raises(DataError, match="one class"):
        classification.make(read_images(tmp_path / "x.npz"), "residual")
    for options, word in (
        ({"block": "dense"}, "vanilla, residual, implicit"), ({"c": 1.0}, "c=1.0"),
        ({"pool": 3}, "pool=3"), ({"pool": 4}, "2 x 2 pixels are too small"),
        ({"width": 0}, "width"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            Classifier((1, 8, 8), 2, **options)


# The command

WORDS = ("--width", "0.05", "--threads", "1", "--quiet", *(
    word for key, value in CONFIG.items() for word in ("--set", f"{key}={str(value).lower()}")
))  # fmt: skip


def test_the_command_resumes_to_the_same_weights(images, tmp_path, monkeypatch):
    out, again = tmp_path / "one", tmp_path / "two"
    words = ("classify", images, "--block", "implicit", "--epochs", "2", *WORDS, "--json", "--out")
    result = json.loads(succeeds(*words, out).stdout)
    assert (result["steps"], result["epochs"], result["classes"]) == (12, 2, 3)
    assert result["n_train"] + result["n_validation"] + result["n_test"] == 240
    assert result["block_lipschitz"][0] <= 1.81 / 0.19 + 1e-3
    own = classification.fit

    def interrupted(*arguments, should_stop, **options):
        left = iter([False] * 4)
        return own(*arguments, should_stop=lambda: should_stop() or next(left, True), **options)

    monkeypatch.setattr(classification, "fit", interrupted)
    assert call(*words, again).exit_code == 128 + 15
    monkeypatch.undo()
    fails(1, "fit", "--resume", "--out", again, says=["rootflow classify"])
    resumed = json.loads(
        succeeds("classify", "--resume", "--out", again, "--quiet", "--json").stdout
    )
    assert resumed["test_log_prob"] == result["test_log_prob"]
    one, two = (classification.load(run).state_dict() for run in (out, again))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    fails(1, "score", out, images, says=["rootflow.classification.load"])
    assert "certified" in succeeds("classify", "--resume", "--out", out).stdout
    fails(2, "classify", "--resume", "--out", out, "--c", "0.5", says=["only --out"])
    (out / "report.html").unlink()
    succeeds("report", out)
    assert "Confusion" in (out / "report.html").read_text(encoding="utf-8")


def test_what_the_command_refuses(images, tmp_path):
    fails(2, "classify", says=["DATA is missing"])
    fails(2, "classify", images, "--block", "dense", says=["vanilla, residual, implicit"])
    fails(2, "classify", images, "--c", "2", says=["c=2"])
    fails(2, "classify", images, "--set", "hidden=3", says=["batch_size"])
    fails(2, "classify", images, "--resume", says=["--out"])
    fails(1, "classify", tmp_path, says=["holds no pictures"])
    with pytest.raises(CheckpointError):
        classification.load(tmp_path)


def test_the_experiment_names_what_the_paper_published(tmp_path):
    found = recipe("classification")
    paper = found.settings["paper"]
    assert isinstance(paper, Classify)
    rows = {
        f"{name}/{block}/{'none' if c is None else f'{c:g}'}"
        for name, block, c in paper._networks()
    }
    assert rows == set(found.published)
    parts = paper.model_copy(update={"images": ("cifar10",), "seeds": 2})
    numbers = dict.fromkeys(
        ("validation_error", "test_error", "test_error_se", "test_log_prob", "calibration_error",
         "lipschitz", "block_lipschitz", "parameters", "epochs", "fit_seconds"), 1.0,
    )  # fmt: skip
    done = {
        part.key: Done({**numbers, "test_error": float(part.key[-1] == "1")}, tmp_path)
        for part in parts.parts()
    }
    done["cifar10-residual-0.9-1"] = Done({"error": "it failed"}, tmp_path)
    table = {row.key: row for row in parts.summarise(done, Job(tmp_path, tmp_path, 0))}
    assert table["cifar10/residual/0.9"].error == "it failed"
    row = table["cifar10/implicit/0.6"]
    assert (row.ours, row.se) == (0.5, pytest.approx(0.5))
    assert (tmp_path / "errors.png").stat().st_size > 5000
    assert math.isclose(paper.steps * 128 / 45_000, 150, rel_tol=0.01)
