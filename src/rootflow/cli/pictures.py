"""What a fitted flow does with held-out images: bits per dimension, round trip, pictures."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import rootflow
from rootflow.cli.measure import Measured
from rootflow.plots.images import Pictures, sheet
from rootflow.report import Evidence
from rootflow.store import write_atomically
from rootflow.training.scores import by_rows, score_images
from rootflow.transforms import Pixels

__all__ = ["SCORED", "Album", "draw", "measure_images", "write_images"]

SCORED = 2000  # test images at most: an estimated log-determinant takes its time
BACK = 256  # images of the round trip
SHOWN = 10  # side by side
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)
PATHS = 4
ALBUM = "samples.npz"

Array = NDArray[Any]


@torch.no_grad()
def draw(
    flow: rootflow.Flow, n: int, generator: torch.Generator, temperature: float = 1.0
) -> Tensor:
    """Draws ``(n, *event)`` with the latent stretched by ``temperature``; NaN where a solve failed.

    At a temperature of 1 they follow the flow's density, below they keep to its likely parts.
    """
    z = flow.base.sample((n,), generator) * temperature  # type: ignore[operator]
    return by_rows(lambda part: flow.inverse(part)[0], z, *flow.event)


def write_images(k: Array, levels: int, path: Path) -> None:
    """Write uint8 images ``(n, c, h, w)``: as they are, or in a .png side by side and enlarged."""
    out = io.BytesIO()
    if path.suffix.lower() == ".npy":
        np.save(out, k, allow_pickle=False)
    elif path.suffix.lower() == ".npz":
        np.savez_compressed(out, pixels=k)
    else:
        seen = sheet(k, math.ceil(math.sqrt(len(k)))) / (levels - 1)
        shown = np.nan_to_num(seen * 255, nan=255).round().astype(np.uint8).squeeze()
        times = max(1, 64 // max(k.shape[2:]))
        shown = shown.repeat(times, 0).repeat(times, 1)
        Image.fromarray(shown).save(out, format="PNG")
    write_atomically(path, out.getvalue())


class Album:
    """Samples from the same latents at ever later steps of a fit, kept in its run directory.

    A new page is added whenever the step has doubled since the last one.
    """

    def __init__(self, run: Path, data: Mapping[str, Any]) -> None:
        self.path, self.levels, self.seed = run / ALBUM, data["levels"], data["seed"]
        self.pages: dict[int, Array] = {}
        if self.path.exists():
            with np.load(self.path, allow_pickle=False) as kept:
                self.pages = dict(zip(kept["steps"].tolist(), kept["pixels"], strict=True))

    def add(self, flow: rootflow.Flow, record: Mapping[str, Any]) -> None:
        """Add a page if it is time for one."""
        step = record["step"]
        if step < 2 * max(self.pages, default=0):
            return
        like = next(flow.parameters())
        generator = torch.Generator(like.device).manual_seed(self.seed)
        drawn = draw(flow, SHOWN, generator, 0.8)
        self.pages[step] = Pixels(self.levels).quantise(drawn.nan_to_num(0.0)).cpu().numpy()
        out = io.BytesIO()
        steps, pixels = np.array(list(self.pages)), np.stack(list(self.pages.values()))
        np.savez_compressed(out, steps=steps, pixels=pixels)
        write_atomically(self.path, out.getvalue())


def _slerp(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Points ``(steps, *event)`` from a to b, whose norms pass evenly from the one to the other.

    Straight lines lead through the middle of a normal latent, where no data lie.
    """
    p, q = a.flatten(), b.flatten()
    angle = torch.arccos((p @ q / (p.norm() * q.norm())).clamp(-1, 1)).clamp_min(1e-6)
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)[:, None]
    unit = torch.sin((1 - t) * angle) * p / p.norm() + torch.sin(t * angle) * q / q.norm()
    length = (1 - t) * p.norm() + t * q.norm()
    found: Tensor = unit / angle.sin() * length
    return found.view(steps, *a.shape)


@torch.no_grad()
def measure_images(
    flow: rootflow.Flow, k: Array, data: Mapping[str, Any], run: Path
) -> Measured:
    """Evaluate the flow on held-out images k ``(n, c, h, w)``, uint8, in its own precision."""
    pixels, event = Pixels(data["levels"]), flow.event
    like = next(flow.parameters())
    test = torch.from_numpy(k[:SCORED])
    scores = score_images(flow, test, pixels, seed=data["seed"])
    noise = torch.Generator().manual_seed(data["seed"])
    x = pixels.dequantise(test[:BACK], noise, like.dtype).to(like.device)
    z = by_rows(lambda part: flow.forward(part)[0], x, *event)
    back = by_rows(lambda part: flow.inverse(part)[0], z, *event)
    error = (back - x).abs().flatten(1).amax(1)
    distance = by_rows(lambda part: flow.certificates(part)[:, None], x, 1)[:, 0]
    converged = scores.log_prob.isfinite()
    converged[:BACK] &= error.isfinite().cpu()
    fine = error[error.isfinite()]
    summary = scores.summary()
    numbers = {
        "n_test": len(test),
        **{f"test_{name}": value for name, value in summary.items()},
        "inverse_error": float(fine.max()) if len(fine) else None,
        "converged_fraction": float(converged.double().mean()),
        "lipschitz": [
            float(bound()) for m in flow.modules() if callable(bound := getattr(m, "bound", None))
        ],
    }
    evidence = Evidence(round_trip_error=_array(error), certificate=_array(distance))
    return Measured(numbers, evidence, None, _pictures(flow, test, x, z, back, scores, data, run))


def _array(t: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = t.double().cpu().numpy()
    return found


def _pictures(
    flow: rootflow.Flow, test: Tensor, x: Tensor, z: Tensor, back: Tensor, scores: Any,
    data: Mapping[str, Any], run: Path,
) -> Pictures:
    levels, generator = data["levels"], torch.Generator(x.device)
    shown = min(SHOWN, len(x))
    samples = {
        t: _array(draw(flow, SHOWN, generator.manual_seed(data["seed"]), t)) * levels
        for t in TEMPERATURES
    }
    ends = z[z.flatten(1).isfinite().all(1)]
    paths = [
        by_rows(lambda part: flow.inverse(part)[0], _slerp(a, b, SHOWN), *flow.event)
        for a, b in zip(ends[0 : 2 * PATHS : 2], ends[1 : 2 * PATHS : 2], strict=False)
    ]
    bits = torch.tensor([scores.pixels.bits_per_dim(v, flow.event) for v in scores.log_prob])
    order = bits.nan_to_num(math.inf).argsort()
    likely, unlikely = order[:SHOWN], order.flip(0)[:SHOWN]
    return Pictures(
        levels, _array(x[:shown]) * levels, _array(back[:shown]) * levels, samples,
        _array(torch.stack(paths)) * levels if paths else np.zeros(0),
        (_array(test[unlikely]), _array(bits[unlikely])),
        (_array(test[likely]), _array(bits[likely])),
        Album(run, data).pages,
    )  # fmt: skip
