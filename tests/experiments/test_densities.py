"""Mixtures: exact log-density, entropy and draws agree with each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootflow.experiments.densities import Mixture, toy


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("sd", [0.01, 1.0, 30.0])
def test_one_gaussian_has_the_entropy_of_a_gaussian(d, sd):
    mixture = Mixture(weights=(1.0,), means=((3.0,) * d,), sds=(sd,))
    exact = d * (0.5 * math.log(2 * math.pi * math.e) + math.log(sd))
    assert mixture.entropy() == pytest.approx(exact, abs=1e-9)


def test_far_gaussians_add_the_entropy_of_the_choice():
    mixture = Mixture(weights=(0.25, 0.75), means=((-50.0,), (50.0,)), sds=(1.0, 2.0))
    choice = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    parts = 0.5 * math.log(2 * math.pi * math.e) + 0.75 * math.log(2.0)
    assert mixture.entropy() == pytest.approx(choice + parts, abs=1e-9)


@given(
    st.integers(1, 2), st.lists(st.floats(0.3, 2.0), min_size=1, max_size=3), st.integers(0, 999)
)
def test_draws_have_the_entropy(d, sds, seed):
    k = len(sds)
    means = tuple(tuple(float(2 * i + j) for j in range(d)) for i in range(k))
    mixture = Mixture(weights=(1 / k,) * k, means=means, sds=tuple(sds))
    x = mixture.sample(4000, torch.Generator().manual_seed(seed))
    assert x.shape == (4000, d)
    assert x.dtype == torch.float32
    log_p = mixture.log_prob(x)
    error = float(log_p.std()) / 4000**0.5
    assert float(-log_p.mean()) == pytest.approx(mixture.entropy(), abs=5 * error)


def test_a_toy_has_the_same_interface():
    found = toy("moons")
    x = found.sample(7, torch.Generator().manual_seed(0))
    assert x.shape == (7, found.features)
    assert found.log_prob(x).shape == (7,)
    assert found.entropy == pytest.approx(2.394, abs=1e-3)
