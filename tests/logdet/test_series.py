"""The unbiased estimators: mean and gradient by z-tests, random numbers of terms, memory."""

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from logdet.helpers import build, draw
from rootflow.logdet import Series, estimated, exact, truncation_bound
from rootflow.solvers import Problem, find_root

REPLICATES = 4000
LIPSCHITZ = 0.7


@dataclass(frozen=True)
class Drawn(Series):
    """A series whose random number of terms has been drawn already."""

    coefficients: tuple = ()

    def draw(self, lipschitz, generator):
        return list(self.coefficients)


def replicate(series, root, implicit, steep=False):
    """Two samples of size REPLICATES, value and projected gradient, and the exact values of both.

    Each replicate has its own probes and number of terms; those with equal numbers share a call.
    """
    net = build(4, (7, 6), lipschitz=LIPSCHITZ)
    if steep:
        net = build(2, (2,), activation="elu", lipschitz=LIPSCHITZ, spread=0.0)
        with torch.no_grad():  # g is the identity times the Lipschitz bound where it is positive
            for w in net.weights:
                w.copy_(torch.eye(2))
    point, cotangent = draw(1, net.features, seed=5), draw(1, net.features, seed=6)
    point = point.abs() if steep else point
    generator = torch.Generator().manual_seed(17)
    if series.method == "probe":
        groups = [(series, REPLICATES)]
    else:
        drawn = Counter(tuple(series.draw(LIPSCHITZ, generator)) for _ in range(REPLICATES))
        options = {"method": series.method, "terms": series.terms, "probes": series.probes}
        groups = [(Drawn(**options, coefficients=c), rows) for c, rows in drawn.items()]

    def solve(c, weights):
        def residual(y, c):
            return y - c + root * net.value(y, weights)

        problem = Problem(residual, (c,), frozenset({0}), net.lipschitz)
        return find_root(problem, c, adjoint="none").value

    with torch.no_grad():
        weights = net.prepare()
    options = {"root": root, "solve": solve if implicit else None}

    def both(call, rows):
        x = point.repeat(rows, 1).requires_grad_()
        value, log_dets = call(x)
        loss = log_dets[0] + (0.3 * value).sum(-1)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        return log_dets[0].detach(), (gradient * cotangent).sum(-1)

    truth = both(lambda x: exact(net, weights, x, (root,), **options), 1)
    found = [
        both(lambda x, s=s: estimated(net, weights, x, (root,), s, generator, **options), rows)
        for s, rows in groups
    ]
    return [torch.cat(part) for part in zip(*found, strict=True)], [float(t) for t in truth]


def z_scores(series, root=1, implicit=False):
    samples, truth = replicate(series, root, implicit)
    scores = []
    for sample, expected in zip(samples, truth, strict=True):
        error = float(sample.std()) / math.sqrt(len(sample))
        gap = float(sample.mean()) - expected
        scores.append(gap / error if error > 1e-12 else gap / 1e-9)
    return scores


@pytest.mark.parametrize(("root", "implicit"), [(1, False), (1, True), (-1, True)])
@pytest.mark.parametrize(
    "series",
    [
        Series("probe"),
        Series("probe", probes=3),
        Series("truncated", terms=80),
        Series("geometric", terms=2),
        Series("geometric", terms=1, probes=3),
        Series("poisson", terms=2),
    ],
    ids=lambda s: f"{s.method}-{s.terms}-{s.probes}",
)
def test_value_and_gradient_are_unbiased(series, root, implicit):
    value, gradient = z_scores(series, root, implicit)
    assert abs(value) < 5
    assert abs(gradient) < 5


@pytest.mark.parametrize("method", ["geometric", "poisson"])
def test_the_test_sees_wrong_weights(method, monkeypatch):
    """Without division by P(N >= j) the same statistic is far out."""
    right = Series.draw

    def wrong(self, lipschitz, generator):
        return [1.0] * len(right(self, lipschitz, generator))

    monkeypatch.setattr(Series, "draw", wrong)
    samples, truth = replicate(Series(method, terms=1), -1, False, steep=True)
    error = float(samples[0].std()) / math.sqrt(REPLICATES)
    assert abs(float(samples[0].mean()) - truth[0]) > 5 * error


def test_a_short_truncated_series_is_seen_to_be_biased_within_its_bound():
    series = Series("truncated", terms=2)
    samples, truth = replicate(series, -1, False, steep=True)
    gap = float(samples[0].mean()) - truth[0]
    error = float(samples[0].std()) / math.sqrt(REPLICATES)
    assert abs(gap) > 5 * error
    assert abs(gap) <= truncation_bound(2, LIPSCHITZ, 2) + 5 * error


@pytest.mark.parametrize("method", ["geometric", "poisson"])
@pytest.mark.parametrize("lipschitz", [0.3, 0.9, 0.97])
def test_numbers_of_terms_follow_the_stated_law(method, lipschitz):
    series = Series(method, terms=3)
    generator = torch.Generator().manual_seed(3)
    n = 2000
    drawn = [series.draw(lipschitz, generator) for _ in range(n)]
    assert all(w[:3] == [1.0] * 3 for w in drawn)
    longest = max(drawn, key=len)
    assert longest[3:] == [1 / series.survival(j, lipschitz) for j in range(1, len(longest) - 2)]
    assert series.survival(0, lipschitz) == pytest.approx(1)
    for j in (1, 2, 3, 5, 10, 30):
        p = series.survival(j, lipschitz)
        assert 0 < p <= series.survival(j - 1, lipschitz)
        share = sum(len(w) - 3 >= j for w in drawn) / n
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-3
    # finite variance: the tail is heavier than the squares of the terms are large
    q = Series.geometric_ratio(lipschitz)
    assert lipschitz**2 < q < 1
    ratio = series.survival(61, lipschitz) / series.survival(60, lipschitz)
    assert ratio > lipschitz**2
    assert ratio == pytest.approx(q, rel=1e-6)


def peak_bytes(terms, hidden=(64, 64), rows=64, d=20):
    """Largest sum of allocations minus releases in one training step, from the profiler's log."""
    net = build(d, hidden, lipschitz=0.9)
    x = draw(rows, d)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        generator = torch.Generator().manual_seed(0)
        series = Series("truncated", terms=terms)
        _, log_dets = estimated(net, net.prepare(), x, (1,), series, generator)
        log_dets.sum().backward()
    held = peak = 0
    for event in log.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_memory_does_not_grow_with_the_number_of_terms():
    peak_bytes(5)  # first use allocates more
    few, many = peak_bytes(5), peak_bytes(50)
    assert few > 64 * 64 * 8
    assert many < 1.1 * few


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="logdet='guess' is unknown; choose one of auto, exact"):
        Series("guess")
    with pytest.raises(ValueError, match="terms=0 and probes=1 must be at least 1"):
        Series(terms=0)
