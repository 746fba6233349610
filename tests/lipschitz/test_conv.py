"""The certified bound on zero-padded convolutions against the operator assembled in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rootflow.lipschitz import conv, conv_bound, norm_bound

DTYPES = [torch.float32, torch.float64]
KINDS = [
    "random", "smooth", "edge", "rank one", "orthogonal", "shift", "huge", "tiny", "zero", "equal",
]  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(kind, m, n, rows=3, columns=3, seed=0):
    w = draw(m, n, rows, columns, seed=seed)
    if kind == "smooth":
        return w[:, :, :1, :1] + 0.1 * w
    if kind == "edge":
        return w[:, :, :1, :1] * torch.linspace(-1, 1, rows, dtype=w.dtype)[:, None].expand(
            rows, columns
        )
    if kind == "rank one":
        return w[:, :1, :1, :1] * w[:1]
    if kind == "orthogonal":
        u, _, v = torch.linalg.svd(w.flatten(1), full_matrices=False)
        return (u @ v).view_as(w)
    if kind == "shift":  # one pixel to the side and down, channels permuted
        corner = F.one_hot(torch.tensor(rows * columns - 1)).double().view(rows, columns)
        return torch.zeros_like(w).index_put_((torch.arange(m), torch.arange(m) % n), corner)
    scale = {"random": 1.0, "huge": 1e20, "tiny": 1e-20, "zero": 0.0, "equal": 0.0}[kind]
    return w * scale + (kind == "equal")


def truth(w, image, stride=1):
    """Largest singular value of the whole operator, the kernel as stored."""
    unit = torch.eye(w.shape[1] * image[0] * image[1], dtype=torch.float64)
    padding = w.shape[2] // 2, w.shape[3] // 2
    out = F.conv2d(unit.view(-1, w.shape[1], *image), w.double(), None, stride, padding).flatten(1)
    gram = out @ out.t() if out.shape[0] < out.shape[1] else out.t() @ out
    return float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt())


def check(w, image, slack=torch.inf):
    bound, exact = float(conv_bound(w, image)), truth(w, image)
    assert bound >= exact, (tuple(w.shape), image, bound / exact - 1)
    assert bound <= exact * (1 + slack) or exact == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_never_below_the_norm_of_the_operator(kind, dtype):
    for m, n in ((3, 9), (9, 3), (20, 2), (1, 1)):
        for image in ((1, 1), (1, 6), (4, 4), (5, 7)):
            check(kernel(kind, m, n).to(dtype), image)
        check(kernel(kind, m, n).to(dtype), (7, 8), slack=0.09)


@settings(max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    taps=st.sampled_from([(1, 3), (3, 1), (3, 3), (5, 5), (5, 3)]),
    image=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    scale=st.sampled_from([1e-15, 1.0, 1e10]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_never_below_for_drawn_kernels(kind, m, n, taps, image, scale, dtype, seed):
    check((kernel(kind, m, n, *taps, seed=seed) * scale).to(dtype), image)


@pytest.mark.parametrize("step", [0, 25])
def test_within_five_percent_of_the_norm_after_training(step):
    """Two layers taught to sharpen, Adam at a high rate, images of 4 x 4 to 8 x 8 pixels."""
    first, last = kernel("random", 24, 4).mul_(0.1), kernel("random", 4, 24).mul_(0.05)
    parameters = [first.requires_grad_(), last.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    for k in range(step):
        x = draw(32, 4, 8, 8, seed=k)
        target = 2 * x - F.avg_pool2d(x, 3, 1, 1)
        found = F.conv2d(torch.tanh(F.conv2d(x, first, padding=1)), last, padding=1)
        optimizer.zero_grad()
        (found - target).square().mean().backward()
        optimizer.step()
    for w in parameters:
        for image in ((4, 4), (7, 7), (8, 8)):
            check(w.detach().float(), image, slack=0.05)


def test_gluing_with_a_change_of_sign_tightens_small_images():
    """Averaging on 8 x 8 pixels: the plain torus is 9 % too large."""
    w = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    check(w, (8, 8), slack=1e-3)
    assert float(w.sum()) > 1.08 * truth(w, (8, 8))


def test_peaks_between_few_frequencies_are_bounded(monkeypatch):
    monkeypatch.setattr(conv, "LARGEST", 12)
    for seed in range(10):
        for kind in ("random", "smooth", "edge"):
            check(kernel(kind, 2, 1, seed=seed), (16, 18), slack=0.2)


def test_a_wrong_guess_of_the_peak_is_noticed(monkeypatch):
    """Without the best candidates the factorisation must send us to what it refuses."""
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda t, k: topk(t, k, largest=False))
    for seed in range(5):
        check(kernel("random", 6, 5, seed=seed), (6, 6))


def test_pointwise_kernels_are_matrices_and_strides_only_drop_rows():
    w = kernel("random", 30, 20, 1, 1)
    torch.testing.assert_close(conv_bound(w, (9, 9)), norm_bound(w[:, :, 0, 0]))
    w = kernel("random", 5, 4)
    assert float(conv_bound(w, (8, 8))) >= truth(w, (8, 8), stride=2)


@pytest.mark.parametrize(("m", "n"), [(4, 3), (3, 4), (2, 20)])
def test_derivatives_equal_finite_differences(m, n):
    w = kernel("random", m, n).requires_grad_()
    with torch.random.fork_rng():  # gradcheck draws
        assert torch.autograd.gradcheck(lambda w: conv_bound(w, (5, 6)), w, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda w: conv_bound(w, (5, 6)), w, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_finite_at_degenerate_kernels(dtype):
    for kind in KINDS:
        w = kernel(kind, 5, 4).to(dtype).requires_grad_()
        conv_bound(w, (6, 6)).backward()
        assert torch.isfinite(w.grad).all(), kind


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel has 2 x 3 taps; both numbers must be odd"):
        conv_bound(torch.ones(1, 1, 2, 3), (4, 4))
