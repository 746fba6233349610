"""What planar, radial and Sylvester layers promise alike, for every value of their numbers."""

import pytest
import torch

from rootflow.transforms.planar import Planar, planar
from rootflow.transforms.radial import Radial, radial
from rootflow.transforms.sylvester import Sylvester, sylvester

LAYERS = [Planar, Radial, Sylvester]
every_layer = pytest.mark.parametrize("kind", LAYERS, ids=[k.__name__ for k in LAYERS])
solved = pytest.mark.parametrize("kind", [Planar, Sylvester], ids=["Planar", "Sylvester"])
every_spread = pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def wild(kind, features, seed=0, spread=1.0, context=0, dtype=torch.float64, **options):
    """A layer whose numbers are drawn around their start in float32, then converted."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = kind(features, context, **options)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p) * spread)
    return layer.to(dtype)


def points(rows, features, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, features, generator=generator, dtype=torch.float64) * 2).to(dtype)


def jacobians(call, z):
    one = torch.autograd.functional.jacobian
    return torch.stack([one(lambda v: call(v[None])[0][0], row) for row in z])


@every_layer
@every_spread
@pytest.mark.parametrize("features", range(1, 9))
def test_log_det_is_that_of_the_jacobian_which_never_folds(kind, spread, features):
    for seed in (features, features + 8):
        layer, z = wild(kind, features, seed, spread), points(4, features, seed)
        for call in (layer.inverse, layer):
            sign, exact = torch.linalg.slogdet(jacobians(call, z))
            assert bool((sign > 0).all())
            torch.testing.assert_close(call(z)[1], exact, rtol=1e-9, atol=1e-9)


@every_layer
@every_spread
def test_float64_round_trips_and_log_dets_cancel(kind, spread):
    for seed in range(16):
        features = seed % 8 + 1
        layer, z = wild(kind, features, seed, spread), points(50, features, seed)
        x, log_det = layer.inverse(z)
        back, log_det_back = layer(x)
        torch.testing.assert_close(back, z, rtol=0, atol=1e-8)
        torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-8)


@every_layer
@pytest.mark.parametrize(("spread", "tolerance"), [(0.1, 2e-5), (1.0, 2e-4)])
def test_float32_round_trips(kind, spread, tolerance):
    for seed in range(16):
        features = seed % 8 + 1
        layer = wild(kind, features, seed, spread, dtype=torch.float32)
        x = points(50, features, seed, torch.float32)
        z, log_det = layer(x)
        back, log_det_back = layer.inverse(z)
        assert {t.dtype for t in (z, log_det, back, log_det_back)} == {torch.float32}
        torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(log_det_back, -log_det, rtol=tolerance, atol=tolerance)


@every_layer
@pytest.mark.parametrize("spread", [1.0, 10.0])
@every_dtype
def test_values_and_gradients_are_finite_at_the_edges(kind, spread, dtype):
    sizes = torch.tensor([0, torch.finfo(dtype).tiny, 1e-30, 1e4, -1e8, 1e15], dtype=dtype)
    for seed in range(8):
        features = seed % 8 + 1
        layer = wild(kind, features, seed, spread, dtype=dtype)
        x = torch.cat([sizes[:, None].expand(-1, features), points(20, features, dtype=dtype) * 10])
        x.requires_grad_()
        for call in (layer, layer.inverse):
            y, log_det = call(x)
            assert bool(y.isfinite().all())
            assert bool(log_det.isfinite().all())
            loss = y.sum() + log_det.sum()
            for g in torch.autograd.grad(loss, [x, *layer.parameters()]):
                assert bool(g.isfinite().all())


@every_layer
def test_all_numbers_at_zero_are_the_identity(kind):
    layer, x = wild(kind, 3), points(9, 3).requires_grad_()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    for call in (layer, layer.inverse):
        y, log_det = call(x)
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(log_det, torch.zeros_like(log_det))
        for g in torch.autograd.grad(y.sum() + log_det.sum(), [x, *layer.parameters()]):
            assert bool(g.isfinite().all())


@every_layer
@pytest.mark.parametrize("context", [0, 2])
def test_a_fresh_layer_is_the_identity_and_moves_at_the_first_step(kind, context):
    layer, x = wild(kind, 3, spread=0, context=context), points(20, 3)
    c = points(20, 2, 1) if context else None
    z, log_det = layer(x, c)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(log_det, torch.zeros_like(log_det))
    (z.square().sum() - log_det.sum()).backward()
    assert any(float(p.grad.abs().max()) > 0 for p in layer.parameters())
    assert all(p.grad is not None for p in layer.parameters())


@every_layer
@every_dtype
def test_a_batch_of_one_equals_a_batch_of_many(kind, dtype):
    tolerance = 100 * torch.finfo(dtype).eps
    for context in (0, 2):
        layer = wild(kind, 3, context=context, dtype=dtype, hidden=(4,))
        x, c = points(30, 3, dtype=dtype), points(30, 2, 1, dtype) if context else None
        for call in (layer, layer.inverse):
            together = call(x, c)
            one = [call(x[k : k + 1], None if c is None else c[k : k + 1]) for k in range(30)]
            for part, alone in zip(together, zip(*one, strict=True), strict=True):
                torch.testing.assert_close(
                    part, torch.cat(alone), rtol=10 * tolerance, atol=10 * tolerance
                )
        none = None if c is None else c[:0]
        assert layer(x[:0], none)[0].shape == layer.inverse(x[:0], none)[0].shape == (0, 3)
        assert layer.certificate(x[:0], x[:0], none).shape == (0,)


@every_layer
@pytest.mark.parametrize("context", [0, 1])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_first_and_second_derivatives_equal_finite_differences(kind, context, direction):
    layer = wild(kind, 2, 3, context=context, hidden=(2,), activation="tanh")
    keys, values = zip(*layer.named_parameters(), strict=True)
    inputs = [points(2, 2).requires_grad_()]
    inputs += [points(2, 1, 1).requires_grad_()] if context else []

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, *inputs):
            return getattr(self.layer, direction)(*inputs)

    def call(*tensors):
        own = dict(zip((f"layer.{k}" for k in keys), tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(Call(), own, tensors[: len(inputs)])

    with torch.random.fork_rng():  # gradcheck draws
        assert torch.autograd.gradcheck(call, (*inputs, *values), atol=1e-7, rtol=1e-6)
        assert torch.autograd.gradgradcheck(call, (*inputs, *values), atol=1e-6)


@solved
@every_spread
@pytest.mark.parametrize("context", [0, 2])
def test_certificates_hold_against_float64(kind, spread, context):
    ratios = []
    for seed in range(8):
        features = seed % 8 + 1
        options = {"seed": seed, "spread": spread, "context": context, "hidden": (4,)}
        layer = wild(kind, features, **options, dtype=torch.float32)
        x = points(200, features, seed, torch.float32)
        c = points(200, 2, seed + 1, torch.float32) if context else None
        with torch.no_grad():
            z, _ = layer(x, c)
            certificate = layer.certificate(x, z, c)
            truth, _ = layer.double()(x.double(), None if c is None else c.double())
        error = torch.linalg.vector_norm(z.double() - truth, dim=-1)
        assert certificate.dtype == torch.float32
        assert bool((error <= certificate.double()).all())
        ratios.append((certificate.double() + 1e-12) / (error + 1e-12))
    if spread <= 1 and not context:  # and they say little more than the truth
        assert float(torch.cat(ratios).median()) < 4


@solved
@every_spread
def test_certificates_hold_far_from_the_root(kind, spread):
    for seed in range(8):
        features = seed % 8 + 1
        layer, x = wild(kind, features, seed, spread), points(100, features, seed)
        with torch.no_grad():
            z, _ = layer(x)
            for size in (1e-6, 1e-2, 1.0, 100.0):
                moved = z + points(100, features, seed + 1) * size
                error = torch.linalg.vector_norm(moved - z, dim=-1)
                assert bool((error <= layer.certificate(x, moved, None) * (1 + 1e-9)).all())


@every_layer
def test_the_closed_direction_compiles_whole(kind, monkeypatch):
    distribution = torch.distributions.Distribution  # whose checks torch.compile switches off
    monkeypatch.setattr(distribution, "_validate_args", distribution._validate_args)
    layer, z, c = wild(kind, 3, context=2), points(5, 3), points(5, 2, 1)
    with torch.random.fork_rng():
        compiled = torch.compile(layer.inverse, fullgraph=True, backend="eager")
        got = compiled(z, c)
    for part, wanted in zip(got, layer.inverse(z, c), strict=True):
        torch.testing.assert_close(part, wanted)


@every_layer
def test_context_moves_the_layer_and_wrong_contexts_are_named(kind):
    layer, x = wild(kind, 3, context=2), points(5, 3)
    assert not torch.allclose(layer(x, points(5, 2, 1))[0], layer(x, points(5, 2, 2))[0])
    with pytest.raises(ValueError, match="takes a context of width 2"):
        layer(x)
    with pytest.raises(ValueError, match="its last dimension must be 2"):
        layer.inverse(x, points(5, 3))
    with pytest.raises(ValueError, match="takes no context"):
        wild(kind, 3)(x, points(5, 2))


@pytest.mark.parametrize("recipe", [planar, radial, sylvester])
def test_recipes_stack_what_was_asked_for(recipe):
    with torch.random.fork_rng():
        chain = recipe(3, blocks=5, actnorm=False, linear=None)
        assert len(chain) == 5
        assert len(recipe(3, 2, blocks=2, actnorm=True, linear="lu", hidden=(4,))) == 8
        assert len(recipe(1, blocks=2, actnorm=False, linear="lu")) == 2
        with pytest.raises(ValueError, match="blocks=0 must be at least 1"):
            recipe(3, blocks=0)
        with pytest.raises(ValueError, match="linear='qr' is unknown"):
            recipe(3, linear="qr")
