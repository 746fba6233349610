"""Tables: rows, budgets and options of a fit, anchors known in closed form, missing data."""

import numpy as np
import pytest
import torch

from rootflow.errors import DataError
from rootflow.experiments import Recipe, recipe, run
from rootflow.experiments.fits import build

GAUSSIAN = {
    "flow": "residual", "fit": {"steps": 1, "lr": 1e-12},
    "options": {"blocks": 1, "hidden": [1], "actnorm": False, "linear": "none"},
}  # fmt: skip


def made(**changes):
    common = {"flows": {"Gaussian": GAUSSIAN}, "tables": {"galaxies": {}}, "steps": 3,
              "seconds": 60.0, **changes}  # fmt: skip
    return Recipe(name="t", kind="tables", summary="", source="", common=common,
                  smoke={}, small={}, paper={})  # fmt: skip


def test_the_gaussian_row_is_the_gaussian_of_the_training_rows(tmp_path):
    result = run(made(tables={"breast_cancer": {}}, seeds=2), "smoke", tmp_path)
    assert result.failed == 0
    settings, means = made(tables={"breast_cancer": {}}).settings["smoke"], []
    for seed in (0, 1):
        train, _, test = (part.double() for part in settings.rows("breast_cancer", seed))
        covariance = train.T.cov(correction=0)
        gaussian = torch.distributions.MultivariateNormal(train.mean(0), covariance)
        means.append(float(gaussian.log_prob(test).mean()))
    assert result.rows[0].ours == pytest.approx(np.mean(means), rel=0.02)
    assert result.rows[0].se == pytest.approx(abs(means[0] - means[1]) / 2, rel=0.1)


def test_rows_are_those_of_the_table_in_three_parts():
    settings = made(test_rows=50).settings["smoke"]
    one, other = settings.rows("galaxies", 0), settings.rows("galaxies", 1)
    assert [len(part) for part in one] == [80_000, 10_000, 50]
    assert not torch.equal(one.train, other.train)
    assert torch.equal(one.test, settings.rows("galaxies", 0).test)
    whole = {tuple(row) for row in one.train[:1000].tolist()}
    assert not whole & {tuple(row) for row in one.test.tolist()}


def test_a_table_may_have_its_own_seconds_settings_and_options(tmp_path):
    special = {"seconds": 7.0, "fit": {"batch_size": 32}, "options": {"Gaussian": {"hidden": [2]}}}
    settings = made(fit={"batch_size": 64}, tables={"galaxies": {}, "digits": special})
    settings = settings.settings["smoke"]
    budgets = [settings.budget(name) for name in ("galaxies", "digits")]
    assert [budget["seconds"] for budget in budgets] == [60.0, 7.0]
    assert [budget["batch_size"] for budget in budgets] == [64, 32]
    assert settings.variant("galaxies", "Gaussian").options["hidden"] == [1]
    assert settings.variant("digits", "Gaussian").options["hidden"] == [2]
    with pytest.raises(DataError, match="'z' is unknown; choose among Gaussian"):
        made(tables={"galaxies": {"options": {"z": {}}}}).settings  # noqa: B018


def test_a_table_that_is_not_here_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run(made(tables={"power": {}}), "smoke", tmp_path / "run")
    assert result.rows[0].error == (
        "power: is not prepared yet; run: rootflow data prepare power"
    )


def test_every_row_of_table_2_has_a_recipe():
    found = recipe("tables")
    settings = found.settings["paper"]
    assert set(settings.names()) == {"power", "gas", "hepmass", "miniboone", "bsds300"}
    keys = {f"{name}/{label}" for name in settings.names() for label in settings.rivals(name)}
    assert set(found.published) <= keys
    assert len(found.published) == 35
    for variant in settings.flows.values():  # names and options exist
        assert build(variant.flow, 6, variant.options, 0).event == (6,)


@pytest.mark.parametrize(("name", "d"), [("galaxies", 7), ("patches", 63)])
def test_flows_of_roots_have_equally_many_networks(name, d):
    settings = recipe("tables").settings["small"]
    variants = [settings.variant(name, label) for label in ("residual", "implicit", "monotone")]
    count = [
        sum(p.numel() for key, p in build(v.flow, d, v.options, 0).named_parameters()
            if ".nets." in key)
        for v in variants
    ]  # fmt: skip
    assert count[0] == count[1] == count[2] > 0
