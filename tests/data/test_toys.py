"""The toys: samples, densities and entropies must belong to one and the same distribution."""

import math

import numpy as np
import pytest
import torch

from rootflow.data import TOYS

PUBLISHED = {  # nats, good to about 0.001
    "checkerboard": 3.4657,
    "8gaussians": 2.832,
    "swissroll": 2.670,
    "circles": 3.268,
    "rings": 2.623,
    "moons": 2.394,
    "2spirals": 2.645,
    "pinwheel": 2.318,
}
ROWS = 20_000
every_toy = pytest.mark.parametrize("name", PUBLISHED)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(name, n=ROWS, seed=0):
    return TOYS[name].sample(n, generator(seed), torch.float64)


def integrals(name, cells=320):
    """Mass and entropy by the midpoint rule on a box around the samples."""
    toy = TOYS[name]
    reach = draw(name).abs().amax(0) + 0.6
    if name == "checkerboard":
        reach = torch.full((2,), 4.0, dtype=torch.float64)
    middles = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 2 - 1
    log_prob = toy.log_prob(torch.cartesian_prod(middles * reach[0], middles * reach[1]))
    area = float(reach.prod()) * 4 / cells**2
    mass = log_prob.exp()
    surprise = torch.where(mass > 0, -mass * log_prob, 0.0)
    return float(mass.sum()) * area, float(surprise.sum()) * area


def test_there_are_eight():
    assert list(TOYS) == list(PUBLISHED)
    assert all(toy.name == name for name, toy in TOYS.items())


@every_toy
def test_density_integrates_to_one_and_has_the_stated_entropy(name):
    mass, entropy = integrals(name)
    assert mass == pytest.approx(1, abs=2e-6)
    assert entropy == pytest.approx(TOYS[name].entropy(), abs=2e-5)
    assert TOYS[name].entropy() == pytest.approx(PUBLISHED[name], abs=1e-3)


@every_toy
def test_entropy_is_what_samples_say(name):
    surprise = -TOYS[name].log_prob(draw(name, seed=5))
    error = float(surprise.std()) / math.sqrt(ROWS)
    assert float(surprise.mean()) == pytest.approx(TOYS[name].entropy(), abs=2e-3 + 4 * error)


@every_toy
def test_samples_fall_where_the_density_says(name):
    """Counts in coarse cells against the integral of the density over them (chi-square)."""
    x, fine, coarse = draw(name, 40_000, seed=2), 240, 12
    reach = 4.0 if name == "checkerboard" else float(x.abs().max()) * 1.001
    middles = ((torch.arange(fine, dtype=torch.float64) + 0.5) / fine * 2 - 1) * reach
    mass = TOYS[name].log_prob(torch.cartesian_prod(middles, middles)).exp()
    cell = mass.view(coarse, fine // coarse, coarse, fine // coarse).sum((1, 3))
    expected = cell.flatten().numpy() * (2 * reach / fine) ** 2 * len(x)
    seen, *_ = np.histogram2d(*x.numpy().T, bins=coarse, range=[[-reach, reach]] * 2)
    big = expected > 10
    excess = ((seen.ravel() - expected) ** 2 / expected.clip(1e-9))[big]
    assert excess.mean() < 1 + 6 * math.sqrt(2 / big.sum())
    assert expected.sum() == pytest.approx(len(x), rel=5e-3)


@every_toy
def test_sampling_is_repeatable_and_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    first, again, other = (TOYS[name].sample(500, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert first.dtype == torch.float32
    assert first.shape == (500, 2)
    assert TOYS[name].sample(0, generator()).shape == (0, 2)


@every_toy
def test_log_prob_takes_any_shape_and_dtype(name):
    x = TOYS[name].sample(60, generator(3))
    whole = TOYS[name].log_prob(x)
    assert whole.dtype == torch.float64
    assert whole.isfinite().all()
    torch.testing.assert_close(TOYS[name].log_prob(x.view(3, 4, 5, 2)), whole.view(3, 4, 5))
    torch.testing.assert_close(torch.stack([TOYS[name].log_prob(row) for row in x]), whole)
    assert TOYS[name].log_prob(x[:0]).shape == (0,)


@every_toy
def test_far_away_it_is_low_but_never_wrong(name):
    inf = math.inf
    x = [[20.0, 9], [1e3, -1e3], [1e14, 0], [1e99, 0], [-inf, 0]]
    value = TOYS[name].log_prob(torch.tensor(x, dtype=torch.float64))
    assert (value < -100).all()
    assert (value[3:] == -inf).all()
    assert TOYS[name].log_prob(torch.tensor([[math.nan, 0], [inf, math.nan]])).isnan().all()
    if name != "checkerboard":
        assert value[:3].isfinite().all()
        assert (value[:3].diff() < 0).all()


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "checkerboard"])
def test_log_prob_is_differentiable(name):
    x = torch.cat([draw(name, 6), 2 * draw(name, 3, seed=1)]).requires_grad_()
    assert torch.autograd.gradcheck(TOYS[name].log_prob, (x,))


def test_checkerboard_has_closed_squares():
    inside = torch.tensor([[-4.0, -4], [0, 0], [1, 1], [2, 1], [3, 3.999], [-3, -2]])
    outside = torch.tensor([[1.0, -1.0], [4.001, 3.0], [3.0, 1.0], [-1.0, 1.0]])
    assert (TOYS["checkerboard"].log_prob(inside) == -math.log(32)).all()
    assert (TOYS["checkerboard"].log_prob(outside) == -math.inf).all()


def test_2spirals_tail_is_exact_where_probabilities_underflow():
    """The same integral by brute force in logarithms."""
    x = torch.tensor([[9.0, 7.0], [-30.0, 2.0], [4.4, -4.4]], dtype=torch.float64)
    s = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * 3 * math.pi
    total = []
    for sign in (1, -1):
        logs = (2 * s / (9 * math.pi**2)).log()
        for point, centre in zip((3 * sign * x).T, (-s * s.cos(), s * s.sin()), strict=True):
            ends = [(point[:, None] - centre - box) / 0.3 for box in (0.0, 0.5)]
            flip = ends[0] + ends[1] > 0  # always use the small tail
            high = torch.where(flip, -ends[1], ends[0])
            low = torch.where(flip, -ends[0], ends[1])
            high, low = torch.maximum(high, low), torch.minimum(high, low)
            high, low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
            logs = logs + high + torch.log1p(-(low - high).exp()) + math.log(2)
        total.append(logs.logsumexp(-1) + math.log(3 * math.pi / 200_000 / 2))
    expected = torch.logaddexp(*total) + math.log(9)
    torch.testing.assert_close(TOYS["2spirals"].log_prob(x), expected, rtol=1e-6, atol=0)


def test_pinwheel_counts_every_root():
    """Push latent points through the map: density at the image is the sum over its origins."""
    f0 = 1 + 0.3 * torch.linspace(-3, 3, 41, dtype=torch.float64)
    f1 = torch.linspace(-0.3, 0.3, 41, dtype=torch.float64)
    f0, f1 = torch.cartesian_prod(f0, f1).T
    angle = 2 * math.pi / 5 * (torch.arange(len(f0)) % 5).double() + f0.exp() / 4
    x = 2 * torch.stack(
        [f0 * angle.cos() + f1 * angle.sin(), f1 * angle.cos() - f0 * angle.sin()], -1
    )
    normal = -((f0 - 1) / 0.3).square() / 2 - (f1 / 0.1).square() / 2
    stretch = 4 * (1 + f1 * f0.exp() / 4).abs()
    alone = normal - math.log(2 * math.pi * 0.03 * 5) - stretch.log()
    found = TOYS["pinwheel"].log_prob(x)
    assert (found >= alone - 1e-9).all()  # this origin is among those found
    assert (found - alone).median() < 1e-6  # and mostly the only one that counts


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"moons\.log_prob: x must be \(\.\.\., 2\), got \(5, 3\)"):
        TOYS["moons"].log_prob(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"moons\.sample: n must not be negative, got -1"):
        TOYS["moons"].sample(-1, generator())
