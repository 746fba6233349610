"""Maps of columns: round trips, and every weight against the exact mass under a known density."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootflow.data.maps import HOLE, REACH, SPREAD, Circle, Levels, Line

NAN = math.nan
CDF = torch.special.ndtr


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def noise(form, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, form.noise, generator=generator, dtype=torch.float64)
    return u.clamp(1e-9, 1 - 1e-9)


def log_normal(y):
    return (-0.5 * (y.square() + math.log(2 * math.pi))).sum(-1)


def mass(form, x, points=4000):
    """E over u of p(y) exp(weight) for one value under a standard normal, by the midpoint rule."""
    middle = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    if form.noise == 2:
        fine = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        u = torch.cartesian_prod((torch.arange(10, dtype=torch.float64) + 0.5) / 10, fine)
    else:
        u = middle[:, None].expand(-1, form.noise)
    y, weight = form.encode(column(x).expand(len(u)), u)
    return float((log_normal(y) + weight).exp().mean())


LINES = {
    "free": (Line(), [-3.0, 0.0, 1e9]),
    "centred": (Line(origin=1e9), [1e9 - 3, 1e9 + 0.5]),
    "positive": (Line(lower=0.0, scale=0.3), [1e-9, 0.2, 1.0, 50.0]),
    "below": (Line(upper=2.0, scale=0.3), [-40.0, 1.0, 1.999]),
    "bounded": (Line(lower=-1.0, upper=3.0), [-1.0, -0.999, 0.0, 2.5, 3.0]),
    "zeros": (Line(lower=0.0, atoms=(0.0,), cell=2.0), [0.0, 1e-12, 0.7, 9.0]),
    "zeros, empty": (Line(lower=0.0, atoms=(0.0,), absent=-0.5, cell=0.7), [NAN, 0.0, 0.4]),
    "both ends": (Line(lower=0.0, upper=1.0, atoms=(0.0, 1.0)), [0.0, 0.5, 1.0]),
    "one end": (Line(lower=0.0, upper=1.0, atoms=(1.0,), scale=0.2), [0.01, 0.5, 1.0]),
    "spikes": (Line(atoms=(-0.3, 0.5), absent=-2.0, cell=0.4), [-3.0, -0.3, 0.1, 0.5, 2.0, NAN]),
    "grid": (Line(gap=0.1, origin=0.2, digits=1), [-0.5, 0.2, 0.3, 7.1]),
    "counts": (Line(lower=0.0, gap=1.0, atoms=(0.0,), digits=0, cell=2.0), [0.0, 1.0, 2.0, 30.0]),
    "counts, empty": (Line(lower=0.0, gap=2.0, absent=-2.0, digits=0), [NAN, 0.0, 2.0, 10.0]),
    "levels": (Levels((0.0, 1.0, 5.0), (0.2, 0.3, 0.5)), [0.0, 1.0, 5.0]),
    "levels, empty": (Levels((0.0, 1.0), (0.2, 0.3, 0.5)), [0.0, 1.0, NAN]),
    "angle": (Circle(0.0, 360.0), [0.0, 90.0, 359.999, 180.0]),
    "compass": (Circle(0.0, 360.0, 10.0, 0, True), [0.0, 10.0, 350.0, NAN]),
    "longitude": (Circle(-180.0, 360.0), [-180.0, 0.0, 179.5]),
}


@pytest.mark.parametrize(("form", "values"), LINES.values(), ids=LINES)
def test_what_is_encoded_is_decoded_again(form, values):
    x = column(*values * 50)
    y, weight = form.encode(x, noise(form, len(x)))
    assert y.shape == (len(x), form.width)
    assert y.isfinite().all()
    assert weight.isfinite().all()
    torch.testing.assert_close(form.decode(y), x, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(("form", "values"), LINES.values(), ids=LINES)
def test_anything_decodes_into_the_support(form, values):
    y = 40 * torch.randn(2000, form.width, generator=torch.Generator().manual_seed(0)).double()
    x = form.decode(y)
    assert form.encode(x, noise(form, len(x)))[1].isfinite().all()
    if isinstance(form, Levels):
        assert set(x[~x.isnan()].tolist()) <= set(form.values)
    if isinstance(form, Circle):
        assert ((x >= form.start) & (x < form.start + form.period) | x.isnan()).all()


def derivative(form, x):
    x = column(x).requires_grad_()
    return torch.autograd.grad(form.encode(x, noise(form, 1))[0].sum(), x)[0].abs().log()


@pytest.mark.parametrize("name", ["free", "centred", "positive", "below", "bounded"])
def test_without_noise_the_weight_is_the_log_jacobian(name):
    form, values = LINES[name]
    for x in values:
        weight = form.encode(column(x), noise(form, 1))[1]
        torch.testing.assert_close(weight, derivative(form, x), rtol=1e-6, atol=1e-6)


def test_masses_of_atoms_cells_and_empty_values_are_those_of_their_intervals():
    def interval(low, high):
        return float(CDF(column(high)) - CDF(column(low)))

    zeros = LINES["zeros, empty"][0]  # empty from -0.5, zeros from 0 + 0.7
    assert mass(zeros, NAN) == pytest.approx(interval(-0.5, 0.2), rel=1e-6)
    assert mass(zeros, 0.0) == pytest.approx(interval(0.7, 1.4), rel=1e-6)
    assert mass(zeros, 0.4) == pytest.approx(float(log_normal(column(1.8)).exp()), rel=1e-6)
    grid = LINES["grid"][0]  # in gaps from 0.2
    assert mass(grid, 0.3) == pytest.approx(interval(1, 2), rel=1e-6)
    empty = LINES["counts, empty"][0]  # empty from -2 to -1, all else one further
    assert mass(empty, NAN) == pytest.approx(interval(-2, -1), rel=1e-6)
    assert mass(empty, 2.0) == pytest.approx(interval(2, 3), rel=1e-6)
    for form, shares in ((LINES["levels"][0], {0.0: 0.2, 1.0: 0.3, 5.0: 0.5}),
                         (LINES["levels, empty"][0], {0.0: 0.2, 1.0: 0.3, NAN: 0.5})):  # fmt: skip
        for x, share in shares.items():
            assert mass(form, x) == pytest.approx(share, rel=1e-6)


def test_everything_adds_up_to_the_mass_of_the_line():
    """Points of mass by their intervals, the rest by quadrature over x."""
    form = LINES["spikes"][0]
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    y, weight = form.encode(x, noise(form, len(x)))
    rest = torch.trapezoid((log_normal(y) + weight).exp(), x)
    spikes = sum(mass(form, value) for value in (-0.3, 0.5, NAN))
    assert float(rest) + spikes == pytest.approx(1, abs=1e-3)


def test_an_angle_has_the_density_of_the_ring():
    inner, outer = math.exp(-SPREAD * REACH), math.exp(SPREAD * REACH)
    ring = math.exp(-(inner**2) / 2) - math.exp(-(outer**2) / 2)
    assert mass(Circle(0.0, 360.0), 77.0) == pytest.approx(ring / 360, rel=1e-3)
    compass = Circle(0.0, 360.0, 10.0, 0, True)
    assert mass(compass, 350.0) == pytest.approx(ring * 10 / 360, rel=1e-3)
    assert mass(compass, NAN) == pytest.approx(1 - math.exp(-(HOLE**2) / 2), rel=1e-3)


def test_the_seam_of_an_angle_is_no_edge():
    form = Circle(0.0, 360.0)
    u = torch.full((3, 2), 0.5, dtype=torch.float64)
    y, weight = form.encode(column(359.9999, 0.0001, 360.0001), u)
    assert (y[0] - y[1]).norm() < 1e-5
    torch.testing.assert_close(y[1], y[2])
    assert weight.unique().numel() == 1


OUTSIDE = {
    "positive": [0.0, -1.0, NAN, math.inf],
    "bounded": [-1.001, 3.001, NAN],
    "zeros": [-1e-9, NAN],
    "grid": [0.25, NAN],
    "counts": [-1.0, 0.5],
    "levels": [0.5, 2.0, -1.0, NAN, math.inf],
    "angle": [NAN, math.inf],
    "compass": [5.0],
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_the_support_the_weight_is_minus_infinity_and_y_is_finite(name):
    form, x = LINES[name][0], column(*OUTSIDE[name])
    y, weight = form.encode(x, noise(form, len(x)))
    assert y.isfinite().all()
    assert (weight == -math.inf).all()


@given(
    atoms=st.lists(st.integers(-5, 5), max_size=4, unique=True),
    empty=st.booleans(),
    cell=st.floats(0.01, 10),
    seed=st.integers(0, 99),
)
def test_cuts_anywhere_keep_the_order_of_the_line(atoms, empty, cell, seed):
    places = tuple(sorted(map(float, atoms)))
    form = Line(atoms=places, absent=-7.5 if empty else None, cell=cell)
    x = torch.from_numpy(np.random.default_rng(seed).normal(0, 4, 200))
    x = torch.cat([x, column(*places)]).sort().values
    y, weight = form.encode(x, noise(form, len(x), seed))
    assert (y[:, 0].diff() > 0).all()
    torch.testing.assert_close(form.decode(y), x, rtol=1e-9, atol=1e-9)
    assert weight.isfinite().all()
