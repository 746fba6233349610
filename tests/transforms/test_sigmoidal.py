"""Sigmoidal maps against their formula, their own Jacobian and themselves in the far tails."""

import pytest
import torch

from rootflow.transforms.sigmoidal import LEAST, Sigmoidal

GRID = [(1, 3), (2, 2), (3, 4)]


def theta(univariate, n, spread=1.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(univariate.size, n, generator=generator, dtype=torch.float64) * spread
    return (univariate.initial()[:, None].double() + noise).to(dtype)


@pytest.mark.parametrize(("layers", "units"), GRID)
def test_it_is_the_logit_of_shares_of_sigmoids(layers, units):
    family = Sigmoidal(units, layers)
    x = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    numbers = theta(family, 25)
    h = x.expand(1, 25)
    for a, b, w in family._parts(numbers):
        assert bool((a > 0).all())
        torch.testing.assert_close(w.sum(1), torch.ones_like(w[:, 0]))
        h = torch.logit((w * torch.sigmoid(a * h + b)).sum(1))
    z, log_slope = family.forward(x, numbers)
    torch.testing.assert_close(z, (1 - LEAST) * h[0] + LEAST * x)
    (slope,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), rtol=1e-10, atol=1e-10)


def test_the_start_is_close_to_the_identity():
    x = torch.linspace(-5, 5, 101)
    z, log_slope = Sigmoidal().forward(x, Sigmoidal().initial()[:, None].expand(-1, 101))
    assert float((z - x).abs().max()) < 1
    assert float(log_slope.abs().max()) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("layers", "units"), GRID)
def test_every_value_has_a_root_also_far_out(layers, units, spread, dtype):
    family, n = Sigmoidal(units, layers), 2000
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(n, generator=generator, dtype=torch.float64).mul(3).sinh().to(dtype)
    assert float(z.abs().max()) > 1e3
    numbers = theta(family, n, spread, dtype)
    x, log_slope = family.inverse(z, numbers)
    again, other = family.forward(x, numbers)
    eps = torch.finfo(dtype).eps
    size = 1 + z.abs() + other.exp() * x.abs() + 100 * spread**layers * (1 + spread)
    assert float(((again - z).abs() / size).max()) < 100 * eps
    assert torch.equal(log_slope, -other)
    assert float(log_slope.max()) <= -torch.log(torch.tensor(LEAST)) + 1e-3


def test_thirty_goes_there_and_comes_back():
    """Where bisection on a fixed interval returns its end instead."""
    family = Sigmoidal()
    x = torch.tensor([-1e6, -30.0, 30.0, 1e6], dtype=torch.float64)
    numbers = theta(family, 4)
    torch.testing.assert_close(family.inverse(family.forward(x, numbers)[0], numbers)[0], x)


def test_tails_are_straight_lines():
    family = Sigmoidal()
    numbers = theta(family, 1).expand(-1, 4)
    x = torch.tensor([-2e5, -1e5, 1e5, 2e5], dtype=torch.float64)
    z, log_slope = family.forward(x, numbers)
    least = (1 - LEAST) * family._parts(numbers)[0][0].amin(0) + LEAST
    torch.testing.assert_close(log_slope, least.log())
    torch.testing.assert_close(z[1::2] - z[::2], least[::2] * 1e5)


def test_the_inverse_has_the_derivatives_of_finite_differences():
    family = Sigmoidal(3, 2)
    z = torch.tensor([-2.0, 0.3, 4.0], dtype=torch.float64, requires_grad=True)
    numbers = theta(family, 3).requires_grad_()
    with torch.random.fork_rng():
        assert torch.autograd.gradcheck(family.inverse, (z, numbers))


@pytest.mark.parametrize(("options", "message"), [((1,), "units=1"), ((2, 0), "layers=0")])
def test_wrong_use(options, message):
    with pytest.raises(ValueError, match=message):
        Sigmoidal(*options)
