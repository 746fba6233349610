"""Sylvester layers: orthonormal frames, triangular factors, and the planar layer inside them."""

import pytest
import torch

from rootflow.transforms.planar import Planar
from rootflow.transforms.sylvester import Sylvester


def drawn(features, rank, seed=0, spread=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = Sylvester(features, rank=rank).double()
        with torch.no_grad():
            layer.numbers.free.add_(torch.randn_like(layer.numbers.free) * spread)
    return layer


@pytest.mark.parametrize(("features", "rank"), [(1, 1), (5, 1), (5, 3), (6, 6), (20, 8)])
@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_the_parts_are_what_the_paper_asks_for(features, rank, spread):
    layer = drawn(features, rank, spread=spread)
    q, right, left, _, log_gain = layer._parts(layer.numbers(None))
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close((q.mT @ q)[0], eye, rtol=0, atol=1e-13)
    assert torch.equal(right, right.triu())
    assert torch.equal(left, left.triu())
    diagonal = right.diagonal(dim1=-2, dim2=-1) * left.diagonal(dim1=-2, dim2=-1)
    assert bool((diagonal > -1).all())
    torch.testing.assert_close(log_gain.exp(), 1 + diagonal, rtol=1e-9, atol=1e-12)
    z = torch.randn(7, features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inner = z @ q[0] @ left[0].T + layer._parts(layer.numbers(None))[3]
    torch.testing.assert_close(layer.inverse(z)[0], z + inner.tanh() @ right[0].T @ q[0].T)


def test_reflections_of_any_length_give_a_frame():
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    for scale in (1e-300, 1e-30, 1.0, 1e200):
        q = Sylvester._frame(v[None] * scale)[0]
        torch.testing.assert_close(q, Sylvester._frame(v[None])[0], rtol=1e-12, atol=1e-12)
    explicit = torch.eye(4, 3, dtype=torch.float64)
    for column in reversed(v.unbind(-1)):
        explicit = explicit - 2 * torch.outer(column, column @ explicit) / (column @ column)
    torch.testing.assert_close(q, explicit, rtol=1e-12, atol=1e-12)
    same = Sylvester._frame(v[None, :, :1].expand(1, 4, 3))[0]  # all three reflections alike
    torch.testing.assert_close(same.T @ same, torch.eye(3).double(), rtol=0, atol=1e-13)


def test_one_dimension_and_rank_one_are_a_planar_layer():
    with torch.random.fork_rng():
        wide, flat = Sylvester(1).double(), Planar(1).double()
    with torch.no_grad():
        wide.numbers.free.copy_(torch.tensor([1.0, -0.7, 1.3, 0.4]))  # v, r, r~, b
        sign = float(wide._parts(wide.numbers(None))[0])
        flat.numbers.free.copy_(torch.tensor([1.3 * sign, -0.7 * sign, 0.4]))  # w, v, b
    x = torch.linspace(-5, 5, 50, dtype=torch.float64)[:, None]
    for a, b in ((wide(x), flat(x)), (wide.inverse(x), flat.inverse(x))):
        torch.testing.assert_close(a, b)


def test_directions_outside_the_frame_stay_put():
    layer = drawn(6, 2)
    q = layer._parts(layer.numbers(None))[0][0]
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = layer(x)[0] - x
    torch.testing.assert_close(moved @ q @ q.T, moved, rtol=0, atol=1e-12)
    assert Sylvester.__init__.__defaults__[1] is None
    assert drawn(20, None).rank == 8


@pytest.mark.parametrize("rank", [0, 4])
def test_a_wrong_rank_is_named(rank):
    with torch.random.fork_rng(), pytest.raises(ValueError, match=f"rank={rank} must be from 1 to"):
        Sylvester(3, rank=rank)
