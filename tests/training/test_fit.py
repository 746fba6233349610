"""The training loop: resuming to the bit, skipped steps, early stopping, weights, noise."""

import math
import time

import pytest
import torch
from safetensors.torch import load_file

import rootflow
from rootflow import FitConfig, fit
from rootflow.training.fit import evaluate


def data(rows=200, features=2, seed=0):
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
    return torch.cat([x[:, :1], torch.sin(2 * x[:, :1]) + 0.3 * x[:, 1:]], 1)[:, :features]


def build(name="residual", features=2, context=0, seed=0, **options):
    options = {"blocks": 1, "hidden": (8,), "activation": "lipswish", **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return rootflow.flow(name, features, context, **options)


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def config(steps=40, **options):
    return FitConfig(**{"steps": steps, "batch_size": 32, "lr": 1e-2, **options})


def stop_after(calls):
    left = iter(range(calls - 1))
    return lambda: next(left, None) is None


@pytest.mark.parametrize("logdet", ["exact", "geometric", "poisson"])
@pytest.mark.parametrize("gaps", [None, torch.tensor([0.1, 0.0])], ids=["", "dequantised"])
def test_a_resumed_fit_equals_an_undisturbed_one_to_the_bit(logdet, gaps, tmp_path):
    x, v = data(), data(50, seed=1)
    straight, broken = build("monotone", logdet=logdet), build("monotone", logdet=logdet)
    whole = fit(straight, x, v, config=config(patience=99), gaps=gaps)
    options = {"config": config(patience=99), "gaps": gaps, "checkpoint": tmp_path}
    first = fit(broken, x, v, should_stop=stop_after(17), **options)
    assert (first.stopped, first.steps) == ("interrupted", 17)
    fresh = build("monotone", logdet=logdet, seed=9)  # another start: all comes from the files
    second = fit(fresh, x, v, should_stop=stop_after(8), **options)
    assert (second.stopped, second.steps) == ("interrupted", 25)
    last = build("monotone", logdet=logdet, seed=5)
    third = fit(last, x, v, **options)
    assert third.stopped == whole.stopped
    assert (third.steps, third.best_step) == (whole.steps, whole.best_step)
    assert third.best_log_prob == whole.best_log_prob
    assert same(straight, last)

    def curve(history):
        return [(r["step"], r["log_prob"]) for r in history.records if r["kind"] == "validation"]

    assert curve(third) == curve(whole)


def test_a_finished_fit_called_again_does_no_step(tmp_path):
    x, v = data(), data(50, seed=1)
    flow = build()
    fit(flow, x, v, config=config(10), checkpoint=tmp_path)
    again = build(seed=3)
    history = fit(again, x, v, config=config(10), checkpoint=tmp_path)
    assert history.steps == 10
    assert same(flow, again)


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    x = data()
    flows = [build() for _ in range(3)]
    for flow, seed in zip(flows, (0, 0, 1), strict=True):
        fit(flow, x, config=config(10, seed=seed))
    assert same(flows[0], flows[1])
    assert not same(flows[0], flows[2])


class _Poison(torch.nn.Module):
    """Makes the log-determinant of chosen training steps NaN."""

    def __init__(self, flow, when):
        super().__init__()
        self.calls, self.when = 0, when
        flow.transform.register_forward_hook(self.hook)

    def hook(self, module, _, output):
        if not module.training:
            return None
        self.calls += 1
        z, log_det = output
        return (z, log_det * math.nan) if self.when(self.calls) else None


def test_non_finite_steps_are_skipped_and_counted():
    x, flow = data(), build()
    poison = _Poison(flow, lambda k: k in (3, 4, 9))
    history = fit(flow, x, data(50, seed=1), config=config(20))
    assert (history.steps, history.skipped, poison.calls) == (20, 3, 20)
    assert all(bool(t.isfinite().all()) for t in flow.state_dict().values())
    assert math.isfinite(history.best_log_prob)
    losses = [r["loss"] for r in history.records if r["kind"] == "train"]
    assert any(x is None for x in losses)
    assert all(x is None or math.isfinite(x) for x in losses)


def test_fifty_bad_steps_in_a_row_end_the_fit_and_keep_the_best_state(tmp_path):
    x, v = data(), data(50, seed=1)
    flow = build()
    _Poison(flow, lambda k: k > 60)
    with pytest.raises(rootflow.RootflowError, match="50 training steps in a row"):
        fit(flow, x, v, config=config(400), checkpoint=tmp_path)
    assert all(bool(t.isfinite().all()) for t in flow.state_dict().values())
    (path,) = tmp_path.glob("state-*.safetensors")
    best = load_file(path)
    assert not flow.training
    for name, p in flow.named_parameters():
        assert torch.equal(p, best[f"best.{name}"])
    assert math.isfinite(evaluate(flow, v)[0])


def test_a_solve_that_does_not_converge_counts_as_a_skipped_step(monkeypatch):
    flow, x = build("monotone"), data()
    block = next(m for m in flow.modules() if hasattr(m, "nets"))
    original, calls = block._solve, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise rootflow.NotConverged("1 of 32 samples missed the tolerance")
        return original(*arguments)

    monkeypatch.setattr(block, "_solve", failing)
    assert fit(flow, x, config=config(10)).skipped == 1


def test_early_stopping_and_the_best_weights():
    x = data(40)
    flow = build("residual", hidden=(32,), blocks=2)
    history = fit(flow, x, data(300, seed=1), config=config(4000, patience=2, lr=5e-2, ema=0.5))
    curve = {r["step"]: r["log_prob"] for r in history.records if r["kind"] == "validation"}
    assert history.stopped == "early stopping"
    assert history.steps < 4000
    assert curve[history.best_step] == max(curve.values()) == history.best_log_prob
    assert list(curve)[-1] > history.best_step
    mean, _ = evaluate(flow, data(300, seed=1))
    assert mean == pytest.approx(history.best_log_prob, abs=1e-6)
    assert not flow.training


def test_without_validation_the_average_of_the_weights_stays():
    averaged, last = build(), build()
    fit(averaged, data(), config=config(30, ema=0.9))
    fit(last, data(), config=config(30, ema=0.0))
    assert not same(averaged, last)


def test_a_weight_equals_repetition():
    """On full batches, where the first objective is the same number and so is the first step."""
    weight = torch.tensor([1.0, 2, 1, 3, 1, 1, 2, 1]).double()
    x = data(8).double()
    repeated = x.repeat_interleave(weight.long(), 0)
    flows, losses = [], []
    for rows, w in ((x, weight), (repeated, None)):
        flow = build(actnorm=False).double()
        flow.transform.transforms[0].set(x, True)  # else repetition would change the whitening
        options = config(1, batch_size=len(rows))
        history = fit(flow, rows, config=options, sample_weight=w)
        losses.append(next(r["loss"] for r in history.records if r["kind"] == "train"))
        flows.append(flow)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for a, b in zip(flows[0].parameters(), flows[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_noise_fills_the_gaps_of_quantised_columns():
    x = data(64).round()
    seen = []
    flow = build(actnorm=False)
    flow.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    fit(flow, x, config=config(4, batch_size=64), gaps=torch.tensor([1.0, 0.0]))
    first = torch.cat([s[:, 0] for s in seen])
    second = torch.cat([s[:, 1] for s in seen])
    assert torch.equal(second, second.round())
    fraction = first - first.floor()
    assert 0.4 < float(fraction.mean()) < 0.6
    assert len(first.unique()) > 200  # fresh in every step
    for s in seen:
        assert torch.equal(s[:, 0].floor().sort().values, x[:, 0].sort().values)


def test_conditional_fits_learn_the_context():
    c = torch.randn(400, 1, generator=torch.Generator().manual_seed(4))
    x = data(400, 1) * 0.1 + 2 * c
    flow = build(features=1, context=1, blocks=2, hidden=(16,))
    options = {"context": c, "validation_context": c, "config": config(150, lr=2e-2)}
    assert fit(flow, x, x, **options).best_log_prob > -1.6  # without context: -2.1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": torch.zeros(10, 3)}, ValueError, r"train has shape \(10, 3\); the flow wants"),
        ({"train": torch.zeros(10)}, ValueError, r"train has shape \(10,\)"),
        ({"validation": torch.zeros(4, 1)}, ValueError, r"validation has shape \(4, 1\)"),
        ({"train": torch.full((10, 2), math.nan)}, rootflow.DataError, "train: row 0 holds NaN"),
        ({"validation": torch.full((4, 2), math.inf)}, rootflow.DataError, "validation: row 0"),
        ({"config": FitConfig()}, ValueError, "config has no budget; give minutes or steps"),
        ({"sample_weight": torch.ones(9)}, ValueError, "sample_weight has shape"),
        ({"sample_weight": -torch.ones(10)}, ValueError, "sample_weight must hold"),
        ({"sample_weight": torch.zeros(10)}, ValueError, "sample_weight must hold"),
        ({"context": torch.ones(10, 1)}, ValueError, "takes no context"),
        ({"train": data(10).numpy()}, TypeError, "train is ndarray; give a torch.Tensor"),
        ({"train": data(10) * torch.tensor([1.0, 0.0])}, rootflow.DataError, "column 1 holds one"),
        ({"config": {"steps": 2}}, TypeError, "config is dict; give a rootflow.FitConfig"),
        ({"train": torch.zeros(0, 2)}, rootflow.DataError, "train has no rows"),
    ],
)
def test_wrong_use_is_named_before_anything_happens(change, error, message):
    arguments = {"train": data(10), "config": config(2, batch_size=4), **change}
    with pytest.raises(error, match=message):
        fit(build(), **arguments)


@pytest.mark.parametrize("field", ["steps", "minutes", "batch_size", "lr", "clip", "patience"])
def test_settings_are_validated(field):
    with pytest.raises(ValueError, match=field):
        FitConfig(**{field: -1})
    with pytest.raises(ValueError, match="Extra inputs"):
        FitConfig(epochs=3)


@pytest.mark.parametrize("clock", ["wall", "processor"])
def test_the_budget_and_the_seconds_are_those_of_the_clock(clock, monkeypatch):
    ticking, still = iter(range(10**6)), {"wall": "process_time", "processor": "monotonic"}[clock]
    moving = "monotonic" if still == "process_time" else "process_time"
    monkeypatch.setattr(time, still, lambda: 0.0)
    monkeypatch.setattr(time, moving, lambda: float(next(ticking)))
    history = fit(build(), data(), config=config(steps=10**6, minutes=1.0, clock=clock))
    assert 10 < history.steps < 60
    assert 60 <= history.seconds < 70
