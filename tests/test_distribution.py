"""Flows as torch and Pyro distributions, and maps exchanged with torch.distributions."""

import copy
import math

import pyro
import pyro.distributions as pd
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from torch.distributions import (
    AbsTransform,
    AffineTransform,
    ComposeTransform,
    Distribution,
    ExpTransform,
    Independent,
    LogNormal,
    Normal,
    SigmoidTransform,
    StickBreakingTransform,
    TanhTransform,
    TransformedDistribution,
    biject_to,
    constraints,
)

import rootflow
from rootflow import Flow
from rootflow.flow import FlowDistribution
from rootflow.transforms import Compose, FromTorch, Inverse, Scale, ToTorch
from test_laws import points, wild


@pytest.fixture
def global_draws():
    """Distributions draw from torch's global generator, which is put back afterwards."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        yield


def closed(*shape):
    base = Normal(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))
    return Independent(base, 1)


@pytest.mark.parametrize("batch", [(), (4,), (3, 1), (2, 3)])
@pytest.mark.parametrize("context", [0, 2])
def test_shapes_are_those_of_torch(batch, context, global_draws):
    c = points(3, context).expand(*batch[:-1], 3, context) if context else None
    d = wild("realnvp", 2, context=context).distribution(c)
    if context and batch in [(), (4,), (3, 1)]:
        batch = d.batch_shape
    d = d.expand(batch)
    model = closed(*batch, 2)
    assert (d.batch_shape, d.event_shape) == (model.batch_shape, model.event_shape)
    for shape in [(), (5,), (2, 5)]:
        x = model.sample(shape)
        assert d.sample(shape).shape == d.rsample(shape).shape == x.shape
        assert d.log_prob(x).shape == model.log_prob(x).shape
    assert d.log_prob(x[..., :1, :]).shape == model.log_prob(x[..., :1, :]).shape if batch else True
    one = torch.zeros(2, dtype=torch.float64)
    assert d.log_prob(one).shape == model.log_prob(one).shape
    x, log_prob = d.rsample_and_log_prob((5,))
    torch.testing.assert_close(d.log_prob(x), log_prob)


def test_an_expanded_batch_is_drawn_independently(global_draws):
    x = wild("realnvp", 1).distribution().expand((3,)).sample((2,)).flatten()
    assert len(x.unique()) == 6


def test_draws_and_their_gradients(global_draws):
    d = wild("realnvp", 2).distribution()
    assert d.rsample().requires_grad
    assert not d.sample().requires_grad
    assert d.has_rsample


def test_validation_is_a_matter_of_each_object():
    flow = wild("nsf-coupling", 2, tails="bounded", interval=3.0)
    inside, outside = torch.tensor([[1.0, -1.0], [1.0, 4.0]], dtype=torch.float64)
    strict, loose = flow.distribution(), flow.distribution(validate_args=False)
    assert strict.support.check(inside)
    assert not strict.support.check(outside)
    with pytest.raises(ValueError, match="within the support"):
        strict.log_prob(outside)
    assert loose.expand((4,)).log_prob(outside).tolist() == [-math.inf] * 4
    torch.testing.assert_close(loose.log_prob(inside), flow.log_prob(inside))
    assert loose.log_prob(inside * math.nan).isnan()
    assert Distribution._validate_args
    with pytest.raises(ValueError, match=r"context has width 1; this flow takes no context"):
        flow.distribution(inside[:1])
    with pytest.raises(ValueError, match=r"this flow takes a context of width 2"):
        wild("maf", 2, context=2).distribution()
    with pytest.raises(ValueError, match="parameter context"):
        wild("maf", 2, context=1).distribution(inside[:1] * math.nan)


def test_a_draw_is_scored_once_and_never_with_old_weights(global_draws):
    flow = wild("maf", 2, context=1)
    c = points(3, 1)
    d = flow.distribution(c)
    x = d.rsample()
    (kept,) = torch.autograd.grad(d.log_prob(x).sum(), flow.transform.transforms[1].log_scale)
    x = d.rsample()
    assert d.log_prob(x) is d.log_prob(x)
    for change in (lambda: next(flow.parameters()).mul_(1.1), lambda: c.mul_(2)):
        with torch.no_grad():
            change()
        torch.testing.assert_close(d.log_prob(x), flow.log_prob(x, c))
    x = d.sample()
    assert d.log_prob(x).requires_grad
    with torch.no_grad():
        x = d.rsample()
    assert d.log_prob(x).requires_grad
    assert kept.abs().sum() > 0


def test_copies_carry_no_draw(global_draws):
    d = wild("iaf", 2).distribution().expand((3,))
    x = d.rsample()
    for again in (copy.deepcopy(d), copy.copy(d)):
        assert again.batch_shape == (3,)
        assert torch.equal(again.log_prob(x), d.flow.log_prob(x))
    assert isinstance(FlowDistribution(d.flow), Distribution)


THEIRS = {
    "exp": (ExpTransform(), constraints.positive),
    "sigmoid": (SigmoidTransform(), constraints.unit_interval),
    "tanh": (TanhTransform(), constraints.interval(-1, 1)),
    "affine": (AffineTransform(1.0, -2.0), constraints.real),
    "half line": (constraints.less_than(2.0), constraints.less_than(2.0)),
    "composed": (ComposeTransform([ExpTransform(), AffineTransform(3.0, 2.0)]), None),
    "interval": (
        constraints.independent(constraints.interval(-1.0, 3.0), 1),
        constraints.interval(-1.0, 3.0),
    ),
    "mixed": (
        torch.distributions.StackTransform([ExpTransform(), AffineTransform(0.0, 2.0)], dim=-1),
        None,
    ),
    "ours": (ToTorch(wild("maf", 2).transform), constraints.real),
}


@pytest.mark.parametrize("name", THEIRS)
def test_their_maps_inside_our_flows(name):
    theirs, codomain = THEIRS[name]
    inner = wild("realnvp", 2)
    flow = Flow(Compose([FromTorch(theirs, (2,)), inner.transform]))
    x, log_det = flow.inverse(points(5, 2) / 4)
    z, back = flow(x)
    exact = [torch.autograd.functional.jacobian(lambda v: flow(v)[0], row) for row in x]
    torch.testing.assert_close(back, torch.linalg.slogdet(torch.stack(exact))[1])
    torch.testing.assert_close(back, -log_det)
    torch.testing.assert_close(z, points(5, 2) / 4)
    d = flow.distribution()
    assert d.log_prob(x).shape == (5,)
    assert d.support.event_dim == 1
    if codomain is not None:
        probe = torch.linspace(-4, 4, 81, dtype=torch.float64)[:, None].expand(-1, 2)
        assert torch.equal(d.support.check(probe), codomain.check(probe[:, 0]))


def test_a_flow_through_exp_is_the_lognormal(global_draws):
    flow = Flow(FromTorch(ExpTransform(), (3,)))
    exact = Independent(LogNormal(torch.zeros(3), torch.ones(3)), 1)
    x = exact.sample((6,))
    torch.testing.assert_close(flow.log_prob(x), exact.log_prob(x))
    assert flow.distribution(validate_args=False).log_prob(-x).tolist() == [-math.inf] * 6
    with pytest.raises(ValueError, match="within the support"):
        flow.distribution().log_prob(-x)
    torch.testing.assert_close(Inverse(FromTorch(ExpTransform().inv, (3,)))(x), flow(x))


def test_the_support_of_images():
    with torch.random.fork_rng():
        d = rootflow.flow("glow", shape=(1, 2, 2), alpha=0.1, scales=1).distribution()
    value = torch.full((3, 1, 2, 2), 0.5)
    value[1, 0, 0, 0], value[2, 0, 0, 0] = -0.12, -0.13  # on both sides of -1 / 8
    assert d.support.check(value).tolist() == [True, True, False]
    assert d.log_prob(value[:2]).shape == (2,)
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(value)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (AbsTransform(), "AbsTransform is not bijective"),
        (StickBreakingTransform(), r"StickBreakingTransform does not keep samples of shape \(3,\)"),
        (biject_to(constraints.independent(constraints.real, 2)), "does not keep samples"),
    ],
)
def test_maps_without_a_density_are_refused(theirs, message):
    with pytest.raises(ValueError, match=message):
        FromTorch(theirs, (3,))


@pytest.mark.parametrize("cache", [0, 1])
@pytest.mark.parametrize("name", ["monotone", "nsf-coupling"])
def test_our_maps_inside_their_classes(name, cache, global_draws):
    flow, c = wild(name, 2, context=1), points(3, 1)
    ours = ToTorch(flow.transform, c, cache_size=cache)
    theirs = TransformedDistribution(closed(2), [ours])
    assert (theirs.batch_shape, theirs.event_shape) == ((3,), (2,))
    x = theirs.rsample((4,))
    torch.testing.assert_close(theirs.log_prob(x), flow.log_prob(x, c))
    torch.testing.assert_close(theirs.log_prob(x.detach().clone()), flow.log_prob(x, c))
    z = closed(3, 2).sample()
    assert ours.inv.inv is ours
    torch.testing.assert_close(ours.inv(ours(z.clone())), z)
    there = ours(z)
    torch.testing.assert_close(ours.log_abs_det_jacobian(z, there), flow.inverse(z, c)[1])
    torch.testing.assert_close(ours.inv.log_abs_det_jacobian(there, z), flow(there, c)[1])
    assert ours.bijective
    assert ours.codomain is not None
    copy.deepcopy(ours)


def test_a_cached_pair_lasts_as_long_as_the_weights(global_draws):
    flow = wild("maf", 2)
    ours = ToTorch(flow.transform).with_cache()
    z = points(3, 2)
    x = ours(z)
    assert ours.inv(x) is z
    assert ours.with_cache(1) is ours
    assert ours.with_cache(0)(z) is not x
    with torch.no_grad():
        next(flow.parameters()).add_(0.5)
    torch.testing.assert_close(ours(z), flow.inverse(z)[0])
    with torch.no_grad():
        x = ours(z)
    assert ours.log_abs_det_jacobian(z, x).requires_grad


def known_model(y):
    """theta ~ N(0, I) in two dimensions, y ~ N(theta_1 + theta_2, 1/2): all of it Gaussian."""
    theta = pyro.sample("theta", pd.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
    pyro.sample("y", pd.Normal(theta.sum(-1), 0.5), obs=y)


@pytest.mark.parametrize("how", ["guide", "automatic"])
def test_a_pyro_guide_reaches_the_evidence(how, global_draws):
    pyro.clear_param_store()
    y = torch.tensor(2.0)
    evidence = Normal(0.0, math.sqrt(2.25)).log_prob(y)
    flow = wild("realnvp", 2, spread=0.01, dtype=torch.float32)

    def guide(y):
        pyro.module("flow", flow)
        pyro.sample("theta", flow.distribution())

    if how == "automatic":
        guide = AutoNormalizingFlow(known_model, lambda features: ToTorch(flow.transform))
    objective = Trace_ELBO(num_particles=32, vectorize_particles=True)
    svi = SVI(known_model, guide, pyro.optim.Adam({"lr": 0.03}), objective)
    for _ in range(100):
        svi.step(y)
    elbo = -sum(svi.evaluate_loss(y) for _ in range(10)) / 10
    assert abs(elbo - float(evidence)) < 0.03
    pyro.clear_param_store()


def test_a_flow_as_the_prior_of_a_pyro_model(global_draws):
    flow = wild("nsf-coupling", 2, dtype=torch.float32)

    def model():
        with pyro.plate("rows", 4):
            x = pyro.sample("x", flow.distribution())
            pyro.sample("y", pd.Normal(x.sum(-1), 1.0), obs=torch.zeros(4))
        pyro.sample("all", flow.distribution().expand([2]).to_event(1).mask(False))

    trace = pyro.poutine.trace(model).get_trace()
    x = trace.nodes["x"]["value"]
    assert x.shape == (4, 2)
    expected = flow.log_prob(x).sum() + Normal(x.sum(-1), 1.0).log_prob(torch.zeros(4)).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_a_pyro_map_trains_inside_a_flow():
    with torch.random.fork_rng():
        theirs = pd.transforms.affine_autoregressive(2, hidden_dims=[4])
    flow = Flow(Compose([Scale(2), FromTorch(theirs, (2,))]))
    assert {id(p) for p in theirs.parameters()} < {id(p) for p in flow.parameters()}
    x = points(5, 2, dtype=torch.float32)
    flow.log_prob(x).sum().backward()
    assert all(p.grad is not None for p in theirs.parameters())
