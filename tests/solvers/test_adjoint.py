"""The derivative of a root: against finite differences, for every method, to second order."""

import copy

import pytest
import torch

import rootflow
from rootflow.solvers import METHODS, Problem, find_root

every_method = pytest.mark.parametrize("method", sorted(METHODS))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def residual(z, c, a):
    return z + 0.8 * torch.sin(z @ a.T / torch.linalg.matrix_norm(a)) - c


def root(c, a, method="auto", **options):
    return find_root(Problem(residual, (c, a), frozenset({0})), c, method=method, **options).value


@every_method
def test_gradients_equal_finite_differences(method):
    c, a = draw(3, 2).requires_grad_(), draw(2, 2, seed=1).requires_grad_()
    with torch.random.fork_rng():  # gradcheck draws
        assert torch.autograd.gradcheck(lambda c, a: root(c, a, method), (c, a))
        assert torch.autograd.gradgradcheck(lambda c, a: root(c, a, method), (c, a))


def test_the_start_gets_no_gradient_and_none_means_none():
    c, a = draw(3, 2).requires_grad_(), draw(2, 2, seed=1).requires_grad_()
    start = draw(3, 2, seed=2).requires_grad_()
    problem = Problem(residual, (c, a), frozenset({0}))
    value = find_root(problem, start).value
    assert torch.autograd.grad(value.sum(), start, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(value.sum(), c)[0].shape == c.shape
    assert not find_root(problem, start, adjoint="none").value.requires_grad
    with torch.no_grad():
        assert not find_root(problem, start).value.requires_grad
    assert not find_root(lambda z: z - 1, start).value.requires_grad


def test_weights_of_the_loss_reach_their_own_rows_and_saved_tensors_stay():
    c, a = draw(6, 2).requires_grad_(), draw(2, 2, seed=1).requires_grad_()
    before = c.detach().clone(), a.detach().clone()
    weights = draw(6, seed=3)
    value = root(c, a)
    both = torch.autograd.grad((weights * value.sum(-1)).sum(), (c, a))
    parts = [torch.autograd.grad(root(c[k : k + 1], a).sum(), (c, a)) for k in range(6)]
    for total, pieces in zip(both, zip(*parts, strict=True), strict=True):
        expected = sum(w * p for w, p in zip(weights, pieces, strict=True))
        torch.testing.assert_close(total, expected)
    assert torch.equal(c, before[0])
    assert torch.equal(a, before[1])


def build(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = rootflow.flow("implicit", 2, blocks=1, hidden=(6, 5), **options).double()
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(torch.randn_like(p) * 0.2)
    return flow.eval()


def test_a_solve_after_an_optimiser_step_is_fresh():
    flow, x = build(), draw(5, 2)
    optimiser = torch.optim.SGD(flow.parameters(), lr=0.1)
    flow.log_prob(x).sum().backward()
    before = flow.inverse(x)[0].detach()
    optimiser.step()
    after = flow.inverse(x)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(flow(after)[0], x, rtol=1e-10, atol=1e-10)


def test_deep_copies_are_independent_and_names_stable():
    flow, x = build(), draw(5, 2)
    twin = copy.deepcopy(flow)
    assert torch.equal(flow.log_prob(x), twin.log_prob(x))
    with torch.no_grad():
        next(iter(twin.parameters())).add_(1)
    assert not torch.allclose(flow.log_prob(x), twin.log_prob(x))
    assert list(build().state_dict()) == list(flow.state_dict())


def test_a_flow_never_returns_a_point_that_missed_the_root():
    flow = build(solver="fixed-point", lipschitz=0.999)
    net = flow.transform.transforms[-3].nets[1]
    with torch.no_grad():
        net.weights[-1].mul_(1e3)
    x = torch.tensor([[0.1, 0.2], [torch.nan, 0.0]], dtype=torch.float64)
    with pytest.raises(rootflow.NotConverged, match="of 2 samples missed the tolerance"):
        flow(x)
