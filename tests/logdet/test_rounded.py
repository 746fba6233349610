"""Estimates rounded to bfloat16 with a share of the rows in float32: the mean must be float32's."""

import itertools
import math

import pytest
import torch

from rootflow.lipschitz import LipschitzConvNet
from rootflow.logdet import Series, estimated, series
from rootflow.solvers import Problem, find_root

EVENT, LIPSCHITZ = (2, 4, 5), 0.9


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = LipschitzConvNet(EVENT, (6, 7), preactivation=True, lipschitz=LIPSCHITZ, context=2)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
    return net


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(net, x, implicit, seed=1, terms=3):
    """Log-determinants, and gradients of a loss with respect to rows, context and parameters."""

    def solve(c, weights):
        problem = Problem(lambda y, c: y - c + net.value(y, weights), (c,), contraction=LIPSCHITZ)
        return find_root(problem, c, method="anderson", adjoint="none").value

    x, context = x.clone().requires_grad_(), draw(len(x), 2, seed=5).requires_grad_()
    weights = net.prepare(context)
    value, log_dets = estimated(
        net, weights, x, (1,), Series("truncated", terms), torch.Generator().manual_seed(seed),
        solve=solve if implicit else None,
    )  # fmt: skip
    loss = (log_dets[0] + (value * draw(len(x), x.shape[1], seed=3)).sum(-1)).sum()
    rows, *shared = torch.autograd.grad(loss, [x, *weights.matrices[1:], *weights.biases])
    return [value.detach(), log_dets[0].detach(), rows, *shared]


@pytest.mark.parametrize("implicit", [False, True])
def test_the_mean_over_the_rows_that_are_picked_is_that_of_float32(net, implicit, monkeypatch):
    """All four outcomes for a row, forward and backward, with their probabilities."""
    x = draw(3, math.prod(EVENT), seed=2)
    monkeypatch.setattr(series, "bfloat16_gains", lambda x: False)
    exact = run(net, x, implicit)
    monkeypatch.setattr(series, "bfloat16_gains", lambda x: True)
    mean = [torch.zeros_like(e, dtype=torch.float64) for e in exact]
    rough = None
    for picks in itertools.product((False, True), repeat=2):
        marks = 1 - torch.tensor(picks).long()[:, None].expand(2, len(x))
        plain = torch.randint
        with monkeypatch.context() as patch:
            patch.setattr(
                torch, "randint",
                lambda *a, m=marks, f=plain, **k: m if a[0] == series.SHARE else f(*a, **k),
            )  # fmt: skip
            found = run(net, x, implicit)
        rough = rough or found
        share = math.prod(1 / series.SHARE if p else 1 - 1 / series.SHARE for p in picks)
        for m, f in zip(mean, found, strict=True):
            m += share * f
    for k, (m, e, r) in enumerate(zip(mean, exact, rough, strict=True)):
        # sums over rows and pixels are rounded once more, after the rows have been weighted
        tolerance = 2e-5 if k < 3 else 2e-2
        size = float(e.abs().max())
        assert float((m - e).abs().max()) < tolerance * size, k
        assert k == 0 or not torch.allclose(r, e, rtol=1e-4, atol=1e-4 * size), k


def test_rounding_alone_is_biased_and_the_share_of_rows_mends_it(net, monkeypatch):
    """The same probes with and without rounding: paired differences, thousands of rows."""
    x = draw(1, math.prod(EVENT), seed=2).expand(4000, -1)
    scores = {}
    for gains, share in ((False, 17), (True, 10**9 + 1), (True, 17)):
        monkeypatch.setattr(series, "bfloat16_gains", lambda x, gains=gains: gains)
        monkeypatch.setattr(series, "SHARE", share)
        with torch.no_grad():
            weights = net.prepare(torch.zeros(len(x), 2))
            options = Series("truncated", 3), torch.Generator().manual_seed(4)
            log_dets = estimated(net, weights, x, (1,), *options)[1][0].double()
        if not gains:
            exact = log_dets
            continue
        gap = log_dets - exact
        scores[share] = abs(float(gap.mean())) / float(gap.std()) * math.sqrt(len(x))
        assert float(gap.std()) < 0.1 * float(exact.std())
    assert scores[10**9 + 1] > 8
    assert scores[17] < 5
