"""The report of a run: one HTML file that shows what was fitted, how well, and how far to trust it.

The file stands alone (figures embedded, no script, no link) and depends on no clock, so equal runs
give equal files. The words and the looks are in report.html beside this module.
"""

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rootflow import plots
from rootflow.errors import DataError
from rootflow.plots.images import Pictures
from rootflow.store import write_atomically

__all__ = ["Evidence", "draw", "render", "write_report"]

Array = NDArray[np.floating[Any]]
Json = Mapping[str, Any]
LogProb = Callable[[NDArray[np.float64]], ArrayLike]
DASH = "–"


def _nothing() -> Array:
    return np.zeros(0)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a fitted flow did with held-out rows; whatever was not measured stays empty.

    ``columns``: d names. ``test`` (n, d), ``samples`` (m, d): in the units of the data. ``latent``
    (n, d): of the test rows. ``round_trip_error`` (n,): from x to inverse(forward(x)), data units.
    ``certificate`` (n,): bound on the distance to the exact latent. ``log_prob`` (n,): nats.
    ``levels``: the texts of columns of text, whose numbers are their positions; NaN is empty.
    """

    columns: Sequence[str] = ()
    test: Array = field(default_factory=_nothing)
    samples: Array = field(default_factory=_nothing)
    latent: Array = field(default_factory=_nothing)
    round_trip_error: Array = field(default_factory=_nothing)
    certificate: Array = field(default_factory=_nothing)
    log_prob: Array = field(default_factory=_nothing)
    levels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        d = len(self.columns)
        for name, table in (("test", self.test), ("samples", self.samples)):
            if table.size and table.shape[1:] != (d,):
                raise ValueError(f"Evidence: {name} has shape {table.shape}; give (rows, {d})")


def write_report(
    run_dir: str | Path,
    evidence: Evidence | None = None,
    *,
    log_prob_fn: LogProb | None = None,
    pictures: Pictures | None = None,
) -> Path:
    """Write report.html and figures/*.png into a run directory; returns the path of the page.

    Reads config.json, result.json and metrics.jsonl there, each of which may be missing.
    ``log_prob_fn`` maps (k, 2) rows to (k,) nats; it is used when the data has two columns.
    ``pictures``: of a flow of images.
    Raises: DataError if ``run_dir`` is not a directory or one of the files is not JSON.
    """
    run_dir, evidence = Path(run_dir), evidence or Evidence()
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a run directory; give one that `rootflow fit` wrote")
    config, result = _read(run_dir / "config.json"), _read(run_dir / "result.json")
    figures = draw(evidence, _read_lines(run_dir / "metrics.jsonl"), log_prob_fn, pictures)
    if "confusion" in result:
        figures |= plots.classes.draw(result["reliability"], result["confusion"])
    (run_dir / "figures").mkdir(exist_ok=True)
    for name, image in figures.items():
        write_atomically(run_dir / "figures" / f"{name}.png", image)
    page = run_dir / "report.html"
    write_atomically(page, render(config, result, figures, evidence).encode())
    return page


def draw(
    evidence: Evidence,
    metrics: Sequence[Json] = (),
    log_prob_fn: LogProb | None = None,
    pictures: Pictures | None = None,
) -> dict[str, bytes]:
    """The figures for which there is something to show: name to PNG bytes."""
    e, d, figures = evidence, len(evidence.columns), {}
    if metrics:
        figures["learning"] = plots.learning_curve(metrics)
    if e.test.size or e.samples.size:
        figures["marginals"] = plots.marginals(e.test, e.samples, e.columns, e.levels)
        if d == 2 and log_prob_fn is not None and e.test.size:
            figures["density"] = plots.density_2d(
                e.test, log_prob_fn, samples=e.samples, columns=e.columns
            )
        elif d > 1:
            figures["pairs"] = plots.pairs(e.test, e.samples, e.columns)
    if e.latent.size:
        figures["latent"] = plots.latent(e.latent)
    if e.round_trip_error.size or e.certificate.size:
        figures["round_trip"] = plots.round_trip(e.round_trip_error, e.certificate)
    if pictures is not None:
        figures |= plots.images.draw(pictures)
    return {name: plots.png(figure) for name, figure in figures.items()}


def render(
    config: Json, result: Json, figures: Mapping[str, bytes], evidence: Evidence | None = None
) -> str:
    """The page, from config.json, result.json and PNG bytes; what is missing shows as a dash."""
    blocks = {name: base64.b64encode(image).decode() for name, image in figures.items()}
    blocks["alerts"] = "".join(f"<li>{escape(line)}</li>" for line in _alerts(result))
    blocks["notes"] = "".join(f"<li>{escape(line)}</li>" for line in result.get("notes") or [])
    blocks["unlikely"] = _unlikely(evidence or Evidence())
    blocks["command"] = escape(str(config.get("command") or ""))
    blocks = {name: block for name, block in blocks.items() if block}
    template = files("rootflow").joinpath("report.html").read_text(encoding="utf-8")
    template = re.sub(  # a section with nothing to show is dropped
        r'<section id="(\w+)">.*?</section>\s*',
        lambda found: found[0] if found[1] in blocks else "",
        template,
        flags=re.DOTALL,
    )
    words = {name: escape(text) for name, text in _words(config, result).items()}
    return Template(template).substitute(words, cards=_cards(result), **blocks)


def _words(config: Json, result: Json) -> dict[str, str]:
    """Every placeholder of the page that is plain text."""
    data = str(result.get("data") or config.get("data", {}).get("source") or "data")
    flow = str(result.get("flow") or config.get("flow", {}).get("name") or "flow")
    flow = f"{result['block']} classifier" if "block" in result else flow
    shape = result.get("shape") or result.get("event") or []
    width = len(result["columns"]) if "columns" in result else result.get("features")
    return {
        **{key: _count(result.get(key)) for key in ("n_train", "n_validation", "n_test")},
        "title": f"{flow} on {data}",
        "size": " x ".join(map(str, shape)) or f"{_count(width)} column{'s' * (width != 1)}",
        "rows": "images" if shape else "rows",
        "config": json.dumps(config, indent=2, ensure_ascii=False),
    }


def _cards(result: Json) -> str:
    """The cards: title, value and small print of each, the headline first."""
    rows = "images" if "shape" in result or "block" in result else "rows"
    mean = f"mean over {_count(result.get('n_test'))} {rows} ± standard error"
    bounds = [b for b in map(_known, result.get("lipschitz") or []) if b is not None]
    lipschitz = f"{min(bounds):.3g} to {max(bounds):.3g}" if bounds else DASH
    score = _of_classifier if "block" in result else _of_images if rows == "images" else _of_rows
    cards = score(result, mean)
    if "block" not in result:
        error, converged = (_known(result.get(k)) for k in ("inverse_error", "converged_fraction"))
        unit = "units that the flow sees" if result.get("notes") else "data units"
        unit = "in units of [0, 1]" if rows == "images" else unit
        cards += [
            ("Largest round-trip error", DASH if error is None else f"{error:.2g}",
             f"{unit}, held-out {rows}"),
            # rounded down: 100 % means every row
            ("Converged", DASH if converged is None else f"{math.floor(converged * 1e4) / 100:g} %",
             f"of held-out {rows}, to the tolerance"),
            ("Certified Lipschitz bounds", lipschitz,
             f"networks: {_count(len(bounds))}; below 1 the map is invertible"),
        ]
    else:
        cards.append(("Certified Lipschitz bounds", lipschitz, "of the branches of the blocks"))
    seen = {key: DASH if value is None else str(value) for key, value in result.items()}.get
    cards += [
        ("Parameters", _count(result.get("parameters")), ""),
        ("Training time", _duration(_known(result.get("seconds"))),
         f"on {seen('device', DASH)}, threads: {seen('torch_threads', DASH)}"),
        ("Steps", _count(result.get("steps")), f"best at step {_count(result.get('best_step'))}"),
        ("Stopped by", seen("stopped", DASH), ""),
        ("Skipped steps", _count(result.get("skipped_steps")), "loss or gradient not finite"),
    ]
    if noisy := result.get("dequantised"):
        cards.append(("Columns with noise", _count(len(noisy)), ", ".join(map(str, noisy))))
    cards.append(("Version", seen("version", DASH), f"seed {seen('seed', DASH)}"))
    return "\n".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}</dd>"
        + (f"<small>{escape(note)}</small>" if note else "") + "</div>"
        for title, value, note in cards
    )  # fmt: skip


def _of_rows(result: Json, mean: str) -> list[tuple[str, str, str]]:
    log_prob, train = _known(result.get("test_log_prob")), _known(result.get("train_log_prob"))
    note = f"{mean}, in the units of the data"
    note += f"; training rows: {_signed(train, '.4f')}" if train is not None else ""
    if log_prob is not None and result.get("features") == 2:
        note += f"; −log2 density: {_signed(-log_prob / math.log(2), '.4f')} bits per row"
    score = _with_error(log_prob, _known(result.get("test_log_prob_se")), "nats per row")
    return [("Held-out log-likelihood", score, note)]


def _of_images(result: Json, mean: str) -> list[tuple[str, str, str]]:
    """The headline of images, with where its error comes from."""
    nats, own = (_known(result.get(k)) for k in ("test_log_prob", "test_bits_per_dim_estimator_se"))
    note = f"{mean}, less is better; with uniform noise within each of {result.get('levels')} "
    note += "levels"
    note += f"; {_signed(nats, '.1f')} nats of density on [0, 1]" if nats is not None else ""
    note += f"; {own:.1g} of the error from estimated log-determinants" if own else ""
    bits, error = (_known(result.get(f"test_bits_per_dim{end}")) for end in ("", "_se"))
    return [("Held-out bits per dimension", _with_error(bits, error, "bits per dimension"), note)]


def _of_classifier(result: Json, mean: str) -> list[tuple[str, str, str]]:
    error, log_prob = (
        _with_error(_known(result.get(name)), _known(result.get(f"{name}_se")), unit)
        for name, unit in (("test_error", "%"), ("test_log_prob", "nats"))
    )
    calibration = _known(result.get("calibration_error"))
    return [
        ("Test error", error, f"{mean}; {result.get('classes')} classes"),
        ("Log-likelihood of the labels", log_prob, "per test image"),
        ("Calibration error", DASH if calibration is None else f"{calibration:.3f}",
         "expected, over 15 bins of confidence"),
    ]  # fmt: skip


def _alerts(result: Json) -> list[str]:
    """What a reader must know before believing the headline."""
    converged, best = _known(result.get("converged_fraction")), _known(result.get("best_step"))
    bounds = [math.inf if _known(b) is None else b for b in result.get("lipschitz") or []]
    late = best is not None and best >= 0.98 * (_known(result.get("steps")) or math.inf)
    stopped, names = result.get("stopped"), ", ".join(map(str, result.get("dequantised") or []))
    checks = {
        "There is no held-out log-likelihood.": _known(result.get("test_log_prob")) is None,
        "Some held-out rows missed the solver's tolerance: their density is not exact.": (
            converged is not None and converged < 1
        ),
        "A Lipschitz bound is not below 1: the inverse is not certified.": any(
            bound >= 1 for bound in bounds
        ) and "block" not in result,
        "Steps with a loss or gradient that is not finite were skipped.": result.get(
            "skipped_steps"
        ),
        "Training was interrupted before its budget ended.": stopped == "interrupted",
        "Validation still improved at the end: a longer fit may gain.": late
        and stopped == "budget",
        f"Noise was added to {names}: this log-likelihood is a lower bound that counts discrete "
        "values by their probability. Do not compare it with that of a fit to the raw "
        "values.": names,
    }
    return [text for text, wrong in checks.items() if wrong]


def _unlikely(evidence: Evidence, most_rows: int = 6, most_columns: int = 12) -> str:
    """The test rows that the flow finds least likely, as rows of an HTML table."""
    if not evidence.log_prob.size or len(evidence.log_prob) != len(evidence.test):
        return ""
    head = ["test row", "log-density", *evidence.columns[:most_columns]]
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    for row in np.argsort(evidence.log_prob)[:most_rows]:
        cells = [f"{row + 1:,}", _signed(float(evidence.log_prob[row]), ".4g")]
        texts = [evidence.levels.get(name, ()) for name in evidence.columns[:most_columns]]
        cells += [_cell(float(value), levels) for value, levels in
                  zip(evidence.test[row, :most_columns], texts, strict=False)]  # fmt: skip
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    return "".join(f"<tr>{line}</tr>\n" for line in lines)


def _cell(value: float, levels: Sequence[str]) -> str:
    """A value of the table, as text where its column holds text."""
    if math.isnan(value):
        return DASH
    return escape(levels[int(value)]) if levels else _signed(value, ".5g")


def _known(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _signed(value: float, form: str) -> str:
    return format(value, form).replace("-", "−")


def _count(value: Any) -> str:
    return DASH if _known(value) is None else f"{int(value):,}"


def _with_error(value: float | None, error: float | None, unit: str) -> str:
    """Mean ± standard error, to two digits of the error."""
    if value is None:
        return DASH
    digits = min(max(1 - math.floor(math.log10(error)), 0), 6) if error else 4
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{_signed(value, f'.{digits}f')}{spread} {unit}"


def _duration(seconds: float | None) -> str:
    if seconds is None or seconds < 60:
        return DASH if seconds is None else f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); restore it or fit again") from error
    return content


def _read_lines(path: Path) -> list[Json]:
    """The metrics; a killed fit may have left half a last line, which is passed over."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
