"""What each layer of a flow does to rows: where they go, and what becomes of a straight grid."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ..flow import Flow
from ..plots.zoo import Stage
from ..transforms import ActNorm, Compose, Standardise, Transform
from ..transforms.linear import Scale
from ..transforms.mixing import MIXINGS

__all__ = ["MOST_STAGES", "curves", "stages", "warps"]

MOST_STAGES = 8  # panels of layers in one picture
AFFINE = (Standardise, ActNorm, Scale, *MIXINGS.values())


def stages(flow: Flow) -> list[tuple[str, list[Transform]]]:
    """The layers of a flow in at most eight groups, each with what to call it.

    A layer is one map that is not affine, with the affine ones before it; those after the last one
    belong to it.
    """
    layers: list[list[Transform]] = [[]]
    for part in _flat(flow.transform):
        layers[-1].append(part)
        if not isinstance(part, AFFINE):
            layers.append([])
    tail = layers.pop()
    if layers:
        layers[-1] += tail
    else:
        layers = [tail]
    groups = min(len(layers), MOST_STAGES)
    edges = [round(k * len(layers) / groups) for k in range(groups + 1)]
    found = []
    for start, end in pairwise(edges):
        name = f"layer {end}" if end == start + 1 else f"layers {start + 1} to {end}"
        found.append((name, [part for layer in layers[start:end] for part in layer]))
    return found


def _flat(transform: Transform) -> Iterator[Transform]:
    if isinstance(transform, Compose):
        for part in transform.transforms:
            assert isinstance(part, Transform)
            yield from _flat(part)
    else:
        yield transform


@torch.no_grad()
def curves(flow: Flow, rows: Tensor) -> list[Stage]:
    """For rows (n, 1): the map of each group of layers over the range that reaches it."""
    found, points = [], rows
    for name, parts in stages(flow):
        low, high = (float(end) for end in (points.min(), points.max()))
        given = torch.linspace(low, high, 400).unsqueeze(-1)
        got = given
        for part in parts:
            points, got = part(points)[0], part(got)[0]
        curve = torch.cat([given, got], 1).numpy()
        found.append(Stage(name, points.numpy(), curve=curve))
    return found


@torch.no_grad()
def warps(flow: Flow, rows: Tensor) -> list[Stage]:
    """For rows (n, 2): the rows after each group of layers, and a latent grid pulled back there."""
    groups, points, forward = stages(flow), rows, [rows]
    for _, parts in groups:
        for part in parts:
            points = part(points)[0]
        forward.append(points)
    lines = _square_grid()
    backward = [lines]
    for _, parts in reversed(groups):
        for part in reversed(parts):
            lines = part.inverse(lines)[0]
        backward.append(lines)
    names = ["the data", *(f"after {name}" for name, _ in groups)]
    names[-1] += ": the latent"
    return [
        Stage(name, p.numpy(), g.numpy())
        for name, p, g in zip(names, forward, reversed(backward), strict=True)
    ]


def _square_grid(reach: float = 3.0, lines: int = 13, dots: int = 241) -> Tensor:
    """Straight lines both ways over a square of the latent plane, (2 lines, dots, 2)."""
    at, along = torch.linspace(-reach, reach, lines), torch.linspace(-reach, reach, dots)
    one = torch.stack(torch.meshgrid(at, along, indexing="ij"), -1)
    return torch.cat([one, one.flip(-1)])
