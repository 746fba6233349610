"""Autoencoders: bounds against brute force, equal starts, gradients, a run through the runner."""

import math

import pytest
import torch

from rootflow.errors import DataError
from rootflow.experiments import Recipe, Stopped, recipe, run, vae
from rootflow.experiments.autoencoder import autoencoder

FLOWS = {
    "planar": {"blocks": 3, "hidden": (8,), "actnorm": False, "linear": None},
    "iaf": {"blocks": 1, "hidden": (8,), "actnorm": False, "linear": "reverse"},
    "implicit": {"blocks": 1, "hidden": (8,), "actnorm": False, "linear": None},
}


def tiny(flow=None, activation="elu", seed=0):
    """Three pixels, two latents, float64, weights off their start."""
    model = autoencoder(3, 2, (8,), activation, seed, flow, 2, FLOWS.get(flow)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
        model.posterior.encoder.gaussian.bias[2:] += 0.5  # wide, so that weights have a variance
    return model


@pytest.mark.parametrize("flow", [None, *FLOWS])
def test_bounds_are_those_of_brute_force(flow):
    model = tiny(flow)
    x = torch.tensor([[0.0, 0, 0], [1, 0, 1], [1, 1, 1]], dtype=torch.float64)
    axis = torch.linspace(-12, 12, 193, dtype=torch.float64)
    grid, cell = torch.cartesian_prod(axis, axis)[:, None], float(axis[1] - axis[0]) ** 2
    with torch.no_grad():
        log_joint, log_q = model.log_joint(x, grid), model.posterior.log_prob(grid, x)
    evidence = log_joint.logsumexp(0) + math.log(cell)
    exact = (log_q.exp() * (log_joint - log_q)).sum(0) * cell
    torch.testing.assert_close(log_q.exp().sum(0) * cell, torch.ones(3).double(), atol=1e-3, rtol=0)
    assert bool((exact < evidence).all())
    draws = 20_000
    elbo, bound = vae.evaluate(model, x, draws, torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_joint, log_q = model(x, 2000, torch.Generator().manual_seed(2))
    error = 5 * (log_joint - log_q).std(0) / draws**0.5
    assert bool(((elbo - exact).abs() < error).all())
    torch.testing.assert_close(bound, evidence, atol=0.05, rtol=0)
    assert bool((bound > elbo).all())


def test_all_patterns_have_probability_one_in_all():
    model, z = tiny(), torch.zeros(1, 2, dtype=torch.float64)
    patterns = torch.tensor([[i >> k & 1 for k in range(3)] for i in range(8)]).double()
    likelihood = model.log_joint(patterns, z.expand(8, 2)) - model.prior.log_prob(z)
    assert likelihood.logsumexp(0).item() == pytest.approx(0, abs=1e-12)
    dark = (likelihood.exp()[:, None] * patterns).sum(0)
    torch.testing.assert_close(model.means(z)[0], dark)


@pytest.mark.parametrize("flow", [None, *FLOWS])
@pytest.mark.parametrize("activation", ["relu", "elu", "maxout"])
def test_gradients_reach_encoder_flow_and_decoder(flow, activation):
    model = tiny(flow, activation)
    x = torch.bernoulli(torch.full((16, 3), 0.5), generator=torch.Generator().manual_seed(0))
    log_joint, log_q = model(x.double(), 2, torch.Generator().manual_seed(0))
    (log_q - log_joint).mean().backward()
    moved = {"posterior.encoder": 0, "posterior.flow": 0, "decoder": 0}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        for part in moved:
            moved[part] += name.startswith(part) and bool(p.grad.abs().sum() > 0)
    assert moved.pop("posterior.encoder") > 0
    assert moved.pop("decoder") > 0
    assert (moved.pop("posterior.flow") > 0) == (flow is not None)


def test_starts_are_equal_whatever_the_flow():
    plain, planar = (autoencoder(3, 2, (8,), "relu", 5, flow, 2) for flow in (None, "planar"))
    other = autoencoder(3, 2, (8,), "relu", 6)
    shared, state = plain.state_dict(), planar.state_dict()
    for name, value in shared.items():
        assert torch.equal(value, state[name]), name
    assert not torch.equal(shared["decoder.0.weight"], other.state_dict()["decoder.0.weight"])
    # a fresh flow is the identity, but for the biases with which a context starts nothing
    x = torch.ones(4, 3)
    first, second = (m(x, 3, torch.Generator().manual_seed(0)) for m in (plain, planar))
    torch.testing.assert_close(first, second)


def tiny_recipe(**changes):
    common = {
        "flows": {
            "planar": {"lengths": [1, 2], "options": {"hidden": [4]}, "milliseconds": 1.0},
            "iaf": {"lengths": [1], "options": {"hidden": [4]}, "milliseconds": 1.0},
        },
        "features": 2, "context": 2, "hidden": [8], "steps": 3, "seeds": 2, "batch": 16,
        "lr": 1e-3, "draws": 4, "held_out": 0.05, **changes,
    }  # fmt: skip
    return Recipe(name="v", kind="vae", summary="", source="", common=common,
                  smoke={}, small={}, paper={})  # fmt: skip


def test_a_run(tmp_path):
    result = run(tiny_recipe(), "smoke", tmp_path)
    assert result.failed == 0
    assert [row.key for row in result.rows] == [
        "gaussian/0", "planar/1", "planar/2", "iaf/1"
    ]  # fmt: skip
    base = result.rows[0]
    assert base.more["gain"] is None
    for row in result.rows:
        assert -64 < row.ours < 0
        assert 0 < row.se < 2
        assert row.more["weighted bound"] > row.ours
        if row is not base:
            assert row.more["gain"] == pytest.approx(row.ours - base.ours, abs=1e-9)
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "bound-by-length.png", "images.png"
    }  # fmt: skip


def test_a_flow_that_fails_is_reported_and_the_rest_goes_on(tmp_path):
    flows = {
        "planar": {"lengths": [1], "options": {"hidden": []}, "milliseconds": 1.0},
        "radial": {"lengths": [1], "milliseconds": 1.0},
    }
    result = run(tiny_recipe(flows=flows), "smoke", tmp_path)
    assert [row.error is None for row in result.rows] == [True, False, True]
    assert "hidden" in result.rows[1].error
    assert (tmp_path / "figures" / "images.png").exists()


def test_training_raises_the_bound_and_can_be_stopped(tmp_path):
    recipe = tiny_recipe(steps=60, lr=1e-2, anneal=0.0, seeds=1)
    result = run(recipe, "smoke", tmp_path / "whole")
    assert result.rows[0].ours > -38  # at the start each pixel costs log 2: 44.4
    assert result.rows[0].more["over seeds"] is None
    steps = iter(range(100))
    with pytest.raises(Stopped):
        run(recipe, "smoke", tmp_path / "cut", should_stop=lambda: next(steps) == 30)


def test_wrong_settings():
    with pytest.raises(DataError, match=r"'nothing' is unknown; choose among .*planar"):
        tiny_recipe(flows={"nothing": {"lengths": [1], "milliseconds": 1.0}}).settings  # noqa: B018
    with pytest.raises(DataError, match="flows"):
        tiny_recipe(flows={}).settings  # noqa: B018
    with pytest.raises(DataError, match="held_out"):
        tiny_recipe(held_out=1.0).settings  # noqa: B018


def test_the_images_are_shares():
    shares = vae.images()
    assert shares.shape == (1797, 64)
    assert (shares.min(), shares.max()) == (0, 1)


def test_the_file_that_ships_has_equal_steps_and_all_lengths():
    settings = recipe("vae-digits").settings["small"]
    assert settings.flows["planar"].lengths == (1, 2, 4, 8, 16, 32)
    assert {"iaf", "implicit"} <= set(settings.flows)
    assert settings.seeds >= 3
