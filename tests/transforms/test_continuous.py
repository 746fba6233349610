"""Continuous flows: the trace against autograd, the order of the steps, what certificates say."""

import sys

import pytest
import torch

import rootflow
from rootflow.transforms.continuous import FIXED, ContinuousTransform


def drawn(features=3, hidden=(6, 5), context=0, spread=0.5, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = ContinuousTransform(features, context, hidden, **options).double()
        with torch.no_grad():
            for p in block.parameters():
                p.add_(torch.randn_like(p) * spread)
    return block


def points(rows, features=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("hidden", [(6,), (6, 5), (4, 6, 5), (3, 4, 5, 6)])
def test_the_trace_is_that_of_the_jacobian(hidden):
    block, x = drawn(hidden=hidden, context=2), points(4)
    field = block._field(points(4, 2))
    t = torch.tensor(0.3, dtype=torch.float64)
    out = field(t, torch.cat([x, torch.zeros(4, 1)], 1))

    def velocity(x):
        return field(t, torch.cat([x, torch.zeros(4, 1)], 1))[:, :-1].sum(0)

    jacobian = torch.autograd.functional.jacobian(velocity, x)  # (o, rows, i)
    torch.testing.assert_close(out[:, -1], torch.einsum("oro->r", jacobian))


@pytest.mark.parametrize("solver", FIXED)
def test_the_error_falls_with_the_order_of_the_steps(solver):
    exact = drawn(solver="dopri8", tol=1e-13)
    x = points(20)
    with torch.no_grad():
        truth = torch.cat([exact(x)[0], exact(x)[1][:, None]], 1)
        errors, estimates = [], []
        for steps in (8, 16):
            block = drawn(solver=solver, steps=steps)
            z, log_det = block(x)
            errors.append((torch.cat([z, log_det[:, None]], 1) - truth).abs())
            estimates.append(block.certificate(x, z, None))
        order = (errors[0].mean() / errors[1].mean()).log2()
        assert FIXED[solver] - 0.3 < float(order) < FIXED[solver] + 0.7
        worst = torch.maximum(errors[0][:, :3].norm(dim=1), errors[0][:, 3])
        assert bool((worst < 2 * estimates[0]).all())
        assert bool((worst > estimates[0] / 2).all())
        back, log_det_back = block.inverse(z)
    assert float((back - x).norm(dim=1).max()) < 4 * float(estimates[1].max())
    assert float((log_det + log_det_back).abs().max()) < 4 * float(estimates[1].max())


@pytest.mark.parametrize("solver", ["dopri5", "dopri8", "bosh3"])
def test_adaptive_solvers_meet_their_tolerance(solver):
    block, exact, x = drawn(solver=solver, tol=1e-6), drawn(solver="dopri8", tol=1e-13), points(50)
    with torch.no_grad():
        torch.testing.assert_close(block(x)[0], exact(x)[0], rtol=0, atol=1e-3)
        torch.testing.assert_close(block.inverse(block(x)[0])[0], x, rtol=0, atol=1e-3)
        assert float(block.certificate(x, x, None).max()) < 1e-3
        steep = drawn(solver=solver, tol=1e-300)
        with pytest.raises(rootflow.NotConverged, match="found no step that meets tol=1e-300"):
            steep(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"solver": "euler"}, "solver='euler'"), ({"steps": 0}, "steps=0"), ({"tol": 0.0}, "tol=0")],
)
def test_wrong_use(options, message):
    with pytest.raises(ValueError, match=message):
        rootflow.flow("ffjord", 2, **options)


def test_without_torchdiffeq_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'rootflow\\[ffjord\\]'"):
        rootflow.flow("ffjord", 2)
