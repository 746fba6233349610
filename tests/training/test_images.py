"""Fitting images: whole numbers become reals batch by batch, validation speaks of bits."""

import math

import pytest
import torch

import rootflow
from rootflow import DataError, FitConfig
from rootflow.training import memory
from rootflow.training.rows import Rows
from rootflow.transforms import Pixels

SHAPE = (1, 4, 4)
PIXELS = Pixels(8)


def images(rows, seed=0):
    """Bright above, dark below, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([6, 5, 1, 0]).view(4, 1) + torch.randint(
        0, 2, (rows, *SHAPE), generator=generator
    )
    return levels.to(torch.uint8)


def glow(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return rootflow.flow("glow", shape=SHAPE, scales=1, blocks=1, hidden=(8,))


def config(steps, **more):
    return FitConfig(steps=steps, batch_size=32, **more)


def test_training_approaches_the_entropy_of_the_pixels():
    flow, seen = glow(), []
    history = rootflow.fit(
        flow, images(500), images(200, 1), config=config(150), pixels=PIXELS,
        on_validation=lambda f, entry: seen.append((f.training, entry["step"])),
    )  # fmt: skip
    curve = [r["bits_per_dim"] for r in history.records if r["kind"] == "validation"]
    assert curve[0] > 2
    assert 1 < curve[-1] < 1.7  # the entropy is one bit per pixel, and this flow is small
    last = history.records[-1]
    assert last["bits_per_dim"] == pytest.approx(
        3 - last["log_prob"] / (16 * math.log(2)), abs=1e-9
    )
    assert [step for _, step in seen] == [
        r["step"] for r in history.records if r["kind"] == "validation"
    ]
    assert not any(training for training, _ in seen)


def test_an_interrupted_fit_of_images_ends_with_the_same_weights(tmp_path):
    def run(flow, stop, folder):
        count = iter(range(1, 100))
        rootflow.fit(
            flow, images(100), images(40, 1), config=config(20, flip=True), pixels=PIXELS,
            checkpoint=tmp_path / folder, should_stop=lambda: next(count) == stop,
        )  # fmt: skip
        return flow

    whole = run(glow(), None, "whole")
    run(glow(), 9, "parts")
    resumed = run(glow(1), None, "parts")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("flip", [False, True])
def test_batches_hold_each_image_in_its_own_cells(flip):
    x = images(200)
    rows = Rows(x, None, None, None, PIXELS, torch.zeros(1).double(), config(1, flip=flip))
    batch = rows.batch(3).x
    assert batch.dtype == torch.float64
    k, own = PIXELS.quantise(batch), x[rows.order[3 * 32 : 4 * 32]]
    mirrored = (k == own.flip(-1)).flatten(1).all(1)
    assert bool(((k == own).flatten(1).all(1) | mirrored).all()) is True
    assert torch.equal(k, own) is not flip
    assert torch.equal(batch, rows.batch(3).x)
    assert not torch.equal(PIXELS.quantise(batch), batch)


@pytest.mark.parametrize(
    ("x", "more", "message"),
    [
        (images(9).float(), {}, "train is torch.float32 up to"),
        (images(9) + 8, {}, "up to 15; with pixels=.* it must be torch.uint8 up to 7"),
        (images(9)[..., :2], {}, r"the flow wants \(rows, 1, 4, 4\)"),
    ],
)
def test_images_that_do_not_fit_are_named(x, more, message):
    with pytest.raises(ValueError, match=message):
        rootflow.fit(glow(), x, config=config(1), pixels=PIXELS)


def test_tables_are_not_mirrored():
    with torch.random.fork_rng():
        flow = rootflow.flow("nice", 2, blocks=1, hidden=(4,))
    with pytest.raises(ValueError, match="flip mirrors images"):
        rootflow.fit(
            flow,
            torch.randn(9, 2, generator=torch.Generator().manual_seed(0)),
            config=config(1, flip=True),
        )


def test_a_batch_beyond_the_memory_is_refused_before_training(monkeypatch):
    flow = glow()
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    state = {k: v.clone() for k, v in flow.state_dict().items()}
    few, more = memory.step_memory(flow, x[:2]), memory.step_memory(flow, x)
    assert 0 < more - few < 100_000
    # a step holds at least its inputs and the hidden layers of the coupling, 8 channels of 2 x 2
    assert more - few >= 2 * 4 * (16 + 2 * 8 * 4)
    for name, value in flow.state_dict().items():
        assert torch.equal(value, state[name])
    monkeypatch.setattr(memory, "available", lambda device: 5 * more)
    with pytest.raises(DataError, match=r"batch_size=32: .* 1 x 4 x 4 .* at most batch_size=\d+"):
        rootflow.fit(flow, images(100), config=config(1), pixels=PIXELS)
    monkeypatch.setattr(memory, "available", lambda device: 10**9)
    assert rootflow.fit(flow, images(100), config=config(1), pixels=PIXELS).steps == 1
