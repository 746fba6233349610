"""Times a training step of the published implicit-flow code beside ours, on one thread.

    git clone https://github.com/thu-ml/implicit-normalizing-flows published
    python benchmarks/published.py --repo published

Both sides run in one process and see the same batches, and steps alternate, theirs then ours, so
that a noisy machine disturbs both alike. A step is the gradient of the loss, clipping where the
published script clips, Adam, and whatever keeps the Lipschitz bound. Memory is read from one more
process for each side.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from published_code import CASES, Case, Published, batch, row_norm_max
from rootflow import Flow
from rootflow.bases import Normal
from rootflow.transforms import ActNorm, Compose, ImplicitBlock, Transform
from rootflow.transforms.pixels import Logit

COLUMNS = {
    "median_ms": ("ms per step", "{:.0f}"),
    "median_cpu_ms": ("CPU ms", "{:.0f}"),
    "max_residual": ("max residual", "{:.1e}"),
    "step_mb": ("MB per step", "{:.0f}"),
    "peak_mb": ("peak MB", "{:.0f}"),
    "loss_nats": ("loss, nats", "{:.3f}"),
}


class Ours:
    """The same architecture from rootflow.flow, with torch's Adam and the published settings."""

    extra: ClassVar[dict[str, Any]] = {}

    def __init__(self, case: Case, repo: Path) -> None:
        import rootflow

        torch.manual_seed(0)
        options = {"activation": "sin", "actnorm": False, "linear": None}
        options |= {**case.options, **self.extra}
        self.model = rootflow.flow("implicit", *case.shape, **options).train()
        self.clip = case.clip
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=1e-3, betas=case.betas, weight_decay=case.weight_decay
        )

    def step(self, x: Tensor) -> float:
        """Takes one training step on x (rows, features); returns its loss in nats per row."""
        self.optimizer.zero_grad()
        loss = -self.model.log_prob(x).mean()
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def residuals(self, x: Tensor) -> list[float]:
        """Per block, the largest |x + g_x(x) - z - g_z(z)| of any row."""
        found = []
        for block in self.model.transform.transforms:
            z, _ = block.to_latent(x, None)
            if type(block).__name__ == "ImplicitBlock":
                found.append(row_norm_max(x + block.g_x(x), z + block.g_z(z)))
            x = z
        return found


class Squeeze(Transform):
    """Each 2 x 2 square of pixels as four channels, in the order of the published layer."""

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images (rows, c, h, w) to (rows, 4c, h / 2, w / 2), log-det 0."""
        return torch.nn.functional.pixel_unshuffle(x, 2), x.new_zeros(len(x))


class OursOnImages(Ours):
    """The published image model layer by layer, with the published initial weights."""

    def __init__(self, case: Case, repo: Path) -> None:
        def copy(block: ImplicitBlock, layer: torch.nn.Module) -> None:
            for net, source in zip(block.nets, (layer.nnet_x, layer.nnet_z), strict=True):
                for name, own in (("weight", net.weights), ("bias", net.biases)):
                    found = [getattr(m, name) for m in source if hasattr(m, name)]
                    for p, q in zip(reversed(own), reversed(found), strict=False):
                        p.copy_(q.view_as(p))
                betas = [m.beta for m in source if hasattr(m, "beta")]
                net.raw_scale.copy_(torch.cat(betas))

        published, shape = Published(case, repo), case.shape
        chain: list[Transform] = []
        with torch.no_grad():
            for layer in published.parts():
                kind = type(layer).__name__
                if kind == "LogitTransform":
                    chain.append(Logit(shape, 0.05))
                elif kind == "ActNorm2d":
                    chain.append(ActNorm(shape))
                    chain[-1].initialised.fill_(True)
                    chain[-1].shift.copy_(-layer.bias)
                    chain[-1].log_scale.copy_(-layer.weight)
                elif kind == "SqueezeLayer":
                    chain.append(Squeeze(shape))
                    shape = (4 * shape[0], shape[1] // 2, shape[2] // 2)
                else:
                    preactivation = len(layer.nnet_x) > 5
                    options = {**case.options, **self.extra}
                    block = ImplicitBlock(shape, preactivation=preactivation, **options)
                    copy(block, layer)
                    chain.append(block)
        self.model = Flow(Compose(chain), Normal(shape)).train()
        self.volume = math.prod(shape) * math.log(256)  # as the published loss, of whole pixels
        self.clip = case.clip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, betas=case.betas)

    def step(self, x: Tensor) -> float:
        """Takes one training step on x (rows, *shape); returns its loss in nats per row."""
        return super().step(x) + self.volume


class Probed(Ours):
    """The same with exact values and gradients of the log-determinant by one random probe."""

    extra: ClassVar[dict[str, Any]] = {"logdet": "probe"}


class OwnTerms(OursOnImages):
    """The same with the number of terms that follows from the bound, and a geometric tail."""

    extra: ClassVar[dict[str, Any]] = {"logdet": "geometric", "terms": None}


SIDES = {"published": Published, "rootflow": Ours, "rootflow-probe": Probed}
IMAGE_SIDES = {"published": Published, "rootflow": OursOnImages, "rootflow-own-terms": OwnTerms}


def sides_of(case: Case) -> dict[str, Any]:
    """What can be measured for a case: name and class."""
    return IMAGE_SIDES if len(case.shape) == 3 else SIDES


def memory_mb(key: str) -> float:
    """Reads VmRSS (now) or VmHWM (peak) of this process in MB; nan where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.nan
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def memory_of(case: Case, repo: Path, side: str) -> dict[str, float]:
    """Takes three steps of one side alone; returns the process's peak and its growth, in MB."""
    model, generator = sides_of(case)[side](case, repo), torch.Generator().manual_seed(0)
    with contextlib.suppress(OSError):  # the peak so far is that of building the model
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = memory_mb("VmRSS")
    for _ in range(3):
        model.step(batch(case, generator))
    peak = memory_mb("VmHWM")
    return {"peak_mb": peak, "step_mb": peak - before}


def measure(case: Case, repo: Path, sides: list[str], steps: int) -> dict[str, dict[str, Any]]:
    """Alternates the sides for ``steps`` steps; times are medians over the second half."""
    models = {side: sides_of(case)[side](case, repo) for side in sides}
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    cpu_seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(steps):
        x = batch(case, generator)
        for side, model in models.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            losses[side].append(model.step(x))
            seconds[side].append(time.perf_counter() - start)
            cpu_seconds[side].append(time.process_time() - cpu_start)
    x = batch(case, generator)
    result = {}
    for side, model in models.items():
        residuals = model.residuals(x)
        result[side] = {
            "median_ms": 1000 * statistics.median(seconds[side][steps // 2 :]),
            "median_cpu_ms": 1000 * statistics.median(cpu_seconds[side][steps // 2 :]),
            "first_ms": 1000 * statistics.median(seconds[side][:5]),
            "loss_nats": statistics.fmean(losses[side][-5:]),
            "max_residual": max(residuals),
            "residuals": residuals,
            "parameters": sum(p.numel() for p in model.model.parameters() if p.requires_grad),
        }
        if side == "published":
            result[side]["backward_residual"] = model.backward_residual(x)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repo", type=Path, required=True, help="clone of the published code")
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--side", choices=[*{**SIDES, **IMAGE_SIDES}, "all"], default="all")
    parser.add_argument(
        "--steps", type=int, help="steps per side; default toy 100, power 40, images 12"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.repo / "train_toy.py").is_file():
        parser.error(f"--repo {args.repo}: no train_toy.py there; give the path of a clone")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: needs at least 1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or the published scripts take a GPU
    torch.set_num_threads(1)
    cases = list(CASES) if args.case == "all" else [args.case]
    if args.memory_only:
        print(json.dumps(memory_of(CASES[cases[0]], args.repo, args.side)))
        return

    report: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine()}
    console = Console()
    for name in cases:
        case = CASES[name]
        sides = list(sides_of(case)) if args.side == "all" else [args.side]
        if not set(sides) <= set(sides_of(case)):
            continue
        memory = {}
        for side in sides:
            command = [sys.executable, __file__, "--repo", str(args.repo), "--memory-only"]
            command += ["--case", name, "--side", side]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            memory[side] = json.loads(child.stdout)
        figures = measure(case, args.repo, sides, args.steps or case.steps)
        report[name] = {side: {**figures[side], **memory[side]} for side in sides}
        table = Table("side", *(title for title, _ in COLUMNS.values()), title=case.title)
        for side in sides:
            row = [text.format(report[name][side][key]) for key, (_, text) in COLUMNS.items()]
            table.add_row(side, *row)
        console.print(table)
        if "published" in sides:
            error = figures["published"]["backward_residual"]
            console.print(f"published backward solves end at a relative residual up to {error:.1e}")
        if len(sides) > 1:
            report[name]["speedup"] = {
                side: figures["published"]["median_ms"] / figures[side]["median_ms"]
                for side in sides[1:]
            }
            texts = ", ".join(f"{side} {r:.2f}" for side, r in report[name]["speedup"].items())
            console.print(f"published per step, divided by ours (wall time): {texts}\n")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
