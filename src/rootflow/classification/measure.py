"""What a classifier does on held-out images: errors, calibration, certified constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..data import Images
from .fit import part
from .network import Classifier

__all__ = ["calibration_error", "measure"]

BINS = 15
AT_ONCE = 500  # images


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    r"""Expected calibration error: mean over images of |accuracy - confidence| in their bin.

    .. math:: \sum_b \frac{n_b}{n} \, |\mathrm{acc}_b - \mathrm{conf}_b|

    over 15 bins of equal width of the largest predicted probability. ``confidence`` and ``correct``
    (bool) are ``(n,)``. Source: Guo et al. 2017 (arXiv:1706.04599).
    """
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64, device=confidence.device)
    gaps.index_add_(0, bins, correct.double() - confidence.double())
    return float(gaps.abs().sum() / len(confidence))


@torch.no_grad()
def measure(model: Classifier, images: Images) -> dict[str, Any]:
    """Test error and its standard error in percent, nats, calibration, and certified constants.

    ``lipschitz`` are those of the branches g, ``block_lipschitz`` of the four blocks: upper bounds,
    for the weights and statistics as they stand.
    """
    model.eval()
    device = next(model.parameters()).device
    found: dict[str, Any] = {}
    for name in ("validation", "test"):
        pixels, labels = part(images, name, device)
        scores = torch.cat([model(rows) for rows in torch.split(pixels, AT_ONCE)])
        confidence, guess = scores.double().exp().max(1)
        wrong = float((guess != labels).double().mean())
        found[f"{name}_error"] = 100 * wrong
        if name == "test":
            log_prob = scores.double().gather(1, labels[:, None])[:, 0]
            found |= {
                "test_error_se": 100 * math.sqrt(wrong * (1 - wrong) / len(labels)),
                "test_log_prob": float(log_prob.mean()),
                "test_log_prob_se": float(log_prob.std()) / math.sqrt(len(labels)),
                "calibration_error": calibration_error(confidence, guess == labels),
            }
    branches = [branch for block in model.blocks for branch in block.nets()]
    found["lipschitz"] = [float(branch.bound()) for branch in branches]
    found["block_lipschitz"] = [float(block.bound()) for block in model.blocks]
    return found
