"""Radial layers: the formula of the paper and both branches of its closed inverse."""

import torch

from rootflow.transforms.radial import Radial


def layer_with(centre, raw_alpha, raw_gamma, dtype=torch.float64):
    with torch.random.fork_rng():
        layer = Radial(len(centre)).to(dtype)
    with torch.no_grad():
        layer.numbers.free.copy_(torch.tensor([*centre, raw_alpha, raw_gamma], dtype=dtype))
    return layer


def test_to_data_is_the_formula_of_the_paper():
    centre = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for raw_alpha, raw_gamma in ((0.3, 2.0), (-1.0, -3.0)):
        alpha = raw_alpha + (1 + raw_alpha**2) ** 0.5
        beta = alpha * (raw_gamma + (1 + raw_gamma**2) ** 0.5 - 1)
        distance = torch.linalg.vector_norm(z - centre, dim=-1, keepdim=True)
        expected = z + beta / (alpha + distance) * (z - centre)
        x, _ = layer_with(centre.tolist(), raw_alpha, raw_gamma).inverse(z)
        torch.testing.assert_close(x, expected)


def test_both_branches_of_the_inverse_and_the_tie_between_them():
    """Radii on both sides of alpha + beta, and exactly there, where abs would lose the slope."""
    layer = layer_with([0.0, 0.0], 0.0, 0.75)  # alpha = 1, alpha + beta = 2
    radii = torch.tensor([0.0, 1e-12, 0.5, 2.0 - 1e-9, 2.0, 2.0 + 1e-9, 50.0, 1e9]).double()
    x = torch.stack([radii, torch.zeros_like(radii)], -1).requires_grad_()
    z, log_det = layer(x)
    back, log_det_back = layer.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(z[:, 0].sum(), x)
    rho = z.detach()[:, 0]
    torch.testing.assert_close(gradient[:, 0], 1 / (1 + 1 / (1 + rho) ** 2), rtol=1e-12, atol=0)


def test_extreme_stretch_and_squeeze_round_trip_in_float32():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 3, generator=generator) * torch.logspace(-4, 4, 500)[:, None]
    for raw in (-1e3, -10.0, 0.0, 10.0, 1e3):
        layer = layer_with([0.1, 0.2, 0.3], 0.5, raw, torch.float32)
        z, log_det = layer(x)
        back, log_det_back = layer.inverse(z)
        # where gamma is a thousandth the map is nearly flat near the centre, not its inverse
        torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-3)
        assert bool((log_det + log_det_back).abs().max() < 0.02)
