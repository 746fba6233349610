"""Convex potentials: gradient, Hessian and bounds against autograd and eigenvalues."""

import math

import pytest
import torch
from torch.nn import functional as F

from rootflow.transforms.convex import LEAST, ConvexPotential, krylov, log_det

HIDDEN = [(5,), (5, 4), (4, 3, 6)]


def drawn(features, hidden, spread=0.5, seed=0, context=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = ConvexPotential(features, context, hidden, **options).double()
        with torch.no_grad():
            for p in block.parameters():
                p.add_(torch.randn_like(p) * spread)
    return block


def points(rows, features, scale=2.0):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, features, generator=generator, dtype=torch.float64) * scale


def potential(x, numbers, curvature, stacked, *positive, sizes):
    """F at one point x, written as in the paper."""
    weights = stacked.split(sizes[:-1])
    *biases, v = numbers[0].split(sizes)
    h = F.softplus(weights[0] @ x + biases[0])
    for w, p, b in zip(weights[1:], positive, biases[1:], strict=False):
        h = F.softplus(w @ x + p @ h + b)
    return curvature * (x @ x) / 2 + (positive[-1] @ h)[0] + v @ x


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("features", [1, 3, 18])
def test_gradient_and_hessian_are_those_of_the_potential(features, hidden):
    block = drawn(features, hidden).eval()
    tensors = block._tensors(None)
    x = points(3, features)
    z, log_dets = block(x)
    for row, image, value in zip(x, z, log_dets, strict=True):

        def one(v):
            return potential(v, *tensors, sizes=block.sizes)

        torch.testing.assert_close(image, torch.func.grad(one)(row))
        hessian = torch.func.jacrev(torch.func.grad(one))(row)
        torch.testing.assert_close(value, torch.linalg.slogdet(hessian).logabsdet)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_curvature_stays_between_its_bounds(hidden, spread):
    for seed in range(3):
        block = drawn(4, hidden, spread, seed)
        with torch.no_grad():
            tensors = block._tensors(None)
            parts = block._gradient(points(200, 4), *tensors)[1:]
            hessian = block._hessian(*parts, *tensors[1:])
            values = torch.linalg.eigvalsh(hessian)
            assert float(tensors[1]) > LEAST
            rounding = 1e-14 * float(values.max())
            assert float(values.min()) >= float(tensors[1]) - rounding
            assert float(values.max()) <= float(block._steepest(*tensors[1:]))


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
def test_the_solve_arrives_from_far_away(spread):
    block = drawn(3, (16, 16), spread, context=2)
    z, c = points(200, 3, 300.0), points(200, 2)
    with torch.no_grad():
        x, log_dets = block.inverse(z, c)
        back, other = block(x, c)
    torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_dets, -other)


def test_log_det_is_differentiable_twice():
    a = points(2, 9).view(2, 3, 3)
    matrix = (a @ a.mT + torch.eye(3)).requires_grad_()

    def symmetric(m):
        return log_det((m + m.mT) / 2)

    torch.testing.assert_close(symmetric(matrix), torch.linalg.slogdet(matrix).logabsdet)
    with torch.random.fork_rng():
        assert torch.autograd.gradcheck(symmetric, matrix)
        assert torch.autograd.gradgradcheck(symmetric, matrix)


def z_scores(block, rows=4000):
    """Of the estimated log_det and its gradient along a direction, over rows that are alike."""
    x, along = points(2, 5).unbind()
    at = x.repeat(rows, 1).requires_grad_()
    others = points(rows, 5)  # so that the mean of the batch is not that row's

    def both(log_dets):
        return log_dets, torch.autograd.grad(log_dets.sum(), at)[0] @ along

    truth = both(block.eval()(at)[1])
    found = both(block.train()(torch.cat([at, others]))[1][:rows])
    for sample, exact in zip(found, truth, strict=True):
        gap = float((sample.mean() - exact[0]).detach())
        error = float(sample.detach().std()) / math.sqrt(rows)
        assert error > 1e-6
        yield gap / error


@pytest.mark.parametrize("hidden", HIDDEN)
def test_probed_log_dets_and_their_gradients_are_unbiased(hidden):
    for seed in range(2):
        assert all(abs(z) < 4.5 for z in z_scores(drawn(5, hidden, seed=seed, logdet="probe")))


def test_the_z_test_sees_a_probe_that_is_solved_against_the_wrong_matrix(monkeypatch):
    def wrong(product, matrix, v):
        u, value = krylov(product, matrix, v)
        return 0.8 * u, 0.8 * value

    monkeypatch.setattr("rootflow.transforms.convex.krylov", wrong)
    assert all(abs(z) > 4.5 for z in z_scores(drawn(5, (5, 4), 1.0, logdet="probe")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("span", [1, 4])
def test_krylov_solves_and_takes_logarithms(dtype, span):
    vectors = torch.linalg.qr(points(6 * 12, 12).view(6, 12, 12))[0]
    values = torch.logspace(-span / 2, span / 2, 12, dtype=torch.float64)
    matrices, v = ((vectors * values) @ vectors.mT).to(dtype), points(6, 12).sign()
    hard = []

    def matrix(rows):
        hard.append(rows)
        return matrices[rows]

    u, value = krylov(lambda p: (matrices @ p[..., None])[..., 0], matrix, v.to(dtype))
    assert bool(hard) == (span == 4)  # rounding keeps conjugate gradients from ending in d steps
    shares = torch.einsum("nij,ni->nj", vectors, v)
    tolerance = 1e-2 if dtype == torch.float32 else 2e-6
    solved = torch.einsum("nij,nj->ni", vectors, shares / values)
    torch.testing.assert_close(u.double(), solved, rtol=tolerance, atol=tolerance)
    truth = (shares.square() * values.log()).sum(-1)
    torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance)


def test_a_probe_refuses_a_second_derivative():
    block = drawn(3, (4,), logdet="probe")
    x = points(5, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once while training"):
        torch.autograd.grad(block(x)[1].sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="logdet='guess' is unknown; choose one of auto, exact"):
        ConvexPotential(3, logdet="guess")
