"""Counts NaN and measures round trips of rational-quadratic splines, ours beside three others.

    python benchmarks/splines.py --points 10000000

Every point has parameters of its own, normal numbers times a standard deviation, the same for each
library. Half of the points are uniform on [-6, 6], the other half are knots of that library's
spline or floating-point neighbours of knots, the tail bound included. nflows and normflows stop at
their own assertion where the root would be NaN; to count such points the script restarts itself
with assertions off.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

BINS, BOUND, LEAST = 8, 5.0, 1e-3
SHIFT = math.log(math.expm1(1 - LEAST))  # raw slope 0 means slope 1 in every library

# widths, heights (n, BINS) and slopes (n, BINS - 1), all raw; (map, knots): the map takes points
# (n,) and whether to invert and returns image and log-slope, knots are (n, BINS + 1) for x, y.
Raw = tuple[Tensor, Tensor, Tensor]
Spline = tuple[Callable[[Tensor, bool], tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]


def rootflow_spline(raw: Raw) -> Spline:
    from rootflow.transforms.spline import Spline as Ours

    spline = Ours(BINS, BOUND, "linear")
    widths, heights, slopes = raw
    theta = torch.cat([widths.T, heights.T, slopes.T])
    knots = spline._knots(theta[: 2 * BINS].view(2, BINS, -1))[0]

    def run(x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return spline.inverse(x, theta) if inverse else spline.forward(x, theta)

    return run, (knots[0].T, knots[1].T)


def zuko_spline(raw: Raw) -> Spline:
    from zuko.transforms import MonotonicRQSTransform

    spline = MonotonicRQSTransform(*raw, bound=BOUND)

    def run(x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if not inverse:
            return spline.call_and_ladj(x)
        image = spline._inverse(x)
        return image, -spline.call_and_ladj(image)[1]

    return run, (spline.horizontal, spline.vertical)


def softmax_knots(raw: Tensor) -> Tensor:
    """Knots as nflows and normflows make them, bit for bit: shares of at least LEAST."""
    shares = LEAST + (1 - LEAST * BINS) * F.softmax(raw, dim=-1)
    knots = 2 * BOUND * F.pad(shares.cumsum(-1), (1, 0)) - BOUND
    knots[..., 0], knots[..., -1] = -BOUND, BOUND
    return knots


def durkan_spline(function: Callable[..., tuple[Tensor, Tensor]], raw: Raw) -> Spline:
    widths, heights, slopes = raw

    def run(x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return function(
            x, widths, heights, slopes + SHIFT, inverse, tails="linear", tail_bound=BOUND
        )

    return run, (softmax_knots(widths), softmax_knots(heights))


def nflows_spline(raw: Raw) -> Spline:
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    return durkan_spline(unconstrained_rational_quadratic_spline, raw)


def normflows_spline(raw: Raw) -> Spline:
    from normflows.utils.splines import unconstrained_rational_quadratic_spline

    return durkan_spline(unconstrained_rational_quadratic_spline, raw)


SIDES = {
    "rootflow": rootflow_spline,
    "zuko": zuko_spline,
    "nflows": nflows_spline,
    "normflows": normflows_spline,
}


def points(knots: Tensor, generator: torch.Generator) -> Tensor:
    """(n,): the first half uniform on [-6, 6], then a knot of its row, or a neighbour of it."""
    n = len(knots)
    uniform = 12 * torch.rand(n, generator=generator) - 6
    pick = torch.randint(knots.shape[1], (n, 1), generator=generator)
    at = knots.gather(1, pick)[:, 0]
    up = torch.nextafter(at, torch.tensor(math.inf))
    down = torch.nextafter(at, torch.tensor(-math.inf))
    which = torch.randint(3, (n,), generator=generator)
    near = torch.where(which == 0, at, torch.where(which == 1, up, down))
    return torch.where(torch.arange(n) < n // 2, uniform, near)


def chunk(side: str, raw: Raw, seed: int) -> dict[str, float]:
    """Counts and largest errors over one chunk of rows."""
    n = len(raw[0])
    run, (horizontal, vertical) = SIDES[side](raw)
    generator = torch.Generator().manual_seed(seed)
    x, y = points(horizontal, generator), points(vertical, generator)
    nan = {}
    for name, start, inverse in (("forward", x, False), ("inverse", y, True)):
        image, log_slope = run(start, inverse)
        bad = ~(image.isfinite() & log_slope.isfinite())
        nan[name] = int(bad.sum())
        if inverse:
            good = torch.where(bad, 0.0, image)
            back, back_slope = run(good, False)
            lost = ~(back.isfinite() & back_slope.isfinite())
            nan["forward"] += int(lost.sum())
            error = torch.where(bad | lost, 0.0, (back - y).abs())
            mismatch = torch.where(bad | lost, 0.0, (back_slope + log_slope).abs())
    return {
        "points": n, "nan_forward": nan["forward"], "nan_inverse": nan["inverse"],
        "round_trip": float(error.max()), "log_slope": float(mismatch.max()),
        "above_1e-3": int((error > 1e-3).sum()),
    }  # fmt: skip


def measure(side: str, deviation: float, count: int, rows: int = 100_000) -> dict[str, Any]:
    """All chunks of one library at one standard deviation of the parameters."""
    total: dict[str, Any] = {"side": side, "std": deviation, "raised": 0}
    for seed in range(math.ceil(count / rows)):
        generator = torch.Generator().manual_seed(1000 + seed)
        size = min(rows, count - seed * rows)
        raw = tuple(
            deviation * torch.randn(size, k, generator=generator) for k in (BINS, BINS, BINS - 1)
        )
        try:
            found = chunk(side, raw, seed)  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            total["raised"] += 1
            total["message"] = f"{type(error).__name__}: {error}"[:200]
            continue
        for key, value in found.items():
            highest = key in ("round_trip", "log_slope")
            total[key] = max(total.get(key, 0), value) if highest else total.get(key, 0) + value
    return total


def render(results: list[dict[str, Any]]) -> str:
    lines = [
        "| spline | std | points | NaN forward | NaN inverse | largest round trip | above 1e-3 | "
        "largest log-slope mismatch |",
        "|---" * 8 + "|",
    ]
    for r in results:
        if "points" not in r:
            lines.append(f"| {r['side']} | {r['std']:g} | raised: {r.get('message')} |")
            continue
        lines.append(
            f"| {r['side']} | {r['std']:g} | {r['points']:,} | {r['nan_forward']:,} | "
            f"{r['nan_inverse']:,} | {r['round_trip']:.1e} | {r['above_1e-3']:,} | "
            f"{r['log_slope']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    if __debug__:
        os.execv(sys.executable, [sys.executable, "-O", *sys.argv])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=10_000_000)
    parser.add_argument("--std", type=float, action="append", help="default: 0.1 1 3 10")
    parser.add_argument("--side", choices=SIDES, action="append", help="only these (repeat)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for deviation in args.std or (0.1, 1.0, 3.0, 10.0):
        for side in args.side or SIDES:
            with torch.no_grad():
                results.append(measure(side, deviation, args.points))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    Console().print(render(results), markup=False, soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
