"""Networks of certified Lipschitz constant: bound for wild parameters, Jacobian, rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rootflow.lipschitz import ACTIVATIONS, LipschitzNet, Weights


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wild(features, hidden, *, spread=1.0, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = LipschitzNet(features, hidden, **options).double()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p) * spread)
    return net


drawn = given(
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    features=st.integers(1, 6),
    hidden=st.sampled_from([(5,), (8, 7), (6, 20, 4)]),
    spread=st.sampled_from([0.01, 0.3, 1.0, 10.0, 1000.0]),
    lipschitz=st.sampled_from([0.1, 0.9, 0.97, 0.999]),
    context=st.sampled_from([0, 2]),
    seed=st.integers(0, 2**20),
)


@settings(max_examples=60)
@drawn
def test_no_parameters_break_the_bound(
    activation, features, hidden, lipschitz, context, seed, spread
):
    net = wild(
        features, hidden, activation=activation, lipschitz=lipschitz, context=context,
        spread=spread, seed=seed,
    )
    x = draw(300, features, seed=seed) * 3
    weights = net.prepare(draw(300, context, seed=seed + 1) if context else None)
    value, jacobian = net.value_and_jacobian(x, weights)
    torch.testing.assert_close(value, net.value(x, weights), rtol=1e-9, atol=1e-9)
    bound = float(net.bound().detach())
    assert bound <= lipschitz
    slope = float(torch.linalg.matrix_norm(jacobian.detach(), 2).max())
    assert slope <= bound * (1 + 1e-12)
    if not context:
        with torch.no_grad():
            step = torch.linalg.vector_norm(net.value(x + 1e-3, weights) - value, dim=-1)
            far = torch.linalg.vector_norm(net.value(x.flip(0), weights) - value, dim=-1)
        assert bool((step <= bound * 1e-3 * features**0.5 * (1 + 1e-9) + 1e-12).all())
        distance = torch.linalg.vector_norm(x.flip(0) - x, dim=-1)
        assert bool((far <= bound * distance * (1 + 1e-9) + 1e-12).all())


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("hidden", [(5,), (5, 4), (5, 4, 3)], ids=str)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_jacobian_is_that_of_autograd(activation, hidden, context):
    net = wild(3, hidden, activation=activation, context=context)
    x = draw(7, 3).requires_grad_()
    weights = net.prepare(draw(7, context, seed=1) if context else None)
    value, jacobian = net.value_and_jacobian(x, weights)
    plain = net.value(x, weights)
    torch.testing.assert_close(value, plain)
    for o in range(3):
        (row,) = torch.autograd.grad(plain[:, o].sum(), x, retain_graph=True)
        torch.testing.assert_close(jacobian[:, :, o], row)


def test_the_jacobian_is_differentiable_in_the_input():
    net = wild(2, (3, 4), activation="cpila")
    weights = net.prepare()
    with torch.random.fork_rng():  # gradcheck draws
        x = draw(2, 2).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: net.value_and_jacobian(x, weights)[1], x)


def test_parameters_are_weights_biases_and_scales_only():
    """The depth is what was asked, and every parameter gets a gradient."""
    with torch.random.fork_rng():
        net = LipschitzNet(3, (10, 7), activation="clipswish")
    shapes = [tuple(p.shape) for p in net.parameters()]
    expected = [(10, 3), (7, 20), (3, 14), (10,), (7,), (3,), (2,)]
    assert sorted(shapes) == sorted(expected)
    net.value(draw(5, 3, dtype=torch.float32), net.prepare()).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    x = draw(5, 3, dtype=torch.float32)
    assert not net.value(x, net.prepare()).any()  # g starts at zero


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_rounding_bounds_the_error_of_float32(activation, spread):
    for seed, hidden in enumerate([(8,), (64, 64), (32, 128, 16)]):
        net = wild(4, hidden, activation=activation, spread=spread, seed=seed).float()
        x = draw(400, 4, seed=seed, dtype=torch.float32) * 3
        with torch.no_grad():
            weights = net.prepare()
            value, bound = net.value(x, weights), net.rounding(x, weights)
            same = Weights(*(tuple(t.double() for t in part) for part in weights))
            truth = net.value(x.double(), same)
            error = torch.linalg.vector_norm(value.double() - truth, dim=-1)
        assert bool((error <= bound).all()), float((error / bound).max())
        assert bool((bound < 1e-2 * (1 + torch.linalg.vector_norm(x, dim=-1))).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation='relu' is unknown; choose one of sin"),
        ({"lipschitz": 1.0}, "lipschitz=1.0 must lie strictly between 0 and 1"),
        ({"lipschitz": 0.0}, "strictly between"),
        ({"hidden": (3, 0)}, "at least one positive width"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LipschitzNet(2, **options)
