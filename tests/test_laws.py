"""The laws that every flow of the registry obeys, over options, seeds, dtypes and edge values."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rootflow
from rootflow.transforms.conditioners import ACTIVATIONS
from rootflow.zoo import ZOO

ROOTS = ["implicit", "monotone", "residual"]  # networks with a certified bound, under "nets"
LIPSCHITZ = ["sin", "lipswish", "clipswish", "cpila", "tanh", "elu"]
CLOSED = {e.name for e in ZOO.values() if e.forward == e.inverse == "closed"}
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}
DEFAULTS = {"blocks": 2, "hidden": (8, 7), "steps": 4}
STEPS = {"ffjord": 1e-5}  # error of the only map that is a sum of steps, in both directions


def wild(name, features, *, seed=0, spread=None, context=0, dtype=torch.float64, **options):
    """A flow far from its start: parameters drawn with standard deviation ``spread`` around it.

    Options that the flow does not have are left out. Maps without a certified bound stay moderate:
    each family's own tests go further.
    """
    known = ZOO[name].options()
    options = {k: v for k, v in {**DEFAULTS, **options}.items() if k in known}
    spread = spread or (1.0 if name in ROOTS else 0.3)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = rootflow.flow(name, features, context, **options).to(dtype)
        with torch.no_grad():
            for key, p in flow.named_parameters():
                # linear layers, scales and context stay moderate: not under test here
                certified = "nets" in key and "context_net" not in key
                p.add_(torch.randn_like(p) * (spread if certified else min(spread, 0.2)))
    return flow.eval()


def points(rows, features, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator, dtype=dtype) * 2


def jacobian(flow, x, context=None):
    def one(v, k):
        return flow(v[None], None if context is None else context[k : k + 1])[0][0]

    full = torch.autograd.functional.jacobian
    return torch.stack([full(lambda v, k=k: one(v, k), x[k]) for k in range(len(x))])


@st.composite
def options_of(draw, name):
    """Options that this flow has, for a small one."""
    choices = {
        "activation": st.sampled_from(LIPSCHITZ if name in ROOTS else sorted(ACTIVATIONS)),
        "hidden": st.sampled_from([(6,), (8, 7), (6, 5, 4)]),
        "residual": st.booleans(),
        "actnorm": st.booleans(),
        "linear": st.sampled_from(["lu", "reverse", "permute", None]),
        "bins": st.integers(2, 9),
        "interval": st.sampled_from([1.0, 3.0, 5.0]),
        "blocks": st.integers(1, 3),
    }
    found = {k: draw(v) for k, v in choices.items() if k in ZOO[name].options()}
    if found.get("residual"):
        found["hidden"] = (6, 6)
    spread = draw(st.sampled_from([0.1, 1.0, 10.0] if name in ROOTS else [0.1, 0.3]))
    return {**found, "spread": spread}


drawn = given(
    data=st.data(),
    seed=st.integers(0, 2**20),
    features=st.integers(1, 5),
    context=st.sampled_from([0, 2]),
)
every_flow = pytest.mark.parametrize("name", sorted(ZOO))
root_flow = pytest.mark.parametrize("name", ROOTS)


@every_flow
@settings(max_examples=8)
@drawn
def test_log_det_is_that_of_the_jacobian(name, data, seed, features, context):
    options = data.draw(options_of(name))
    flow = wild(name, features, seed=seed, context=context, **options)
    x = points(4, features, seed)
    c = points(4, context, seed + 1) if context else None
    exact = torch.linalg.slogdet(jacobian(flow, x, c))
    log_det = flow(x, c)[1]
    assert log_det.shape == (4,)
    tolerance = STEPS.get(name, 1e-9)
    torch.testing.assert_close(log_det, exact.logabsdet, rtol=tolerance, atol=tolerance)


@every_flow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=8)
@drawn
def test_round_trip_and_cancelling_log_dets(name, dtype, data, seed, features, context):
    options = data.draw(options_of(name))
    flow = wild(name, features, seed=seed, context=context, dtype=dtype, **options)
    x = points(20, features, seed, dtype)
    c = points(20, context, seed + 1, dtype) if context else None
    z, log_det = flow(x, c)
    back, log_det_back = flow.inverse(z, c)
    assert z.dtype == log_det.dtype == back.dtype == dtype
    tolerance = max(TOLERANCE[dtype], STEPS.get(name, 0))
    if dtype == torch.float32 and name not in ROOTS:
        error: torch.Tensor = torch.linalg.vector_norm((back - x).double(), dim=-1)
        assert (error <= 16 * representable(flow, x, z, c) + STEPS.get(name, 0)).all()
        log_det = flow(back, c)[1]  # of the point that came back
    else:
        torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
    assert float((log_det + log_det_back).detach().abs().max()) <= 10 * tolerance


def representable(flow, x, z, c):
    """How far off x is when x and z are rounded to float32, by the Jacobian in float64."""
    twin = copy.deepcopy(flow).double()
    forward = jacobian(twin, x.double(), None if c is None else c.double()).detach()
    norm = partial(torch.linalg.matrix_norm, ord=2)
    back = norm(torch.linalg.inv(forward))
    size_x, size_z = (1 + torch.linalg.vector_norm(v.detach().double(), dim=-1) for v in (x, z))
    return torch.finfo(torch.float32).eps * (1 + back * (size_z + norm(forward) * size_x))


@root_flow
@pytest.mark.parametrize("solver", ["fixed-point", "anderson", "broyden", "newton", "auto"])
def test_every_solver_leaves_the_gradients_exact(name, solver):
    check_gradients(wild(name, 2, **SMALL, solver=solver, context=1))


@every_flow
def test_gradients_equal_finite_differences_in_both_directions(name):
    smooth = {} if name in ROOTS else {"activation": "tanh", "bins": 3}
    check_gradients(wild(name, 2, **SMALL, **smooth, context=1))


SMALL = {"hidden": (3, 2), "blocks": 1, "actnorm": False, "linear": None}


def check_gradients(flow):
    x = points(2, 2).requires_grad_()
    c = points(2, 1, 1).requires_grad_()
    skipped = ("context_net.0", "context_net.2.weight")  # plain torch, and 64 columns wide
    chosen = {k: v for k, v in flow.named_parameters() if not any(part in k for part in skipped)}
    keys, values = list(chosen), list(chosen.values())

    def call(method, x, c, *values):
        pair = dict(zip(keys, values, strict=True))
        tensors = {f"flow.{k}": v for k, v in pair.items()}
        return torch.func.functional_call(_Method(flow, method), tensors, (x, c))

    for method in ("log_prob", "inverse"):
        with torch.random.fork_rng():  # gradcheck draws
            assert torch.autograd.gradcheck(
                lambda *a, m=method: call(m, *a), (x, c, *values), eps=1e-6, atol=1e-7, rtol=1e-6
            )


class _Method(torch.nn.Module):
    """Lets functional_call reach a method other than forward."""

    def __init__(self, flow, method):
        super().__init__()
        self.flow, self.method = flow, method

    def forward(self, x, c):
        return getattr(self.flow, self.method)(x, c)


@pytest.mark.parametrize(
    ("name", "activation"),
    [(name, a) for name in ROOTS for a in ("sin", "lipswish", "cpila")]
    + [(name, "tanh") for name in sorted(set(ZOO) - set(ROOTS))],
)
def test_second_derivatives_equal_finite_differences(name, activation):
    small = {**SMALL, "hidden": (2, 2)}
    flow = wild(name, 2, **small, activation=activation, bins=3)
    x = points(2, 2).requires_grad_()
    w = max((p for p in flow.parameters() if p.numel() < 200), key=torch.numel)
    with torch.random.fork_rng():  # gradgradcheck draws
        assert torch.autograd.gradgradcheck(lambda x, _: flow.log_prob(x), (x, w))
        assert torch.autograd.gradgradcheck(lambda x, _: flow.inverse(x)[0], (x, w))


@root_flow
@pytest.mark.parametrize("logdet", ["exact", "probe", "truncated", "geometric", "poisson"])
def test_every_sample_keeps_its_own_weight_in_the_loss(name, logdet):
    flow = wild(name, 3, logdet=logdet, context=1, actnorm=False, activation="clipswish").train()
    x, c = points(6, 3), points(6, 1, 1)
    parameters = list(flow.parameters())

    def gradient(weights, rows=slice(None)):
        for module in flow.modules():
            if hasattr(module, "draws"):
                module.draws = 0
        loss = (weights * flow.log_prob(x[rows], c[rows])).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    one_hot = torch.eye(6, dtype=torch.float64)
    alone = torch.stack([gradient(w) for w in one_hot])
    weights = points(1, 6, 2)[0]
    torch.testing.assert_close(gradient(weights), weights @ alone, rtol=1e-8, atol=1e-8)
    if logdet == "exact":
        own = torch.stack([gradient(1.0, slice(k, k + 1)) for k in range(6)])
        torch.testing.assert_close(alone, own, rtol=1e-8, atol=1e-9)


@every_flow
def test_training_mode_changes_nothing_but_the_initialisation(name):
    flow = wild(name, 3, actnorm=False, logdet="exact")
    for module in flow.modules():
        if hasattr(module, "initialised"):
            module.initialised.fill_(True)
    x = points(20, 3)
    expected = flow.log_prob(x)
    assert torch.equal(expected, flow.log_prob(x))
    assert torch.equal(expected, flow.train().log_prob(x))
    fresh = wild(name, 3)
    fresh.log_prob(x)
    fresh.train().log_prob(x[:1])  # neither evaluation nor a single row initialises
    norms = [m for m in fresh.modules() if hasattr(m, "initialised")]
    assert norms or not ZOO[name].options().get("actnorm")
    assert not any(bool(m.initialised) for m in norms)
    fresh.log_prob(x)
    assert all(bool(m.initialised) for m in norms)


@every_flow
def test_the_density_integrates_to_one(name):
    for features, points_each in ((1, 40_001), (2, 701)):  # on x = 4 sinh(t), for the far tails
        t = torch.linspace(-6, 6, points_each, dtype=torch.float64)
        axes = torch.meshgrid(*[t] * features, indexing="ij")
        x = torch.stack([4 * t.sinh() for t in axes], -1)
        blocks = 1 if name == "cpflow" else 2  # two are too steep for this grid
        flow = wild(name, features, seed=2 + features, blocks=blocks)
        with torch.no_grad():
            mass = flow.log_prob(x).exp() * (4 * torch.stack(axes, -1).cosh()).prod(-1)
        for _ in range(features):
            mass = torch.trapezoid(mass, t)
        tolerance = max(1e-6 if features == 1 else 1e-4, STEPS.get(name, 0))
        assert abs(float(mass) - 1) < tolerance


@every_flow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_of_one_equals_a_batch_of_many(name, dtype):
    flow = wild(name, 3, seed=5, dtype=dtype)
    x = points(50, 3, dtype=dtype)
    tolerance = 100 * torch.finfo(dtype).eps
    alone = torch.cat([flow.log_prob(row[None]) for row in x])
    torch.testing.assert_close(flow.log_prob(x), alone, rtol=tolerance, atol=10 * tolerance)
    back = torch.cat([flow.inverse(row[None])[0] for row in x])
    torch.testing.assert_close(flow.inverse(x)[0], back, rtol=tolerance, atol=10 * tolerance)


@every_flow
def test_leading_dimensions_and_context_broadcast(name):
    flow = wild(name, 3, context=2)
    x, c = points(8, 3).view(2, 4, 3), points(4, 2)
    flat = flow.log_prob(x.reshape(8, 3), c.repeat(2, 1))
    torch.testing.assert_close(flow.log_prob(x, c), flat.view(2, 4))
    assert flow.log_prob(x[0, 0], c[0]).shape == ()
    assert flow.sample((5,), c, generator=torch.Generator().manual_seed(0)).shape == (5, 4, 3)
    assert flow.log_prob(x[:, :0], c[:0]).shape == (2, 0)
    with pytest.raises(ValueError, match="context of width 2"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match="do not broadcast"):
        flow.log_prob(points(3, 3), c)
    with pytest.raises(ValueError, match=r"trailing dimensions must be \(3,\)"):
        flow.log_prob(points(3, 4), c[:3])


@every_flow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finite_at_edge_values(name, dtype):
    flow = wild(name, 2, spread=3.0, dtype=dtype)
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([[0, 0], [tiny, -tiny], [1e4, -1e4], [1e-30, 1e4], [30, 30]], dtype=dtype)
    x.requires_grad_()
    log_prob = flow.log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(gradient).all()
    z, _ = flow(x)
    if name in ROOTS:  # no other family bounds what rounding does that far out
        tolerance = 1e-2 if dtype == torch.float32 else 1e-8
        torch.testing.assert_close(flow.inverse(z)[0], x, rtol=1e-4, atol=tolerance)


@every_flow
@pytest.mark.parametrize("context", [0, 2])
def test_saved_and_loaded_flows_are_equal(name, context, tmp_path):
    flow = wild(name, 3, context=context)
    flow.save(tmp_path / "model")
    again = rootflow.load(tmp_path / "model")
    x, c = points(6, 3), points(6, 2) if context else None
    assert torch.equal(flow.log_prob(x, c), again.log_prob(x, c))
    assert list(flow.state_dict()) == list(again.state_dict())


@every_flow
def test_draws_are_deterministic_given_a_generator_and_match_their_density(name):
    flow = wild(name, 2)
    a = flow.sample((100,), generator=torch.Generator().manual_seed(1))
    b = flow.sample((100,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    x, log_prob = flow.rsample_and_log_prob((50,), generator=torch.Generator().manual_seed(2))
    tolerance = STEPS.get(name, 1e-8)
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=tolerance, atol=tolerance)
    x.sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


@every_flow
def test_every_parameter_gets_a_gradient(name):
    flow = wild(name, 3, context=2, **({"activation": "lipswish"} if name in ROOTS else {})).train()
    flow.log_prob(points(10, 3), points(10, 2, 1)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters())


@every_flow
def test_a_flow_is_a_torch_distribution(name):
    d = wild(name, 2, context=1).distribution(points(3, 1))
    assert d.batch_shape == (3,)
    assert d.event_shape == (2,)
    assert d.log_prob(points(3, 2)).shape == (3,)
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(torch.full((3, 2), math.nan, dtype=torch.float64))


@root_flow
def test_certificates_hold_against_float64(name):
    """Every block's float32 image lies within its certificate of the float64 image."""
    for spread in (0.1, 1.0, 10.0):
        flow = wild(name, 3, spread=spread, hidden=(32, 32), dtype=torch.float32)
        exact = wild(name, 3, spread=spread, hidden=(32, 32), dtype=torch.float32).double()
        x = points(500, 3, dtype=torch.float32)
        with torch.no_grad():
            pairs = zip(flow.transform.transforms, exact.transform.transforms, strict=True)
            for block, twin in pairs:
                z, truth = block(x)[0], twin(x.double())[0]
                if hasattr(block, "nets") and name != "residual":
                    error = torch.linalg.vector_norm(z.double() - truth, dim=-1)
                    bound = block.certificate(x, z, None)
                    assert bool((error <= bound).all())
                    assert float(bound.max()) < 1e-1
                x = z
        assert bool((flow.certificates(x) >= 0).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rootflow.flow("splines", 2), "choose one of "),
        (lambda: rootflow.flow("implicit", 2, width=3), "implicit has no option 'width'"),
        (lambda: rootflow.flow("implicit", 0), "at least one feature"),
        (lambda: rootflow.flow("implicit", 2.5), "features=2.5"),
        (lambda: rootflow.flow("implicit", 2, blocks=0), "blocks=0"),
        (lambda: rootflow.flow("implicit", 2, blocks="two"), "blocks='two' cannot be used"),
        (lambda: rootflow.flow("implicit", 2, lipschitz=1.0), "strictly between 0 and 1"),
        (lambda: rootflow.flow("implicit", 2, activation="relu"), "sin, lipswish"),
        (lambda: rootflow.flow("implicit", 2, hidden=()), "at least one positive width"),
        (lambda: rootflow.flow("implicit", 2, linear="qr"), "linear='qr'"),
        (lambda: rootflow.flow("implicit", 2, solver="bisect"), "fixed-point, anderson"),
        (lambda: rootflow.flow("implicit", 2, logdet="guess"), "logdet='guess'"),
    ],
)
def test_wrong_use_names_what_would_be_right(call, message):
    with torch.random.fork_rng(), pytest.raises(ValueError, match=message):
        call()


def test_one_width_is_enough_and_two_precisions_are_too_many():
    with torch.random.fork_rng():
        flow = rootflow.flow("maf", 2, 1, blocks=1, hidden=8)
    assert flow.recipe["options"]["hidden"] == (8,)
    x, c = torch.zeros(3, 2), torch.zeros(3, 1)
    for wrong in ((x.double(), c), (x, c.double())):
        with pytest.raises(TypeError, match="weights are"):
            flow.log_prob(*wrong)
    assert flow.double().log_prob(x.double(), c.double()).dtype == torch.float64


@pytest.mark.parametrize("name", sorted(CLOSED))
def test_compiled_code_gives_the_eager_result(name):
    flow = wild(name, 3, context=2)
    x, c = points(6, 3), points(6, 2, 1)
    weights = torch.linspace(0, 1, 6, dtype=torch.float64)
    torch.compiler.reset()  # all flows share code, and Dynamo stops after some versions of it
    results = []
    for compiled in (False, True):
        for call in (flow.log_prob, lambda x, c: flow.inverse(x, c)[0].sum(-1)):
            if compiled:
                call = torch.compile(call, fullgraph=True, backend="eager", dynamic=False)
            value = call(x, c)
            results.append((value, *torch.autograd.grad(value @ weights, [*flow.parameters()])))
    # torch switches this off when it first compiles
    torch.distributions.Distribution.set_default_validate_args(True)
    torch.testing.assert_close(results[:2], results[2:], rtol=1e-9, atol=1e-9)


@every_flow
def test_a_whitened_float32_flow_keeps_its_map_and_its_inverse_in_float64(name):
    flow = wild(name, 3, hidden=(32, 32), dtype=torch.float32)
    x = points(200, 3) @ torch.tensor([[1, 0.9, 0], [0, 0.1, 3], [0, 0, 20]]).double() + 5
    flow.transform.transforms[0].set(x, whiten=True)
    with torch.no_grad():
        z = flow(x.float())[0]
        exact = flow.double()
        torch.testing.assert_close(z.double(), exact(x)[0], rtol=1e-4, atol=1e-4)
        atol = 100 * STEPS.get(name, 1e-12)  # the last column is 20 wide
        torch.testing.assert_close(exact.inverse(exact(x)[0])[0], x, rtol=0, atol=atol)
