"""The laws of every flow of the registry that has a version for images."""

import pytest
import torch

import rootflow
from rootflow.training.scores import score_images
from rootflow.transforms import Pixels
from rootflow.zoo import ZOO

FLOWS = [name for name, entry in ZOO.items() if entry.build_images is not None]
every_flow = pytest.mark.parametrize("name", FLOWS)


def wild(name, shape, dtype=torch.float64, seed=0, **options):
    """A small flow far from its start, in evaluation, with exact log-determinants."""
    options = {"blocks": 1, "scales": 2, "hidden": (4, 3), "alpha": 0.05, **options}
    options |= {} if name == "glow" else {"logdet": options.get("logdet", "exact")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = rootflow.flow(name, shape=shape, **options).to(dtype)
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return flow.eval()


def images(rows, shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, *shape, generator=generator, dtype=dtype)


@every_flow
@pytest.mark.parametrize(
    ("shape", "factor_out"), [((1, 4, 4), False), ((2, 4, 4), True)], ids=["kept", "factored"]
)
def test_log_det_is_that_of_the_jacobian_and_the_inverse_undoes_it(name, shape, factor_out):
    flow, x = wild(name, shape, factor_out=factor_out), images(3, shape)
    z, log_det = flow(x)
    full = torch.autograd.functional.jacobian
    matrices = [full(lambda v: flow(v[None])[0][0], row) for row in x]
    exact = torch.linalg.slogdet(torch.stack(matrices).view(3, x[0].numel(), -1)).logabsdet
    torch.testing.assert_close(log_det, exact, rtol=1e-9, atol=1e-9)
    back, log_det_back = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-7)


@every_flow
def test_float32_leading_dimensions_and_single_images(name):
    shape = (1, 4, 4)
    flow, exact = wild(name, shape, torch.float32), wild(name, shape, torch.float32).double()
    x = images(6, shape, torch.float32)
    log_prob = flow.log_prob(x.view(2, 3, *shape))
    assert log_prob.shape == (2, 3)
    torch.testing.assert_close(
        log_prob.double().view(6), exact.log_prob(x.double()), rtol=1e-4, atol=1e-3
    )
    alone = torch.stack([flow.log_prob(image) for image in x])
    torch.testing.assert_close(log_prob.view(6), alone, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(flow.inverse(flow(x)[0])[0], x, rtol=0, atol=1e-4)
    assert float(flow.certificates(x).max()) < 1e-2
    assert flow.log_prob(x[:0]).shape == (0,)


@every_flow
def test_gradients_equal_finite_differences(name):
    shape = (1, 2, 2)
    smooth = {"activation": "tanh"} if name == "glow" else {}
    flow = wild(name, shape, **smooth, alpha=0.1, hidden=(2,), scales=1)
    keys, values = zip(*flow.named_parameters(), strict=True)
    x = images(2, shape).requires_grad_()

    def log_prob(x, *values):
        return torch.func.functional_call(
            _LogProb(flow), {f"flow.{k}": v for k, v in zip(keys, values, strict=True)}, (x,)
        )

    with torch.random.fork_rng():  # gradcheck draws
        assert torch.autograd.gradcheck(log_prob, (x, *values), fast_mode=True)


class _LogProb(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        return self.flow.log_prob(x)


@every_flow
def test_saved_and_loaded_flows_are_equal_and_draws_deterministic(name, tmp_path):
    flow = wild(name, (1, 4, 4), torch.float32)
    flow.save(tmp_path / "model")
    again = rootflow.load(tmp_path / "model")
    assert again.event == (1, 4, 4)
    x = images(4, flow.event, torch.float32)
    assert torch.equal(flow.log_prob(x), again.log_prob(x))
    a, b = (f.sample((3,), generator=torch.Generator().manual_seed(1)) for f in (flow, again))
    assert torch.equal(a, b)
    assert a.shape == (3, 1, 4, 4)
    drawn, log_prob = flow.rsample_and_log_prob((5,), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(log_prob, flow.log_prob(drawn), rtol=1e-3, atol=5e-2)


@every_flow
def test_every_parameter_learns_and_actnorm_starts_from_the_first_batch(name):
    flow = wild(name, (1, 4, 4), torch.float32).train()
    flow.log_prob(images(8, flow.event, torch.float32)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters())
    assert all(bool(m.initialised) for m in flow.modules() if hasattr(m, "initialised"))


def test_scores_of_estimated_flows_cover_the_exact_value():
    """Of 20 repeated evaluations at least 16, as 99.7 % of binomials with 95 % do."""
    estimated = wild("residual", (1, 4, 4), torch.float32, logdet="geometric", lipschitz=0.7)
    exact = wild("residual", (1, 4, 4), torch.float32, lipschitz=0.7)
    k = torch.randint(0, 256, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    truth = score_images(exact, k, Pixels()).summary()
    assert truth["bits_per_dim_estimator_se"] == 0
    inside = 0
    for probes in range(20):
        found = score_images(estimated, k, Pixels(), probes=probes).summary()
        assert found["bits_per_dim_estimator_se"] > 0
        gap = abs(found["bits_per_dim"] - truth["bits_per_dim"])
        inside += gap < 1.96 * found["bits_per_dim_estimator_se"]
    assert inside >= 16


def test_the_published_blocks_have_their_size():
    """Three scales of two implicit blocks with 512 channels: 5.48 million in the convolutions."""
    with torch.random.fork_rng(), torch.device("meta"):
        flow = rootflow.flow(
            "implicit", shape=(3, 32, 32), hidden=(512, 512), linear=None, preactivation=True
        )
    inside = sum(p.numel() for n, p in flow.named_parameters() if "nets" in n and p.dim() > 1)
    assert inside == pytest.approx(5.48e6, rel=0.005)


@pytest.mark.parametrize(("name", "scales"), [("glow", 1), ("residual", 2)])
def test_scales_that_are_not_given_are_those_that_fit(name, scales):
    """Sides of six pixels, which can be halved once; Glow halves them before its first scale."""
    options = {"shape": (1, 6, 6), "blocks": 1, "hidden": (4,)}
    with torch.random.fork_rng():
        flows = [rootflow.flow(name, **options, **more) for more in ({}, {"scales": scales})]
    assert str(flows[0].transform) == str(flows[1].transform)
