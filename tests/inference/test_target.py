"""Targets: shapes, supports with their Jacobians, callables of every kind, and what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian as jacobian_of
from torch.distributions import constraints

from rootflow.inference import Target, TargetError, from_bridgestan, ordered
from rootflow.inference.examine import examine, require_proper

CPU = torch.device("cpu")
SUPPORTS = {
    "real": (constraints.real, ()),
    "positive": (constraints.positive, ()),
    "interval": (constraints.interval(-2.0, 5.0), (2,)),
    "unit": (constraints.unit_interval, (2, 2)),
    "above": (constraints.greater_than(3.0), ()),
    "below": (constraints.less_than(-1.0), ()),
    "ordered": (ordered, (4,)),
    "simplex": (constraints.simplex, (3,)),
    "rows of simplexes": (constraints.simplex, (2, 3)),
    "cholesky": (constraints.corr_cholesky, (3, 3)),
    "stacked": (constraints.stack([constraints.positive, constraints.real], -1), (2,)),
    "dependent": (lambda p: constraints.interval(0, 1 + p["first"].exp()), ()),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made(name):
    support, shape = SUPPORTS[name]
    return Target(
        lambda p: -p["first"].square() - p["it"].reshape(len(p["it"]), -1).square().sum(-1),
        {"first": (), "it": shape},
        {"it": support},
    )


@pytest.mark.parametrize("name", SUPPORTS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**20), spread=st.sampled_from([0.1, 1.0, 3.0]))
def test_supports_are_reached_and_their_jacobian_counted(name, seed, spread):
    target = made(name)
    u = spread * torch.randn(2, target.free_features, generator=generator(seed), dtype=torch.double)
    x, log_det = target.constrain(u)
    assert x.shape == (2, target.features)
    assert log_det.shape == (2,)
    assert bool(target.inside(x).all())
    torch.testing.assert_close(target.unconstrain(x), u, rtol=1e-6, atol=1e-6)
    jacobian = torch.stack(
        [jacobian_of(lambda v: target.constrain(v[None])[0][0], row) for row in u]
    )
    if target.free_features < target.features:  # on a simplex all entries but the last are free
        kept = [k for k, c in enumerate(target.columns) if not c.endswith("3]")]
        if name == "cholesky":  # below the diagonal
            kept = [0] + [1 + k for k in (3, 6, 7)]
        jacobian = jacobian[:, kept]
    exact = torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(log_det, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_positive_density_integrates_to_one_in_unconstrained_space(dtype):
    target = Target(lambda x: -x.sum(-1), 1, constraints.positive, dtype=dtype)  # exponential
    u = torch.linspace(-20, 6, 20_001, dtype=torch.float64)[:, None]
    value = target.unconstrained_log_prob(u)
    assert value.dtype == dtype
    assert torch.trapezoid(value.double().exp(), u[:, 0]) == pytest.approx(1, abs=1e-4)


def test_names_and_shapes():
    target = made("rows of simplexes")
    assert target.columns[:4] == ("first", "it[1,1]", "it[1,2]", "it[1,3]")
    assert target.features == 7
    assert target.free_features == 5
    parts = target.split(torch.arange(14.0).reshape(2, 7))
    assert parts["first"].tolist() == [0, 7]
    assert parts["it"].shape == (2, 2, 3)
    assert Target(lambda x: x, 2).columns == ("x1", "x2")
    assert Target(lambda x: x, names=["a", "b"]).columns == ("a", "b")
    assert Target(lambda p: p, support={"a": constraints.real, "b": ordered}, features={
        "a": (), "b": 2}).columns == ("a", "b[1]", "b[2]")  # fmt: skip
    assert Target(lambda p: p, support={"s": constraints.positive}).by_name
    assert Target(lambda x: x, 3, constraints.simplex, ["a", "b", "c"]).columns == ("a", "b", "c")


def test_a_sequence_of_supports_and_a_function_of_earlier_columns():
    target = Target(
        lambda x: -x.sum(-1), names=["a", "b"],
        support=[constraints.unit_interval, lambda p: constraints.interval(0, 1 - p["a"])],
    )  # fmt: skip
    x, _ = target.constrain(torch.randn(50, 2, generator=generator(), dtype=torch.float64))
    assert bool((x > 0).all())
    assert bool((x.sum(-1) < 1).all())


def quadratic(x):
    return -(x**2).sum()


@pytest.mark.parametrize(
    "target",
    [
        Target(lambda x: -(x**2).sum(-1), 3),
        Target(quadratic, 3, batched=False),
        Target(lambda x: quadratic(x) * (1 if bool(x[0] < 9) else 2), 3, batched=False),
        Target(lambda p: -(p["a"] ** 2).sum() - p["b"] ** 2, {"a": 2, "b": ()}, batched=False),
        Target(lambda x: -(x**2).sum(-1), 3, gradient=lambda x: -2 * x),
        Target(lambda x: float(quadratic(x)), 3, gradient=lambda x: -2 * x, batched=False),
        Target(
            lambda p: -(p["a"] ** 2).sum(-1) - p["b"] ** 2, {"a": 2, "b": ()},
            gradient=lambda p: {"a": -2 * p["a"], "b": -2 * p["b"]},
        ),
        Target(
            lambda p: -(p["a"] ** 2).sum() - p["b"] ** 2, {"a": 2, "b": ()}, batched=False,
            gradient=lambda p: {"a": -2 * p["a"], "b": -2 * p["b"]},
        ),
    ],
    ids=["batched", "vmapped", "looped", "by name", "numpy", "numpy point", "numpy names", "both"],
)  # fmt: skip
def test_callables_of_every_kind_agree(target):
    u = torch.randn(4, 3, generator=generator(), dtype=torch.float64)
    value, slope = target.value_and_gradient(u)
    torch.testing.assert_close(value, -u.square().sum(-1))
    torch.testing.assert_close(slope, -2 * u)
    assert not value.requires_grad
    examine(target, generator(), CPU)


def test_numpy_callables_get_arrays_in_float64():
    seen = []

    def density(x):
        seen.append(x)
        return -(x**2).sum(-1)

    Target(density, 2, gradient=lambda x: -2 * x).log_prob(torch.zeros(3, 2))
    assert isinstance(seen[0], np.ndarray)
    assert seen[0].dtype == np.float64


def normal(x):
    return -x.square().sum(-1) / 2


REFUSED = {
    "nan": (lambda x: normal(x) * math.nan, "none of 52 points.*13 NaN"),
    "plus infinity": (lambda x: normal(x) * 0 + math.inf, "13 infinite"),
    "minus infinity": (lambda x: normal(x) * 0 - math.inf, "13 infinite"),
    "a column": (lambda x: normal(x)[:, None], r"shape \(13, 1\).*squeeze"),
    "not summed": (lambda x: -x.square(), r"shape \(13, 2\).*sum\(-1\)"),
    "one number": (lambda x: -x.square().sum(), "one number per row, or give batched=False"),
    "mixed rows": (lambda x: normal(x) - x.mean(), "changes with the other rows"),
    "integers": (lambda x: normal(x).long(), "torch.int64"),
    "an array": (lambda x: normal(x).numpy(), "ndarray.*gradient="),
    "no gradient": (lambda x: normal(x.detach()), "no gradient"),
    "numpy": (lambda x: normal(torch.as_tensor(x.requires_grad_().numpy())), "gradient="),
    "a probability": (lambda x: normal(x).exp(), "looks like a probability density"),
    "zero probability": (lambda x: (normal(x) - 1e6).exp(), "rounded to zero"),
    "constant": (lambda x: normal(x) * 0 + 3, "log_prob is 3 at all points"),
    "float32 data": (lambda x: (x @ torch.ones(2, 1))[:, 0], "convert its tensors or give dtype="),
    "raises": (lambda x: 1 / 0, "raised ZeroDivisionError"),
    "no support": (
        lambda x: -x[:, 1].log() - normal(x[:, :1] / x[:, 1:]), "does support say"
    ),
    "nan gradient": (lambda x: normal(x) - (x - x).sum(-1).sqrt(), "gradient of log_prob is NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_log_density_is_refused_in_one_line(name):
    density, words = REFUSED[name]
    with pytest.raises(TargetError, match=words) as caught:
        examine(Target(density, 2, name="mine"), generator(), CPU)
    assert "mine" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_supplied_gradient_is_refused():
    target = Target(lambda x: -(x**2).sum(-1), 2, gradient=lambda x: 2 * x)
    with pytest.raises(TargetError, match="gradient= does not fit log_prob: along x1"):
        examine(target, generator(), CPU)
    target = Target(lambda x: -(x**2).sum(-1), 2, gradient=lambda x: -2 * x.sum(-1))
    with pytest.raises(TargetError, match="gradient returned shape"):
        examine(target, generator(), CPU)


@pytest.mark.parametrize(
    ("density", "words"),
    [
        (lambda x: -x[:, 0].square(), "does not fall off as x2"),
        (lambda x: -x[:, 0].square() - (-x[:, 1]).exp(), "does not fall off as x2 rises"),
        (lambda x: -x[:, 0].square() + x[:, 1], "does not fall off as x2 rises"),
        (lambda x: x.square().sum(-1), "does not fall off"),
    ],
)
def test_improper_densities_are_seen_along_rays(density, words):
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(TargetError, match=words):
        require_proper(Target(density, 2), eye[0], eye)


@pytest.mark.parametrize(
    "density",
    [
        normal,
        lambda x: -torch.log1p(x.square()).sum(-1),  # Cauchy
        lambda x: -1.1 * torch.log1p(x.abs()).sum(-1),  # barely proper
        lambda x: -((x - 1e6) / 1e-3).square().sum(-1),
    ],
)
def test_proper_densities_are_let_through(density):
    eye = torch.eye(2, dtype=torch.float64)
    require_proper(Target(density, 2), eye[0], eye)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"features": 0}, ValueError, "features=0"),
        ({"features": None}, ValueError, "features=None"),
        ({"features": 2, "names": ["a"]}, ValueError, "names: 1 given"),
        ({"features": 2, "names": ["a", "a"]}, ValueError, "names"),
        ({"features": {}}, ValueError, "empty"),
        ({"features": {"a": 1}, "names": ["a"]}, ValueError, "leave it out"),
        ({"features": {"a": 1}, "support": constraints.real}, TypeError, "mapping"),
        ({"features": {"a": 1}, "support": {"b": constraints.real}}, ValueError, "'b'"),
        ({"features": {"a": 0}}, ValueError, "a has shape"),
        ({"features": 2, "support": [constraints.real]}, ValueError, "1 given for 2"),
        ({"features": 2, "support": constraints.boolean}, ValueError, "smooth map"),
        ({"features": 2, "support": constraints.corr_cholesky}, ValueError, "vectors or matrices"),
        ({"features": {"a": ()}, "support": {"a": constraints.simplex}}, ValueError, "vectors"),
        ({"features": 2, "support": [1, 2]}, TypeError, "constraint"),
        ({"features": 2, "dtype": torch.int64}, TypeError, "float64"),
    ],
)
def test_contradicting_arguments_are_refused(arguments, kind, words):
    with pytest.raises(kind, match=words):
        Target(lambda x: x, **arguments)


def test_dependent_supports_say_what_they_may_use():
    target = Target(lambda x: x, names=["a", "b"],
                    support={"a": lambda p: constraints.interval(0, p["b"])})  # fmt: skip
    with pytest.raises(ValueError, match=r"support of a asks for 'b'"):
        target.constrain(torch.zeros(1, 2))
    target = Target(lambda x: x, names=["a"], support={"a": lambda p: constraints.simplex})
    with pytest.raises(ValueError, match="single numbers"):
        target.constrain(torch.zeros(1, 1))


def test_points_outside_the_support_are_named():
    target = made("positive")
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [math.nan, 1.0]])
    assert target.inside(x).tolist() == [True, False, False]
    with pytest.raises(ValueError, match=r"row 1, it = -1.0 is outside its support GreaterThan"):
        target.unconstrain(x[:2])
    with pytest.raises(ValueError, match="row 2, first = nan"):
        target.unconstrain(x)
    with pytest.raises(ValueError, match=r"x has shape \(3, 3\); give \(n, 2\)"):
        target.log_prob(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"u has shape \(3,\); give \(n, 2\)"):
        target.unconstrained_log_prob(torch.zeros(3))


class FakeStan:
    """What BridgeStan offers, one point at a time: an exponential variable on its log scale."""

    def name(self):
        return "exponential"

    def param_unc_names(self):
        return ["rate"]

    def log_density(self, theta, *, propto, jacobian):
        assert theta.dtype == float
        assert not propto
        assert jacobian
        if theta[0] > 30:
            raise RuntimeError("rejected")
        return theta[0] - math.exp(theta[0])

    def log_density_gradient(self, theta, *, propto, jacobian):
        value = self.log_density(theta, propto=propto, jacobian=jacobian)
        return value, 1 - np.exp(theta)


def test_a_stan_program_is_a_target_over_its_unconstrained_parameters():
    target = from_bridgestan(FakeStan())
    assert (target.name, target.columns) == ("exponential", ("rate",))
    u = torch.tensor([[0.0], [1.0], [40.0]], dtype=torch.float64)
    value, gradient = target.value_and_gradient(u)
    assert value.tolist() == pytest.approx([-1, 1 - math.e, -math.inf])
    assert gradient[:2, 0].tolist() == pytest.approx([0, 1 - math.e])
    assert gradient[2].isnan().all()
