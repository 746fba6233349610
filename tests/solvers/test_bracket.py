"""Bracketed roots of increasing functions: guaranteed, honest, differentiable."""

import pytest
import torch

import rootflow
from rootflow.solvers.bracket import find_increasing

DTYPES = [torch.float32, torch.float64]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cubic(y, s):
    return y**3 + 1e-3 * y - s, 3 * y * y + 1e-3


def logistic(y, s):
    """A cliff between two plains on which Newton's method alone leaves for infinity."""
    p = torch.sigmoid(50 * y)
    return p + 1e-4 * y - s, 50 * p * (1 - p) + 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("equation", "reach"), [(cubic, 50.0), (logistic, 1e5)])
def test_every_element_arrives(equation, reach, dtype):
    s = draw(20, 30, dtype=dtype)
    found = find_increasing(equation, (s,), torch.full_like(s, -reach), torch.full_like(s, reach))
    assert found.value.shape == found.residual.shape == found.steps.shape == s.shape
    assert found.value.dtype == dtype
    assert bool(found.converged.all())
    assert int(found.steps.max()) <= 120
    residual = equation(found.value.double(), s.double())[0].abs()
    slope = equation(found.value.double(), s.double())[1]
    allowed = 8 * torch.finfo(dtype).eps * (1 + (1 + slope) * found.value.abs())
    assert bool((residual <= allowed).all())


def test_the_bound_covers_the_distance_and_needs_a_slope():
    s = draw(200)
    ends = torch.full_like(s, -50.0), torch.full_like(s, 50.0)
    exact = find_increasing(cubic, (s,), *ends).value
    options = {"tol": 1e-3, "least_slope": 1e-3}
    rough = find_increasing(cubic, (s,), *ends, **options)
    assert bool(((rough.value - exact).abs() <= rough.bound + 1e-12).all())
    assert bool(find_increasing(cubic, (s,), *ends).bound.isnan().all())


def test_a_bracket_without_a_root_is_flagged_not_clipped():
    s = torch.tensor([0.5, 1e3, float("nan")], dtype=torch.float64)
    ends = torch.full_like(s, -2.0), torch.full_like(s, 2.0)
    with pytest.raises(rootflow.NotConverged, match="2 of 3 samples"):
        find_increasing(cubic, (s,), *ends)
    found = find_increasing(cubic, (s,), *ends, on_failure="nan")
    assert found.converged.tolist() == [True, False, False]
    assert found.value.isnan().tolist() == [False, True, True]
    with pytest.warns(RuntimeWarning, match="2 of 3 samples"):
        find_increasing(cubic, (s,), *ends, on_failure="warn")


def test_elements_do_not_depend_on_each_other():
    s = draw(50)
    ends = torch.full_like(s, -50.0), torch.full_like(s, 50.0)
    together = find_increasing(logistic, (s,), *(1e3 * e for e in ends))
    for k in range(0, 50, 9):
        cut = slice(k, k + 1)
        alone = find_increasing(logistic, (s[cut],), *(1e3 * e[cut] for e in ends))
        assert torch.equal(alone.steps, together.steps[cut])
        torch.testing.assert_close(alone.value, together.value[cut])


def test_gradients_equal_finite_differences_to_second_order():
    s, a = draw(2, 3).requires_grad_(), draw(3, seed=1).requires_grad_()

    def root(s, a, adjoint="implicit"):
        low, high = torch.full_like(s, -100.0), torch.full_like(s, 100.0)
        return find_increasing(equation, (s, a), low, high, adjoint=adjoint).value

    def equation(y, s, a):
        return y + a.exp() * torch.tanh(y) - s, 1 + a.exp() * (1 - torch.tanh(y) ** 2)

    with torch.random.fork_rng():  # gradcheck draws
        assert torch.autograd.gradcheck(root, (s, a))
        assert torch.autograd.gradgradcheck(root, (s, a))
    assert not root(s, a, "none").requires_grad


def test_wrong_names_and_empty_batches():
    s = torch.zeros(0, 3)
    assert find_increasing(cubic, (s,), s, s).value.shape == (0, 3)
    with pytest.raises(ValueError, match="on_failure='ignore' is unknown"):
        find_increasing(cubic, (s,), s, s, on_failure="ignore")
    with pytest.raises(ValueError, match="adjoint='magic' is unknown"):
        find_increasing(cubic, (s,), s, s, adjoint="magic")
