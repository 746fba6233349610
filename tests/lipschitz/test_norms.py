"""The certified bound on operator norms: never below, seldom far above, differentiable twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rootflow.lipschitz import norm_bound, norms

DTYPES = [torch.float32, torch.float64]
SHAPES = [(1, 1), (1, 9), (9, 1), (2, 128), (17, 17), (128, 128), (300, 40), (170, 200)]
KINDS = ["random", "ill", "rank one", "huge", "tiny", "orthogonal", "zero", "equal"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def matrix(kind, m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=g, dtype=torch.float64)
    if kind == "ill":
        u, _, v = torch.linalg.svd(w, full_matrices=False)
        return u * torch.logspace(0, -12, min(m, n), dtype=torch.float64) @ v
    if kind == "orthogonal":
        u, _, v = torch.linalg.svd(w, full_matrices=False)
        return u @ v
    if kind == "rank one":
        return w[:, :1] * w[:1]
    scale = {"random": 1.0, "huge": 1e20, "tiny": 1e-20, "zero": 0.0, "equal": 0.0}[kind]
    return w * scale + (kind == "equal")


def check(w):
    """The bound against a float64 decomposition of the matrix as stored; the loss of the latter."""
    bound = float(norm_bound(w))
    truth = float(torch.linalg.matrix_norm(w.double(), 2))
    slack = 1e-14 if w.dtype == torch.float64 else 0.0  # the decomposition rounds, too
    assert bound >= truth * (1 - slack), (tuple(w.shape), bound / truth - 1)
    return bound, truth


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_never_below_the_norm(kind, dtype):
    for m, n in SHAPES:
        bound, truth = check(matrix(kind, m, n).to(dtype))
        assert bound <= truth * 1.025 + 1e-300 * (kind == "zero") + (kind == "zero") * 1e-30


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([1e-30, 1e-10, 1.0, 1e10]),
    dtype=st.sampled_from(DTYPES),
)
def test_never_below_the_norm_of_drawn_matrices(kind, m, n, seed, scale, dtype):
    check((matrix(kind, m, n, seed) * scale).to(dtype))


def test_a_batch_is_bounded_matrix_by_matrix():
    scaled = [matrix("random", 20, 30, k) * 10.0 ** (10 * k) for k in range(4)]
    w = torch.stack(scaled).view(2, 2, 20, 30)
    alone = torch.stack([norm_bound(m) for m in w.view(4, 20, 30)])
    torch.testing.assert_close(norm_bound(w), alone.view(2, 2), rtol=1e-13, atol=0)


def test_more_squarings_come_closer():
    w = matrix("random", 60, 60)
    bounds = [float(norm_bound(w, t)) for t in (2, 4, 6, 8)]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (1, 3), (18, 17), (17, 18)])
def test_derivatives_equal_finite_differences(shape):
    w = matrix("random", *shape).requires_grad_()
    with torch.random.fork_rng():  # gradcheck draws
        assert torch.autograd.gradcheck(norm_bound, w, fast_mode=True)
        assert torch.autograd.gradgradcheck(norm_bound, w, fast_mode=True)


@every_dtype
def test_gradients_are_finite_at_degenerate_matrices(dtype):
    for kind in KINDS:
        for shape in ((5, 3), (40, 30)):
            w = matrix(kind, *shape).to(dtype).requires_grad_()
            norm_bound(w).backward()
            assert torch.isfinite(w.grad).all(), kind


def test_a_large_matrix_is_bounded_by_proof():
    """Half a percent above the norm, and the gradient is that of the largest singular value."""
    w = matrix("random", 180, 170)
    w = (w + 30 * w[:, :1] * w[:1] / w[0, 0].abs()).requires_grad_()
    bound = norm_bound(w)
    bound.backward()
    u, s, v = torch.linalg.svd(w.detach())
    excess = bound.detach() / s[0]
    assert 1.004 < float(excess) < 1.006
    expected = torch.outer(u[:, 0], v[0]) * excess
    torch.testing.assert_close(w.grad, expected, rtol=1e-4, atol=1e-8)


def test_a_wrong_guess_is_noticed(monkeypatch):
    """Without a search the guess is the Rayleigh quotient of an arbitrary vector."""
    monkeypatch.setattr(norms, "KRYLOV", 0)
    bound, truth = check(matrix("random", 180, 170))
    assert bound < 1.03 * truth
