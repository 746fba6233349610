"""Each kind of experiment: its numbers against what is known, its pictures, its failures."""

import math

import numpy as np
import pytest
import torch

from experiments.helpers import PLANE, zoo_recipe
from rootflow.experiments import Recipe, fits, layers, names, recipe, run
from rootflow.experiments.parts import Job
from rootflow.experiments.slopes import GRID, Slopes, ThreeParameters, lower_bound, steep
from rootflow.zoo import ZOO


def pictures(out):
    return {path.name for path in (out / "figures").iterdir()}


@pytest.mark.parametrize("name", names())
def test_every_experiment_runs_at_smoke_scale(name, tmp_path):
    found = recipe(name)
    result = run(found, "smoke", tmp_path)
    assert [row.error for row in result.rows if row.error is not None] == []
    assert len({(row.measure, row.key) for row in result.rows}) == len(result.rows) > 1


@pytest.mark.parametrize("mixture", [None, PLANE], ids=["line", "plane"])
def test_zoo(mixture, tmp_path):
    made = zoo_recipe(**({} if mixture is None else {"mixtures": {"m": mixture}}))
    result = run(made, "smoke", tmp_path)
    assert result.failed == 0
    assert pictures(tmp_path) == {"m-monotone.png", "m-residual.png", "overview-m.png"}
    for row in result.rows:
        assert row.labels["density"] == "m"
        # KL is the entropy's distance from the held-out mean, with far less noise
        gap = row.exact - row.ours
        assert row.more["KL"] == pytest.approx(gap, abs=6 * row.se)
        assert row.more["KL"] > -4 * row.more["KL se"]
        assert row.more["parameters"] > 0


def test_every_flow_of_the_registry_takes_part():
    settings = zoo_recipe(flows=[]).settings["smoke"]
    assert [part.key for part in settings.parts()] == [f"m-{name}" for name in ZOO]


def test_a_flow_that_fails_is_reported_and_the_rest_goes_on(tmp_path):
    options = {"residual": {"blocks": 0}, "monotone": {"blocks": 1, "hidden": [8]}}
    result = run(zoo_recipe(options=options), "smoke", tmp_path)
    failed, fine = result.rows
    assert "blocks" in failed.error
    assert failed.ours is None
    assert fine.error is None
    assert "overview-m.png" in pictures(tmp_path)


@pytest.mark.parametrize("name", list(ZOO))
@pytest.mark.parametrize("features", [1, 2])
def test_stages_are_the_whole_flow(name, features):
    flow = fits.build(name, features, {}, seed=3).eval()
    x = torch.randn(50, features, generator=torch.Generator().manual_seed(0))
    groups = layers.stages(flow)
    assert 1 <= len(groups) <= layers.MOST_STAGES
    z = x
    for _, parts in groups:
        for part in parts:
            z = part(z)[0]
    torch.testing.assert_close(z, flow(x)[0])
    if features == 1:
        stages = layers.curves(flow, x)
        torch.testing.assert_close(torch.from_numpy(stages[-1].points), z.detach())
        assert all(np.diff(stage.curve[:, 1]).min() > -1e-4 for stage in stages)
    else:
        stages = layers.warps(flow, x)
        assert len(stages) == len(groups) + 1
        torch.testing.assert_close(torch.from_numpy(stages[-1].points), z.detach())
        # the grid at the data, carried through the flow, is straight again
        lines = flow(torch.from_numpy(stages[0].lines))[0].detach().numpy()
        np.testing.assert_allclose(lines, stages[-1].lines, atol=2e-2)


def test_cells_run_to_the_right_first():
    nodes = fits.cells((0.0, 2.0, 10.0, 14.0), 2)
    assert nodes.tolist() == [[0.5, 11.0], [0.5, 13.0], [1.5, 11.0], [1.5, 13.0]]


@pytest.mark.parametrize("slope", [1.5, 10.0, 1000.0])
def test_the_block_by_hand_is_exact(slope):
    x = torch.linspace(-1, 1, GRID, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        image = ThreeParameters.by_hand(slope)(x)
    torch.testing.assert_close(image, steep(x, slope), rtol=1e-9, atol=1e-10)


def test_three_parameters_learn_the_function_from_a_start_of_the_right_signs(tmp_path):
    settings = Slopes(
        slope=10.0, blocks=(1,), starts=1, stairs=(), most_blocks=1, steps=300, batch=64, lr=1e-2
    )
    block = ThreeParameters(torch.tensor([-0.3, -0.3, 0.3]))
    generator = torch.Generator().manual_seed(0)
    job = Job(tmp_path, tmp_path, 0)
    settings._regress(block, block.parameters(), 10.0, 0.1, generator, job)
    first, second, third = block.raw.detach().tanh().tolist()
    assert first == pytest.approx(-0.9, abs=0.03)
    assert second * third == pytest.approx(-0.9, abs=0.01)
    assert len(job.records) == 20


def test_lower_bounds():
    assert lower_bound(10.0, 1) == (2.0, 4.0)
    assert lower_bound(10.0, 3) == (0.5, 1.0)
    assert lower_bound(10.0, 4) == (0.0, 0.0)


def test_slopes(tmp_path):
    common = {
        "slope": 10.0, "blocks": [1, 2], "starts": 1, "stairs": [2.0, 4.0], "most_blocks": 2,
        "steps": 20, "batch": 16, "options": {"hidden": [8], "activation": "cpila"},
    }  # fmt: skip
    made = Recipe(name="s", kind="slopes", summary="", source="", common=common,
                    smoke={}, small={}, paper={})  # fmt: skip
    result = run(made, "smoke", tmp_path)
    assert result.failed == 0
    assert pictures(tmp_path) == {"fits.png", "errors.png", "staircase.png"}
    rows = {row.key: row for row in result.rows}
    assert rows["slopes 0.1 and 10/3 parameters, by hand"].ours < 1e-10
    for row in rows.values():  # what the theorem forbids does not happen
        bound = row.more["bound"]
        assert bound is None or row.ours >= bound - 1e-5


def test_inference(tmp_path):
    common = {
        "targets": {"ring": 6.0, "energy2": 4.0}, "flows": {"residual": {"hidden": [8]}},
        "lengths": [1, 2], "shown": [2], "steps": 2, "seconds": 60.0, "points": 64, "cells": 20,
        "fit": {"draws": 16, "validation_draws": 50, "gaussian": False},
    }  # fmt: skip
    made = Recipe(name="i", kind="inference", summary="", source="", common=common,
                    smoke={}, small={}, paper={})  # fmt: skip
    result = run(made, "smoke", tmp_path)
    assert result.failed == 0
    assert pictures(tmp_path) == {"residual.png", "kl-by-length.png"}
    assert [row.key for row in result.rows] == [
        f"{target}/residual/{length}" for target in ("ring", "energy2") for length in (1, 2)
    ]
    for row in result.rows:
        assert math.isfinite(row.ours)
        assert row.ours > 0
