"""Convex potentials: gradient, Hessian and bounds against autograd and eigenvalues."""

import pytest
import torch
from torch.nn import functional as F

from rootflow.transforms.convex import LEAST, ConvexPotential, log_det

HIDDEN = [(5,), (5, 4), (4, 3, 6)]


def drawn(features, hidden, spread=0.5, seed=0, context=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = ConvexPotential(features, context, hidden).double()
        with torch.no_grad():
            for p in block.parameters():
                p.add_(torch.randn_like(p) * spread)
    return block


def points(rows, features, scale=2.0):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, features, generator=generator, dtype=torch.float64) * scale


def potential(x, numbers, curvature, *rest, sizes):
    """F at one point x, written as in the paper."""
    count = len(rest) // 2
    weights, positive = rest[:count], rest[count:]
    *biases, v = numbers[0].split(sizes)
    h = F.softplus(weights[0] @ x + biases[0])
    for w, p, b in zip(weights[1:], positive, biases[1:], strict=False):
        h = F.softplus(w @ x + p @ h + b)
    return curvature * (x @ x) / 2 + (positive[-1] @ h)[0] + v @ x


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("features", [1, 3, 18])
def test_gradient_and_hessian_are_those_of_the_potential(features, hidden):
    block = drawn(features, hidden)
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
            hessian = block._gradient(points(200, 4), *tensors)[1]
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
