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


def reliability(confidence: Tensor, correct: Tensor) -> Tensor:
    """Images, right guesses and summed confidence ``(15, 3)`` by the largest probability.

    ``confidence`` and ``correct`` (bool) are ``(n,)``; the bins are of equal width.
    """
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    found = torch.zeros(BINS, 3, dtype=torch.float64, device=confidence.device)
    each = torch.stack([torch.ones_like(confidence), correct, confidence], 1)
    return found.index_add_(0, bins, each.double())


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    r"""Expected calibration error: mean over images of |accuracy - confidence| in their bin.

    .. math:: \sum_b \frac{n_b}{n} \, |\mathrm{acc}_b - \mathrm{conf}_b|

    over the bins of ``reliability``. Source: Guo et al. 2017 (arXiv:1706.04599).
    """
    _, right, sure = reliability(confidence, correct).unbind(1)
    return float((right - sure).abs().sum() / len(confidence))


@torch.no_grad()
def measure(model: Classifier, images: Images) -> dict[str, Any]:
    """Test error and its standard error in percent, nats, calibration, and certified constants.

    ``reliability`` is that of the test images, ``confusion`` their numbers by class and guess.
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
            k = scores.shape[1]
            log_prob = scores.double().gather(1, labels[:, None])[:, 0]
            found |= {
                "test_error_se": 100 * math.sqrt(wrong * (1 - wrong) / len(labels)),
                "test_log_prob": float(log_prob.mean()),
                "test_log_prob_se": float(log_prob.std()) / math.sqrt(len(labels)),
                "calibration_error": calibration_error(confidence, guess == labels),
                "reliability": reliability(confidence, guess == labels).tolist(),
                "confusion": (labels * k + guess).bincount(minlength=k * k).view(k, k).tolist(),
            }
    branches = [branch for block in model.blocks for branch in block.nets()]
    found["lipschitz"] = [float(branch.bound()) for branch in branches]
    found["block_lipschitz"] = [float(block.bound()) for block in model.blocks]
    return found
