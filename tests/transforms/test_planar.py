"""Planar layers: the formula of the paper, and slopes that stay positive however steep."""

import torch

from rootflow.transforms.planar import Planar


def layer_with(w, v, b, dtype=torch.float64):
    with torch.random.fork_rng():
        layer = Planar(len(w)).to(dtype)
    with torch.no_grad():
        layer.numbers.free.copy_(torch.tensor([*w, *v, b], dtype=dtype))
    return layer


def test_to_data_is_the_formula_of_the_paper():
    """Where u, solved for from two images, reproduces a third and moves along the same line."""
    layer = layer_with([0.3, -0.8, 0.5], [1.0, 2.0, -0.7], 0.2)
    z = torch.tensor([[0.1, 0.2, 0.3], [-1.0, 0.5, 2.0], [3.0, 1.0, -1.0]], dtype=torch.float64)
    w = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64)
    x = layer.inverse(z)[0].detach()
    u = (x - z) / torch.tanh(z @ w + 0.2)[:, None]
    torch.testing.assert_close(u, u[:1].expand(3, 3))
    assert float(u[0] @ w) > -1
    v = torch.tensor([1.0, 2.0, -0.7], dtype=torch.float64)
    moved = u[0] - v  # the constraint acts along w alone
    torch.testing.assert_close(moved, w * (moved @ w) / (w @ w))


def test_the_constraint_neither_overflows_nor_closes():
    """w.v of -1e4 to 1e4: log(1 + exp) would be infinite above, exactly zero below, in float32."""
    for t in (-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4):
        layer = layer_with([1.0, 0.0], [t, 0.5], 0.0, torch.float32)
        _, log_det = layer.inverse(torch.zeros(1, 2))
        expected = torch.asinh(torch.tensor([t], dtype=torch.float64)).float()
        torch.testing.assert_close(log_det, expected, rtol=1e-5, atol=1e-6)


def test_increasing_along_w():
    line = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        w, v = (torch.randn(3, generator=generator, dtype=torch.float64) * 10 for _ in range(2))
        layer = layer_with(w.tolist(), v.tolist(), 0.1 * seed - 2)
        x = layer.inverse(line[:, None] * w / torch.linalg.vector_norm(w))[0].detach()
        assert bool(((x @ w).diff() > 0).all())


def test_one_dimension_integrates_to_one():
    grid = torch.linspace(-40, 40, 20001, dtype=torch.float64)[:, None]
    for w, v in ((1.5, 3.0), (2.0, -1.5), (-1.0, 0.7)):
        with torch.no_grad():
            z, log_det = layer_with([w], [v], 0.3)(grid)
        density = torch.exp(-0.5 * z[:, 0].square() + log_det) / (2 * torch.pi) ** 0.5
        assert abs(float(torch.trapezoid(density, grid[:, 0])) - 1) < 1e-6
