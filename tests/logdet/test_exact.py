"""Exact log-determinants and inverses in few and many dimensions, against LAPACK and autograd."""

import pytest
import torch

from logdet.helpers import build, draw
from rootflow.logdet import exact, inverse_and_log_det, truncation_bound

DIMENSIONS = [1, 2, 3, 5, 16, 17, 40]


def contractions(rows, d, size):
    j = draw(rows, d, d)
    return j * size / torch.linalg.matrix_norm(j, 2, keepdim=True)


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("size", [0.0, 0.5, 0.999])
def test_inverse_and_log_det_equal_those_of_lapack(d, size):
    jac = contractions(30, d, size)  # [b, i, o], the transpose of the Jacobian
    inverse, log_det = inverse_and_log_det(jac, (1, -1))
    for k, sign in enumerate((1, -1)):
        matrix = torch.eye(d, dtype=torch.float64) + sign * jac.mT
        reference = torch.linalg.slogdet(matrix)
        assert bool((reference.sign == 1).all())
        torch.testing.assert_close(log_det[k], reference.logabsdet, rtol=1e-10, atol=1e-10)
        # [o, i, b] holds the inverse of the transpose
        own = torch.linalg.inv(matrix).permute(1, 2, 0)
        torch.testing.assert_close(inverse[k].transpose(0, 1), own, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_value_and_log_dets_equal_slogdet(d):
    net = build(d)
    x = draw(9, d, seed=1).requires_grad_()
    weights = net.prepare()
    value, log_dets = exact(net, weights, x, (1, -1))
    torch.testing.assert_close(value, net.value(x, weights))
    jacobian = net.value_and_jacobian(x, weights)[1]
    eye = torch.eye(d, dtype=torch.float64)
    plain = torch.stack([torch.linalg.slogdet(eye + s * jacobian)[1] for s in (1, -1)])
    torch.testing.assert_close(log_dets, plain, rtol=1e-9, atol=1e-10)
    cotangents = draw(2, 9, seed=2), draw(9, d, seed=3)
    inputs = [x, *net.parameters()]

    def gradients(log_dets, value):
        loss = (cotangents[0] * log_dets).sum() + (cotangents[1] * value).sum()
        return torch.autograd.grad(loss, inputs, retain_graph=True)

    for own, reference in zip(
        gradients(log_dets, value), gradients(plain, net.value(x, weights)), strict=True
    ):
        torch.testing.assert_close(own, reference, rtol=1e-8, atol=1e-9)


def test_many_rows_in_chunks_equal_few():
    """More rows than are worked on together; sums over chunks included."""
    net = build(3, (300, 300), context=2)
    x, c = draw(5000, 3), draw(5000, 2, seed=1)
    whole = exact(net, net.prepare(c), x, (1,))
    loss = whole[1].sum() + whole[0].sum()
    gradient = torch.autograd.grad(loss, list(net.parameters()))
    total = None
    for k in range(0, 5000, 1000):
        part = slice(k, k + 1000)
        value, log_det = exact(net, net.prepare(c[part]), x[part], (1,))
        torch.testing.assert_close(value, whole[0][part])
        own = torch.autograd.grad(log_det.sum() + value.sum(), list(net.parameters()))
        total = own if total is None else [a + b for a, b in zip(total, own, strict=True)]
    torch.testing.assert_close(list(gradient), list(total), rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("lipschitz", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("d", [1, 5])
def test_truncation_is_bounded(lipschitz, d):
    symmetric = torch.eye(d, dtype=torch.float64) * -lipschitz  # the worst case, all of one sign
    for jac in (contractions(20, d, lipschitz), symmetric[None]):
        truth = torch.linalg.slogdet(torch.eye(d, dtype=torch.float64) + jac)[1]
        power, total = torch.eye(d, dtype=torch.float64).expand_as(jac), torch.zeros(len(jac))
        total = total.double()
        for k in range(1, 41):
            power = power @ jac
            total = total - (-1) ** k / k * power.diagonal(dim1=-2, dim2=-1).sum(-1)
            bound = truncation_bound(d, lipschitz, k)
            assert bool(((truth - total).abs() <= bound * (1 + 1e-9) + 1e-12).all())
    assert truncation_bound(5, 0.9, 400) < 1e-15
