"""Blocks on images: the laws in float64 on 2 x 4 x 4 pixels, estimators, memory, certificates."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rootflow import Flow
from rootflow.logdet import truncation_bound
from rootflow.transforms import ImplicitBlock, MonotoneBlock, ResidualBlock, implicit

KINDS = [ImplicitBlock, MonotoneBlock, ResidualBlock]
EVENT = 2, 4, 4
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(kind, event=EVENT, *, hidden=(6, 5), spread=0.5, seed=0, **options):
    """A float64 block with all parameters moved away from their start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = kind(event, hidden, **{"lipschitz": 0.9, **options}).double()
        with torch.no_grad():
            for p in block.parameters():
                p.add_(torch.randn_like(p) * spread)
    return block


@every_kind
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("preactivation", [False, True])
def test_round_trip_and_exact_log_det_equal_autograd(kind, preactivation, context):
    block = build(kind, preactivation=preactivation, context=context, logdet="exact")
    x, c = draw(3, *EVENT), draw(3, context, seed=1) if context else None
    z, log_det = block(x, c)
    back, other = block.inverse(z, c)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(other, -log_det, rtol=0, atol=1e-11)
    for k in range(3):
        own = None if c is None else c[k : k + 1]
        full = torch.autograd.functional.jacobian(
            lambda v, own=own: block(v[None], own)[0][0], x[k]
        )
        plain = torch.linalg.slogdet(full.view(32, 32))
        torch.testing.assert_close(log_det[k], plain.logabsdet, rtol=1e-10, atol=1e-10)
    alone = torch.stack(
        [block(x[k : k + 1], None if c is None else c[k : k + 1])[0][0] for k in range(3)]
    )
    torch.testing.assert_close(z, alone, rtol=0, atol=1e-12)


@every_kind
@pytest.mark.parametrize("logdet", ["exact", "truncated"])
def test_gradients_equal_finite_differences(kind, logdet):
    """Value and log-det both ways; the series has so many terms and probes that it is exact."""
    event = (1, 2, 3)
    block = build(kind, event, hidden=(3, 2), lipschitz=0.5, logdet="exact").train()
    x, parameters = draw(2, *event).requires_grad_(), list(block.parameters())

    def both(x, *_):
        z, log_det = block(x)
        y, other = block.inverse(x)
        return z, log_det, y, other

    if logdet == "exact":
        with torch.random.fork_rng():  # gradcheck draws
            assert torch.autograd.gradcheck(both, (x, *parameters), fast_mode=True)
        return
    exact = torch.autograd.grad(sum(t.sum() for t in both(x)[::2]), [x, *parameters])
    block.series = build(kind, event, logdet="truncated", terms=60).series
    found = torch.autograd.grad(sum(t.sum() for t in both(x)[::2]), [x, *parameters])
    for a, b in zip(found, exact, strict=True):  # values alone: the adjoint solves are iterative
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "logdet"),
    [
        (ImplicitBlock, "geometric"),
        (ImplicitBlock, "poisson"),
        (MonotoneBlock, "geometric"),
        (ResidualBlock, "poisson"),
    ],
)
def test_estimates_are_unbiased_for_weighted_losses(kind, logdet):
    """Value and gradients, each sample with its own weight, in standard errors of the mean."""
    block = build(kind, (1, 3, 3), hidden=(4,), lipschitz=0.7, logdet=logdet, terms=2)
    x, weights = draw(4, 1, 3, 3).requires_grad_(), draw(4, seed=1)
    inputs = [x, *block.nets[0].weights]
    probes = [draw(*t.shape, seed=7 + k) for k, t in enumerate(inputs)]

    def one():
        z, log_det = block(x)
        loss = (weights * (log_det + z.flatten(1).sum(1))).sum()
        gradients = torch.autograd.grad(loss, inputs)
        projected = [(g * p).sum() for g, p in zip(gradients, probes, strict=True)]
        return torch.stack([*log_det.detach(), *projected])

    samples = torch.stack([one() for _ in range(80)])
    block.series = None
    truth = one()
    error = samples.std(0) / math.sqrt(len(samples))
    assert bool(((samples.mean(0) - truth).abs() < 4.5 * error).all())
    assert bool((samples.std(0) > 0).all())


@every_kind
def test_both_memory_modes_give_the_same_gradients(kind):
    found = []
    for save_memory in (True, False):
        block = build(kind, logdet="geometric", terms=3, probes=2, save_memory=save_memory)
        z, log_det = block(draw(5, *EVENT))
        (log_det * draw(5, seed=2)).sum().add(z.square().sum()).backward()
        found.append([p.grad for p in block.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_evaluation_estimates_carry_an_honest_standard_error():
    """Of 30 repeated estimates most lie as near to the exact value as their errors say."""
    block = build(ImplicitBlock, hidden=(4,), logdet="geometric", lipschitz=0.7).eval()
    flow, x = Flow(block), draw(1, *EVENT)
    with torch.no_grad():
        found = [flow.log_prob_and_error(x, draws=6) for _ in range(30)]
        block.series = None
        truth, none = flow.log_prob_and_error(x)
        torch.testing.assert_close(truth, flow.log_prob(x))
    assert float(none) == 0
    score = torch.cat([(mean - truth) / error for mean, error in found])
    assert abs(float(score.mean())) < 5 / math.sqrt(30)
    assert float((score.abs() < 2.57).double().mean()) > 0.8  # Student, 5 degrees: 95 %


def test_the_number_of_terms_follows_from_the_bound():
    for lipschitz in (0.3, 0.729, 0.9):
        block = build(ImplicitBlock, (1, 8, 9), hidden=(4,), lipschitz=lipschitz)
        k = block.series.terms
        assert lipschitz**k / k <= 0.3
        assert k == 1 or lipschitz ** (k - 1) / (k - 1) > 0.3
        longer = block.series.evaluation(lipschitz)
        assert truncation_bound(1, lipschitz, longer.terms) <= 1e-4


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_certificates_are_true(kind, dtype):
    block = (
        build(kind, hidden=(16, 16), lipschitz=0.95, logdet="exact", spread=1.0).to(dtype).eval()
    )
    x = draw(20, *EVENT, dtype=dtype) * 2
    with torch.no_grad():
        z, _ = block(x)
        bound = block.certificate(x, z, None)
        truth, _ = block.double()(x.double())
    error = torch.linalg.vector_norm((z.double() - truth).flatten(1), dim=1)
    if kind is ResidualBlock:
        assert not bound.any()  # a formula
    else:
        assert bool((error <= bound).all())
        assert float(bound.max()) < (1e-2 if dtype is torch.float32 else 1e-10)


@every_kind
def test_first_steps_in_bfloat16_leave_the_root_where_it_is(kind, monkeypatch):
    block = build(kind, hidden=(16, 16), logdet="exact", spread=1.0).float().eval()
    x = draw(20, *EVENT, dtype=torch.float32) * 2
    with torch.no_grad():
        plain, rounded = [], []
        for gains, found in ((False, plain), (True, rounded)):
            monkeypatch.setattr(implicit, "bfloat16_gains", lambda x, gains=gains, **_: gains)
            found += [block(x)[0], block.inverse(x)[0]]
        for a, b in zip(plain, rounded, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=3e-5)
        assert not torch.equal(plain[1], rounded[1])


def peak_bytes(terms, solver="auto"):
    """Largest sum of allocations minus releases in one training step."""
    block = build(
        ImplicitBlock, (2, 8, 8), hidden=(16, 16), logdet="truncated", terms=terms, solver=solver,
        spread=0.05,
    )  # fmt: skip
    x = draw(8, 2, 8, 8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        z, log_det = block(x)
        (z.square().flatten(1).sum(1) - log_det).sum().backward()
    held = peak = 0
    for event in log.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_memory_does_not_grow_with_terms_or_solver_steps():
    peak_bytes(5)  # first use allocates more
    few = peak_bytes(5)
    assert few > 8 * 16 * 64 * 8
    assert peak_bytes(50) < 1.1 * few
    assert peak_bytes(5, "fixed-point") < 1.1 * few


def test_options_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="kernels and preactivation are for images"):
        ImplicitBlock(3, kernels=(3, 1, 3))
    with pytest.raises(ValueError, match=r"event=\(3, 4\) must be a number of columns or"):
        ImplicitBlock((3, 4))
