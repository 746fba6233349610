"""Rational-quadratic splines: no NaN, exact log-slopes, hand-written gradients, both directions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rootflow.transforms.spline import FEW, LEAST, Spline

every_tails = pytest.mark.parametrize("tails", ["linear", "bounded", "circular"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
directions = pytest.mark.parametrize("direction", ["forward", "inverse"])
drawn = given(
    seed=st.integers(0, 2**20),
    bins=st.sampled_from([2, 3, 5, 8, 16, 70]),
    interval=st.sampled_from([0.3, 1.0, 3.0, math.pi, 32.0, 64.0]),
    std=st.sampled_from([0.1, 1.0, 3.0, 10.0]),
)


def draw(spline, n, std, seed=0, dtype=torch.float64, reach=1.2):
    """Points on and around the interval and wild parameters."""
    generator = torch.Generator().manual_seed(seed)
    x = (2 * torch.rand(n, generator=generator, dtype=dtype) - 1) * spline.interval * reach
    return x, torch.randn(spline.size, n, generator=generator, dtype=dtype) * std


def edges(spline, theta, inverse):
    """For each column of theta the knots, the float above and below each, and far points."""
    raw = theta[: 2 * spline.bins].view(2, spline.bins, -1)
    knots = spline._knots(raw)[0][int(inverse)]
    far = torch.tensor([math.inf, -math.inf, 3e38, -3e38, 0.0, 1e-45], dtype=theta.dtype)
    beside = [torch.nextafter(knots, torch.full_like(knots, e)) for e in (math.inf, -math.inf)]
    return torch.cat([knots, *beside, far[:, None].expand(-1, knots.shape[1])])


def distance(spline, a, b):
    """Of two points; on a circle both ends of the interval are the same."""
    gap = (a - b).abs()
    if spline.tails != "circular":
        return gap
    return torch.minimum(gap, (2 * spline.interval - gap).abs())


def _close(spline, found, wanted):
    """Equal to rounding, which slopes and their inverses enlarge."""
    (out, log_slope), (image, log_other) = found, wanted
    reach = torch.finfo(out.dtype).eps * (1 + log_slope.abs().exp())
    assert (distance(spline, out, image) <= 100 * reach * spline.interval).all()
    assert ((log_slope - log_other).abs() <= 3e4 * reach).all()


@every_tails
@every_dtype
@drawn
def test_knots_bounds_and_far_points_are_finite_with_finite_gradients(
    tails, dtype, seed, bins, interval, std
):
    spline = Spline(bins, interval, tails)
    _, theta = draw(spline, 20, std, seed, dtype)
    for inverse, call in enumerate((spline.forward, spline.inverse)):
        x = edges(spline, theta, inverse).requires_grad_()
        wide = theta[:, None].expand(-1, *x.shape).clone().requires_grad_()
        out, log_slope = call(x, wide)
        assert torch.equal(out.isinf(), x.isinf())
        assert not out.isnan().any()
        assert log_slope.isfinite().all()
        outside = x.abs() > interval
        assert torch.equal(out[outside], x[outside])
        assert (log_slope[outside] == 0).all()
        assert (out[~outside].abs() <= interval).all()
        total = torch.where(x.isinf(), 0.0, out).sum() + log_slope.sum()
        g_x, g_theta = torch.autograd.grad(total, (x, wide))
        assert g_x.isfinite().all()
        assert g_theta.isfinite().all()
        assert (g_x[outside & x.isfinite()] == 1).all()
        assert (g_theta[:, outside] == 0).all()


@every_tails
@pytest.mark.parametrize("std", [0.1, 1.0, 3.0, 10.0])
def test_no_nan_among_very_many_points_and_small_round_trip_error(tails, std):
    # Twice what was seen among 10 million points for interval 5; the floor is one rounding of x
    # times the steepest slope, about 400 where parameters are wild.
    largest = {0.1: 3e-6, 1.0: 6e-5, 3.0: 2e-4, 10.0: 2e-4}[std]
    for interval in (1.0, 3.0, 32.0, 64.0):
        spline = Spline(8, interval, tails)
        y, theta = draw(spline, 10_000, std, int(interval), torch.float32)
        x, log_inverse = spline.inverse(y, theta)
        z, log_slope = spline.forward(y, theta)
        for part in (x, log_inverse, z, log_slope):
            assert part.isfinite().all()
        error = distance(spline, spline.forward(x, theta)[0], y)
        assert float(error.max()) <= largest * interval / 5


@every_tails
@directions
def test_nan_stays_where_it_was(tails, direction):
    spline = Spline(tails=tails)
    x, theta = draw(spline, 7, 1.0)
    x[3] = math.nan
    x.requires_grad_()
    theta.requires_grad_()
    out, log_slope = getattr(spline, direction)(x, theta)
    assert out.isnan().tolist() == [k == 3 for k in range(7)]
    kept = torch.arange(7) != 3
    g_x, g_theta = torch.autograd.grad((out + log_slope)[kept].sum(), (x, theta))
    assert g_x.isfinite().all()
    assert g_theta.isfinite().all()
    assert (g_theta[:, 3] == 0).all()


@every_tails
@every_dtype
def test_the_start_is_the_identity(tails, dtype):
    spline = Spline(7, 3.0, tails)
    x, _ = draw(spline, 1000, 1.0, dtype=dtype)
    theta = spline.initial().to(dtype)[:, None].expand(-1, 1000)
    for call in (spline.forward, spline.inverse):
        out, log_slope = call(x, theta)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out, x, rtol=0, atol=8 * eps)
        torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=8 * eps)


@every_tails
@drawn
def test_both_directions_undo_each_other_and_their_log_slopes_cancel(
    tails, seed, bins, interval, std
):
    spline = Spline(bins, interval, tails)
    x, theta = draw(spline, 300, std, seed)
    z, log_slope = spline.forward(x, theta)
    back, log_inverse = spline.inverse(z, theta)
    flat = log_slope.neg().exp()  # a rounding of z returns this many times as large
    assert (distance(spline, back, x) <= 1e-14 * interval * (10 + flat)).all()
    torch.testing.assert_close(log_slope, -log_inverse, rtol=0, atol=1e-6)


@every_tails
@drawn
def test_log_slope_is_that_of_autograd(tails, seed, bins, interval, std):
    spline = Spline(bins, interval, tails)
    x, theta = draw(spline, 300, std, seed)
    x.requires_grad_()
    for call in (spline.forward, spline.inverse):
        out, log_slope = call(x, theta)
        (slope,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(log_slope.exp(), slope, rtol=1e-9, atol=0)
        out, log_slope = spline.plain(x, theta, call == spline.inverse)
        (slope,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(log_slope.exp(), slope, rtol=1e-9, atol=0)


@every_tails
@every_dtype
@pytest.mark.parametrize("std", [0.1, 1.0, 10.0])
def test_few_points_take_a_shorter_way_to_the_same(tails, dtype, std):
    spline = Spline(8, 3.0, tails)
    x, theta = draw(spline, FEW, std, 0, dtype)
    for inverse, call in enumerate((spline.forward, spline.inverse)):
        out, log_slope = call(x, theta)
        wanted, wanted_slope, _ = spline.run(x, theta, bool(inverse))
        _close(spline, (out, log_slope), (wanted, wanted_slope))


@every_tails
@every_dtype
@drawn
def test_hand_written_and_plain_formulas_agree(tails, dtype, seed, bins, interval, std):
    spline = Spline(bins, interval, tails)
    x, theta = draw(spline, 200, std, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    upstream = tuple(torch.randn(2, 200, generator=generator, dtype=dtype))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-2
    for inverse, call in enumerate((spline.forward, spline.inverse)):
        lean = spline.run(x, theta, bool(inverse))[:2]
        inputs = (x.clone().requires_grad_(), theta.clone().requires_grad_())
        hand, plain = call(*inputs), spline.plain(*inputs, bool(inverse))
        assert all(torch.equal(a, b) for a, b in zip(lean, hand, strict=True))
        _close(spline, plain, lean)
        found = torch.autograd.grad(hand, inputs, upstream)
        wanted = torch.autograd.grad(plain, inputs, upstream)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        alone = [torch.autograd.grad(call(x, inputs[1]), inputs[1], upstream)[0]]
        alone.insert(0, torch.autograd.grad(call(inputs[0], theta), inputs[0], upstream)[0])
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


@every_tails
@directions
@pytest.mark.parametrize("std", [0.3, 2.0])
def test_gradients_equal_finite_differences(tails, direction, std):
    for bins, interval in ((2, 1.0), (4, 3.0)):
        spline = Spline(bins, interval, tails)
        x, theta = draw(spline, 6, std, seed=bins)
        inputs = (x.requires_grad_(), theta.requires_grad_())
        call = getattr(spline, direction)
        with torch.random.fork_rng():  # both checks draw
            assert torch.autograd.gradcheck(call, inputs, eps=1e-7, atol=1e-6, rtol=1e-6)
            if std < 1:
                assert torch.autograd.gradgradcheck(call, inputs, atol=1e-4, rtol=1e-4)


@every_tails
@directions
def test_compiled_in_one_graph_it_is_the_same(tails, direction):
    spline = Spline(3, 2.0, tails)
    x, theta = draw(spline, 50, 1.0)
    inputs = (x.requires_grad_(), theta.requires_grad_())
    call = getattr(spline, direction)
    eager = call(*inputs)
    distribution = torch.distributions.Distribution  # whose checks torch.compile switches off
    checks = distribution._validate_args
    with torch.random.fork_rng():  # compiling draws
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    distribution.set_default_validate_args(checks)
    wanted = torch.autograd.grad(eager, inputs, (x, x))
    found = torch.autograd.grad(compiled, inputs, (x, x))
    for a, b in zip((*compiled, *found), (*eager, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every_tails
def test_function_transforms_give_per_sample_gradients(tails):
    spline = Spline(4, 2.0, tails)
    x, theta = draw(spline, 6, 1.0)

    def log_slope(x, theta):
        return spline.forward(x, theta)[1]

    each = torch.func.vmap(torch.func.grad(log_slope, argnums=1), (0, 1), 1)(x, theta)
    theta.requires_grad_()
    (whole,) = torch.autograd.grad(log_slope(x, theta).sum(), theta)
    torch.testing.assert_close(each, whole)


@every_tails
def test_any_shape_and_one_alone_equals_one_of_many(tails):
    spline = Spline(5, 2.0, tails)
    x, theta = draw(spline, 24, 3.0, dtype=torch.float32)
    whole = torch.stack(spline.forward(x, theta))
    for shape in ((2, 3, 4), (24, 1), (4, 6)):
        shaped = spline.forward(x.view(shape), theta.view(-1, *shape))
        assert torch.equal(torch.stack(shaped).view(2, 24), whole)
    turned = spline.forward(x.view(4, 6).mT, theta.view(-1, 4, 6).mT)  # not contiguous
    turned = torch.stack(turned).mT.reshape(2, 24)
    torch.testing.assert_close(turned, whole, rtol=1e-6, atol=1e-6)  # other lanes of a vector
    alone = [torch.stack(spline.forward(x[k], theta[:, k])) for k in range(24)]
    torch.testing.assert_close(torch.stack(alone, 1), whole, rtol=1e-6, atol=1e-6)
    assert spline.inverse(x[:0], theta[:, :0])[0].shape == (0,)
    half = spline.forward(x, theta.bfloat16())
    assert all(part.dtype == torch.float32 for part in half)


@every_tails
@drawn
def test_it_increases_from_end_to_end(tails, seed, bins, interval, std):
    spline = Spline(bins, interval, tails)
    _, theta = draw(spline, 1, std, seed)
    x = torch.linspace(-interval, interval, 2001, dtype=torch.float64)
    z, log_slope = spline.forward(x, theta.expand(-1, 2001))
    steps = z.diff()
    if tails == "circular":
        assert int((steps < 0).sum()) <= 1  # where the rotation carries points across the cut
        torch.testing.assert_close(log_slope[0], log_slope[-1])
        steps = torch.where(steps < 0, steps + 2 * interval, steps)
    else:
        assert (z[[0, -1]].abs() - interval).abs().max() < 1e-14 * interval
    assert (steps >= 0).all()
    assert float(steps.sum()) == pytest.approx(2 * interval)
    if tails == "linear":
        assert float(log_slope[[0, -1]].abs().max()) < 1e-12


def test_the_rotation_moves_every_point_of_the_circle():
    spline = Spline(4, math.pi, "circular")
    theta = spline.initial().double()
    theta[-1] = 0.5
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    z, log_slope = spline.forward(x, theta[:, None].expand(-1, 50))
    torch.testing.assert_close(torch.exp(1j * z), torch.exp(1j * (x + math.pi / 2)))
    assert float(log_slope.abs().max()) < 1e-12


@every_tails
def test_a_steep_and_a_flat_target_are_within_reach(tails):
    """Shares go through one softmax only: a bin can stretch 190 times, a knot 1,000 times."""
    spline = Spline(8, 5.0, tails)
    theta = spline.initial().double()
    theta[0], theta[8] = -30.0, 30.0  # narrow and high
    x, z = -4.975, -0.175
    found, log_slope = spline.forward(torch.tensor(x).double(), theta)
    assert float(log_slope) > math.log(190)
    assert float(found) == pytest.approx(z, abs=0.5)
    theta[16:] = -30.0
    flat = spline.forward(torch.tensor(0.0).double(), spline.initial().double() + theta * 0)[1]
    assert abs(float(flat)) < 1e-12
    knot = 0.0  # equal bins: a knot lies in the middle
    theta = spline.initial().double()
    theta[16:-1] = -30.0
    theta[-1] = 0.0 if tails == "circular" else -30.0
    low = spline.forward(torch.tensor(knot).double(), theta)[1]
    assert float(low) == pytest.approx(math.log(LEAST), abs=1e-6)


def test_training_reaches_a_steep_step():
    """Fit one map to the quantiles of a density with a slope of 100 in the middle."""
    spline = Spline(8, 3.0)
    x = torch.linspace(-2.9, 2.9, 512)
    target = 2 * torch.tanh(50 * x) + 0.3 * x
    theta = spline.initial()[:, None].clone().requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        loss = (spline.forward(x, theta.expand(-1, 512))[0] - target).square().mean()
        loss.backward()
        optimiser.step()
    steepest = spline.forward(x, theta.expand(-1, 512))[1].max()
    assert float(loss.detach()) < 0.02
    assert float(steepest.detach()) > math.log(30)


@settings(max_examples=10)
@given(scale=st.sampled_from([1e2, 1e5, 1e20, 3e37]), seed=st.integers(0, 1000))
def test_parameters_of_any_size_give_a_finite_map(scale, seed):
    for tails in ("linear", "bounded", "circular"):
        spline = Spline(6, 3.0, tails)
        x, theta = draw(spline, 100, 1.0, seed, torch.float32)
        inputs = (x.requires_grad_(), (theta * scale).requires_grad_())
        for call in (spline.forward, spline.inverse):
            out, log_slope = call(*inputs)
            assert out.isfinite().all()
            assert log_slope.isfinite().all()
            for g in torch.autograd.grad(out.sum() + log_slope.sum(), inputs):
                assert g.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Spline(1), "bins=1 must be between 2 and 500"),
        (lambda: Spline(8, -1.0), "interval=-1.0 must be positive"),
        (lambda: Spline(8, math.nan), "interval=nan"),
        (lambda: Spline(tails="free"), "choose one of linear, bounded, circular"),
        (lambda: Spline().forward(torch.zeros(3), torch.zeros(24, 3)), r"needs \(23, 3\)"),
    ],
)
def test_wrong_use_names_what_would_be_right(call, message):
    with pytest.raises(ValueError, match=message):
        call()
