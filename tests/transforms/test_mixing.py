"""What stands between blocks: orders that are saved, LU maps, data initialisation that is safe."""

import pytest
import torch

import rootflow
from rootflow.transforms import ActNorm, LULinear, Permute, Reverse, Scale, mixing
from rootflow.transforms.mixing import check_mixing


def made(kind, *arguments, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        part = kind(*arguments, **options).double()
        with torch.no_grad():
            for p in part.parameters():
                p.add_(torch.randn_like(p) * 0.3)
    return part


def points(rows, features, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    "part",
    [
        made(Reverse, 5),
        made(Permute, 5),
        made(LULinear, 5),
        made(LULinear, 5, permute=True),
        made(Scale, 5),
        made(ActNorm, 5),
    ],
    ids=lambda part: type(part).__name__,
)
def test_log_det_and_inverse(part):
    part.eval()
    x = points(7, 5)
    z, log_det = part(x)
    jacobian = torch.autograd.functional.jacobian(lambda v: part(v)[0], x[0])
    exact = torch.linalg.slogdet(jacobian).logabsdet.expand(7)
    torch.testing.assert_close(log_det, exact, rtol=1e-9, atol=1e-9)
    back, log_det_back = part.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-12, atol=1e-12)
    assert part(x[:0])[0].shape == (0, 5)


def test_reverse_and_permute_move_whole_columns():
    x = points(4, 6)
    assert torch.equal(made(Reverse, 6)(x)[0], x.flip(-1))
    part = made(Permute, 6)
    assert torch.equal(part(x)[0], x[:, part.order])
    assert sorted(part.order.tolist()) == list(range(6))


def test_the_permutation_is_drawn_with_the_weights():
    first, again, other = (made(Permute, 20, seed=seed).order for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_permuted_lu_map_starts_as_its_permutation():
    with torch.random.fork_rng(devices=[]):
        part = LULinear(6, permute=True).double()
    x = points(4, 6)
    assert torch.equal(part(x)[0], x[:, part.order])
    assert LULinear(6).order is None


@pytest.mark.parametrize(
    ("name", "options"), [("realnvp", {"linear": "permute"}), ("glow", {})], ids=["permute", "glow"]
)
def test_permutations_are_saved_and_loaded(name, options, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        flow = rootflow.flow(name, 9, blocks=3, hidden=(4,), **options).eval()
    orders = {k: v for k, v in flow.state_dict().items() if k.endswith("order")}
    assert len(orders) == 2  # before every second block
    flow.save(tmp_path / "m")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        again = rootflow.load(tmp_path / "m")
    for key, order in orders.items():
        assert torch.equal(again.state_dict()[key], order)
    x = points(5, 9, dtype=torch.float32)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))


def test_names():
    with torch.random.fork_rng(devices=[]):
        kinds = {"lu": LULinear, "reverse": Reverse, "permute": Permute}
        for name, kind in kinds.items():
            assert [type(p) for p in mixing(3, True, name)] == [ActNorm, kind]
        assert mixing(3, False, None) == []
        assert mixing(1, False, "lu") == []
        message = "linear='qr' is unknown; choose 'lu', 'reverse', 'permute' or None"
        with pytest.raises(ValueError, match=message):
            mixing(1, False, "qr")


def test_intervals_are_kept():
    assert check_mixing("linear", False, "auto") == "lu"
    assert check_mixing("bounded", False, "auto") == "permute"
    assert check_mixing("circular", False, None) is None
    with pytest.raises(ValueError, match="actnorm=True leads out of the interval"):
        check_mixing("circular", True, "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_actnorm_standardises_and_leaves_constant_columns_their_scale(dtype):
    part = ActNorm(4).to(dtype).train()
    x = points(100, 4, dtype=dtype) * 5 + 3
    x[:, 1] = 0.1  # its mean and so its spread may come out as rounding errors
    x[:, 2] = 12345.678
    z, log_det = part(x)
    assert bool(part.initialised)
    z, tolerance = z.detach(), 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(part.log_scale[1:3], torch.zeros(2, dtype=dtype))
    for k in (0, 3):
        assert abs(float(z[:, k].mean())) < tolerance
        assert abs(float(z[:, k].std()) - 1) < tolerance
    moved = x[:1] + 1
    assert float((part(moved)[0].detach() - z[:1])[:, 1:3].abs().max()) < 1.01
    assert bool(log_det.isfinite().all())


def test_compiled_code_leaves_the_initialisation_to_the_first_eager_step():
    part = ActNorm(3).double().train()
    x = points(10, 3) * 4
    torch._dynamo.reset()
    before = torch.distributions.Distribution._validate_args
    run = torch.compile(part, backend="eager", fullgraph=True)
    assert torch.equal(run(x)[0], x)
    torch.distributions.Distribution.set_default_validate_args(before)  # tracing turns it off
    assert not bool(part.initialised)
    z, _ = part(x)
    assert bool(part.initialised)
    torch.testing.assert_close(run(x)[0], z)
