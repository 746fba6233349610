"""Fits: exact answers, objectives, budgets, skipped draws, failures that keep the best state."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from torch.distributions import constraints

import rootflow
from inference.helpers import COVARIANCE, LOG_Z, MEAN, TINY, bent, gaussian, gaussian_target
from rootflow.inference import Target, TargetError, Trace, VIConfig, fit, reference
from rootflow.inference import target as builtin
from rootflow.inference.amortised import importance_bound
from rootflow.inference.examine import examine
from rootflow.inference.fit import _Fitter, _place, _prepare
from rootflow.inference.gaussian import Gaussian, cover, fit_gaussian
from rootflow.inference.objectives import loss
from rootflow.transforms import ActNorm, Compose, Standardise

QUICK = {**TINY, "draws": 64, "lr": 2e-2, "patience": 100, "validation_draws": 500}
CPU = torch.device("cpu")


def gaussian_of(target, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return fit_gaussian(target, examine(target, generator, CPU), generator)


def test_the_gaussian_stage_is_exact_for_a_gaussian():
    found = gaussian_of(gaussian_target())
    torch.testing.assert_close(found.mean, MEAN, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.covariance, COVARIANCE, atol=1e-2, rtol=0)
    assert found.elbo == pytest.approx(LOG_Z, abs=1e-3)


@pytest.mark.parametrize(
    ("centre", "scale"), [(1e3, 1e-3), (1e9, 1e8), (-1e6, 1e-2), (0.0, 1e-6)]
)
def test_the_gaussian_stage_finds_far_and_narrow_densities(centre, scale):
    target = Target(lambda x: -((x - centre) / scale).square().sum(-1) / 2, 3)
    found = gaussian_of(target)
    assert bool(((found.mean - centre).abs() < 0.1 * scale).all())
    sds = found.covariance.diagonal().sqrt()
    torch.testing.assert_close(sds / scale, torch.ones_like(sds), atol=0.05, rtol=0)


def test_the_gaussian_stage_is_not_trapped_by_an_infinite_mode():
    """A funnel's mode lies where its neck has no width; the mass is elsewhere."""
    target = Target(
        lambda x: -x[:, 0].square() / 18
        - (x[:, 1:].square() * (-x[:, :1]).exp() + x[:, :1]).sum(1) / 2, 10,
    )  # fmt: skip
    found = gaussian_of(target)
    assert abs(float(found.mean[0])) < 6
    assert found.elbo > -4 + 4.5 * math.log(2 * math.pi)


def test_the_gaussian_stage_spans_the_modes_it_finds():
    found = gaussian_of(Target(two_modes, 2))
    assert float(found.covariance.diagonal().max().sqrt()) > 4


def two_modes(x):
    return torch.logaddexp(*(-(x - c).square().sum(-1) / 2 for c in (-6.0, 6.0)))


@pytest.mark.parametrize(
    ("density", "features", "settings", "share"),
    [
        (two_modes, 5, {}, 0.25),
        (two_modes, 2, {}, 0.0),
        (two_modes, 2, {"anneal": 0.1}, 0.1),
        (two_modes, 5, {"objective": "iw"}, 0.0),
        (gaussian, 2, {}, 0.0),
    ],
)
def test_annealing_is_for_targets_that_are_far_from_a_gaussian(density, features, settings, share):
    trace = fit(Target(density, features), **TINY, steps=2, **settings).trace
    assert trace.anneal == share
    assert trace.gaussian_modes == (2 if density is two_modes else 1)
    assert trace.records[0]["beta"] == (0.01 if share else 1)
    few = density is two_modes and features == 2
    assert trace.gradient == ("log-variance" if few else "path")


def test_the_log_variance_follows_a_quarter_of_path_gradients(monkeypatch):
    seen, module = [], sys.modules["rootflow.inference.fit"]

    def noted(flow, target, config, *rest):
        seen.append(config.gradient)
        return loss(flow, target, config, *rest)

    monkeypatch.setattr(module, "loss", noted)
    fit(Target(two_modes, 2), **TINY, steps=8)
    assert seen == ["path"] * 2 + ["log-variance"] * 6
    seen.clear()
    fit(Target(two_modes, 2), **TINY, steps=2, gradient="log-variance")
    assert seen == ["log-variance"] * 2


def test_both_of_two_far_modes_are_found():
    """Of unequal mass; reverse KL from a Gaussian around one of them would never see the other."""
    posterior = fit("two-modes", "nsf-coupling", options={"blocks": 2, "hidden": (32,)}, steps=200)
    right = float((reference("two-modes").draws[:, 0] > 0).double().mean())
    weights = posterior.log_weights.exp()
    assert float(weights[posterior.draws[:, 0] > 0].sum()) == pytest.approx(right, abs=0.05)
    assert posterior.log_evidence.value == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("gradient", ["path", "log-variance", "plain"])
def test_at_the_optimum_only_the_plain_gradient_has_noise(gradient):
    target = gaussian_target()
    flow = _prepare("realnvp", TINY["options"], target, 0)
    next(m for m in flow.modules() if isinstance(m, Standardise)).place(MEAN, COVARIANCE)
    config = VIConfig(steps=1, gradient=gradient, draws=64)
    found = loss(flow, target, config, 1.0, torch.Generator().manual_seed(0))
    found.value.backward()
    size = max(float(p.grad.abs().max()) for p in flow.parameters() if p.grad is not None)
    assert size > 1e-3 if gradient == "plain" else size < 1e-4
    assert found.bound == pytest.approx(LOG_Z, abs=1e-4)


@pytest.mark.parametrize(
    ("objective", "pair"),
    [("elbo", ("path", "plain")), ("elbo", ("path", "log-variance")), ("iw", ("path", "plain"))],
)
def test_gradients_have_the_same_mean(objective, pair):
    """One against another over many draws: within five standard errors, off the optimum."""
    target = Target(bent, 2)
    flow = _prepare("realnvp", {"blocks": 1, "hidden": (4,)}, target, 0).double()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in flow.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    means, errors = [], []
    for gradient in pair:
        config = VIConfig(steps=1, gradient=gradient, draws=256, objective=objective, particles=4,
                          stretch=1.0)  # fmt: skip
        generator = torch.Generator().manual_seed(2)
        rows = []
        for _ in range(150):
            flow.zero_grad()
            # outliers are shortened in a fit, which biases both; here all of them count
            loss(flow, target, config, 1.0, generator, shorten=False).value.backward()
            rows.append(torch.cat([p.grad.flatten() for p in flow.parameters()]))
        rows = torch.stack(rows)
        means.append(rows.mean(0))
        errors.append(rows.std(0) / len(rows) ** 0.5)
    gap = (means[0] - means[1]).abs() / torch.hypot(*errors).clamp_min(1e-12)
    assert float(gap.max()) < 5


@pytest.mark.parametrize("seed", range(3))
def test_a_poor_gaussian_is_replaced_by_one_that_covers_the_target(seed):
    """energy2: a window of length 8 mapped to a logistic variable, and a sine with noise 0.4."""
    target = builtin("energy2")
    eye = torch.eye(2, dtype=torch.float64)
    narrow = Gaussian(0 * eye[0], eye / 4, -1.0)
    found = cover(target, narrow, torch.Generator().manual_seed(seed))
    exact = torch.tensor([math.pi**2 / 3, 0.5 + 0.4**2], dtype=torch.float64)
    torch.testing.assert_close(found.covariance.diag(), exact, rtol=0.2, atol=0)
    assert bool((found.mean.abs() < 0.2 * exact.sqrt()).all())
    trace = Trace()
    flow = _prepare("nsf-coupling", {"blocks": 1}, target, seed)
    config = VIConfig(steps=1)
    assert _place(flow, target, eye, None, config, torch.Generator(), trace, None)
    placed = next(m for m in flow.modules() if isinstance(m, Standardise))
    spread = placed.to_data(torch.eye(2) - torch.eye(2).flip(0), None)[0].diff(dim=0)
    assert float(spread.abs().max()) > 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient": "plain"},
        {"gradient": "log-variance"},
        {"objective": "iw", "lr": 5e-3},
        {"objective": "iw", "lr": 5e-3, "gradient": "plain"},
        {"objective": "forward-kl"},
        {"anneal": 0.5},
        {"gaussian": False},
    ],
    ids=str,
)
def test_every_objective_improves_on_the_gaussian(settings):
    posterior = fit(Target(bent, 2), **{**QUICK, **settings}, steps=160)
    objective = posterior.config.objective
    size = posterior.config.particles if objective == "iw" else 1
    bound = float(importance_bound(posterior.log_ratios.view(size, -1)).mean())
    # the exact answer is 0; the best Gaussian reaches -0.6, by the bound of eight draws -0.4
    assert bound > {"elbo": -0.3, "iw": -0.15, "forward-kl": -0.6}[objective]
    assert posterior.log_evidence.value == pytest.approx(0, abs=0.2)


def test_reference_draws_serve_the_forward_kl():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    rows = torch.stack([z[:, 0], z[:, 0].square() + z[:, 1] / 2], 1)
    posterior = fit(Target(bent, 2), **QUICK, steps=150, objective="forward-kl", reference=rows)
    assert posterior.log_prob(rows).mean() == pytest.approx(-2.14, abs=0.15)  # minus its entropy


@pytest.mark.parametrize("name", ["implicit", "residual", "monotone"])
def test_flows_that_solve_equations_can_be_fitted(name):
    posterior = fit(
        Target(bent, 2), name, options={"blocks": 1, "hidden": (8,)}, steps=5, draws=16,
        validation_draws=50,
    )  # fmt: skip
    assert posterior.elbo.value > posterior.trace.records[0]["elbo"]


def test_an_exact_fit_ends_at_once_and_says_so():
    posterior = fit(gaussian_target(), **TINY, steps=1000)
    assert posterior.trace.stopped == "exact"
    assert posterior.trace.steps < 100
    assert posterior.elbo.value == pytest.approx(LOG_Z, abs=1e-3)
    assert posterior.verdict().level == "good"


def test_a_plateau_shortens_the_schedule():
    posterior = fit(
        Target(bent, 2), **TINY, steps=400, patience=1, draws=8, validation_draws=20
    )
    trace = posterior.trace
    assert trace.stopped == "no improvement"
    assert trace.steps < 400
    assert trace.records[-1]["lr"] < trace.records[1]["lr"] / 5


def test_the_budget_in_minutes_is_kept():
    posterior = fit(Target(bent, 2), **TINY, minutes=0.02)
    assert posterior.trace.stopped == "budget"
    assert posterior.trace.seconds > 0.02 * 60


def test_the_same_seed_gives_the_same_fit():
    first, second, third = (
        fit(Target(bent, 2), **TINY, steps=12, seed=seed).elbo.value for seed in (1, 1, 2)
    )
    assert first == second != third


def test_records_hold_what_happened():
    seen = []
    posterior = fit(Target(bent, 2), **TINY, steps=40, anneal=0.5, on_record=seen.append)
    assert seen == posterior.trace.records
    assert seen[0]["step"] == 0
    assert seen[0]["beta"] == pytest.approx(0.01)
    assert seen[-1]["beta"] == 1
    assert all(a["step"] <= b["step"] for a, b in pairwise(seen))
    assert {"elbo", "elbo_se", "objective", "lr", "skipped", "bad_draws"} <= set(seen[0])


def test_the_flow_given_is_copied_and_its_place_kept():
    flow = _prepare("realnvp", TINY["options"], Target(bent, 2), 0)
    first = next(m for m in flow.modules() if isinstance(m, Standardise))
    first.place(torch.zeros(2), torch.eye(2))
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    posterior = fit(Target(bent, 2), flow, steps=5)
    assert posterior.flow is not flow
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    assert torch.equal(posterior.flow.state_dict()["transform.transforms.0.mean"], torch.zeros(2))
    with pytest.raises(ValueError, match=r"flow is over \(2,\).*3 unconstrained"):
        fit(Target(lambda x: -x.square().sum(-1), 3), flow, steps=5)
    with pytest.raises(ValueError, match="options"):
        fit(Target(bent, 2), flow, options={"blocks": 2}, steps=5)


def test_wrong_settings_are_refused():
    target = Target(bent, 2)
    with pytest.raises(ValueError, match="reference draws are for"):
        fit(target, **TINY, steps=5, reference=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="give steps in config"):
        fit(target, **TINY, steps=5, config=VIConfig(steps=5))
    with pytest.raises(ValueError, match="mixture"):
        fit(target, "realnvp", options={"base": "mixture"}, steps=5)
    with pytest.raises(ValueError, match="nsf-coupl"):
        fit(target, "nsf-coupl", steps=5)
    with pytest.raises(ValueError, match="objective"):
        fit(target, **TINY, steps=5, objective="alpha")
    with pytest.raises(TypeError, match="target is int"):
        fit(3, steps=5)


class Failing:
    """The banana, until its calls number ``good``; then what ``fate`` says."""

    def __init__(self, good, fate):
        self.good, self.fate, self.calls = good, fate, 0

    def __call__(self, x):
        self.calls += 1
        return bent(x) if self.calls < self.good else self.fate(x)


def broken(x):
    raise ConnectionError("the server went away")


@pytest.mark.parametrize(
    ("fate", "words"),
    [
        (broken, "raised ConnectionError: the server went away"),
        (lambda x: bent(x) * math.nan, "50 steps in a row failed; of all draws so far"),
        (lambda x: bent(x)[:, None], "squeeze"),
    ],
    ids=["raises", "nan", "shape"],
)
def test_a_failure_on_the_way_keeps_the_best_state(fate, words):
    density = Failing(10**9, fate)
    fit(Target(density, 2), **TINY, steps=40, draws=16, seed=3, gradient="path")
    density.good = density.calls - 30  # the same fit again, failing thirty calls before its end
    density.calls = 0
    with pytest.raises(TargetError, match=words) as caught:
        fit(Target(density, 2), **TINY, steps=4000, draws=16, seed=3, gradient="path")
    posterior = caught.value.posterior
    assert posterior.trace.steps > 0
    assert not posterior.flow.training
    density.good = 10**9
    assert posterior.elbo.value > posterior.trace.records[0]["elbo"] - 0.1


def test_bad_draws_are_left_out_and_counted():
    def holed(x):
        return torch.where(x[:, 0] > 1.5, math.nan, bent(x))

    posterior = fit(Target(holed, 2), **TINY, steps=20, patience=100)
    assert posterior.trace.bad_draws > 0
    assert posterior.trace.skipped == 0
    assert posterior.trace.draws == 20 * 512
    assert posterior.undefined > 10
    assert posterior.verdict().level == "do not trust"
    assert "had no log-density" in posterior.verdict().line


def test_an_improper_density_is_named_with_its_direction():
    with pytest.raises(TargetError, match="does not fall off as x2"):
        fit(Target(lambda x: -x[:, 0].square(), 2), **TINY, steps=5)
    with pytest.raises(TargetError, match=r"still rises|does not fall off"):
        fit(Target(lambda x: x.square().sum(-1), 2), **TINY, steps=5)


def test_a_density_that_escapes_the_first_check_is_caught_when_it_runs_away():
    target = Target(lambda x: -x[:, 0].square() + 0 * x[:, 1], 2)
    flow = rootflow.Flow(Compose([Standardise(2), ActNorm(2)]))
    with pytest.raises(TargetError, match="runs away") as caught:
        fit(target, flow, steps=400, gaussian=False, lr=0.5, patience=10**6, draws=16)
    assert caught.value.posterior is not None


def test_an_interrupted_fit_returns_its_best_state():
    calls = iter(range(100))
    posterior = fit(Target(bent, 2), **TINY, steps=400, should_stop=lambda: next(calls) > 60)
    assert posterior.trace.stopped == "interrupted"
    assert posterior.trace.steps < 100
    assert math.isfinite(posterior.elbo.value)


def test_constrained_parameters_get_their_exact_moments():
    """Exponential and beta: means and evidence in the parameters' own units."""
    target = Target(
        lambda p: -2 * p["rate"] + 2 * p["share"].log() + (1 - p["share"]).log(),
        {"rate": (), "share": ()},
        {"rate": constraints.positive, "share": constraints.unit_interval},
    )
    posterior = fit(target, "nsf-coupling", options={"blocks": 2, "hidden": (16,)},
                    steps=240, draws=64, lr=1e-2)  # fmt: skip
    assert posterior.log_evidence.value == pytest.approx(math.log(1 / 2 / 12), abs=0.02)
    x = posterior.draws
    assert x.mean(0).tolist() == pytest.approx([0.5, 0.6], abs=0.02)
    assert x.std(0).tolist() == pytest.approx([0.5, 0.2], abs=0.03)


def test_float32_and_float64_flows():
    for dtype in (torch.float32, torch.float64):
        flow = _prepare("realnvp", TINY["options"], Target(bent, 2), 0).to(dtype)
        posterior = fit(Target(bent, 2, dtype=dtype), flow, steps=10)
        assert next(posterior.flow.parameters()).dtype == dtype
        assert posterior.draws.dtype == torch.float64


def test_coarse_densities_are_fitted_in_float64():
    def density(x):
        away = 2 * (x - 1e7).abs() / 0.1
        return -(away / 2 + (-away).exp().log1p()).sum(-1)

    target = Target(density, 2)
    posterior = fit(target, **TINY, steps=5)
    assert next(posterior.flow.parameters()).dtype == torch.float64
    assert float(posterior.draws[:, 0].mean()) == pytest.approx(1e7, abs=0.05)



def test_placing_asks_for_nothing_where_there_is_nothing_to_place():
    target = Target(bent, 2)
    flow = rootflow.Flow(_prepare("realnvp", TINY["options"], target, 0).transform.transforms[1])
    config, trace = VIConfig(steps=1), Trace()
    _place(flow, target, torch.zeros(1, 2), None, config, torch.Generator(), trace, None)
    assert trace.gaussian_elbo is None
    assert _Fitter(flow, target, config, None, trace, 0.0).evaluate() is not None
