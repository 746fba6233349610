"""Masks, the sweep and its gradient, and the recipes of autoregressive flows."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import rootflow
from rootflow.transforms import (
    Affine,
    AutoregressiveTransform,
    Inverse,
    Shift,
    Spline,
    conditioners,
)
from rootflow.transforms.autoregressive import nsf_ar
from rootflow.transforms.conditioners import ACTIVATIONS
from rootflow.transforms.masked import Masked, degrees

CASES = {
    "one column": (1, Affine(), {"hidden": (5,)}),
    "one column with context": (1, Affine(), {"context": 2, "hidden": (5,), "activation": "tanh"}),
    "shift": (3, Shift(), {"context": 1, "hidden": (6,), "activation": "elu"}),
    "affine": (3, Affine(), {"hidden": (8, 8), "activation": "tanh"}),
    "residual": (
        3,
        Affine(),
        {"context": 2, "hidden": (7, 7, 7), "activation": "silu", "residual": True},
    ),
    "narrow": (20, Affine(), {"hidden": (7, 5), "activation": "gelu"}),
    "narrow with context": (9, Affine(), {"context": 1, "hidden": (4, 1), "activation": "tanh"}),
    "spline": (4, Spline(3, 2.0), {"context": 1, "hidden": (9, 8), "activation": "elu"}),
    "circular": (
        3,
        Spline(3, 2.0, "circular"),
        {"hidden": (7, 7), "activation": "tanh", "residual": True, "circle": 2.0},
    ),
    "circular with context": (
        10,
        Spline(2, 2.0, "circular"),
        {"context": 1, "hidden": (12,), "activation": "silu", "circle": 2.0},
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def build(case, seed=0, spread=0.4, dtype=torch.float64):
    """A transform far from its start, with inputs and context for it."""
    features, univariate, options = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transform = AutoregressiveTransform(features, univariate, **options).to(dtype)
    with torch.no_grad():
        for p in transform.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=dtype) * spread)
    x = torch.rand(6, features, generator=generator, dtype=dtype) * 3 - 1.5
    width = options.get("context", 0)
    context = torch.randn(6, width, generator=generator, dtype=dtype) if width else None
    return transform, x, context


class Directions(torch.nn.Module):
    """Both directions of a transform as functions of x, context and parameters."""

    def __init__(self, transform, backwards):
        super().__init__()
        self.transform, self.backwards = transform, backwards

    def forward(self, x, context):
        run = self.transform.inverse if self.backwards else self.transform
        return run(x, context)


def function(transform, backwards):
    module = Directions(transform, backwards)
    keys = [key for key, _ in module.named_parameters()]

    def call(x, context, *parameters):
        tensors = dict(zip(keys, parameters, strict=True))
        return torch.func.functional_call(module, tensors, (x, context))

    return call


def leaves(transform, x, context, rows=2):
    x = x[:rows].detach().clone().requires_grad_()
    context = None if context is None else context[:rows].clone().requires_grad_()
    return x, context, *transform.parameters()


@pytest.mark.parametrize("width", [1, 2, 5, 6, 7, 64, 100])
@pytest.mark.parametrize(("low", "high"), [(0, 5), (1, 6), (0, 0), (1, 62)])
def test_degrees_are_sorted_present_and_equally_frequent(width, low, high):
    found = degrees(width, low, high)
    assert found.tolist() == sorted(found.tolist())
    assert found[0] == low
    counts = torch.bincount(found, minlength=high + 1)[low:]
    if width > high - low:
        assert int(counts.max() - counts.min()) <= 1
        assert int(counts.min()) >= 1
    else:
        assert int(counts.max()) <= 1 + (high - low + 1 < width)
        assert found[-1] == high or width == 1


@every_case
@pytest.mark.parametrize("seed", [0, 1])
def test_the_jacobian_is_triangular_and_gives_log_det(case, seed):
    transform, x, context = build(case, seed)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: transform(x, context)[0].sum(0), x
    ).transpose(0, 1)
    assert torch.equal(jacobian, jacobian.tril())
    _, log_det = transform(x, context)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)


def first_parameter(net, context, x):
    return net(net.embed(x, context))[0, :, 0]


def test_every_earlier_column_reaches_every_later_one():
    for options in ({"hidden": (64, 64)}, {"hidden": (70, 70), "residual": True, "context": 3}):
        with torch.random.fork_rng():
            net = Masked(20, torch.zeros(2), activation="tanh", **options).double()
            net.values.data.normal_()
        x = torch.zeros(20, 1, dtype=torch.float64)
        c = torch.zeros(3, 1, dtype=torch.float64) if "context" in options else None
        jacobian = torch.autograd.functional.jacobian(partial(first_parameter, net, c), x)[:, :, 0]
        below = torch.ones(20, 20).tril(-1).bool()
        assert bool((jacobian[below] != 0).all())
        assert bool((jacobian[~below] == 0).all())


@pytest.mark.parametrize("features", [1, 2, 30])
@pytest.mark.parametrize("hidden", [(40,), (5, 3), (1, 1)])
def test_context_reaches_every_output(features, hidden):
    with torch.random.fork_rng():
        net = Masked(features, torch.zeros(2), 2, hidden, "tanh").double()
        net.values.data.normal_()
    x, c = torch.zeros(features, 1).double(), torch.zeros(2, 1).double()
    jacobian = torch.autograd.functional.jacobian(lambda c: net(net.embed(x, c))[:, :, 0], c)
    assert bool((jacobian != 0).all())


@every_case
def test_blocks_give_the_same_as_dense_products(case, monkeypatch):
    whole, x, context = build(case)
    monkeypatch.setattr(conditioners, "STEP", 10)
    split, _, _ = build(case)
    assert sum(map(len, split.net.blocks)) > sum(map(len, whole.net.blocks)) or x.shape[1] == 1
    for transform in (whole, split):
        net = transform.net
        feature_major = x.mT, None if context is None else context.mT
        h = net.embed(*feature_major)
        biases, matrices = net.dense(net.pieces(net.masked(net.values)))
        y, last = h, len(matrices) - 1
        for k, (b, w) in enumerate(zip(biases, matrices, strict=True)):
            new = b + w @ (net.activation.plain(y) if k else y)[: w.shape[1]]
            y = y + new if net.residual and 0 < k < last else new
        expected = y.view(net.features, net.size, -1).transpose(0, 1)
        torch.testing.assert_close(net(h), expected)
        layers = net.pieces(net.masked(net.values))
        with torch.no_grad():
            inputs, kept, theta = net.run(h, layers)
            torch.testing.assert_close(theta, expected)
            weights = torch.rand(theta.shape, generator=torch.Generator().manual_seed(1)).double()
            lean = net.backward(layers, inputs, kept, weights, (True, True))
        h = h.detach().requires_grad_()
        plain = torch.autograd.grad(net(h), (h, net.values), weights)
        torch.testing.assert_close(lean, plain)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_round_trip_and_cancelling_log_dets(case, dtype):
    for seed in range(3):
        transform, x, context = build(case, seed, dtype=dtype)
        with torch.no_grad():
            z, log_det = transform(x, context)
            back, log_det_back = transform.inverse(z, context)
        tolerance = 2e-4 if dtype == torch.float32 else 1e-10
        assert back.dtype == log_det_back.dtype == dtype
        torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(log_det_back, -log_det, rtol=tolerance, atol=tolerance)


@every_case
@pytest.mark.parametrize("backwards", [False, True], ids=["to latent", "to data"])
def test_gradients_equal_finite_differences(case, backwards):
    transform, x, context = build(case)
    call, inputs = function(transform, backwards), leaves(transform, x, context)
    with torch.random.fork_rng():  # gradcheck draws
        assert gradcheck(call, inputs, fast_mode=x.shape[1] > 3)


@pytest.mark.parametrize("case", ["one column", "shift", "affine", "residual", "spline"])
@pytest.mark.parametrize("backwards", [False, True], ids=["to latent", "to data"])
def test_second_derivatives_equal_finite_differences(case, backwards):
    transform, x, context = build(case)
    call, inputs = function(transform, backwards), leaves(transform, x, context)
    with torch.random.fork_rng():
        assert gradgradcheck(call, inputs, fast_mode=True)


@every_case
def test_the_reverse_sweep_agrees_with_the_dense_solve(case):
    transform, x, context = build(case)
    inputs = leaves(transform, x, context, rows=6)
    call, wanted = function(transform, True), [t for t in inputs if t is not None]
    y, log_det = call(*inputs)
    weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(2)).double()
    loss = (weights * y).sum() + (weights[:, 0] * log_det).sum()
    swept = torch.autograd.grad(loss, wanted, retain_graph=True)
    solved = torch.autograd.grad(loss, wanted, create_graph=True)
    torch.testing.assert_close(list(swept), [t.detach() for t in solved])


@every_case
def test_a_batch_of_one_equals_a_batch_of_many(case):
    transform, x, context = build(case)
    with torch.no_grad():
        for run in (transform, transform.inverse):
            alone = [
                run(x[k : k + 1], None if context is None else context[k : k + 1]) for k in range(6)
            ]
            for whole, parts in zip(run(x, context), zip(*alone, strict=True), strict=True):
                torch.testing.assert_close(whole, torch.cat(parts))


@every_case
def test_an_empty_batch_in_both_directions_with_gradients(case):
    transform, x, context = build(case)
    inputs = leaves(transform, x, context, rows=0)
    for backwards in (False, True):
        y, log_det = function(transform, backwards)(*inputs)
        assert y.shape == (0, x.shape[1])
        assert log_det.shape == (0,)
        gradients = torch.autograd.grad(y.sum() + log_det.sum(), tuple(transform.parameters()))
        assert all(bool((g == 0).all()) for g in gradients)


@pytest.mark.parametrize("residual", [False, True])
def test_the_sweep_computes_each_unit_once(residual):
    """Its products together: one dense pass, and what each strip repeats within itself."""
    d, n, width = 40, 16, 80
    with torch.random.fork_rng():
        transform = AutoregressiveTransform(d, Affine(), hidden=(width, width), residual=residual)
    z = torch.zeros(n, d)

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    dense = 2 * n * sum(a * b for a, b in pairwise([d, width, width, 2 * d]))
    with torch.no_grad():
        assert flops(lambda: transform.inverse(z)) <= 0.75 * dense
    x, log_det = transform.inverse(z)
    backward = flops((x.sum() + log_det.sum()).backward)
    assert backward <= 3 * dense  # activations again, the reverse sweep, the weights' gradient


def test_sampling_after_a_step_is_fresh():
    transform, x, _ = build("affine")
    before = transform.inverse(x)[0].detach()
    with torch.no_grad():
        transform.net.values.add_(0.1)
    assert not torch.allclose(transform.inverse(x)[0], before)
    torch.testing.assert_close(transform.inverse(transform(x)[0])[0], x)


def test_a_copy_is_independent_and_a_fresh_transform_is_the_identity():
    with torch.random.fork_rng():
        transform = AutoregressiveTransform(3, Spline(4, 2.0))
    x = torch.linspace(-3, 3, 12).view(4, 3)
    torch.testing.assert_close(transform(x)[0], x)
    again = copy.deepcopy(transform)
    with torch.no_grad():
        again.net.values.add_(1)
    torch.testing.assert_close(transform(x)[0], x)
    assert list(transform.state_dict()) == ["net.values"]


@pytest.mark.parametrize("case", ["affine", "residual", "spline", "circular with context"])
def test_to_latent_compiles_as_one_graph(case, monkeypatch):
    # Importing the compiler switches the checks of distributions off; undone after the test.
    distribution = torch.distributions.Distribution
    monkeypatch.setattr(distribution, "_validate_args", distribution._validate_args)
    transform, x, context = build(case)
    compiled = torch.compile(transform.to_latent, fullgraph=True, backend="eager")
    for ours, theirs in zip(transform(x, context), compiled(x, context), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_circle_has_no_seam():
    transform, x, _ = build("circular")
    left, right = x.clone(), x.clone()
    left[:, 0], right[:, 0] = -2.0, 2.0
    torch.testing.assert_close(transform(left)[0][:, 1:], transform(right)[0][:, 1:])
    torch.testing.assert_close(transform(left)[1], transform(right)[1])


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_rules_are_those_of_the_activations(name):
    rule = ACTIVATIONS[name]
    a = torch.linspace(-3, 3, 20, dtype=torch.float64).requires_grad_()
    y = rule.plain(a)
    (slope,) = torch.autograd.grad(y.sum(), a)
    a, y = a.detach(), y.detach()
    kept = y if rule.from_result else a
    torch.testing.assert_close(rule.backward(torch.ones_like(a), kept), slope)
    torch.testing.assert_close(rule.inplace(a.clone()), y)


def test_iaf_is_maf_turned_around():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        maf = rootflow.flow("maf", 3, blocks=2, actnorm=False, linear=None)
        torch.manual_seed(0)
        iaf = rootflow.flow("iaf", 3, blocks=2, actnorm=False, linear=None)
    assert all(isinstance(t, Inverse) for t in list(iaf.transform.transforms)[1:])
    x = torch.linspace(-1, 1, 6).view(2, 3)
    for (_, a), (_, b) in zip(maf.named_parameters(), iaf.named_parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(maf(x)[0], iaf.inverse(x)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear": "lu"}, "linear='lu' leads out of the interval"),
        ({"actnorm": True}, "actnorm=True leads out of the interval"),
        ({"blocks": 0}, "blocks=0"),
        ({"hidden": (8, 9), "residual": True}, "equal widths"),
        ({"activation": "sin"}, "activation='sin' is unknown"),
    ],
)
@pytest.mark.parametrize("tails", ["bounded", "circular"])
def test_wrong_options_say_what_would_be_right(options, message, tails):
    with torch.random.fork_rng(), pytest.raises(ValueError, match=message):
        nsf_ar(2, **{"tails": tails, **options})
