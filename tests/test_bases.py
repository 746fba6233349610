"""Base distributions: densities integrate to one, draws follow them, gradients arrive."""

import math

import pytest
import torch

import rootflow
from rootflow.bases import BASES


@pytest.mark.parametrize("name", sorted(BASES))
def test_density_and_draws_agree(name):
    base = BASES[name]((1,)).double()
    for p in base.parameters():
        generator = torch.Generator().manual_seed(1)
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    grid = torch.linspace(-2000, 2000, 800_001, dtype=torch.float64)
    with torch.no_grad():
        density = base.log_prob(grid[:, None]).exp()
        z = base.sample((40_000,), torch.Generator().manual_seed(0))[:, 0]
    assert abs(float(torch.trapezoid(density, grid)) - 1) < 1e-5
    cdf = torch.cumulative_trapezoid(density, grid)
    at = cdf[torch.searchsorted(grid, z.clamp(-1999, 1999)) - 1].sort().values
    gap = (at - (torch.arange(len(z), dtype=torch.float64) + 0.5) / len(z)).abs().max()
    assert float(gap) < 1.95 / math.sqrt(len(z))  # Kolmogorov-Smirnov, 0.1 % level


@pytest.mark.parametrize("name", sorted(BASES))
def test_flows_with_this_base(name, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = rootflow.flow("monotone", 2, blocks=1, hidden=(4,), base=name).eval()
    x, log_prob = flow.rsample_and_log_prob((6,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=1e-4, atol=1e-4)
    log_prob.sum().backward()
    flow.log_prob(x.detach()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.base.parameters())
    flow.save(tmp_path / "m")
    again = rootflow.load(tmp_path / "m")
    assert torch.equal(again.log_prob(x), flow.log_prob(x))


def test_unknown_base_lists_the_valid_ones():
    with pytest.raises(ValueError, match="normal, student, mixture"):
        rootflow.flow("monotone", 2, base="cauchy")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda flow: flow.sample(5), ValueError, r"sample_shape=5: give a tuple"),
        (lambda flow: flow.rsample((2, -1)), ValueError, r"sample_shape=\(2, -1\): give a tuple"),
        (lambda flow: flow.log_prob([[0.0, 0.0]]), TypeError, "the input is list; give a torch"),
        (lambda flow: rootflow.flow("maf", "2"), ValueError, "features='2', context=0: give a"),
    ],
)
def test_wrong_calls_of_a_flow_are_named(call, error, message):
    with torch.random.fork_rng(devices=[]), pytest.raises(error, match=message):
        call(rootflow.flow("maf", 2, blocks=1, hidden=(4,)))
