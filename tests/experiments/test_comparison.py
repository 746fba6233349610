"""Comparisons: paired differences and standard errors by hand, toys beside their entropy."""

import math

import numpy as np
import pytest
import torch

from experiments.test_kinds import pictures
from rootflow.errors import DataError
from rootflow.experiments import Recipe, recipe, run
from rootflow.experiments.comparison import estimate, key

SMALL = {"blocks": 1, "hidden": [8]}
TOYS = {
    "toys": ["checkerboard", "moons"], "shown": ["a", "b"], "references": ["a"],
    "flows": {
        "a": {"flow": "residual", "options": SMALL},
        "b": {"flow": "monotone", "options": SMALL, "fit": {"whiten": False}},
        "c, bare": {"flow": "implicit", "options": SMALL, "only": ["moons"]},
    },
    "steps": 2, "seconds": 60.0, "train_rows": 200, "test_rows": 100, "cells": 20,
}  # fmt: skip


def made(kind="toys", published=(), **changes):
    return Recipe(name="t", kind=kind, summary="", source="", published=dict(published),
                  common={**TOYS, **changes}, smoke={}, small={}, paper={})  # fmt: skip


def test_toys(tmp_path):
    result = run(made(published={"moons/b": 3.0}, seeds=2), "smoke", tmp_path)
    assert result.failed == 0
    assert pictures(tmp_path) == {"densities.png"}
    rows = {row.key: row for row in result.rows}
    assert list(rows) == ["checkerboard/a", "checkerboard/b", "moons/a", "moons/b", "moons/c, bare"]
    assert rows["moons/b"].published == 3.0
    assert rows["checkerboard/a"].exact == pytest.approx(5.0)
    base = rows["moons/a"]
    assert base.more["minus a"] is None
    for row in (rows["moons/b"], rows["moons/c, bare"]):
        assert row.better == "lower"
        assert row.more["minus a"] == pytest.approx(row.ours - base.ours)
        gap = row.ours - row.exact  # says the same with more noise
        assert row.more["KL"] == pytest.approx(gap, abs=6 * row.more["se over rows"])
        assert row.more["KL"] > 0
    # by hand, from what the parts kept, on the same fresh points for both flows
    kept = [np.load(tmp_path / "parts" / key("moons", label, start) / "shown.npz")["log_q"]
            for label in "ab" for start in (0, 1)]  # fmt: skip
    bits = -np.array(kept).reshape(2, 2, -1).mean(2) / math.log(2)
    assert rows["moons/b"].ours == pytest.approx(bits[1].mean())
    assert rows["moons/b"].se == pytest.approx(abs(bits[1, 0] - bits[1, 1]) / 2)
    difference = bits[1] - bits[0]
    assert rows["moons/b"].more["minus a se"] == pytest.approx(abs(np.diff(difference)[0]) / 2)


def test_estimates_over_rows_of_one_seed_and_over_several_seeds():
    assert estimate(np.array([[1.0, 2.0, 3.0, 4.0]])) == pytest.approx(
        (2.5, 1.25**0.5 / 3**0.5)
    )
    assert estimate(np.array([[1.0, 3.0], [4.0, 6.0]])) == pytest.approx((3.5, 1.5))


def test_a_flow_that_fails_fails_alone_with_one_line(tmp_path):
    flows = {"a": TOYS["flows"]["a"], "b": {"flow": "maf", "options": {"nothing": 1}}}
    result = run(made(flows=flows, toys=["moons"]), "smoke", tmp_path)
    assert [row.error is None for row in result.rows] == [True, False]
    assert "maf has no option 'nothing'; its options are blocks" in result.rows[1].error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"references": ["z"]}, "'z' is unknown; choose among a, b, c, bare"),
        ({"shown": ["z"]}, "'z' is unknown"),
        ({"toys": ["moons", "z"]}, "'z' is unknown; choose among checkerboard"),
        ({"fit": {"z": 1}}, "'z' is unknown; choose among minutes"),
        ({"flows": {"a": {"flow": "z"}}}, "'z' is unknown; choose among implicit"),
        ({"flows": {"a": {"flow": "residual", "fit": {"z": 1}}}}, "'z' is unknown"),
        ({"flows": {"a": {"flow": "residual", "only": ["z"]}}}, "'z' is unknown"),
    ],
)
def test_wrong_names(change, says):
    with pytest.raises(DataError, match=says):
        made(**change).settings  # noqa: B018


def test_the_published_models_have_as_many_parameters_with_twice_the_residual_blocks():
    from rootflow.experiments.fits import build

    for scale, settings in recipe("toys").settings.items():
        count = {
            label: sum(p.numel() for p in build(v.flow, 2, v.options, 0).parameters())
            for label, v in settings.flows.items()
        }
        pairs = [("implicit", "residual"), ("implicit", "monotone")]
        pairs.append(("implicit, as published", "residual, as published"))
        for one, other in pairs:
            assert count[one] == pytest.approx(count[other], rel=5e-3), scale


def test_a_table_is_judged_in_its_own_units_whatever_the_whitening(tmp_path):
    """The density of the rows, not of the whitened ones: both variants start as one Gaussian."""
    x = TOYS["flows"]["a"]
    flows = {word: {**x, "fit": {"steps": 1, "lr": 1e-12, "whiten": word == "white"}}
             for word in ("white", "plain")}  # fmt: skip
    result = run(made(flows=flows, references=[], shown=[], toys=["rings"], test_rows=4000),
                 "smoke", tmp_path)  # fmt: skip
    # rings are round, so both are the Gaussian of their second moment
    variance = (3**2 + 2.25**2 + 1.5**2 + 0.75**2) / 8 + 0.08**2
    bits = (math.log(2 * math.pi * variance) + 1) / math.log(2)
    for row in result.rows:
        assert row.ours == pytest.approx(bits, abs=0.1)
    assert torch.get_num_threads() == 1
