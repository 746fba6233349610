"""Densities with known answers, small flows, and quick settings."""

import math

import torch

from rootflow.inference import Target

TINY = {"options": {"blocks": 2, "hidden": (16,)}, "flow": "realnvp"}
COVARIANCE = torch.tensor([[4.0, 1.2], [1.2, 1.0]], dtype=torch.float64)
MEAN = torch.tensor([3.0, -1.0], dtype=torch.float64)
LOG_Z = 2.5  # of the Gaussian below: what its log_prob adds


def gaussian(x):
    precision = torch.linalg.inv(COVARIANCE).to(x)
    away = x - MEAN.to(x)
    return -((away @ precision) * away).sum(-1) / 2 + LOG_Z - 0.5 * float(
        torch.logdet(2 * math.pi * COVARIANCE)
    )


def bent(x):
    """A banana: x2 is normal around x1 squared; normalised."""
    return -x[:, 0].square() / 2 - 2 * (x[:, 1] - x[:, 0].square()).square() - math.log(math.pi)


def gaussian_target(**arguments):
    return Target(gaussian, 2, **arguments)
