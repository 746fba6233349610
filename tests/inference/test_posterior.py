"""Posteriors: numbers with known answers, draws, ArviZ, files that come back or are refused."""

import json
import math
import sys
import types

import pytest
import torch
from torch.distributions import constraints

import rootflow
from inference.helpers import COVARIANCE, LOG_Z, MEAN, TINY, bent, gaussian_target
from rootflow.errors import CheckpointError
from rootflow.inference import Posterior, Target, TargetError, fit, load, reference, target
from rootflow.transforms import Compose, Standardise


def exactly(mean=MEAN, covariance=COVARIANCE):
    """A flow that is a given Gaussian."""
    flow = rootflow.Flow(Compose([Standardise(2)])).double()
    flow.transform.transforms[0].place(mean, covariance)
    flow.register_parameter("anchor", torch.nn.Parameter(torch.zeros((), dtype=torch.float64)))
    return flow.eval()


@pytest.fixture(scope="module")
def fitted():
    return fit(Target(bent, names=["a", "b"], name="bent"), **TINY, steps=40, draws=64, lr=2e-2)


def test_a_perfect_q_has_exact_numbers():
    posterior = Posterior(gaussian_target(), exactly(), draws=500)
    assert posterior.elbo.value == pytest.approx(LOG_Z, abs=1e-9)
    assert posterior.elbo.se == pytest.approx(0, abs=1e-9)
    assert posterior.log_evidence.value == pytest.approx(LOG_Z, abs=1e-9)
    assert posterior.khat == 0
    assert posterior.ess == pytest.approx(500)
    assert posterior.verdict().level == "good"
    assert "not checked" in posterior.verdict().line


def test_numbers_of_a_wrong_q_have_their_closed_form():
    """KL between Gaussians, and weights whose second moment is known."""
    posterior = Posterior(gaussian_target(), exactly(covariance=2 * COVARIANCE), draws=20_000)
    kl = math.log(2) + 2 * 0.5 * 2 - 1  # log sqrt(4) + (trace 4 - 2) / 2
    assert posterior.elbo.value == pytest.approx(LOG_Z - (kl - math.log(2) * 2), abs=0.05)
    assert abs(posterior.log_evidence.value - LOG_Z) < 5 * posterior.log_evidence.se
    assert posterior.khat < 0.5
    assert posterior.ess / 20_000 == pytest.approx(0.75, abs=0.02)  # 1 / E w^2 = 3 / 4


def test_the_density_is_that_of_the_parameters_own_units():
    half = Target(lambda x: -x[:, 0].log() - x[:, 0].log().square() / 2 - x[:, 1].square() / 2, 2,
                  [constraints.positive, constraints.real])  # fmt: skip
    posterior = Posterior(half, exactly(torch.zeros(2), torch.eye(2)), draws=200)
    x = posterior.draws
    exact = torch.distributions.LogNormal(0.0, 1.0).log_prob(x[:, 0])
    exact = exact + torch.distributions.Normal(0.0, 1.0).log_prob(x[:, 1])
    torch.testing.assert_close(posterior.log_prob(x), exact)
    outside = torch.tensor([[-1.0, 0.0], [1.0, math.nan]])
    assert posterior.log_prob(outside).tolist() == [-math.inf, -math.inf]
    assert posterior.khat == 0


def test_resampling_corrects_a_wrong_q():
    posterior = Posterior(gaussian_target(), exactly(MEAN + 1, 1.5 * COVARIANCE), draws=1000)
    plain, corrected = posterior.sample(4000), posterior.sample(4000, resample=True)
    assert plain.shape == corrected.shape == (4000, 2)
    assert corrected.dtype == torch.float64
    assert float((plain.mean(0) - MEAN).abs().min()) > 0.8
    assert float((corrected.mean(0) - MEAN).abs().max()) < 0.2
    assert corrected.T.cov()[0, 0] == pytest.approx(4, rel=0.15)
    assert len(posterior.sample(3, resample=True)) == 3
    with pytest.raises(ValueError, match="n=0"):
        posterior.sample(0)


def test_inits_are_resampled_draws_by_name(fitted):
    inits = fitted.create_inits(3, seed=4)
    draws = fitted.sample(3, resample=True, seed=4)
    columns = fitted.target.columns
    assert [[float(init[name]) for name in columns] for init in inits] == draws.tolist()


def test_draws_follow_the_seed(fitted):
    assert torch.equal(fitted.sample(5, seed=1), fitted.sample(5, seed=1))
    assert not torch.equal(fitted.sample(5, seed=1), fitted.sample(5, seed=2))
    before = torch.get_rng_state()
    fitted.sample(5, resample=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missed_mode_passes_without_reference_draws_and_fails_with_them():
    """The two-sided limits of the diagnostics: k-hat sees only where q has draws."""
    both = Target(
        lambda x: torch.logaddexp(*(-(x - c).square().sum(-1) / 2 for c in (0.0, 20.0))), 2
    )
    posterior = Posterior(both, exactly(torch.zeros(2), torch.eye(2)), draws=2000)
    assert posterior.verdict().level == "good"
    rows = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[::2] += 20
    judged = posterior.verdict(rows)
    assert judged.level == "do not trust"
    assert "% of the reference lies where q has no draws" in judged.line
    assert posterior.verdict(posterior.compare(rows)) == judged
    with pytest.raises(TypeError, match="give a tensor of draws"):
        posterior.compare(reference("banana"))


def test_built_in_targets_compare_with_their_reference():
    built_in = target("banana")
    posterior = Posterior(built_in, exactly(torch.zeros(2), torch.eye(2)), draws=500)
    assert posterior.compare(reference("banana")).reference_draws == 10_000


def test_draws_without_density_are_counted_or_refused():
    holed = Target(lambda x: torch.where(x[:, 0] > 9, math.nan, -x.square().sum(-1)), 2)
    posterior = Posterior(holed, exactly(), draws=5000)
    assert 0 < posterior.undefined < 50
    assert len(posterior.draws) == 5000 - posterior.undefined
    assert posterior.summary()["undefined_draws"] == posterior.undefined
    empty = Target(lambda x: torch.where(x[:, 0] > 3, math.nan, -x.square().sum(-1)), 2)
    with pytest.raises(TargetError, match="nothing can be said"):
        Posterior(empty, exactly(), draws=100).verdict()


def test_the_summary_is_plain_json(fitted):
    summary = fitted.summary()
    json.dumps(summary, allow_nan=False)
    assert set(summary["parameters"]) == {"a", "b"}
    assert {"elbo", "elbo_se", "log_evidence", "khat", "ess", "verdict"} <= set(summary)


def test_arviz_before_its_version_one(fitted):
    arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "InferenceData"):
        pytest.skip("a newer ArviZ is installed")
    data = fitted.to_arviz()
    assert data.posterior["a"].shape == (1, 10_000)
    assert data.posterior.attrs["khat"] == fitted.khat
    assert data.posterior.attrs["inference_library"] == "rootflow"
    assert set(data.sample_stats) == {"log_q", "lp", "log_weight"}
    assert float(data.sample_stats["log_weight"][0, 0]) == float(fitted.log_weights[0])


def test_arviz_from_its_version_one(monkeypatch):
    """A stand-in: groups in one dictionary, attributes by group, no class InferenceData."""
    seen = {}

    def from_dict(data, *, attrs):
        seen.update(data=data, attrs=attrs)
        return "a tree"

    stub = types.ModuleType("arviz")
    stub.from_dict = from_dict
    monkeypatch.setitem(sys.modules, "arviz", stub)
    named = Target(lambda p: -p["m"].square().sum(-1), {"m": 2}, name="named")
    posterior = Posterior(named, exactly(torch.zeros(2), torch.eye(2)), draws=100)
    assert posterior.to_arviz() == "a tree"
    assert seen["data"]["posterior"]["m"].shape == (1, 100, 2)
    assert seen["data"]["sample_stats"]["lp"].shape == (1, 100)
    assert seen["attrs"].keys() == {"posterior", "sample_stats"}
    assert seen["attrs"]["posterior"]["target"] == "named"


def test_arviz_missing(fitted, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ModuleNotFoundError, match=r"rootflow\[arviz\]"):
        fitted.to_arviz()


def test_a_saved_posterior_comes_back(fitted, tmp_path):
    fitted.save(tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"config.json", "manifest.json", "model.safetensors"}
    again = load(tmp_path / "kept", fitted.target)
    assert again.elbo == fitted.elbo
    assert again.khat == fitted.khat
    assert again.config == fitted.config
    assert again.trace.summary() == fitted.trace.summary()
    assert torch.equal(again.sample(7, seed=3), fitted.sample(7, seed=3))
    assert rootflow.load(tmp_path / "kept").event == (2,)


def test_built_in_targets_need_not_be_given_again(tmp_path):
    posterior = fit("banana", **TINY, steps=2, draws=16)
    posterior.save(tmp_path)
    assert load(tmp_path).target.name == "banana"


def test_loading_refuses_what_is_foreign_or_damaged(fitted, tmp_path):
    fitted.save(tmp_path)
    with pytest.raises(CheckpointError, match="not built in; give target="):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="was fitted to a, b; target has x1, x2, x3"):
        load(tmp_path, Target(bent, 3))
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        load(tmp_path, fitted.target)
    with pytest.raises(CheckpointError, match="no such directory"):
        load(tmp_path / "nowhere", fitted.target)
    fitted.flow.save(tmp_path / "flow")
    with pytest.raises(CheckpointError, match="holds a flow but no variational posterior"):
        load(tmp_path / "flow", fitted.target)


def test_a_hand_made_flow_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="by hand"):
        Posterior(gaussian_target(), exactly()).save(tmp_path)
