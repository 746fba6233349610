"""The report and its figures: they say what was measured and survive missing parts."""

import json
import re
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
from matplotlib.figure import Figure

from rootflow import plots
from rootflow.errors import DataError
from rootflow.report import Evidence, draw, render, write_report

METRICS = [
    {"kind": kind, "step": step, "loss": 9 - step / 100, "log_prob": step / 100, "log_prob_se": 0.1}
    for step in range(10, 200, 10)
    for kind in ("train", "validation")
]
RESULT = {
    "flow": "implicit", "data": "galaxies", "n_train": 3280, "n_validation": 410, "n_test": 410,
    "features": 3, "parameters": 12345, "steps": 190, "seconds": 301.2, "best_step": 120,
    "test_log_prob": -8.31234, "test_log_prob_se": 0.0561, "inverse_error": 3.2e-06,
    "converged_fraction": 1.0, "device": "cpu", "version": "0.1.0", "seed": 0,
    "stopped": "early stopping", "skipped_steps": 0, "lipschitz": [0.6, 0.97], "torch_threads": 1,
    "dequantised": [],
}  # fmt: skip
CONFIG = {
    "flow": {"name": "implicit", "options": {"blocks": 2, "hidden": [64, 64]}},
    "data": {"source": "my table.csv"},
    "fit": {"minutes": 1.5, "max_steps": None},
}


def evidence(columns=("a", "b", "c"), n=300, seed=0):
    generator = np.random.default_rng(seed)
    table = generator.normal(size=(3, n, len(columns)))
    error = 10 ** generator.normal(-6, 1, size=n)
    return Evidence(columns, *table, error, error / 10, generator.normal(size=n))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    lines = [json.dumps(line) for line in METRICS]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "tra']))
    return tmp_path


def text_of(page):
    """What a reader sees of a page, in one line."""
    body = page[page.index("<body>") :]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_a_report_is_one_page_that_stands_alone(run):
    path = write_report(run, evidence())
    page = path.read_text(encoding="utf-8")
    assert path == run / "report.html"
    assert not re.search(r"<script|<link|https?:|url\(", page)
    assert not re.search(r"\$[a-z_]+", page)
    names = {"learning", "marginals", "pairs", "latent", "round_trip"}
    assert {file.name for file in (run / "figures").iterdir()} == {f"{n}.png" for n in names}
    assert page.count('src="data:image/png;base64,') == len(names)
    assert len(page) < 2_000_000
    seen = text_of(page)
    for words in (
        "implicit on galaxies", "−8.312 ± 0.056 nats per row", "100 %", "0.6 to 0.97", "12,345",
        "5 min 1 s", "early stopping", "3.2e-06", "best at step 120", '&quot;blocks&quot;: 2',
    ):  # fmt: skip
        assert words in seen
    assert "bits" not in seen
    assert "Look here first" not in seen
    assert "Do it again" not in seen  # no command is recorded


def test_equal_runs_give_equal_files_and_nothing_half_written_is_left(run):
    measured = evidence(("a",))
    first = write_report(run, measured).read_bytes()
    assert write_report(run, measured).read_bytes() == first
    assert not [file for file in run.rglob("*") if "tmp" in file.name]


def test_an_empty_run_directory_gives_dashes_and_no_figures(tmp_path):
    seen = text_of(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Held-out log-likelihood –" in seen
    assert "Learning curve" not in seen
    assert "There is no held-out log-likelihood." in seen


@pytest.mark.parametrize("value", [None, float("nan")])
def test_an_unknown_likelihood_is_a_dash(value):
    seen = text_of(render(CONFIG, RESULT | {"test_log_prob": value, "device": None}, {}))
    assert "Held-out log-likelihood –" in seen
    assert "on –, threads: 1" in seen


def test_likelihood_of_two_columns_is_also_given_in_bits():
    seen = text_of(render(CONFIG, RESULT | {"features": 2, "test_log_prob": -np.log(32.0)}, {}))
    assert "−log2 density: 5.0000 bits per row" in seen


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"converged_fraction": 0.99999}, "Converged 99.99 %"),
        ({"converged_fraction": 0.99999}, "missed the solver&#x27;s tolerance"),
        ({"lipschitz": [0.5, 1.0]}, "A Lipschitz bound is not below 1"),
        ({"lipschitz": [0.5, None]}, "A Lipschitz bound is not below 1"),
        ({"skipped_steps": 2}, "were skipped"),
        ({"stopped": "interrupted"}, "interrupted before"),
        ({"stopped": "budget", "best_step": 190}, "a longer fit may gain"),
        ({"dequantised": ["n", "<k>"]}, "added to n, &lt;k&gt;"),
    ],
)
def test_what_a_reader_must_know_comes_first(change, words):
    assert words in text_of(render(CONFIG, RESULT | change, {}))


def test_a_recorded_command_is_shown_as_it_was():
    command = "rootflow fit a.csv --flow maf --minutes 3"
    assert command in text_of(render(CONFIG | {"command": command}, RESULT, {}))


def test_a_classifier_shows_its_errors_its_calibration_and_what_it_mixes_up(tmp_path):
    result = {
        "name": "classifier", "block": "implicit", "event": [1, 8, 8], "classes": 2,
        "data": "shades", "n_test": 10, "test_error": 30.0, "test_error_se": 14.5,
        "test_log_prob": -0.5, "test_log_prob_se": 0.1, "calibration_error": 0.08,
        "lipschitz": [0.5, 1.2], "reliability": [[0, 0, 0], [4, 2, 2.2], [6, 5, 5.4]],
        "confusion": [[4, 1], [2, 3]],
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    seen = text_of(page)
    for words in ("30 ± 14 %", "implicit classifier on shades", "Calibration error 0.080"):
        assert words in seen
    assert "Converged" not in seen
    assert "not certified" not in seen
    assert {f.stem for f in (tmp_path / "figures").iterdir()} == {"reliability", "confusion"}
    texts = [t.get_text() for t in plots.classes.confusion(result["confusion"]).axes[0].texts]
    assert texts == ["80", "20", "40", "60"]
    (line,) = plots.classes.reliability(result["reliability"]).axes[0].containers
    np.testing.assert_allclose(line.lines[0].get_xydata(), [[0.55, 0.5], [0.9, 5 / 6]])


def test_names_from_a_table_cannot_change_the_page_or_the_figures(tmp_path):
    columns = (
        "<script>alert(1)</script>",
        "$cost_per_$x^",
        "列の名前 that is much too long to show",
    )
    shown = write_report(tmp_path, evidence(columns)).read_text(encoding="utf-8")
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown


def test_least_likely_rows_are_listed_from_the_least_likely():
    e = evidence()
    row = int(np.argmin(e.log_prob))
    page = render(CONFIG, RESULT, {}, e)
    cells = re.findall(r"<td>([^<]*)</td>", page)
    assert cells[0] == str(row + 1)
    assert float(cells[2].replace("−", "-")) == pytest.approx(e.test[row, 0], rel=1e-4)


def test_what_was_not_measured_is_not_drawn():
    full = evidence(("a", "b"))
    assert draw(Evidence()) == {}
    assert set(draw(Evidence(full.columns, test=full.test))) == {"marginals", "pairs"}
    assert set(draw(Evidence(full.columns, samples=full.samples))) == {"marginals", "pairs"}
    assert set(draw(Evidence(round_trip_error=full.round_trip_error))) == {"round_trip"}
    assert set(draw(evidence(("x",)), METRICS)) == {"learning", "marginals", "latent", "round_trip"}


def test_two_columns_show_the_density_instead_of_pairs():
    drawn = draw(evidence(("x", "y")), [], lambda x: -(x**2).sum(1) / 2 - np.log(2 * np.pi))
    assert "density" in drawn
    assert "pairs" not in drawn


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((0, 3)),
        np.ones((5, 3)),
        np.full((4, 3), np.nan),
        np.array([[np.nan, 1, 2], [3, 4, np.inf], [1e9, 1e-9, 7]]),
        np.random.default_rng(0).normal(size=(50, 3)) * [1e-30, 1e30, 1] + [0, 0, 1e12],
        np.random.default_rng(0).integers(0, 3, size=(5000, 3)).astype(np.float32),
    ],
    ids=["no rows", "constant", "all NaN", "one finite row", "scales", "levels"],
)
def test_figures_survive_awkward_tables(values):
    columns = ("a", "b", "c")
    other = np.random.default_rng(1).normal(size=(30, 3))
    for data, samples in ((values, values), (other, values)):
        plots.png(plots.marginals(data, samples, columns))
    plots.png(plots.pairs(values, other, columns, max_columns=2))
    plots.png(plots.latent(values))
    plots.png(plots.round_trip(values[:, 0], np.zeros(len(values))))
    plots.png(plots.density_2d(values[:, :2], lambda x: np.full(len(x), np.nan)))


def test_metrics_may_be_missing_partial_or_not_finite():
    for metrics in (
        [],
        [{"kind": "validation", "step": 5, "log_prob": 1.0}],
        [{"kind": "train", "step": 5, "loss": float("nan")}, {"kind": "train", "step": 6}],
    ):
        plots.png(plots.learning_curve(metrics))


def test_objective_and_likelihood_never_share_an_axis():
    left, right = plots.learning_curve(METRICS).axes
    assert left.get_title(loc="left") == "Training objective"
    assert right.get_title(loc="left") == "Validation log-likelihood"
    assert right.get_lines()[0].get_ydata().tolist() == [m["log_prob"] for m in METRICS[1::2]]


def test_the_band_of_the_quantile_plot_is_that_of_normal_order_statistics():
    expected, rank, low, high = plots.trust._normal_order(500)
    generator = np.random.default_rng(5)
    draws = np.sort(generator.normal(size=(4000, 500)), axis=1)[:, rank - 1]
    inside = ((draws > low) & (draws < high)).mean(axis=0)
    assert rank[0] == 1
    assert rank[-1] == 500
    assert np.abs(inside - 0.95).max() < 0.025
    assert np.abs(np.median(draws, axis=0) - expected).max() < 0.1


def test_curves_of_normal_latents_stay_flat_and_of_wide_ones_tilt():
    exact = np.array([[NormalDist().inv_cdf((k + 0.5) / 2000) for k in range(2000)]]).T
    figure = plots.latent(np.hstack([exact, 1.2 * exact]))
    flat, tilted = (ax.get_lines()[1].get_xydata() for ax in figure.axes[:2])
    assert np.abs(flat[:, 1]).max() < 0.1
    assert tilted[:, 1] == pytest.approx(0.2 * tilted[:, 0], abs=0.1)


def test_the_chi_square_curve_is_a_density():
    curve = plots.latent(np.random.default_rng(0).normal(size=(400, 6))).axes[-1].get_lines()[0]
    t, density = curve.get_data()
    assert np.trapezoid(density, t) == pytest.approx(1, abs=0.005)


def test_a_density_that_is_right_integrates_to_one_in_its_window():
    data = np.random.default_rng(0).normal(size=(3000, 2))
    figure = plots.density_2d(
        data, lambda x: -(x**2).sum(1) / 2 - np.log(2 * np.pi), (-6, 6, -6, 6), data
    )
    titles = [ax.get_title(loc="left") for ax in figure.axes[:3]]
    assert titles == [
        "data: 100.0% inside",
        "samples: 100.0% inside",
        "model density: 100.0% inside",
    ]


def test_many_columns_are_named_as_cut_short():
    wide = np.random.default_rng(0).normal(size=(20, 70))
    figure = plots.marginals(wide, wide, [f"c{i}" for i in range(70)])
    assert len(figure.axes) == 64
    assert "first 64 of 70 columns" in [t.get_text() for t in figure.legends[0].get_texts()]
    assert isinstance(plots.latent(wide[:, :3]), Figure)


def test_wrong_use_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"test has shape \(4, 3\); give \(rows, 2\)"):
        Evidence(("a", "b"), test=np.zeros((4, 3)))
    with pytest.raises(DataError, match="is not a run directory"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is not valid JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_neither_importing_rootflow_nor_drawing_needs_pyplot():
    code = (
        "import sys, rootflow; assert 'matplotlib' not in sys.modules; import rootflow.report;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
