"""Activations: joint slope at most one, derivatives in closed form that agree with autograd."""

import pytest
import torch

from rootflow.lipschitz import ACTIVATIONS

every_activation = pytest.mark.parametrize(
    "activation", ACTIVATIONS.values(), ids=list(ACTIVATIONS)
)
FINE = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
FAR = torch.tensor([50.0, 100, 700, 800, 1e3, 1e5, 1e10, 1e30], dtype=torch.float64)
GRID = torch.cat([FINE, FAR, -FAR])


@every_activation
@pytest.mark.parametrize("beta", [0.05, 1.0, 20.0])
def test_slope_never_exceeds_one(activation, beta):
    """Of the whole map with its scales; for a pair the norm of both slopes together."""
    a = GRID[:, None] * activation.scale_in * beta
    _, slope, _ = activation.derivatives(activation.spread(a))
    joint = torch.linalg.vector_norm(slope, dim=-1) * activation.scale_in * activation.scale_out
    assert torch.isfinite(joint).all()
    assert float(joint.max()) <= 1 + 1e-12
    assert float(joint.max()) > 0.9  # the bound is not wasted


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_closed_forms_agree_with_autograd(activation, dtype):
    a = GRID[::97].to(dtype).requires_grad_()
    a = torch.cat([a, torch.zeros(1, dtype=dtype)]).detach().requires_grad_()
    value, slope, bend = activation.derivatives(a)
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(value, activation.value(a), rtol=tolerance, atol=tolerance)
    assert torch.isfinite(torch.stack([value, slope, bend])).all()
    for own, other in zip(activation.value_and_slope(a), (value, slope), strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)
    inner = a.abs() < 30  # autograd itself overflows further out
    (first,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    torch.testing.assert_close(slope[inner], first[inner], rtol=tolerance, atol=tolerance)
    (second,) = torch.autograd.grad(slope.sum(), a)
    away = inner & (a != 0)  # at zero elu has two second derivatives
    torch.testing.assert_close(-bend[away], second[away], rtol=tolerance, atol=10 * tolerance)


@every_activation
def test_mirror_and_fold_are_adjoint(activation):
    g = torch.Generator().manual_seed(0)
    t = torch.randn(4, 5, generator=g, dtype=torch.float64)
    c = torch.randn(4, 5 * activation.widen, generator=g, dtype=torch.float64)
    assert activation(t).shape == c.shape
    left, right = (activation.mirror(t) * c).sum(), (t * activation.fold(c)).sum()
    torch.testing.assert_close(left, right)
    step = activation.spread(t + t.flip(0)) - activation.spread(t)
    torch.testing.assert_close(step, activation.mirror(t.flip(0)))
