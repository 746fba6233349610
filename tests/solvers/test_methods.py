"""Root finding on problems with known roots: every method, every row, honest about failure."""

import pytest
import torch

import rootflow
from rootflow.solvers import METHODS, Problem, Solution, default_tolerance, find_root

DTYPES = [torch.float32, torch.float64]
every_method = pytest.mark.parametrize("method", sorted(METHODS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def equation(residual, *tensors, contraction):
    return Problem(residual, tensors, frozenset({0}), contraction)


def linear(dtype, rows=60, d=5, contraction=0.9):
    m = draw(d, d)
    m = (m * contraction / torch.linalg.matrix_norm(m, 2)).to(dtype)
    c = draw(rows, d, seed=1, dtype=dtype)
    return equation(lambda z, c, m: z + z @ m.T - c, c, m, contraction=contraction)


def sine(dtype, rows=60, d=3, contraction=0.97, hidden=40):
    """z + g(z) = c with a steep wavy net of slope at most the contraction."""
    a, b = draw(hidden, d), draw(d, hidden, seed=1)
    a, b = (w / torch.linalg.matrix_norm(w, 2) for w in (a, b))
    a, b = (a * 20).to(dtype), (b * contraction / 20).to(dtype)
    c = draw(rows, d, seed=2, dtype=dtype) * 3

    def residual(z, c, a, b):
        return z + torch.sin(z @ a.T) @ b.T - c

    return equation(residual, c, a, b, contraction=contraction)


def cubic(dtype, rows=60, d=1, contraction=0.99):
    """A scalar equation whose slope runs from nearly zero to two."""

    def residual(z, c):
        return z + contraction * (z.pow(3) / (1 + z * z) - z) - c  # slope in [-1, 1/8]

    return equation(residual, draw(rows, d, seed=3, dtype=dtype) * 10, contraction=contraction)


def flat_and_far(dtype, rows=60, d=4, contraction=0.9):
    """Rows from 1e-6 to 1e6 in one batch."""
    c = draw(rows, d, seed=4) * torch.logspace(-6, 6, rows, dtype=torch.float64)[:, None]
    g = torch.tanh
    return equation(lambda z, c: z - contraction * g(z) - c, c.to(dtype), contraction=contraction)


PROBLEMS = {f.__name__: f for f in (linear, sine, cubic, flat_and_far)}
every_problem = pytest.mark.parametrize("build", PROBLEMS.values(), ids=list(PROBLEMS))


def truth(problem, start):
    """Root in float64 to the last digits, by plain fixed-point iteration with averaging."""
    problem = Problem(problem.residual, tuple(t.double() for t in problem.tensors), problem.per_row)
    return find_root(problem, start.double(), method="newton", tol=1e-14, max_steps=3000).value


@every_problem
@every_dtype
@every_method
def test_every_row_converges_and_the_bound_is_true(build, method, dtype):
    problem = build(dtype)
    start = problem.tensors[0]
    found = find_root(problem, start, method=method, max_steps=5000)
    assert found.value.dtype == found.residual.dtype == dtype
    assert bool(found.converged.all())
    size = torch.linalg.vector_norm(found.value, dim=-1)
    assert bool((found.residual <= default_tolerance(dtype) * (1 + size)).all())
    again = torch.linalg.vector_norm(problem(found.value), dim=-1)
    rounding = 16 * torch.finfo(dtype).eps * (1 + size)
    assert bool(((found.residual - again).abs() <= rounding).all())
    distance = torch.linalg.vector_norm(found.value.double() - truth(problem, start), dim=-1)
    assert bool((distance <= found.bound + rounding / (1 - problem.contraction)).all())
    assert bool((found.steps >= 1).all())


@every_problem
def test_bounds_hold_far_from_the_root(build):
    """Where rounding plays no part the certificate alone must cover the distance."""
    problem = build(torch.float64)
    start = problem.tensors[0]
    with pytest.warns(RuntimeWarning, match="missed the tolerance"):
        rough = find_root(problem, start, method="fixed-point", max_steps=2, on_failure="warn")
    distance = torch.linalg.vector_norm(rough.value - truth(problem, start), dim=-1)
    assert bool((distance <= rough.bound * (1 + 1e-9) + 1e-12).all())


@every_method
def test_rows_do_not_depend_on_their_batch(method):
    problem = sine(torch.float64)
    c = problem.tensors[0]
    together = find_root(problem, c, method=method)
    for k in range(0, len(c), 7):
        alone = find_root(problem.rows(torch.tensor([k])), c[k : k + 1], method=method)
        torch.testing.assert_close(alone.value[0], together.value[k], rtol=1e-12, atol=1e-13)
    calm = flat_and_far(torch.float64)
    d = calm.tensors[0]
    again = find_root(calm, d, method=method, max_steps=999)
    half = calm.rows(torch.arange(0, 60, 2))
    half = find_root(half, d[::2], method=method, max_steps=999)
    assert torch.equal(half.steps, again.steps[::2])


@every_method
def test_a_ruined_row_harms_nobody_and_is_reported(method):
    problem = sine(torch.float64)
    c = problem.tensors[0].clone()
    clean = find_root(problem, c, method=method)
    c[7], c[11] = torch.nan, torch.inf
    ruined = equation(problem.residual, c, *problem.tensors[1:], contraction=0.97)
    with pytest.warns(RuntimeWarning, match=r"2 of 60 samples missed .*; look for NaN or infinity"):
        found = find_root(ruined, c, method=method, on_failure="warn")
    good = torch.ones(60, dtype=torch.bool)
    good[[7, 11]] = False
    assert torch.equal(found.converged, good)
    torch.testing.assert_close(found.value[good], clean.value[good], rtol=1e-12, atol=1e-12)
    whole = Problem(ruined.residual, ruined.tensors, None, 0.97)  # rows stay in the batch
    again = find_root(whole, c, method=method, on_failure="nan")
    assert torch.equal(again.converged, good)
    torch.testing.assert_close(again.value[good], clean.value[good], rtol=1e-12, atol=1e-12)
    assert bool(again.value[~good].isnan().all())


def test_a_singular_row_falls_back_to_the_safe_step():
    c = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    problem = Problem(lambda z, c: z - torch.sin(z) * (c == 0) - c, (c,), frozenset({0}))
    start = torch.tensor([[0.0], [3.0]], dtype=torch.float64)  # slope zero at the root itself
    assert bool(find_root(problem, start, method="newton").converged.all())
    start = torch.tensor([[2 * torch.pi], [3.0]], dtype=torch.float64)  # and far from it
    found = find_root(problem, start, method="newton", on_failure="nan")
    assert bool(found.converged[1])


@every_method
@pytest.mark.parametrize("reaction", ["raise", "warn", "nan"])
def test_a_solve_that_stops_early_says_so(method, reaction):
    problem = sine(torch.float64)
    c = problem.tensors[0]
    message = (
        r"\d+ of 60 samples missed the tolerance in [34] steps "
        r"\(worst residual \d.*, sample \d+\); allow more max_steps"
    )
    options = {"method": method, "max_steps": 3, "on_failure": reaction}
    if reaction == "raise":
        with pytest.raises(rootflow.NotConverged, match=message):
            find_root(problem, c, **options)
        return
    if reaction == "warn":
        with pytest.warns(RuntimeWarning, match=message):
            found = find_root(problem, c, **options)
        assert bool(found.value.isfinite().all())
    else:
        found = find_root(problem, c, **options)
        assert torch.equal(found.value.isnan().any(-1), ~found.converged)
    assert not bool(found.converged.all())
    tolerance = default_tolerance(torch.float64) * (1 + torch.linalg.vector_norm(c, dim=-1) * 4)
    assert bool((found.residual[~found.converged] > tolerance[~found.converged] / 8).all())


def test_wrong_names_are_answered_with_the_right_ones():
    c = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="method='bisect' is unknown; choose one of fixed"):
        find_root(lambda z: z, c, method="bisect")
    with pytest.raises(ValueError, match="on_failure='ignore' is unknown; choose one of raise"):
        find_root(lambda z: z, c, on_failure="ignore")
    with pytest.raises(ValueError, match="adjoint='magic' is unknown"):
        find_root(lambda z: z, c, adjoint="magic")


@every_method
@every_dtype
def test_a_plain_function_and_an_empty_batch_are_fine(method, dtype):
    start = draw(8, 3, dtype=dtype)
    before = start.clone()
    found = find_root(lambda z: z + 0.5 * torch.sin(z) - 1, start, method=method)
    assert isinstance(found, Solution)
    assert bool(found.converged.all())
    assert bool(found.bound.isnan().all())  # no contraction, no certificate
    assert torch.equal(start, before)
    empty = find_root(lambda z: z + 0.5 * torch.sin(z) - 1, start[:0], method=method)
    assert empty.value.shape == (0, 3)
    assert empty.converged.shape == (0,)


def test_damped_newton_arrives_where_full_steps_do_not():
    """The slope of a convex function that is flat but for a narrow, steep part."""
    c = torch.linspace(-9, 9, 61, dtype=torch.float64)[:, None]
    problem = Problem(lambda z, c: 0.01 * z + 5 * torch.tanh(30 * z) - c, (c,), frozenset({0}))
    start = torch.full_like(c, 3.0)
    found = find_root(problem, start, method="damped-newton", max_steps=200)
    assert bool(found.converged.all())
    torch.testing.assert_close(problem(found.value), torch.zeros_like(c), rtol=0, atol=1e-11)
    with pytest.raises(rootflow.NotConverged):
        find_root(problem, start, method="newton", max_steps=200)


def test_broyden_ends_on_a_linear_equation_within_twice_the_dimension():
    """Gay 1979 (SIAM J. Numer. Anal. 16:623): at most 2 d steps, where no step is replaced."""
    problem = linear(torch.float64)
    found = find_root(problem, problem.tensors[0], method="broyden")
    assert int(found.steps.median()) <= 2 * 5 + 1


@every_problem
def test_a_rough_equation_only_moves_the_start(build):
    """Rounded to bfloat16, or without a finite value anywhere: the same root, found from nearer."""
    problem = build(torch.float32)
    start = torch.zeros_like(problem.tensors[0])
    exact = find_root(problem, start, on_failure="warn")
    used = []

    def rounded(z, *tensors):
        used.append(len(z))
        return problem.residual(z, *tensors).bfloat16().float()

    for rough in (rounded, lambda z, *tensors: torch.full_like(z, torch.inf)):
        equation = Problem(rough, problem.tensors, problem.per_row)
        found = find_root(problem, start, rough=equation)
        assert bool(found.converged.all())
        gap = torch.linalg.vector_norm(found.value - exact.value, dim=-1)
        assert bool((gap <= found.bound + exact.bound + 1e-6 * (1 + exact.value.norm())).all())
    assert 1 < len(used) <= 16
