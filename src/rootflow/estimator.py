"""Flows as scikit-learn estimators: a density, and a detector of outliers made from one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import narwhals as nw
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError
from torch import Tensor

from .data import Table, describe_columns, split
from .errors import DataError
from .flow import Flow
from .training import FitConfig, fit
from .transforms import Standardise
from .zoo import flow as build_flow

try:
    from sklearn.base import BaseEstimator, DensityMixin, OutlierMixin, clone
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "FlowDensity needs scikit-learn; install it with: pip install 'rootflow[sklearn]'"
    ) from None

__all__ = ["FlowDensity", "FlowOutlierDetector"]

CHUNK = 1024  # rows scored or drawn at once
Floats = NDArray[np.float64]


def _seed(random_state: Any) -> int:
    return int(check_random_state(random_state).randint(2**31 - 1))


def _moments(values: Floats, weight: Floats | None) -> tuple[Floats, Floats]:
    """Weighted mean and standard deviation of each column, 1 for a column without any spread."""
    share = np.ones(len(values)) if weight is None else weight
    share = share / share.sum()
    center = share @ values
    scale = np.sqrt(share @ (values - center) ** 2)
    return center, np.where(scale > 0, scale, 1.0)


class FlowDensity(DensityMixin, BaseEstimator):  # type: ignore[misc]
    """A normalizing flow as a scikit-learn density estimator.

    Log-densities are natural logarithms (nats) in the units of X, computed in float64. ``score`` is
    the *mean* over the rows, as that of GaussianMixture, so that folds of unequal size compare.

    Parameters, all kept as they are given:

    - ``flow``, ``options``: name of a flow of ``rootflow.flows()``, and a mapping of its options;
    - ``steps``, ``minutes``: the budget; the fit ends at the first of the two;
    - ``batch_size``, ``lr``, ``weight_decay``, ``patience``: as in ``rootflow.FitConfig``;
    - ``validation_fraction``: share of the rows that choose the best weights and end the fit
      early; 0 for none, and fewer than two rows are not held out;
    - ``context``: columns of X, by name or position, that the density is conditioned on. Then
      ``score_samples`` gives log p(other columns | these) and ``sample`` wants their values;
    - ``device``: such as "cuda"; None for the CPU;
    - ``random_state``: seed of the weights, of the order of the rows and of those held out.

    What a fit leaves:

    - ``model_``: the ``rootflow.Flow``, in float64, over the columns that are not context, in their
      units; its context is (value - ``context_center_``) / ``context_scale_``;
    - ``history_``: what the fit reported, a ``rootflow.History``; ``n_iter_``: its steps;
    - ``n_features_in_``: columns of X, context included; ``feature_names_in_``: their names, if X
      was a data frame.

    A row of weight w counts w times in the loss and on validation. Minibatches and held-out rows
    are drawn by row, so repeating a row w times gives a similar fit, not the same.
    """

    def __init__(
        self,
        flow: str = "nsf-coupling",
        *,
        options: Mapping[str, Any] | None = None,
        steps: int | None = 1000,
        minutes: float | None = None,
        batch_size: int = 512,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        patience: int = 20,
        validation_fraction: float = 0.1,
        context: str | int | Sequence[str | int] | None = None,
        device: str | None = None,
        random_state: Any = None,
    ) -> None:
        self.flow = flow
        self.options = options
        self.steps = steps
        self.minutes = minutes
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.context = context
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> FlowDensity:
        """Fit the rows of X ``(n, d)``, weighted by ``sample_weight`` ``(n,)``; y is ignored.

        Warns of columns with ties. Raises ValueError for wrong parameters, non-finite or too few
        rows, constant or repeated columns, and weights that are negative or all zero.
        """
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction!r} must be in [0, 1)")
        seed = _seed(self.random_state)
        config = self._config(seed)
        values = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self._frame = _kind_of_frame(X) if hasattr(self, "feature_names_in_") else None
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(
                sample_weight, values, dtype=np.float64, ensure_non_negative=True
            )
            values, weight = values[weight > 0], weight[weight > 0]
            if len(values) < 2:
                raise ValueError(f"sample_weight is positive in {len(values)} rows; give two")
        self._given = self._positions()
        self._own = np.setdiff1d(np.arange(self.n_features_in_), self._given)
        if not len(self._own):
            raise ValueError("context names every column of X; leave one for the density")
        rows, context = values[:, self._own], values[:, self._given]
        self._examine(rows)

        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                flow = build_flow(
                    self.flow, len(self._own), len(self._given), **dict(self.options or {})
                )
        except TypeError as error:
            raise ValueError(f"options={self.options!r}: {error}") from error
        # The flow trains in float32, where a large mean would swallow the digits behind it.
        first = next((part for part in flow.modules() if isinstance(part, Standardise)), None)
        center = 0.0 if first is None else _moments(rows, weight)[0]
        self.context_center_, self.context_scale_ = _moments(context, weight)
        held = max(0.0, self.validation_fraction)
        train, validation, _ = split(len(rows), seed, (1 - held, held, 0.0))
        if len(validation) < 2:
            train, validation = np.arange(len(rows)), validation[:0]

        def part(array: Floats | None, which: NDArray[np.int64]) -> Tensor | None:
            if array is None or not array.size or not len(which):
                return None
            return torch.as_tensor(array[which], dtype=torch.float32, device=self.device)

        centered = rows - center
        context = (context - self.context_center_) / self.context_scale_
        training = part(centered, train)
        assert training is not None
        self.history_ = fit(
            flow.to(self.device), training, part(centered, validation), config=config,
            context=part(context, train), validation_context=part(context, validation),
            sample_weight=part(weight, train), validation_weight=part(weight, validation),
        )  # fmt: skip
        self.n_iter_ = self.history_.steps
        self.model_: Flow = flow.double()
        if first is not None:
            first.mean.add_(self._tensor(center))
        return self

    def score_samples(self, X: Any) -> Floats:
        """Log-density ``(n,)`` in nats of each row of X, given its context columns if any."""
        check_is_fitted(self)
        values = validate_data(self, X, dtype=np.float64, reset=False)
        scores = np.empty(len(values))
        with torch.no_grad():
            for k in range(0, len(values), CHUNK):
                part = values[k : k + CHUNK]
                x, context = self._tensor(part[:, self._own]), self._context(part[:, self._given])
                scores[k : k + CHUNK] = self.model_.log_prob(x, context).cpu().numpy()
        return scores

    def score(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> float:
        """Mean log-density of the rows of X in nats, weighted if weights are given."""
        scores = self.score_samples(X)
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, scores[:, None])
        return float(np.average(scores, weights=weights))

    def sample(self, n_samples: int = 1, random_state: Any = None, context: Any = None) -> Any:
        """Draw rows like those of X: an array, or a data frame of the kind that ``fit`` was given.

        ``context`` ``(m, k)``: for a conditional density, the values of its context columns in
        their order, or a data frame with these columns; each row gets ``n_samples`` draws, one
        after the other, ``(m * n_samples, n_features_in_)`` in all, its context included.
        """
        check_is_fitted(self)
        if not isinstance(n_samples, (int, np.integer)) or n_samples < 1:
            raise ValueError(f"n_samples={n_samples!r} must be an integer of at least 1")
        if (context is None) != (len(self._given) == 0):
            wanted = f"needs values for {len(self._given)}" if context is None else "has no"
            raise ValueError(f"context: this density {wanted} context columns")
        generator = torch.Generator(self.device or "cpu").manual_seed(_seed(random_state))
        given = self._context_rows(context).repeat(n_samples, axis=0)
        total = n_samples if context is None else len(given)
        values = np.empty((total, self.n_features_in_))
        values[:, self._given] = given
        for k in range(0, total, CHUNK):
            size, c = min(CHUNK, total - k), self._context(given[k : k + CHUNK])
            shape = () if c is not None else (size,)
            drawn = self.model_.sample(shape, c, generator=generator)
            values[k : k + size, self._own] = drawn.cpu().numpy()
        if self._frame is None:
            return values
        names = [str(name) for name in self.feature_names_in_]
        return nw.from_numpy(values, schema=names, backend=self._frame).to_native()

    def _config(self, seed: int) -> FitConfig:
        try:
            config = FitConfig(
                steps=self.steps, minutes=self.minutes, batch_size=self.batch_size, lr=self.lr,
                weight_decay=self.weight_decay, patience=self.patience, seed=seed,
            )  # fmt: skip
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{first['loc'][0]}={first['input']!r}: {first['msg']}") from None
        if self.steps is None and self.minutes is None:
            raise ValueError("steps=None and minutes=None: the fit has no budget; give one of them")
        return config

    def _positions(self) -> NDArray[np.int64]:
        """Where in X the context columns are, in the order of ``context``."""
        wanted = [] if self.context is None else self.context
        wanted = [wanted] if isinstance(wanted, (str, int, np.integer)) else list(wanted)
        names, d = list(getattr(self, "feature_names_in_", [])), self.n_features_in_
        found = []
        for column in wanted:
            if isinstance(column, str) and column in names:
                found.append(names.index(column))
            elif not isinstance(column, str) and -d <= column < d:
                found.append(int(column) % d)
            else:
                known = f"named {', '.join(names)}" if names else "without names"
                raise ValueError(f"context: X has no column {column!r}; it has {d} columns {known}")
        if len(set(found)) < len(found):
            raise ValueError(f"context={self.context!r} names a column twice")
        return np.array(found, dtype=np.int64)

    def _examine(self, rows: Floats) -> None:
        names = getattr(self, "feature_names_in_", [f"x{k}" for k in range(self.n_features_in_)])
        columns = tuple(str(names[k]) for k in self._own)
        for column in describe_columns(Table("X", columns, rows, ("float64",) * len(columns))):
            if column.constant or column.duplicate_of is not None:
                raise DataError(f"X: {column.warning}")
            if column.warning is not None:
                found = column.warning.partition(";")[0]
                warnings.warn(f"X: {found}; spread it by noise, or leave it out", stacklevel=3)

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64, device=self.device)

    def _context(self, values: Floats) -> Tensor | None:
        if not len(self._given):
            return None
        return self._tensor((values - self.context_center_) / self.context_scale_)

    def _context_rows(self, context: Any) -> Floats:
        if context is None:
            return np.empty((1, 0))
        if hasattr(self, "feature_names_in_") and _kind_of_frame(context) is not None:
            names = [str(self.feature_names_in_[k]) for k in self._given]
            frame = nw.from_native(context, eager_only=True)
            missing = [name for name in names if name not in frame.columns]
            if missing:
                raise ValueError(f"context: column {missing[0]!r} is missing")
            context = frame.select(names).to_numpy()
        values: Floats = check_array(context, dtype=np.float64, input_name="context")
        if values.shape[1] != len(self._given):
            raise ValueError(
                f"context has {values.shape[1]} columns; this density has {len(self._given)}"
            )
        return values


def _kind_of_frame(X: Any) -> Any:
    """Which library X is a data frame of, by the name narwhals has for it."""
    frame = nw.from_native(X, eager_only=True, pass_through=True)
    return str(frame.implementation.value) if isinstance(frame, nw.DataFrame) else None


class FlowOutlierDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """Rows of low density as outliers, in the manner of scikit-learn's detectors.

    ``density``: a ``FlowDensity`` to be cloned and fitted, None for its defaults; with context
    columns a row is an outlier if it is improbable given its context. ``contamination``: share of
    the training rows that count as outliers, in (0, 0.5].

    A fit leaves ``density_``; ``offset_``, the log-density in nats below which a row is an outlier;
    ``n_features_in_`` and, if X was a data frame, ``feature_names_in_``.
    """

    def __init__(self, density: FlowDensity | None = None, *, contamination: float = 0.1) -> None:
        self.density = density
        self.contamination = contamination

    def fit(
        self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None
    ) -> FlowOutlierDetector:
        """Fit the density, and the offset to its scores of the same rows; y is ignored."""
        if not 0 < self.contamination <= 0.5:
            raise ValueError(f"contamination={self.contamination!r} must be in (0, 0.5]")
        density = FlowDensity() if self.density is None else self.density
        self.density_ = clone(density).fit(X, sample_weight=sample_weight)
        self.n_features_in_ = self.density_.n_features_in_
        if hasattr(self.density_, "feature_names_in_"):
            self.feature_names_in_ = self.density_.feature_names_in_
        scores = self.density_.score_samples(X)
        weighted: dict[str, Any] = {}
        if sample_weight is not None:
            weighted = {"weights": np.asarray(sample_weight), "method": "inverted_cdf"}
        self.offset_ = float(np.quantile(scores, self.contamination, **weighted))
        return self

    def score_samples(self, X: Any) -> Floats:
        """Log-density ``(n,)`` in nats of each row."""
        check_is_fitted(self)
        scores: Floats = self.density_.score_samples(X)
        return scores

    def decision_function(self, X: Any) -> Floats:
        """Log-density less ``offset_``, ``(n,)`` in nats: negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> NDArray[np.int64]:
        """-1 for outliers and 1 for the others, ``(n,)``."""
        return np.where(self.decision_function(X) < 0, -1, 1)
