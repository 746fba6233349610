"""The experiment on images: its sizes, its bits per dimension, its failures."""

import numpy as np
import pytest

from rootflow.experiments import recipe, run
from rootflow.experiments.images import pooled


def test_pooling_averages_squares():
    pixels = np.array([[[[0, 2, 9, 9], [2, 4, 9, 9]]]], np.uint8)
    assert pooled(pixels, 2).tolist() == [[[[2, 9]]]]
    assert pooled(pixels, 1) is pixels


def test_equal_coefficients_mean_equal_sizes_and_the_bound_of_a_network():
    for scale in ("small", "paper"):
        settings = recipe("image-bits").settings[scale]
        sizes = {}
        for part in settings.parts():
            flow, options = part.recipe["flow"], part.recipe["options"]
            if flow == "glow":
                continue
            assert 0 < options["lipschitz"] < 0.73
            sizes[flow] = options["blocks"] * (2 if flow == "implicit" else 1)
        assert len(set(sizes.values())) == 1
        by_key = {part.key: part.recipe["options"] for part in settings.parts()}
        assert by_key["implicit-0.9"]["lipschitz"] == pytest.approx(0.729)


def test_smoke(tmp_path):
    result = run(recipe("image-bits"), "smoke", tmp_path)
    assert result.failed == 0, [row.error for row in result.rows]
    assert [row.key for row in result.rows] == [
        "digits/implicit/0.9", "digits/residual/0.6", "digits/monotone/0.9",
        "digits/glow/–",
    ]  # fmt: skip
    for row in result.rows:
        assert 0 < row.ours < 10
        assert row.se > 0
        assert row.published is None  # those are of CIFAR-10
        assert (row.more["estimator se"] > 0) is (row.labels["flow"] != "glow")
    assert (tmp_path / "figures" / "samples.png").exists()
