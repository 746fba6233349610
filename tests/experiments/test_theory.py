"""Theory in numbers: limits, variances by enumeration, and what trained blocks may never exceed."""

import itertools
import math

import pytest
import torch

from experiments.test_kinds import pictures
from rootflow.experiments import Recipe, run
from rootflow.experiments.parts import Job
from rootflow.experiments.theory import (
    TAILS,
    Published,
    Theory,
    is_finite,
    slope_limits,
    variance,
)
from rootflow.logdet import Series


@pytest.mark.parametrize(
    ("c", "layers", "residual", "implicit"),
    [
        (0.99, 5, (0.0024, 3.81), (0.025, 39.8)), (0.99, 3, (0.0009, 3.88), (0.015, 66.3)),
        (0.9, 3, (0.073, 2.99), (0.157, 6.38)), (0.6, 3, (0.615, 1.48), (0.645, 1.55)),
    ],
)  # fmt: skip
def test_slope_limits(c, layers, residual, implicit):
    assert slope_limits("residual", c**layers) == pytest.approx(residual, rel=0.03)
    for name in ("implicit", "monotone"):
        assert slope_limits(name, c**layers) == pytest.approx(implicit, rel=0.03)


@pytest.mark.parametrize("word", list(TAILS))
def test_variance_is_that_of_all_probes_and_all_numbers_of_terms(word):
    series, rho, most = TAILS[word], 0.6, 16
    jac = torch.tensor([[[0.3, -0.2], [0.4, 0.1]], [[-0.5, 0.0], [0.0, 0.5]]]).double()
    survival = [series.survival(j, rho) for j in range(most - series.terms + 1)] + [0.0]
    values, chances = [], []
    for n, signs in itertools.product(range(most - series.terms + 1),
                                      itertools.product((-1.0, 1.0), repeat=2)):  # fmt: skip
        v = torch.tensor(signs).double()
        weights = [1.0] * series.terms + [1 / survival[j] for j in range(1, n + 1)]
        terms = [
            a * (-1) ** (k + 1) / k * (v @ torch.linalg.matrix_power(jac, k) @ v)
            for k, a in enumerate(weights, 1)
        ]
        values.append(sum(terms))
        chances.append((survival[n] - survival[n + 1]) / 4)
    values, chances = torch.stack(values), torch.tensor(chances).double()[:, None]
    assert float(chances.sum()) == pytest.approx(1)
    mean = (chances * values).sum(0)
    exact = (chances * (values - mean).square()).sum(0)
    torch.testing.assert_close(variance(jac, series, rho, most), exact)


def test_variance_of_the_probes_alone():
    jac = torch.tensor([[[0.3, -0.2], [0.4, 0.1]]]).double()
    eye = torch.eye(2).double()
    log = torch.zeros(2, 2).double()
    for k in range(1, 200):
        log += (-1) ** (k + 1) / k * torch.linalg.matrix_power(jac[0], k)
    torch.testing.assert_close(log.trace(), torch.linalg.slogdet(eye + jac[0])[1])
    # v' A v for independent signs varies by the entries beside the diagonal alone
    exact = (log[0, 1] + log[1, 0]) ** 2
    assert float(variance(jac, None, 0.6, 200)[0]) == pytest.approx(float(exact))


def test_which_variances_are_finite():
    ours, half = Series("geometric", 2), Published("geometric", 2)
    poisson, mixed = Published("poisson", 10), Series("poisson", 10)
    for rho in (0.2, 0.5, 0.7, 0.729, 0.9, 0.97, 0.995):
        assert is_finite(ours, rho, rho)
        assert is_finite(mixed, rho, rho)
        assert is_finite(half, rho, rho) == (rho < 0.5**0.5)
        assert not is_finite(poisson, rho, rho)


def test_the_published_choice_of_terms_grows_without_end():
    for rho, most, value in ((0.7, 600, 5e-3), (0.729, 50, 1.4e-2), (0.729, 300, 4e2),
                             (0.729, 600, 9e9)):  # fmt: skip
        found = variance(torch.full((1, 1, 1), rho), Published("geometric", 2), rho, most)
        assert float(found) == pytest.approx(value, rel=0.1)


def test_a_poisson_tail_is_a_poisson_tail():
    published = Published("poisson", 1)
    for j in range(12):
        below = sum(math.exp(-2) * 2**i / math.factorial(i) for i in range(j))
        assert published.survival(j, 0.5) == pytest.approx(1 - below, abs=1e-14)


def test_theory(tmp_path):
    common = {
        "coefficients": [0.5, 0.95], "hidden": [8, 8], "max_rows": 1000, "pushes": 60,
        "seconds": 60.0, "steps": 3, "draws": 200, "most": 100,
    }  # fmt: skip
    made = Recipe(name="t", kind="theory", summary="", source="", common=common,
                  smoke={}, small={}, paper={})  # fmt: skip
    result = run(made, "smoke", tmp_path)
    assert result.failed == 0
    assert pictures(tmp_path) == {"slopes.png"}
    stretches = [row for row in result.rows if row.measure == "largest stretch"]
    assert len(stretches) == 2 * 3 * 2
    for row in stretches:
        assert row.more["least limit"] < row.more["least"] <= 1 <= row.ours < row.more["limit"]
        if row.labels["map"].startswith("pushed"):
            assert row.more["least"] < 0.9
            assert row.ours > 1.1
    solved = [row for row in result.rows if row.measure.startswith("evaluations")]
    for row in solved:
        assert row.more["bound"] is None or row.ours <= row.more["bound"]
    varied = [row for row in result.rows if row.measure.startswith("variance")]
    assert len(varied) == 2 * len(TAILS)
    for row in varied:
        assert abs(row.more["bias"]) < 5 * row.more["bias se"]
        assert row.exact is None or abs(row.ours - row.exact) < 5 * row.se


@pytest.mark.parametrize("name", ["residual", "implicit", "monotone"])
def test_blocks_can_be_pushed_to_their_limits(name, tmp_path):
    settings = Theory(coefficients=(0.8,), hidden=(16, 16), pushes=100, seconds=1.0, steps=1,
                      draws=40)  # fmt: skip
    found = settings._pushed(name, 0.8, Job(tmp_path, tmp_path, 0))
    limits = slope_limits(name, 0.8**3)
    assert (found["least"], found["largest"]) == pytest.approx(limits, rel=0.02)
