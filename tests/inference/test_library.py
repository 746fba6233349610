"""Built-in targets: normalisers, exact draws, and the posteriors against their reference draws."""

import math

import pytest
import torch
from torch import distributions as td

from rootflow.inference.diagnostics import grid
from rootflow.inference.energies import ENERGIES, w1, w2, w3
from rootflow.inference.library import TARGETS, reference, target
from rootflow.inference.posteriors import POSTERIORS, Recurrence, data

PLANAR = ["energy1", "energy2", "energy3", "energy4", "ring", "banana", "two-modes", "eight-modes"]
PARAMETERS = {
    "eight_schools_noncentered": [*(f"t[{k}]" for k in range(1, 9)), "mu", "tau"],
    "blr": [*(f"beta[{k}]" for k in range(1, 6)), "sigma"],
    "kidscore_momiq": ["beta[1]", "beta[2]", "sigma"],
    "garch11": ["mu", "alpha0", "alpha1", "beta1"],
    "arK": ["alpha", *(f"beta[{k}]" for k in range(1, 6)), "sigma"],
    "low_dim_gauss_mix": ["mu[1]", "mu[2]", "sigma[1]", "sigma[2]", "theta"],
    "gp_regr": ["rho", "alpha", "sigma"],
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def parameters(name):
    """Reference draws as parameters ``(n, features)``."""
    return target(name).parameters_of(reference(name).draws)


def stein(it, x):
    """Means of g_i and of u_i g_i + 1 over draws, in standard errors: about normal(0, 1)."""
    u = it.unconstrain(x)
    gradient = it.value_and_gradient(u)[1]
    centred = u - u.mean(0)
    terms = torch.cat([gradient, centred * gradient + 1], -1)
    return terms.mean(0) / (terms.std(0) / math.sqrt(len(x)))


def test_names_are_listed_where_one_is_unknown():
    for find in (target, reference):
        with pytest.raises(ValueError, match=r"unknown target 'rings'; valid: energy1, .*gp_regr"):
            find("rings")


@pytest.mark.parametrize("name", TARGETS)
def test_target_is_vectorised_finite_and_has_gradients(name):
    it = target(name)
    assert it.name == name
    assert it.summary
    u = torch.randn(64, it.free_features, generator=generator(1), dtype=torch.float64)
    value, gradient = it.value_and_gradient(u)
    assert value.shape == (64,)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    x, _ = it.constrain(u)
    one_by_one = torch.cat([it.log_prob(row[None]) for row in x])
    torch.testing.assert_close(it.log_prob(x), one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLANAR)
def test_stored_normaliser_is_the_integral(name):
    it = target(name)
    nodes, area = grid(it.box, 512)
    integral = it.unconstrained_log_prob(nodes).logsumexp(0) + math.log(area)
    assert float(integral) == pytest.approx(it.log_normaliser, abs=3e-9)


@pytest.mark.parametrize(("name", "radius", "bump"), [("energy1", 2, 0.6), ("ring", 4, 0.8)])
def test_normaliser_of_a_ring_in_polar_coordinates(name, radius, bump):
    r = torch.linspace(0, radius + 6, 4001, dtype=torch.float64)
    angle = torch.arange(400, dtype=torch.float64) * (2 * math.pi / 400)
    z1 = r[:, None] * angle.cos()
    bumps = sum(torch.exp(-(((z1 + m) / bump) ** 2) / 2) for m in (-2, 2))
    radial = bumps.mean(-1) * 2 * math.pi * r * torch.exp(-(((r - radius) / 0.4) ** 2) / 2)
    integral = torch.trapezoid(radial, r)
    assert float(integral.log()) == pytest.approx(target(name).log_normaliser, abs=1e-9)


def test_energies_are_those_of_the_paper():
    z = torch.tensor([[1.0, -1.5], [-3.3, 0.2], [3.9, -2.0]], dtype=torch.float64)
    z1, z2 = z.unbind(-1)
    a, b, c = torch.sin(2 * math.pi * z1 / 4), w2(z1), w3(z1)
    assert torch.allclose(w1(z1), a)
    assert float(w2(torch.tensor(1.6))) == pytest.approx(3 * math.exp(-0.5))
    assert float(w3(torch.tensor(1.3))) == pytest.approx(3 / (1 + math.exp(-1)))

    def bump(x):
        return torch.exp(-0.5 * x**2)

    expected = {
        "energy1": bump((z.norm(dim=-1) - 2) / 0.4) * (bump((z1 - 2) / 0.6) + bump((z1 + 2) / 0.6)),
        "energy2": bump((z2 - a) / 0.4),
        "energy3": bump((z2 - a) / 0.35) + bump((z2 - a + b) / 0.35),
        "energy4": bump((z2 - a) / 0.4) + bump((z2 - a + c) / 0.35),
        "ring": bump((z.norm(dim=-1) - 4) / 0.4) * (bump((z1 - 2) / 0.8) + bump((z1 + 2) / 0.8)),
    }
    for name, density in expected.items():
        torch.testing.assert_close(target(name).log_prob(z), density.log())


@pytest.mark.parametrize("name", ENERGIES)
def test_exact_draws_follow_the_density(name):
    it = target(name)
    x = it.sampler(20_000, generator(3))
    assert x.shape == (20_000, it.features)
    assert x.dtype == torch.float64
    assert torch.equal(x, it.sampler(20_000, generator(3)))
    assert stein(it, x).abs().max() < 5


@pytest.mark.parametrize("name", PLANAR)
def test_exact_draws_have_the_entropy_of_the_density(name):
    it = target(name)
    x = it.sampler(20_000, generator(4))
    surprise = it.log_normaliser - it.log_prob(x)
    lines = [torch.linspace(a, b, 513, dtype=torch.float64)[:-1] for a, b in it.box]
    area = math.prod((b - a) / 512 for a, b in it.box)
    u = torch.cartesian_prod(*lines)
    log_p = it.unconstrained_log_prob(u) - it.log_normaliser
    density = it.log_prob(it.constrain(u)[0]) - it.log_normaliser
    entropy = -float((log_p.exp() * density).sum()) * area
    error = float(surprise.std()) / math.sqrt(len(x))
    assert abs(float(surprise.mean()) - entropy) < 5 * error + 1e-6


def test_reference_of_a_formula_is_exact_draws():
    first, second = reference("funnel"), reference("funnel", seed=1)
    assert first.names == ("v", *(f"x[{k}]" for k in range(1, 10)))
    assert first.draws.shape == (2000, 10)
    assert not torch.equal(first.draws, second.draws)
    assert abs(float(first.means[0])) < 5 * 3 / 100
    assert float(first.sds[0]) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("name", POSTERIORS)
def test_reference_draws_fit_the_published_moments(name):
    it, known = target(name), reference(name)
    assert list(it.columns) == PARAMETERS[name]
    assert known.count == 10_000
    assert known.draws.shape == (2000, len(known.names))
    x = parameters(name)
    assert it.inside(x).all()
    torch.testing.assert_close(it.quantities(x), known.draws, rtol=1e-9, atol=1e-9)
    shift = (known.draws.mean(0) - known.means) / known.sds * math.sqrt(2000)
    assert shift.abs().max() < 4
    assert (known.draws.std(0) / known.sds).log().abs().max() < 0.15
    known.draws.zero_()
    assert reference(name).draws.abs().sum() > 0  # each call gives its own copy


@pytest.mark.parametrize("name", POSTERIORS)
def test_log_density_scores_the_reference_draws(name):
    """Stein's identity: a wrong prior, a lost Jacobian or a factor in the likelihood shows."""
    assert stein(target(name), parameters(name)).abs().max() < 4.5


@pytest.mark.parametrize("name", POSTERIORS)
def test_steins_identity_finds_a_wrong_width(name):
    it = target(name)
    right = it.function
    it.function = lambda p: 1.25 * right(p)
    assert stein(it, parameters(name)).abs().max() > 4.5


def plainly(name, p):
    """The same densities in the words of torch.distributions, for one point."""
    given = data(name)
    cauchy, normal = td.HalfCauchy, td.Normal
    if name == "eight_schools_noncentered":
        theta = p["mu"] + p["tau"] * p["t"]
        return (
            normal(0.0, 1.0).log_prob(p["t"]).sum() + normal(0.0, 5.0).log_prob(p["mu"])
            + cauchy(5.0).log_prob(p["tau"])
            + normal(theta, given["sigma"]).log_prob(given["y"]).sum()
        )  # fmt: skip
    if name == "blr":
        return (
            normal(0.0, 10.0).log_prob(p["beta"]).sum()
            + td.HalfNormal(10.0).log_prob(p["sigma"])
            + normal(given["X"] @ p["beta"], p["sigma"]).log_prob(given["y"]).sum()
        )
    if name == "kidscore_momiq":
        mean = p["beta"][0] + p["beta"][1] * given["mom_iq"]
        return cauchy(2.5).log_prob(p["sigma"]) + (
            normal(mean, p["sigma"]).log_prob(given["kid_score"]).sum()
        )
    if name == "arK":
        y, total = given["y"], cauchy(2.5).log_prob(p["sigma"])
        total = total + normal(0.0, 10.0).log_prob(p["alpha"])
        total = total + normal(0.0, 10.0).log_prob(p["beta"]).sum()
        for t in range(5, len(y)):
            mean = p["alpha"] + sum(p["beta"][k] * y[t - 1 - k] for k in range(5))
            total = total + normal(mean, p["sigma"]).log_prob(y[t])
        return total
    if name == "garch11":
        y, variance, total = given["y"], given["sigma1"] ** 2, 0.0
        for t in range(len(y)):
            if t:
                shock = (y[t - 1] - p["mu"]) ** 2
                variance = p["alpha0"] + p["alpha1"] * shock + p["beta1"] * variance
            total = total + normal(p["mu"], variance.sqrt()).log_prob(y[t])
        return total
    if name == "low_dim_gauss_mix":
        parts = td.MixtureSameFamily(
            td.Categorical(torch.stack([p["theta"], 1 - p["theta"]])), normal(p["mu"], p["sigma"])
        )
        return (
            parts.log_prob(given["y"]).sum() + td.Beta(5.0, 5.0).log_prob(p["theta"])
            + td.HalfNormal(2.0).log_prob(p["sigma"]).sum()
            + normal(0.0, 2.0).log_prob(p["mu"]).sum() + math.log(2)  # half of the plane is left
        )  # fmt: skip
    x = given["x"]
    kernel = p["alpha"] ** 2 * torch.exp(-((x[:, None] - x) ** 2) / (2 * p["rho"] ** 2))
    cover = kernel + p["sigma"] * torch.eye(len(x))
    return (
        td.MultivariateNormal(torch.zeros_like(x), cover).log_prob(given["y"])
        + td.Gamma(*torch.tensor([25.0, 4.0]).double()).log_prob(p["rho"])
        + td.HalfNormal(2.0).log_prob(p["alpha"])
        + td.HalfNormal(1.0).log_prob(p["sigma"])
    )  # fmt: skip


@pytest.mark.parametrize("name", POSTERIORS)
def test_log_density_is_the_plain_one_with_every_constant(name):
    it = target(name)
    near = parameters(name)[:3]
    far = it.constrain(torch.randn(3, it.free_features, generator=generator(7)).double())[0]
    for rows in (near, far):
        points = [dict(zip(it.split(rows), values, strict=True))
                  for values in zip(*it.split(rows).values(), strict=True)]  # fmt: skip
        plain = torch.stack([plainly(name, p) for p in points])
        torch.testing.assert_close(it.log_prob(rows), plain, rtol=1e-8, atol=1e-6)


def test_support_of_garch_depends_on_alpha1():
    it = target("garch11")
    u = 3 * torch.randn(1000, 4, generator=generator(9), dtype=torch.float64)
    x, _ = it.constrain(u)
    assert (x[:, 2] + x[:, 3] < 1).all()
    assert not it.inside(torch.tensor([[5.0, 1.0, 0.6, 0.5]], dtype=torch.float64)).any()


def test_recurrence_has_both_derivatives():
    drive = torch.rand(2, 7, generator=generator(1), dtype=torch.float64).requires_grad_()
    decay = torch.rand(2, 1, generator=generator(2), dtype=torch.float64).requires_grad_()
    v = Recurrence.apply(drive, decay)
    assert torch.allclose(v[:, 1:], drive[:, 1:] + decay * v[:, :-1])
    with torch.random.fork_rng():  # the checks draw from the global generator
        assert torch.autograd.gradcheck(Recurrence.apply, (drive, decay))
        assert torch.autograd.gradgradcheck(Recurrence.apply, (drive, decay))


@pytest.mark.parametrize("sigma", [1e-8, 1e-3, 0.009, 0.011, 1.0])
def test_a_narrow_component_of_the_mixture_is_exact(sigma):
    it, known = target("low_dim_gauss_mix"), parameters("low_dim_gauss_mix")[:2]
    known[0, 2] = sigma
    for n in (1, 2):  # alone and beside a row that does not need care
        rows = known[:n]
        points = {name: value[0] for name, value in it.split(rows).items()}
        value = it.log_prob(rows)[0]
        torch.testing.assert_close(value, plainly(it.name, points), rtol=1e-9, atol=1e-7)


def test_a_covariance_without_noise_is_impossible_not_an_error():
    it = target("gp_regr")
    x = torch.tensor([[50.0, 1e6, 1e-30], [6.0, 2.0, 1.0]], dtype=torch.float64)
    x.requires_grad_()
    value = it.log_prob(x)
    assert value[0] == -math.inf
    assert value[1].isfinite()
    gradient = torch.autograd.grad(value[1], x)[0]
    assert gradient.isfinite().all()
