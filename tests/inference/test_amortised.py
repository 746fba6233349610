"""Posteriors that a network gives: densities of their own draws, errors, the weighted bound."""

import math

import pytest
import torch

import rootflow
from rootflow.inference.amortised import AmortisedPosterior, importance_bound
from rootflow.transforms import ActNorm

FLOWS = {
    None: {},
    "planar": {"blocks": 4, "hidden": (8,)},
    "iaf": {"blocks": 2, "hidden": (8,)},
    "implicit": {"blocks": 1, "hidden": (8,)},
    "nsf-coupling": {"blocks": 2, "hidden": (8,)},
}


def made(flow=None, features=2, context=3, inputs=5, seed=0):
    """A posterior in float64 whose weights are far from their start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = 2 * features + (context if flow else 0)
        encoder = torch.nn.Sequential(torch.nn.Linear(inputs, 8), torch.nn.Tanh(),
                                      torch.nn.Linear(8, width))  # fmt: skip
        built = rootflow.flow(flow, features, context, **FLOWS[flow]) if flow else None
        posterior = AmortisedPosterior(encoder, features, built).double()
        with torch.no_grad():
            for p in posterior.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return posterior


def inputs(n=4, seed=1):
    return torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_draws_come_with_their_density(flow, shape):
    posterior, x = made(flow), inputs()
    z, log_q = posterior.rsample_and_log_prob(x, shape, generator=torch.Generator().manual_seed(2))
    assert z.shape == (*shape, 4, 2)
    assert log_q.shape == (*shape, 4)
    torch.testing.assert_close(posterior.log_prob(z, x), log_q, rtol=1e-7, atol=1e-7)
    again, _ = posterior.rsample_and_log_prob(x, shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(z, again)


@pytest.mark.parametrize("flow", FLOWS)
def test_densities_integrate_to_one_for_every_x(flow):
    posterior, x = made(flow, seed=3), inputs(3)
    axis = torch.linspace(-20, 20, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = posterior.log_prob(grid[:, None], x).exp()
    mass = density.sum(0) * float(axis[1] - axis[0]) ** 2
    # the splines' slopes jump at their knots, where the rectangle rule is less exact
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-2, rtol=0)


@pytest.mark.parametrize("flow", FLOWS)
def test_gradients_reach_encoder_and_flow(flow):
    posterior, x = made(flow), inputs()
    z, log_q = posterior.rsample_and_log_prob(x, generator=torch.Generator().manual_seed(0))
    (z.square().sum(-1) + log_q).mean().backward()
    for name, p in posterior.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_without_a_flow_it_is_the_gaussian():
    posterior, x = made(), inputs()
    numbers = posterior.encoder(x)
    exact = torch.distributions.Normal(numbers[:, :2], numbers[:, 2:].exp())
    z = torch.randn(6, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(posterior.log_prob(z, x), exact.log_prob(z).sum(-1))


def test_a_batch_does_not_reset_the_normalisation():
    posterior, x = made("iaf"), inputs(64)
    parts = [part for part in posterior.modules() if isinstance(part, ActNorm)]
    before = [part.shift.clone() for part in parts]
    posterior.train().log_prob(torch.full((64, 2), 7.0, dtype=torch.float64), x)
    assert parts
    for part, shift in zip(parts, before, strict=True):
        assert torch.equal(part.shift, shift)


def test_wrong_use():
    with torch.random.fork_rng():
        encoder = torch.nn.Linear(5, 6)
        wide = rootflow.flow("planar", 3, 2, blocks=1)
        heavy = rootflow.flow("planar", 2, 2, blocks=1, base="student")
        fine = rootflow.flow("planar", 2, 3, blocks=1)
    with pytest.raises(ValueError, match=r"flow: its samples have shape \(3,\), but features=2"):
        AmortisedPosterior(encoder, 2, wide)
    with pytest.raises(ValueError, match=r"flow: its base is StudentT; .* base='normal'"):
        AmortisedPosterior(encoder, 2, heavy)
    posterior = AmortisedPosterior(encoder, 2, fine)
    with pytest.raises(ValueError, match=r"encoder: gives 6 numbers .* needs 7: .* width 3"):
        posterior.rsample_and_log_prob(torch.zeros(4, 5), generator=torch.Generator())


def test_weighted_bound():
    log_weights = torch.tensor([[0.0, -1e4], [math.log(3.0), -1e4]], dtype=torch.float64)
    torch.testing.assert_close(importance_bound(log_weights), torch.tensor([math.log(2.0), -1e4],
                               dtype=torch.float64))  # fmt: skip
    assert torch.equal(importance_bound(log_weights[:1]), log_weights[0])
