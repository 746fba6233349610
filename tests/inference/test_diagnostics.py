"""Diagnostics against known answers: tails, evidence, coverage, exact KL, and the blind spot."""

import importlib.util
import json
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootflow.inference.comparison import Estimate, compare_draws
from rootflow.inference.diagnostics import (
    elbo,
    grid_kl,
    importance_ess,
    log_evidence,
    psis,
    verdict,
)
from rootflow.inference.library import reference, target

PLAIN = {"allow_nan": False}  # json.dumps refuses NaN and infinity


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pareto(k, n, seed=0):
    """Log ratios whose exponentials have a Pareto tail of shape k."""
    u = torch.empty(n, dtype=torch.float64).uniform_(generator=generator(seed))
    return -k * torch.log1p(-u)


def normals(n, d=1, seed=0):
    return torch.empty(n, d, dtype=torch.float64).normal_(generator=generator(seed))


@pytest.mark.parametrize("k", [0.3, 0.6, 0.9])
def test_khat_finds_a_known_shape(k):
    """Averaged over seeds, since one estimate from 20,000 draws has a sd of about 0.05."""
    found = [psis(pareto(k, 20_000, seed)).khat for seed in range(20)]
    assert abs(sum(found) / len(found) - k) < 0.05
    wrong = psis(-pareto(k, 20_000)).khat
    assert wrong < -0.5, "the wrong sign looks perfect"


@pytest.mark.skipif(importlib.util.find_spec("arviz") is None, reason="arviz is not installed")
@given(
    n=st.sampled_from([30, 50, 333, 2000, 20_000]),
    k=st.floats(0.05, 1.5),
    seed=st.integers(0, 2**20),
    noise=st.booleans(),
    offset=st.floats(-1e3, 1e3),
)
def test_weights_are_those_of_arviz(n, k, seed, noise, offset):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # arviz 0.23 announces version 1 on import
        import arviz

    r = 2 * k * normals(n, seed=seed)[:, 0] if noise else pareto(k, n, seed)
    r[::17] = -math.inf
    ours = psis(r + offset)
    theirs, khat = arviz.psislw((r + offset).numpy().copy())
    assert ours.khat == pytest.approx(float(khat), rel=1e-12, abs=1e-12)
    assert ours.zeros == len(r[::17])
    expected = torch.as_tensor(theirs)
    torch.testing.assert_close(ours.log_weights, expected, rtol=1e-12, atol=1e-12)


def test_draws_outside_the_target_are_not_good_without_weights():
    r = torch.zeros(1000)
    r[:300] = -math.inf
    found = psis(r)
    assert (found.khat, found.zeros, found.constant) == (0, 300, True)
    assert importance_ess(found.log_weights) == pytest.approx(700)
    judged = verdict(found)
    assert judged.level == "usable with importance weights"
    assert "the target is zero at 300 draws" in judged.line


def test_smoothing_keeps_the_order_and_adds_up_to_one():
    r = pareto(0.9, 5000, 3)
    found = psis(r)
    assert float(found.log_weights.exp().sum()) == pytest.approx(1)
    assert torch.equal(found.log_weights.argsort(), r.argsort())
    assert found.tail == math.ceil(3 * math.sqrt(5000))
    assert found.threshold == pytest.approx(0.7)
    assert psis(r[:200]).threshold == pytest.approx(1 - 1 / math.log10(200))
    assert importance_ess(found.log_weights) > importance_ess(r)


@pytest.mark.parametrize("value", [0.0, -5321.7, 1e-3])
def test_constant_ratios_are_perfect(value):
    r = torch.full((1000,), value) + 1e-14 * abs(value) * normals(1000)[:, 0].sign()
    found = psis(r)
    assert found.constant
    assert found.khat == 0
    assert torch.allclose(found.log_weights.exp(), torch.tensor(1 / 1000).double())
    assert importance_ess(found.log_weights) == pytest.approx(1000)
    assert verdict(found).level == "good"
    json.dumps(found.to_dict(), **PLAIN)


def test_an_impossible_draw_weighs_nothing():
    r = pareto(0.3, 2000)
    r[7] = -math.inf
    found = psis(r)
    assert found.log_weights[7] == -math.inf
    assert found.zeros == 1
    assert elbo(r).value == -math.inf
    assert log_evidence(r).value == pytest.approx(float(r.exp().mean().log()))
    for result in (found, elbo(r), log_evidence(r)):
        json.dumps(result.to_dict(), **PLAIN)


@pytest.mark.parametrize("function", [psis, elbo, log_evidence, importance_ess])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([0.0, math.nan, 1.0]), r"1 of 3 log ratios are NaN \(the first is draw 1\)"),
        (torch.tensor([0.0, math.inf]), "inf"),
        (torch.full((5,), -math.inf), "-inf at each of the 5 draws"),
        (torch.zeros(3, 1), r"must be \(draws,\), got shape \(3, 1\)"),
        (torch.zeros(0), r"must be \(draws,\)"),
    ],
)
def test_bad_ratios_are_named(function, bad, message):
    with pytest.raises(ValueError, match=message):
        function(bad)


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_a_short_tail_has_no_khat(n):
    found = psis(pareto(0.3, n))
    assert found.khat == math.inf
    assert not found.trusted
    assert verdict(found).level == "do not trust"
    assert found.to_dict()["khat"] is None
    json.dumps(found.to_dict(), **PLAIN)
    assert float(found.log_weights.exp().sum()) == pytest.approx(1)


def test_ties_and_tiny_differences_do_not_break_the_fit():
    r = normals(4000)[:, 0].round(decimals=1)  # many equal ratios
    assert math.isfinite(psis(r).khat)
    close = 1e-9 * normals(4000)[:, 0]
    assert math.isfinite(psis(close).khat)
    one = torch.zeros(1000)
    one[3] = 50.0  # a single weight: nothing to fit a tail to
    assert psis(one).khat == math.inf


def test_evidence_and_elbo_of_a_gaussian():
    """p~ = 5 normal(0, 1), q = normal(0, 1.2): log 5 is the evidence, the KL is known."""
    sd, log_z, n = 1.2, math.log(5), 50_000
    x = sd * normals(n)[:, 0]
    r = log_z + torch.distributions.Normal(0.0, 1.0).log_prob(x)
    r = r - torch.distributions.Normal(0.0, sd).log_prob(x)
    kl = (sd**2 - 1) / 2 - math.log(sd)
    bound, evidence = elbo(r), log_evidence(r)
    assert abs(bound.value - (log_z - kl)) < 5 * bound.se
    assert abs(evidence.value - log_z) < 5 * evidence.se
    assert 0 < evidence.se < 0.01
    assert bound.draws == evidence.draws == n
    assert importance_ess(r) < n
    assert psis(r).khat < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_standard_error_of_the_evidence_is_right(seed):
    r = 0.5 * normals(400 * 200, seed=seed)[:, 0].view(200, 400)
    found = [log_evidence(row) for row in r]
    spread = torch.tensor([e.value for e in found]).std()
    assert float(spread) == pytest.approx(sum(e.se for e in found) / 200, rel=0.2)


def gaussian(mean, sd):
    law = torch.distributions.Normal(torch.as_tensor(mean).double(), torch.as_tensor(sd).double())
    return lambda x: law.log_prob(x).sum(-1)


def test_grid_kl_of_the_target_itself_is_zero():
    for name in ("energy1", "energy3", "ring", "eight-modes"):
        it = target(name)
        found = grid_kl(lambda u, it=it: it.unconstrained_log_prob(u) - it.log_normaliser, it)
        assert abs(found.value) < 1e-7, name
        assert found.reliable


@pytest.mark.parametrize(
    ("name", "mean", "sd"), [("banana", [1.0, -30.0], [9.0, 6.0]), ("energy4", [0, -1], [2, 0.8])]
)
def test_grid_kl_is_that_of_sampling(name, mean, sd):
    it, mean, sd = target(name), torch.tensor(mean), torch.tensor(sd)
    q = gaussian(mean, sd)
    found = grid_kl(q, it, points=700)
    u = mean + sd * normals(200_000, 2)
    ratio = q(u) - it.unconstrained_log_prob(u) + it.log_normaliser
    assert abs(found.value - float(ratio.mean())) < 5 * float(ratio.std()) / math.sqrt(len(u))
    assert found.reliable


def test_grid_kl_says_when_the_grid_is_not_enough():
    it = target("energy1")
    assert not grid_kl(gaussian([30.0, 0.0], [1.0, 1.0]), it).reliable
    assert not grid_kl(gaussian([0.0, 0.0], [0.01, 1.0]), it).reliable
    with pytest.raises(ValueError, match="normaliser"):
        grid_kl(gaussian([0.0], [1.0]), target("blr"))
    with pytest.raises(ValueError, match="bounds in two"):
        grid_kl(gaussian([0.0], [1.0]), target("funnel"))
    with pytest.raises(ValueError, match="points must be even"):
        grid_kl(gaussian([0.0], [1.0]), it, points=17)


def blind_fit(n=4000):
    """A q that covers the larger of two far modes perfectly, and its log ratios."""
    it = target("two-modes")
    q = gaussian([-6.0, 0.0], [1.0, 1.0])
    x = torch.tensor([-6.0, 0.0]) + normals(n, 2, 5)
    return it, q, x, it.log_prob(x) - q(x)


def test_a_missed_mode_is_never_good_with_reference_draws():
    _, q, x, r = blind_fit()
    smoothed = psis(r)
    alone = verdict(smoothed)
    assert alone.level == "good", "draws of q cannot see the other mode"
    assert "missed mode" in alone.line
    assert "needs reference draws" in alone.line
    known = reference("two-modes")
    for extra in ({}, {"log_q_draws": q(x), "log_q_reference": q(known.draws)}):
        found = compare_draws(x, known.draws, known.names, **extra)
        judged = verdict(smoothed, found)
        assert judged.level == "do not trust"
        assert "missed mode" not in judged.line
    assert found.uncovered == pytest.approx(0.3, abs=0.05)
    assert "of the reference lies where q has no draws" in judged.line
    assert found.log_q_on_reference.value < -20
    assert found.mmd2 > 0.05
    assert found.p_value < 0.005
    json.dumps(found.to_dict(), **PLAIN)


def test_the_order_of_the_rows_does_not_matter():
    """The tests look at a part of many draws: of all of them, not of the first."""
    x, y = normals(4000, 1, 2), normals(4000, 1, 3)
    assert compare_draws(x, y.sort(0).values, permutations=99).p_value > 0.02


def test_a_small_missed_mode_shows_in_the_coverage():
    """2 % of the target 6 sds away moves no moment by more than the limits for wrong ones."""
    q = gaussian([0.0, 0.0], [1.0, 1.0])
    known, x = normals(2000, 2, 1), normals(2000, 2, 2)
    known[:40] += torch.tensor([6.0, 0.0])
    found = compare_draws(x, known, log_q_draws=q(x), log_q_reference=q(known))
    assert verdict(psis(torch.zeros(2000)), found).level == "do not trust"
    assert verdict(psis(torch.zeros(2000)), compare_draws(x, known)).level != "good"


@pytest.mark.parametrize("seed", range(3))
def test_right_draws_are_good(seed):
    it, known = target("eight-modes"), reference("eight-modes")
    x = it.sampler(2000, generator(100 + seed))
    found = compare_draws(
        x, known, log_q_draws=it.log_prob(x), log_q_reference=it.log_prob(known.draws), seed=seed,
    )  # fmt: skip
    judged = verdict(psis(torch.zeros(2000)), found)
    assert judged.level == "good", judged
    assert found.uncovered < 0.01
    assert found.reference_draws == 10_000
    assert "10,000 reference draws" in judged.line


def test_small_errors_need_weights_and_large_ones_are_wrong():
    y = normals(5000, 1, 1)
    smoothed = psis(torch.zeros(10))
    levels = [
        verdict(smoothed, compare_draws(scale * normals(5000, 1, 2) + shift, y, most=300)).level
        for shift, scale in ((0.0, 1.0), (0.2, 1.0), (0.0, 1.2), (0.8, 1.0), (0.0, 0.5))
    ]
    usable, wrong = "usable with importance weights", "do not trust"
    assert levels == ["good", usable, usable, wrong, wrong]


def test_standard_errors_of_a_comparison_are_right():
    found = [
        compare_draws(normals(500, 1, 2 * s), normals(1000, 1, 2 * s + 1), permutations=1, most=9)
        for s in range(300)
    ]
    found = [c.parameters[0] for c in found]
    for value, error in (("shift", "shift_se"), ("sd_ratio", "sd_ratio_se")):
        spread = torch.tensor([getattr(p, value) for p in found]).std()
        assert float(spread) == pytest.approx(sum(getattr(p, error) for p in found) / 300, rel=0.15)


def test_p_values_are_uniform_if_both_sets_are_alike():
    found = [
        compare_draws(normals(100, 2, 2 * s), normals(150, 2, 2 * s + 1), permutations=39, seed=s)
        for s in range(200)
    ]
    values = torch.tensor([c.p_value for c in found])
    assert abs(float((values <= 0.25).double().mean()) - 0.25) < 5 * math.sqrt(0.1875 / 200)
    mmd2 = torch.tensor([c.mmd2 for c in found])
    assert abs(float(mmd2.mean())) < 5 * float(mmd2.std()) / math.sqrt(200)
    assert (mmd2 < 0).any(), "an unbiased estimate of zero is negative at times"


def test_two_sample_distances_by_hand():
    x, y = normals(60, 3, 1), normals(45, 3, 2) + 0.5
    found = compare_draws(x, y, permutations=5)
    a, b = x / y.std(0), y / y.std(0)
    kernel = torch.exp(
        -(torch.cdist(torch.cat([a, b]), torch.cat([a, b])) ** 2) / (2 * found.scale**2)
    )
    first, second, across = kernel[:60, :60], kernel[60:, 60:], kernel[:60, 60:]
    expected = (first.sum() - 60) / (60 * 59) + (second.sum() - 45) / (45 * 44) - 2 * across.mean()
    assert found.mmd2 == pytest.approx(float(expected), rel=1e-9)
    assert compare_draws(x, y, seed=3) == compare_draws(x, y, seed=3)
    assert compare_draws(x, y, seed=3) != compare_draws(x, y, seed=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": torch.zeros(5)}, "draws must be"),
        ({"reference": torch.zeros(5, 3)}, r"reference must be \(n, 2\)"),
        ({"draws": torch.full((5, 2), math.nan)}, "draws holds NaN"),
        ({"reference": torch.zeros(5, 2)}, "column of reference is constant"),
        ({"names": ["a"]}, "1 names for 2 columns"),
    ],
)
def test_bad_draws_are_named(change, message):
    arguments = {"draws": normals(50, 2, 1), "reference": normals(50, 2, 2)} | change
    with pytest.raises(ValueError, match=message):
        compare_draws(**arguments)


def test_collapsed_draws_are_wrong_not_an_error():
    found = compare_draws(torch.zeros(50, 2), normals(50, 2))
    assert found.level()[0] == 2
    json.dumps(found.to_dict(), **PLAIN)


def test_an_estimate_without_a_finite_error_is_plain():
    assert Estimate(-math.inf, math.inf, 1).to_dict() == {"value": None, "se": None, "draws": 1}
