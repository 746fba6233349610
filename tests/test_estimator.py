"""The scikit-learn estimators: scikit-learn's own checks, and what these do not test."""

import copy
import pickle
import sys

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import (
    check_dataframe_column_names_consistency,
    parametrize_with_checks,
)

import rootflow
from rootflow import FlowDensity, FlowOutlierDetector


def tiny(**changes):
    options = {"blocks": 1, "hidden": (8,)}
    settings = {"flow": "realnvp", "options": options, "steps": 5, "random_state": 0}
    return FlowDensity(**{**settings, **changes})


def rows(n=60, d=3, seed=0):
    return np.random.RandomState(seed).randn(n, d) * [1, 3, 0.1][:d] + [0, 5, -2][:d]


NOT_OURS = {
    FlowOutlierDetector: {
        "check_sample_weight_equivalence_on_dense_data": (
            "a weight equals a repetition only without minibatches and held-out rows"
        )
    }
}


@pytest.mark.filterwarnings("ignore:X. column .* distinct values")  # the checks' data have ties
@parametrize_with_checks(
    [tiny(), FlowOutlierDetector(tiny())],
    expected_failed_checks=lambda estimator: NOT_OURS.get(type(estimator), {}),
    xfail_strict=True,
)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", [tiny(), FlowOutlierDetector(tiny())], ids=str)
def test_columns_keep_their_names(estimator):
    check_dataframe_column_names_consistency(type(estimator).__name__, estimator)


@pytest.mark.parametrize(
    ("flow", "options"),
    [
        ("monotone", {"blocks": 1, "hidden": (8,)}),
        ("nsf-coupling", {"blocks": 1, "hidden": (8,)}),
        ("nsf-ar", {"blocks": 1, "hidden": (8,), "tails": "bounded", "interval": 20.0}),
    ],
)
def test_scores_belong_to_a_row_and_to_float64(flow, options):
    X = rows(1100)
    e = tiny(flow=flow, options=options).fit(X)
    scores = e.score_samples(X)
    assert (scores.dtype, scores.shape) == (np.float64, (1100,))
    alone = np.concatenate([e.score_samples(row[None]) for row in X[:20]])
    np.testing.assert_allclose(alone, scores[:20], rtol=1e-12, atol=1e-12)
    order = np.random.RandomState(1).permutation(len(X))
    np.testing.assert_allclose(e.score_samples(X[order]), scores[order], rtol=1e-12, atol=1e-12)
    assert e.score(X) == pytest.approx(scores.mean(), rel=1e-14)
    weight = np.arange(len(X))
    expected = (weight * scores).sum() / weight.sum()
    assert e.score(X, sample_weight=weight) == pytest.approx(expected, rel=1e-13)
    assert e.n_iter_ == e.history_.steps == 5


def test_a_fit_approaches_the_known_density():
    covariance = np.array([[1.0, 1.9], [1.9, 4.0]])
    exact = multivariate_normal([1e6, -3.0], covariance)  # float32 has no digit behind 1e6
    X, fresh = exact.rvs(2000, random_state=0), exact.rvs(2000, random_state=1)
    e = tiny(steps=60, options={"blocks": 2, "hidden": (16,)}).fit(X)
    lost = exact.logpdf(fresh).mean() - e.score(fresh)
    assert 0 < lost < 0.02
    assert e.history_.best_log_prob == pytest.approx(e.score(X), abs=0.15)  # in the units of X
    drawn = e.sample(4000, random_state=0)
    np.testing.assert_allclose(drawn.mean(0), exact.mean, atol=0.2)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.4)


def test_rows_outside_declared_bounds():
    X = np.random.RandomState(0).uniform(-1, 1, (60, 2))
    e = tiny(flow="nsf-coupling", options={"tails": "bounded", "interval": 1.0, "blocks": 1}).fit(X)
    assert np.isneginf(e.score_samples([[0.0, 1.5], [2.0, 0.0]])).all()
    assert np.isfinite(e.score_samples(X)).all()


def test_a_second_fit_is_the_first():
    X, e = rows(), tiny()
    before = copy.deepcopy(e.get_params())
    first = e.fit(X).score_samples(X)
    kept = dict(vars(e))
    second = e.fit(X).score_samples(X)
    assert np.array_equal(first, second)
    assert e.get_params() == before
    e.score_samples(X)
    e.sample(3)
    assert set(vars(e)) == set(kept)
    assert np.array_equal(clone(e).fit(X.astype(">f8")[::1]).score_samples(X), first)
    assert not np.array_equal(tiny(random_state=1).fit(X).score_samples(X), first)


def test_pickled_estimators_are_equal():
    X = rows()
    for e in (tiny().fit(X), FlowOutlierDetector(tiny()).fit(X)):
        again = pickle.loads(pickle.dumps(e))
        assert np.array_equal(again.score_samples(X), e.score_samples(X))
    density = tiny(flow="monotone").fit(X)
    again = pickle.loads(pickle.dumps(density))
    assert np.array_equal(again.sample(5, random_state=1), density.sample(5, random_state=1))


def test_the_model_can_be_saved_without_pickle(tmp_path):
    X, e = rows(), tiny()
    e.fit(X).model_.save(tmp_path)
    again = rootflow.load(tmp_path)
    with torch.no_grad():
        log_prob = again.log_prob(torch.as_tensor(X))
    assert np.array_equal(log_prob.numpy(), e.score_samples(X))


def test_weights():
    shift = np.array([4, 0, 0])
    left, right = rows(300) - shift, rows(300, seed=1) + shift
    X, weight = np.concatenate([left, right]), np.repeat([1.0, 0.0], 300)
    ignored = tiny(steps=40).fit(X, sample_weight=weight)
    outliers = X.copy()
    outliers[300:] = 1e9
    same = tiny(steps=40).fit(outliers, sample_weight=weight)
    assert np.array_equal(same.score_samples(X), ignored.score_samples(X))
    light = tiny(steps=40).fit(X, sample_weight=np.repeat([1.0, 0.01], 300))
    even = tiny(steps=40).fit(X)
    assert light.score(left) > even.score(left) + 0.2
    assert light.score(right) < even.score(right) - 0.2
    ones = tiny(steps=40).fit(X, sample_weight=np.full(600, 7.0))
    np.testing.assert_allclose(ones.score_samples(X), even.score_samples(X), atol=1e-3)
    for wrong, message in [
        (np.zeros(600), "positive in 0 rows|zero"),
        (np.full(600, -1.0), "[Nn]egative"),
        (np.ones((600, 2)), "1D|1-d"),
        (np.ones(3), "shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny().fit(X, sample_weight=wrong)


@pytest.mark.parametrize("n", [2, 3, 10, 25])
@pytest.mark.parametrize("d", [1, 30])
def test_few_rows_and_few_or_many_columns(n, d):
    X = np.random.RandomState(0).randn(n, d)
    e = tiny(steps=3).fit(X)
    assert np.isfinite(e.score(X))
    assert e.sample(2, random_state=0).shape == (2, d)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda X: tiny(flow="splines").fit(X), "choose one of"),
        (lambda X: tiny(options={"width": 3}).fit(X), "realnvp has no option 'width'"),
        (lambda X: tiny(options={"hidden": None}).fit(X), "options="),
        (lambda X: tiny(steps=-1).fit(X), "steps=-1"),
        (lambda X: tiny(steps=None).fit(X), "no budget"),
        (lambda X: tiny(validation_fraction=1.0).fit(X), r"validation_fraction=1\.0"),
        (lambda X: tiny().fit(X[:1]), "1 sample"),
        (lambda X: tiny().fit(X * [1, 0, 1]), "column x1 is always 0"),
        (lambda X: tiny().fit(X[:, [0, 1, 0]]), "column x2 repeats column x0"),
        (lambda X: tiny(context=[3]).fit(X), "no column 3; it has 3 columns without names"),
        (lambda X: tiny(context="a").fit(X), "no column 'a'"),
        (lambda X: tiny(context=[0, -3]).fit(X), "twice"),
        (lambda X: tiny(context=[0, 1, 2]).fit(X), "every column"),
        (lambda X: tiny().fit(X).sample(0), "n_samples=0"),
        (lambda X: tiny().fit(X).sample(1, context=X), "has no context columns"),
        (lambda X: tiny(context=0).fit(X).sample(1), "needs values for 1 context columns"),
        (lambda X: tiny(context=0).fit(X).sample(1, context=X), "context has 3 columns"),
        (lambda X: tiny().fit(X).score_samples(X * np.nan), "NaN"),
        (lambda X: tiny().fit(X).score_samples(X[:, :2]), "expecting 3 features"),
        (lambda X: FlowOutlierDetector(tiny(), contamination=0.7).fit(X), "contamination=0.7"),
    ],
)
def test_wrong_use_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message):
        make(rows())


def test_ties_are_warned_of_and_an_unfitted_estimator_says_so():
    X = rows(100)
    with pytest.warns(UserWarning, match="X: column x1 has only"):
        tiny().fit(np.column_stack([X[:, 0], X[:, 1].round()]))
    for call in (tiny().score_samples, tiny().score, FlowOutlierDetector().predict):
        with pytest.raises(NotFittedError):
            call(X)
    with pytest.raises(NotFittedError):
        tiny().sample()


@pytest.mark.parametrize("kind", [pd.DataFrame, pl.DataFrame])
def test_data_frames_in_and_out(kind):
    X = rows()
    frame = kind(dict(zip("abc", X.T, strict=True)))
    e = tiny().fit(frame)
    assert list(e.feature_names_in_) == ["a", "b", "c"]
    drawn = e.sample(4, random_state=0)
    assert type(drawn) is kind
    assert list(drawn.columns) == ["a", "b", "c"]
    plain = tiny().fit(X)
    assert np.array_equal(plain.sample(4, random_state=0), drawn.to_numpy())
    assert np.array_equal(plain.score_samples(X), e.score_samples(frame))
    given = tiny(context="b").fit(frame)
    drawn = given.sample(2, random_state=0, context=frame[:3])
    assert np.array_equal(drawn.to_numpy()[:, 1], X[:3, 1].repeat(2))
    with pytest.raises(ValueError, match="column 'b' is missing"):
        given.sample(1, context=frame[["a"]])


def test_a_density_given_other_columns():
    """x2 given x0 is N(2 x0, 0.1), and x1 is given but says nothing."""
    r = np.random.RandomState(0)
    x0, x1 = r.randn(1500) * 10 + 100, r.randn(1500)
    X = np.column_stack([x0, x1, 2 * x0 + r.randn(1500)])
    e = tiny(context=[1, 0], steps=150, options={"blocks": 2, "hidden": (16,)}).fit(X)
    assert e.model_.event == (1,)
    exact = -0.5 * ((X[:, 2] - 2 * x0) ** 2 + np.log(2 * np.pi))
    assert 0 < exact.mean() - e.score(X) < 0.15
    given = np.array([[0.0, 90.0], [0.0, 110.0]])
    drawn = e.sample(500, random_state=0, context=given)
    assert drawn.shape == (1000, 3)
    assert np.array_equal(drawn[:, [1, 0]], given.repeat(500, axis=0))
    means = drawn[:, 2].reshape(2, 500).mean(1)
    np.testing.assert_allclose(means, [180, 220], atol=1.0)
    assert np.isfinite(e.score_samples(drawn)).all()
    near, far = e.score_samples([[90, 0, 180], [90, 0, 220]])
    assert near > far + 5


def test_in_the_tools_of_scikit_learn():
    X = rows(90)
    pipeline = make_pipeline(StandardScaler(), tiny())
    assert np.isfinite(pipeline.fit(X).score(X))
    folds = cross_val_score(tiny(), X, cv=3)
    assert folds.shape == (3,)
    assert np.isfinite(folds).all()
    grid = {"options": [{"blocks": 1, "hidden": (4,)}, {"blocks": 2, "hidden": (4,)}], "steps": [2]}
    search = GridSearchCV(tiny(), grid, cv=2).fit(X)
    assert search.best_params_["options"] in grid["options"]
    assert search.best_estimator_.sample(3).shape == (3, 3)
    conditional = cross_val_score(make_pipeline(StandardScaler(), tiny(context=[0])), X, cv=2)
    assert np.isfinite(conditional).all()


def test_outliers_are_the_improbable_rows():
    X = rows(500)
    X[:5] += [0, 60, 0]
    e = FlowOutlierDetector(tiny(steps=40), contamination=0.01).fit(X)
    assert np.flatnonzero(e.predict(X) == -1).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(e.decision_function(X), e.score_samples(X) - e.offset_)
    weight = np.ones(500)
    weight[:5] = 0
    clean = FlowOutlierDetector(tiny(steps=40), contamination=0.01).fit(X, sample_weight=weight)
    assert (clean.predict(X[:5]) == -1).all()
    assert (clean.predict(X[5:]) == -1).sum() == 4  # strictly below the fifth of 495
    assert clean.set_params(density__steps=3).fit(X).density_.n_iter_ == 3


def test_scikit_learn_is_optional(monkeypatch):
    assert {"FlowDensity", "FlowOutlierDetector", "flow"} <= set(dir(rootflow))
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "rootflow.estimator")
    monkeypatch.delattr(rootflow, "estimator")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rootflow\[sklearn\]'"):
        _ = rootflow.FlowDensity
    with pytest.raises(AttributeError, match="no attribute 'FlowDensities'"):
        _ = rootflow.FlowDensities
