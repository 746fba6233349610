"""Coupling flows: exact log-determinants, kept intervals, no column left out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rootflow
from rootflow.bases import Uniform
from rootflow.transforms import Affine, Coupling, Scale, Shift, Spline, Standardise
from rootflow.transforms.conditioners import Network

NAMES = ("nice", "realnvp", "glow", "nsf-coupling")
BOUNDED = ("bounded", "circular")
EDGE = 3.0


def wild(name, features, context=0, *, seed=0, spread=0.3, dtype=torch.float64, **options):
    """A flow with all parameters moved away from their start."""
    options = {"blocks": 3, "hidden": (8, 8), **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = rootflow.flow(name, features, context, **options).to(dtype)
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(torch.randn_like(p) * spread)
    return flow.eval()


def on_interval(tails, features, context=0, **options):
    return wild("nsf-coupling", features, context, tails=tails, interval=EDGE, **options)


def points(rows, features, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator, dtype=dtype) * scale


def inside(rows, features, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(rows, features, generator=generator, dtype=dtype) - 1) * EDGE


def slogdet(flow, x, context=None):
    def one(k):
        c = None if context is None else context[k : k + 1]
        return torch.autograd.functional.jacobian(lambda v: flow(v[None], c)[0][0], x[k])

    return torch.linalg.slogdet(torch.stack([one(k) for k in range(len(x))]))


@pytest.fixture
def unchanged_validation():
    """Tracing switches the validation of torch's distributions off, for everybody."""
    before = torch.distributions.Distribution._validate_args
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


every_flow = pytest.mark.parametrize("name", NAMES)
every_bound = pytest.mark.parametrize("tails", BOUNDED)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@every_flow
@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**20),
    features=st.integers(1, 7),
    context=st.sampled_from([0, 2]),
    activation=st.sampled_from(["relu", "silu", "tanh"]),
    residual=st.booleans(),
    spread=st.sampled_from([0.1, 0.25]),
)
def test_log_det_is_that_of_the_jacobian_and_cancels(name, features, context, seed, **options):
    flow = wild(name, features, context, seed=seed, **options)
    x = points(5, features, seed)
    c = points(5, context, seed + 1) if context else None
    z, log_det = flow(x, c)
    exact, y = torch.zeros_like(log_det), x
    for part in flow.transform.transforms:  # the product of all is too ill-conditioned for slogdet
        own = c if part.context else None
        exact = exact + slogdet(part, y, own).logabsdet
        y = part(y, own)[0].detach()
    torch.testing.assert_close(log_det, exact, rtol=1e-9, atol=1e-9)
    back, log_det_back = flow.inverse(z, c)
    # slopes reach 1e3 and 1e-3 in each block: the way back is as well posed as that allows
    again, _ = flow(back, c)
    torch.testing.assert_close(again, z, rtol=1e-8, atol=1e-8)
    if options["spread"] == 0.1:
        torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(log_det_back, -log_det, rtol=1e-7, atol=1e-7)


@every_bound
@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("linear", ["permute", "reverse", None])
def test_log_det_on_an_interval(tails, features, linear):
    for seed in range(3):
        flow = on_interval(tails, features, 2, seed=seed, spread=0.15, linear=linear)
        x, c = inside(5, features, seed), points(5, 2, seed)
        z, log_det = flow(x, c)
        exact = slogdet(flow, x, c)
        torch.testing.assert_close(log_det, exact.logabsdet, rtol=1e-9, atol=1e-9)
        assert float(z.detach().abs().max()) <= EDGE
        back, log_det_back = flow.inverse(z, c)
        torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(log_det_back, -log_det, rtol=1e-8, atol=1e-8)


@every_flow
@every_dtype
@pytest.mark.parametrize("linear", ["lu", "reverse", "permute", None])
def test_round_trip(name, dtype, linear):
    options = {} if name == "glow" else {"linear": linear, "actnorm": True}
    flow = wild(name, 5, 3, dtype=dtype, spread=0.1, **options)
    x, c = points(50, 5, dtype=dtype), points(50, 3, 1, dtype)
    z, log_det = flow(x, c)
    back, log_det_back = flow.inverse(z, c)
    assert z.dtype == log_det.dtype == back.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_det_back, -log_det, rtol=tolerance, atol=tolerance)


def test_the_conditioner_runs_once_per_block_and_direction(monkeypatch):
    flow, calls = wild("realnvp", 4), []
    run = Network.run
    monkeypatch.setattr(Network, "run", lambda *args: calls.append(1) or run(*args))
    flow(points(3, 4))
    assert len(calls) == 3
    flow.inverse(points(3, 4))
    assert len(calls) == 6


@pytest.mark.parametrize("features", [2, 3, 6])
def test_one_block_leaves_its_drivers_and_moves_the_rest(features):
    half = features // 2
    for flip in (False, True):
        with torch.random.fork_rng(devices=[]):
            block = Coupling(features, Affine(), hidden=(4,), flip=flip).double()
            with torch.no_grad():
                for p in block.parameters():
                    p.add_(torch.randn_like(p))
        x = points(4, features)
        z, _ = block(x)
        fixed = slice(half, None) if flip else slice(half)
        moved = slice(half) if flip else slice(half, None)
        assert torch.equal(z[:, fixed], x[:, fixed])
        assert bool((z[:, moved] != x[:, moved]).all())


@every_flow
@pytest.mark.parametrize("features", [2, 3, 7])
@pytest.mark.parametrize("linear", ["reverse", "permute", None])
def test_four_blocks_let_every_column_depend_on_every_column_and_on_the_context(
    name, features, linear
):
    options = {} if name == "glow" else {"linear": linear}
    for seed in range(4):
        flow = wild(name, features, 1, seed=seed, blocks=4, activation="tanh", **options)
        x, c = points(1, features, seed, scale=0.3), points(1, 1, seed, scale=0.3)
        by_x, by_c = torch.autograd.functional.jacobian(lambda x, c, f=flow: f(x, c)[0][0], (x, c))
        assert bool((by_x != 0).all())
        assert bool((by_c != 0).all())


@every_flow
def test_a_fresh_flow_only_reorders_and_standardises(name):
    with torch.random.fork_rng(devices=[]):
        flow = rootflow.flow(name, 5).double().eval()
    x = points(6, 5)
    z, log_det = flow(x)
    torch.testing.assert_close(z.sort(-1).values, x.sort(-1).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=1e-5)


@pytest.mark.parametrize("features", [63])
@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_pairs_of_blocks_transform_every_column_under_random_orders(name, features):
    options = {} if name == "glow" else {"linear": "permute"}
    with torch.random.fork_rng(devices=[]):
        flow = rootflow.flow(name, features, blocks=2, hidden=(4,), **options).double()
        for part in flow.modules():
            if isinstance(part, Coupling):
                part.net.pieces(part.net.values.data)[-1][0][0].add_(
                    1.0
                )  # moves what it transforms
    start, _ = flow(torch.zeros(1, features, dtype=torch.float64))
    assert bool((start != 0).all())


@every_flow
@pytest.mark.parametrize("context", [0, 2])
def test_one_column_is_an_elementwise_map(name, context):
    flow = wild(name, 1, context)
    grid = torch.linspace(-30, 30, 80_001, dtype=torch.float64)
    c = points(1, 2).expand(len(grid), 2) if context else None
    with torch.no_grad():
        z, _ = flow(grid[:, None], c)
        mass = torch.trapezoid(flow.log_prob(grid[:, None], c).exp(), grid)
    assert bool((z.diff(dim=0) > 0).all())
    assert abs(float(mass) - 1) < 1e-5
    if context:
        middle = grid[40_000:40_003, None]
        assert not torch.equal(flow(middle, c[:3])[0], flow(middle, -c[:3])[0])
    flow.log_prob(grid[:10, None], None if c is None else c[:10]).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


@every_bound
def test_densities_on_an_interval_integrate_to_one(tails):
    for seed in range(2):
        flow = on_interval(tails, 1, seed=seed, spread=0.6)
        grid = torch.linspace(-EDGE, EDGE, 20_001, dtype=torch.float64)
        with torch.no_grad():
            mass = torch.trapezoid(flow.log_prob(grid[:, None]).exp(), grid)
        assert abs(float(mass) - 1) < 1e-4
        flow = on_interval(tails, 2, seed=seed)
        cells = 600
        middle = (torch.arange(cells, dtype=torch.float64) + 0.5) * (2 * EDGE / cells) - EDGE
        x, y = torch.meshgrid(middle, middle, indexing="ij")
        with torch.no_grad():
            density = flow.log_prob(torch.stack([x, y], -1)).exp()
        assert abs(float(density.sum()) * (2 * EDGE / cells) ** 2 - 1) < 2e-3


@pytest.mark.parametrize("features", [1, 2, 4])
def test_a_circular_flow_does_not_see_where_the_circle_was_cut(features):
    flow = on_interval("circular", features, spread=0.6)
    x = inside(8, features)
    low, high = x.clone(), x.clone()
    low[:, 0], high[:, 0] = -EDGE, EDGE
    torch.testing.assert_close(flow.log_prob(low), flow.log_prob(high), rtol=1e-9, atol=1e-9)
    z_low, z_high = flow(low)[0], flow(high)[0]
    angles = math.pi / EDGE * (z_low - z_high)
    torch.testing.assert_close(angles.cos(), torch.ones_like(angles), rtol=1e-9, atol=1e-9)


@every_bound
@every_dtype
def test_minus_infinity_outside_and_gradients_untouched_inside(tails, dtype):
    flow = on_interval(tails, 3, dtype=dtype, spread=0.6)
    good = inside(4, 3, dtype=dtype)
    good[0], good[1] = EDGE, -EDGE  # the ends belong to the interval
    bad = inside(6, 3, 1, dtype)
    values = (3.1, -40.0, 1e30, -math.inf, math.inf, -3.01)
    for k, value in enumerate(values):
        bad[k, k % 3] = value
    x = torch.cat([good, bad]).requires_grad_()
    log_prob = flow.log_prob(x)
    assert bool(log_prob[:4].isfinite().all())
    assert bool((log_prob[4:] == -math.inf).all())
    log_prob.sum().backward()
    assert bool(x.grad.isfinite().all())
    both = [p.grad.clone() for p in flow.parameters()]
    assert all(bool(g.isfinite().all()) for g in both)
    flow.zero_grad()
    alone = good.clone().requires_grad_()
    flow.log_prob(alone).sum().backward()
    rounding = 2e-5 if dtype == torch.float32 else 1e-7  # products of another width
    torch.testing.assert_close(x.grad[:4], alone.grad, rtol=rounding, atol=rounding)
    broken = good.clone()
    broken[2, 1] = math.nan
    found = flow.log_prob(broken)
    assert bool(found[2].isnan())
    assert bool(found[[0, 1, 3]].isfinite().all())


@every_bound
def test_draws_stay_inside_and_match_their_density(tails):
    flow = on_interval(tails, 3, dtype=torch.float32, spread=0.1)
    x, log_prob = flow.rsample_and_log_prob((20_000,), generator=torch.Generator().manual_seed(0))
    assert float(x.detach().abs().max()) <= EDGE
    found = flow.log_prob(x)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, log_prob, rtol=1e-3, atol=1e-2)


@every_bound
def test_a_flow_on_an_interval_says_so(tails, tmp_path):
    flow = on_interval(tails, 2)
    assert isinstance(flow.base, Uniform)
    assert not any(isinstance(m, Standardise) for m in flow.modules())
    d = flow.distribution()
    assert bool(d.support.check(torch.full((2,), EDGE)))
    assert not bool(d.support.check(torch.tensor([0.0, 3.5])))
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(torch.tensor([0.0, 3.5], dtype=torch.float64))
    flow.save(tmp_path / "m")
    x = inside(5, 2)
    assert torch.equal(rootflow.load(tmp_path / "m").log_prob(x), flow.log_prob(x))
    assert bool(wild("realnvp", 2).distribution().support.check(torch.full((2,), 1e9)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tails": "bounded", "actnorm": True}, "actnorm=True leads out of the interval"),
        ({"tails": "circular", "linear": "lu"}, "linear='lu' leads out of the interval"),
        ({"tails": "bounded", "base": "student"}, "base='student'.*uniform"),
        ({"tails": "open"}, "tails='open' is unknown"),
        ({"linear": "svd"}, "linear='svd' is unknown; choose 'lu', 'reverse', 'permute' or None"),
        ({"blocks": 0}, "blocks=0 must be at least 1"),
        ({"hidden": ()}, "at least one positive width"),
        ({"hidden": (8, 9), "residual": True}, "equal widths"),
        ({"activation": "sine"}, "activation='sine' is unknown"),
    ],
)
def test_wrong_options_name_what_would_be_right(options, message):
    with torch.random.fork_rng(devices=[]), pytest.raises(ValueError, match=message):
        rootflow.flow("nsf-coupling", 2, **options)


@every_flow
def test_shapes_and_wrong_inputs(name):
    flow = wild(name, 3, 2)
    x, c = points(8, 3).view(2, 4, 3), points(4, 2)
    flat = flow.log_prob(x.reshape(8, 3), c.repeat(2, 1))
    torch.testing.assert_close(flow.log_prob(x, c), flat.view(2, 4))
    assert flow.log_prob(x[0, 0], c[0]).shape == ()
    assert flow.log_prob(x[:, :0], c[:0]).shape == (2, 0)
    assert flow.inverse(x[:, :0], c[:0])[0].shape == (2, 0, 3)
    with pytest.raises(ValueError, match="its last dimension must be 2"):
        flow.log_prob(x, points(4, 3))
    with pytest.raises(ValueError, match="a context of width 2"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match="do not broadcast"):
        flow.log_prob(x, points(3, 2))
    with pytest.raises(ValueError, match=r"trailing dimensions must be \(3,\)"):
        flow.log_prob(points(4, 4), c)


@pytest.mark.parametrize(
    ("name", "options"),
    [(n, {}) for n in NAMES]
    + [("nsf-coupling", {"tails": t, "interval": EDGE}) for t in BOUNDED]
    + [("realnvp", {"linear": k, "actnorm": True}) for k in ("reverse", "permute")],
    ids=str,
)
def test_one_graph_compiles_both_directions(name, options, unchanged_validation):
    flow = wild(name, 3, 1, blocks=1, **options).train()
    x, c = inside(6, 3), points(6, 1)
    torch._dynamo.reset()
    for method in (flow.log_prob, flow.inverse):
        expected = method(x, c)  # eagerly first, as a fit must: this sets ActNorm
        run = torch.compile(method, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(x, c), expected)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name):
    flow = wild(name, 2, 1, blocks=1, hidden=(3,), activation="tanh")
    x, c = points(2, 2, scale=0.5).requires_grad_(), points(2, 1)
    with torch.random.fork_rng(devices=[]):  # gradgradcheck draws
        assert torch.autograd.gradgradcheck(lambda x: flow.log_prob(x, c), (x,))
        assert torch.autograd.gradgradcheck(lambda z: flow.inverse(z, c)[0], (x,))


def test_nice_keeps_volume_up_to_its_final_scale():
    flow = wild("nice", 4, linear=None)
    scale = flow.transform.transforms[-1]
    assert isinstance(scale, Scale)
    log_det = flow(points(6, 4))[1]
    torch.testing.assert_close(log_det, scale.log_scale.sum().expand(6))


def test_parameters_are_those_asked_for():
    def count(univariate, features, context=0, **options):
        with torch.random.fork_rng(devices=[]):
            block = Coupling(features, univariate, context, hidden=(10, 20), **options)
        return sum(p.numel() for p in block.parameters())

    middle = 10 * 20 + 20
    assert count(Affine(), 5) == 2 * 10 + 10 + middle + 20 * 6 + 6
    assert count(Affine(), 5, flip=True) == 3 * 10 + 10 + middle + 20 * 4 + 4
    assert count(Shift(), 1, 3, flip=True) == 3 * 10 + 10 + middle + 20 + 1
    assert count(Spline(4), 1) == Spline(4).size
    circle = Spline(4, tails="circular")
    assert count(circle, 4) == 4 * 10 + 10 + middle + (20 + 1) * 2 * circle.size
