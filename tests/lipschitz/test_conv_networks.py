"""Convolutional networks of certified Lipschitz constant, and the image layers they are made of."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rootflow.lipschitz import ACTIVATIONS, LipschitzConvNet, conv_bound, layers


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wild(event, hidden, *, spread=1.0, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = LipschitzConvNet(event, hidden, **options).double()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p) * spread)
    return net


@settings(max_examples=40)
@given(
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    event=st.sampled_from([(1, 4, 3), (2, 3, 5), (3, 4, 4)]),
    hidden=st.sampled_from([(5,), (6, 7), (4, 9, 3)]),
    preactivation=st.booleans(),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    lipschitz=st.sampled_from([0.1, 0.9, 0.999]),
    context=st.sampled_from([0, 2]),
    seed=st.integers(0, 2**20),
)
def test_no_parameters_break_the_bound(
    activation, event, hidden, preactivation, spread, lipschitz, context, seed
):
    net = wild(
        event, hidden, activation=activation, lipschitz=lipschitz, context=context,
        preactivation=preactivation, spread=spread, seed=seed,
    )  # fmt: skip
    x = net.rows(draw(9, *event, seed=seed) * 3)
    weights = net.prepare(draw(9, context, seed=seed + 1) if context else None)
    value, jacobian = net.value_and_jacobian(x, weights)
    torch.testing.assert_close(value, net.value(x, weights), rtol=1e-9, atol=1e-9)
    bound = float(net.bound().detach())
    assert bound <= lipschitz
    slope = float(torch.linalg.matrix_norm(jacobian.detach(), 2).max())
    assert slope <= bound * (1 + 1e-12)


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("activation", ["lipswish", "cpila"])
def test_the_network_is_the_plain_one_of_torch(activation, preactivation):
    """Value and Jacobian against conv2d with channels first, from the normalised weights."""
    event = 2, 4, 3
    net = wild(event, (5, 6), activation=activation, preactivation=preactivation, kernels=(3, 3, 1))
    phi, weights, x = net.activation, net.prepare(), draw(3, *event)

    def plain(x):
        h = x
        for k, (w, b) in enumerate(zip(*weights, strict=True)):
            if w.dim():
                w = w.view(*w.shape, 1, 1) if w.dim() == 2 else w
                h = F.conv2d(h, w, b, padding=w.shape[-1] // 2)
            else:
                h = h * w + b[:, None, None]
            if k < len(weights.matrices) - 1:
                h = phi(h.movedim(1, -1)).movedim(-1, 1)
        return h

    rows = net.rows(x)
    assert torch.equal(net.images(rows), x)
    torch.testing.assert_close(net.images(net.value(rows, weights)), plain(x))
    full = torch.autograd.functional.jacobian(
        lambda v: net.rows(plain(net.images(v[None])))[0], rows[1]
    )
    for jacobian in (net.value_and_jacobian(rows, weights)[1], net.jacobian(rows, weights)[1]):
        torch.testing.assert_close(jacobian[1].mT, full)


@pytest.mark.parametrize("channels", [(1, 4), (4, 1), (3, 5), (5, 3), (6, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["scale", "matrix", "3x3", "5x3"])
def test_adjoints_and_gradients_are_those_of_autograd(kind, channels):
    n, m = channels
    shape = {"scale": (), "matrix": (m, n), "3x3": (m, n, 3, 3), "5x3": (m, n, 5, 3)}[kind]
    w, x = draw(*shape).requires_grad_(), draw(2, 3, 5, 4, n, seed=1).requires_grad_()
    out = layers.linear(x, w)
    u = draw(*out.shape, seed=2)
    grad_x, grad_w = torch.autograd.grad((u * out).sum(), (x, w))
    torch.testing.assert_close(layers.adjoint(u, w), grad_x)
    torch.testing.assert_close(layers.outer(u, x, w), grad_w)
    torch.testing.assert_close(layers.outer(u, x, w, w), grad_w + w)
    b = draw(out.shape[-1], seed=3)
    torch.testing.assert_close(layers.affine(x[0], w, b), out[0] + b)
    each = draw(3, out.shape[-1], seed=3)
    torch.testing.assert_close(layers.affine(x[0], w, each), out[0] + each[:, None, None])


def test_parameters_are_those_of_the_architecture_and_g_starts_at_zero():
    with torch.random.fork_rng():
        net = LipschitzConvNet((3, 8, 8), (10, 7), preactivation=True)
    shapes = [tuple(w.shape) for w in net.weights]
    assert shapes == [(10, 3, 3, 3), (7, 10), (3, 7, 3, 3)]
    assert [b.numel() for b in net.biases] == [3, 10, 7, 3]
    x = net.rows(draw(5, 3, 8, 8, dtype=torch.float32))
    value = net.value(x, net.prepare())
    assert not value.any()
    value.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("activation", ["lipswish", "cpila", "sin"])
def test_rounding_bounds_the_error_of_float32(activation):
    for seed, spread in enumerate((0.1, 1.0, 10.0)):
        net = wild((2, 6, 6), (16, 16), activation=activation, spread=spread, seed=seed).float()
        x = net.rows(draw(50, 2, 6, 6, seed=seed, dtype=torch.float32) * 3)
        with torch.no_grad():
            weights = net.prepare()
            value, bound = net.value(x, weights), net.rounding(x, weights)
            same = type(weights)(*(tuple(t.double() for t in part) for part in weights))
            error = torch.linalg.vector_norm(value.double() - net.value(x.double(), same), dim=-1)
        assert bool((error <= bound).all())
        assert bool((bound < 1e-2 * (1 + torch.linalg.vector_norm(x, dim=-1))).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": (3, 3)}, r"kernels=\(3, 3\) must hold 3 odd numbers, one more than hidden"),
        ({"kernels": (3, 2, 3)}, "odd numbers"),
        ({"activation": "relu"}, "activation='relu' is unknown; choose one of sin"),
        ({"lipschitz": 1.0}, "strictly between"),
        ({"hidden": ()}, "at least one positive width"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LipschitzConvNet((2, 4, 4), **options)


def test_a_network_with_preactivation_is_its_formula():
    """Weights beyond the bound: all convolutions shrink by one factor, the input by none."""
    net, x = wild((2, 5, 6), (4, 3), preactivation=True, lipschitz=0.9), draw(3, 2, 5, 6)
    rates = F.softplus(net.raw_scale)
    weights = [w if w.dim() == 4 else w[:, :, None, None] for w in net.weights]
    total = math.prod(float(conv_bound(w.detach(), (5, 6))) for w in weights)
    assert total > 0.9
    first, *biases = net.biases
    h = x + first[:, None, None]
    for rate, w, b in zip(rates, weights, biases, strict=True):
        h = h * torch.sigmoid(rate * h) / 1.1  # LipSwish
        h = F.conv2d(h, w * (0.9 / total) ** (1 / 3), b, padding=w.shape[2] // 2)
    torch.testing.assert_close(net.images(net.value(net.rows(x), net.prepare())), h)
