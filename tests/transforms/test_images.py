"""Maps of images against autograd's Jacobian, closed forms, and one another."""

import math

import pytest
import torch

import rootflow
from rootflow.transforms import (
    ActNorm,
    Affine,
    Compose,
    FirstChannels,
    ImageCoupling,
    Logit,
    LULinear,
    Permute,
    Pixels,
    Reverse,
    Squeezed,
    glow_images,
)

SMALL = {"hidden": (5, 4), "activation": "tanh"}
KINDS = {
    "actnorm": ActNorm,
    "lu": LULinear,
    "lu permuted": lambda shape: LULinear(shape, permute=True),
    "reverse": Reverse,
    "permute": Permute,
    "logit": Logit,
    "coupling": lambda shape: ImageCoupling(shape, Affine(), **SMALL),
    "flipped": lambda shape: ImageCoupling(shape, Affine(), flip=True, **SMALL),
    "factored out": lambda shape: FirstChannels(shape, LULinear((1, *shape[1:]))),
    "one scale": lambda shape: Compose(glow_images(shape, scales=1, blocks=2, **SMALL)),
    "glow": lambda shape: Compose(glow_images(shape, blocks=2, **SMALL)),
    "kept": lambda shape: Compose(glow_images(shape, blocks=2, factor_out=False, **SMALL)),
}
CASES = [
    (name, shape)
    for name in KINDS
    for shape in ((1, 4, 4), (2, 4, 4))
    if shape[0] == 2 or name not in ("coupling", "flipped")
]
every_map = pytest.mark.parametrize(("name", "shape"), CASES)


def made(name, shape, dtype=torch.float64, seed=0):
    """The map, far from its start, in evaluation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        part = KINDS[name](shape).to(dtype)
        with torch.no_grad():
            for p in part.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return part.eval()


def images(rows, shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, *shape, generator=generator, dtype=dtype)


@every_map
def test_log_det_is_that_of_the_jacobian_and_the_inverse_undoes_it(name, shape):
    for seed in (0, 1):
        part, x = made(name, shape, seed=seed), images(3, shape, seed=seed)
        z, log_det = part(x)
        back, log_det_back = part.inverse(z)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
        torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-10)
        full = torch.autograd.functional.jacobian
        matrices = [full(lambda v, f=part: f(v[None])[0][0], row) for row in x]
        exact = torch.linalg.slogdet(torch.stack(matrices).view(3, x[0].numel(), -1)).logabsdet
        torch.testing.assert_close(log_det, exact, rtol=1e-10, atol=1e-10)


@every_map
def test_leading_dimensions_and_float32(name, shape):
    part, exact = made(name, shape, torch.float32), made(name, shape, torch.float32).double()
    x = images(6, shape, torch.float32)
    z, log_det = part(x.view(2, 3, *shape))
    assert z.shape == (2, 3, *shape)
    assert log_det.shape == (2, 3)
    truth, log_det_truth = exact(x.double())
    torch.testing.assert_close(z.view(truth.shape).double(), truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_det.view(-1).double(), log_det_truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part.inverse(z)[0].view(x.shape), x, rtol=1e-3, atol=1e-4)
    alone = torch.cat([part(row[None])[0] for row in x])
    torch.testing.assert_close(z.view(x.shape), alone, rtol=1e-5, atol=1e-5)
    assert part(x[:0])[0].shape == (0, *shape)
    assert part.inverse(x[:0])[0].shape == (0, *shape)
    with pytest.raises(ValueError, match="trailing dimensions"):
        part(x[:, 0])


@pytest.mark.parametrize("name", ["actnorm", "lu permuted", "logit", "flipped", "glow"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients_equal_finite_differences(name, direction):
    part = made(name, (2, 2, 2) if name != "glow" else (1, 4, 4))
    x = images(2, part.event).requires_grad_()
    keys, values = zip(*part.named_parameters(), strict=True) if name != "logit" else ((), ())

    class Method(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = part

        def forward(self, x):
            return getattr(self.part, direction)(x)

    def call(x, *values):
        tensors = {f"part.{k}": v for k, v in zip(keys, values, strict=True)}
        return torch.func.functional_call(Method(), tensors, (x,))

    with torch.random.fork_rng():  # gradcheck draws
        assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_compiled_code_gives_the_eager_result():
    with torch.random.fork_rng():
        parts = [Logit((2, 4, 4)), *glow_images((2, 4, 4), scales=1, blocks=1, **SMALL)]
    part = Compose(parts).double().eval()
    x = images(3, part.event)
    expected = [*part.to_latent(x, None), *part.to_data(x, None)]
    torch.compiler.reset()
    found = []
    for call in (part.to_latent, part.to_data):
        found += torch.compile(call, fullgraph=True, backend="eager", dynamic=False)(x, None)
    # torch switches this off when it first compiles
    torch.distributions.Distribution.set_default_validate_args(True)
    torch.testing.assert_close(found, expected)


def test_squeezing_puts_each_square_into_four_channels():
    shift = ActNorm((8, 1, 1))
    with torch.no_grad():
        shift.shift.copy_(-torch.arange(8.0))
    z, _ = Squeezed(shift)(torch.zeros(1, 2, 2, 2))
    assert z[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_actnorm_standardises_each_channel_of_the_first_batch():
    x = images(50, (3, 4, 2)) * torch.tensor([1.0, 10.0, 0.0]).view(3, 1, 1) + 5
    part = ActNorm((3, 4, 2)).double()
    assert torch.equal(part(x)[0], x) is False  # training mode: it initialises
    z = part.eval()(x)[0]
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)
    spread = z.transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(spread, torch.tensor([1.0, 1.0, 0.0]).double(), rtol=0, atol=1e-12)


def test_factor_out_leaves_half_of_the_channels_alone():
    shape = (1, 8, 8)
    with torch.random.fork_rng():
        flow = Compose(glow_images(shape, blocks=1, hidden=(4,)))
    inner = [m for m in flow.modules() if isinstance(m, FirstChannels)]
    assert [(m.event, m.kept) for m in inner] == [((16, 2, 2), 8)]


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_come_back_from_their_cells_whatever_the_noise(levels, dtype):
    pixels = Pixels(levels)
    k = torch.arange(levels, dtype=torch.uint8).repeat(5000 if levels < 20 else 500)
    x = pixels.dequantise(k, torch.Generator().manual_seed(0), dtype)
    assert x.dtype == dtype
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    assert torch.equal(pixels.quantise(x), k)
    assert abs(float((x * levels - k).mean()) - 0.5) < 0.02
    ends = torch.tensor([-0.1, 0.0, 1.0, 1.1], dtype=dtype)
    assert pixels.quantise(ends).tolist() == [0, 0, levels - 1, levels - 1]


def test_bits_per_dimension_of_known_densities():
    shape = (3, 4, 4)
    for levels in (16, 17, 256):
        # the uniform density on [0, 1) knows nothing: log2(levels) bits for every value
        assert Pixels(levels).bits_per_dim(0.0, shape) == pytest.approx(math.log2(levels))
    # a density that puts all mass into one cell is certain
    assert Pixels(32).bits_per_dim(48 * math.log(32), shape) == pytest.approx(0, abs=1e-12)
    # one nat per image more is 1 / (D ln 2) bits less
    gain = Pixels(256).bits_per_dim(0.0, shape) - Pixels(256).bits_per_dim(1.0, shape)
    assert gain == pytest.approx(Pixels.bits(shape))
    assert Pixels.bits(shape) == pytest.approx(1 / (48 * math.log(2)))


@pytest.mark.parametrize("alpha", [1e-6, 1e-4, 0.05, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logit_takes_back_its_own_draws_from_far_tails(alpha, dtype):
    part = Logit((1, 1, 1), alpha)
    z = torch.tensor([-200, -30, -5, 0, 5, 30, 200], dtype=dtype).view(-1, 1, 1, 1)
    x, _ = part.inverse(z)
    again, log_det = part(x)
    assert bool(again.isfinite().all() and log_det.isfinite().all())
    torch.testing.assert_close(again[2:5], z[2:5], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.3])
def test_the_logit_keeps_the_mass_of_a_density(alpha):
    part = Logit((1, 1, 1), alpha).double()
    flow = rootflow.Flow(part)
    edges = torch.linspace(part.lowest, 1 - part.lowest, 200_001, dtype=torch.float64)
    middle = ((edges[1:] + edges[:-1]) / 2).clamp(part.lowest, 1 - part.lowest)
    density = flow.log_prob(middle.view(-1, 1, 1, 1)).exp()
    assert float(density.sum() * (edges[1] - edges[0])) == pytest.approx(1, abs=1e-4)
    ends = torch.tensor([part.lowest, 0.0, 1.0, 1 - part.lowest], dtype=torch.float64)
    assert bool(flow.log_prob(ends.view(-1, 1, 1, 1)).isfinite().all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rootflow.flow("glow", shape=(1, 4, 4), bins=3), "options are scales, blocks"),
        (lambda: rootflow.flow("maf", shape=(1, 4, 4)), "choose one of implicit, residual, mon"),
        (lambda: rootflow.flow("glow"), "either features"),
        (lambda: rootflow.flow("glow", 3, shape=(1, 4, 4)), "either features"),
        (lambda: rootflow.flow("glow", shape=(4, 4)), r"shape=\(4, 4\), context=0"),
        (lambda: rootflow.flow("glow", shape=(1, 4, 4), context=2), "without context"),
        (lambda: rootflow.flow("glow", shape=(1, 5, 4)), "even sides"),
        (lambda: rootflow.flow("glow", shape=(1, 6, 6), scales=2), "3 x 3 can be halved 0 times"),
        (lambda: rootflow.flow("glow", shape=(1, 4, 4), alpha=0.5), "alpha=0.5"),
        (lambda: rootflow.flow("glow", shape=(1, 4, 4), base="cauchy"), "base='cauchy'"),
        (lambda: ImageCoupling((1, 4, 4), Affine()), "two channels"),
        (lambda: Logit((1, 1, 1))(torch.full((1, 1, 1), 3.0)), "values from 3 to 3; images must"),
        (lambda: Pixels(1), "levels=1"),
    ],
)
def test_wrong_use_names_what_would_be_right(call, message):
    with torch.random.fork_rng(), pytest.raises(ValueError, match=message):
        call()
