"""Planar flows of growing length on the energies: rootflow's layers beside an unconstrained one.

    python benchmarks/planar.py [--targets energy2,energy4] [--lengths 2,4,8,16,32] [--steps 400]

The unconstrained layer, after ex4sperans/variational-inference-with-normalizing-flows (github.com),
is x = z + u tanh(w.z + b) with u, w and b free numbers, uniform on [-0.01, 0.01] at the start, and
log |1 + w.u tanh'| for its log-determinant. Where w.u < -1 it folds the plane, and this is not the
density of its draws. So both are judged by draws: KL(q, p) of the shares of a million of them in
square cells, which is never larger than the true one. Equal targets, steps, draws, rates, annealing
and gradient. rootflow's flow is the registry's, which puts a linear map between the layers; "alone"
is without.
"""

import argparse
import json
import time

import torch
from torch import Tensor, nn

import rootflow
from rootflow import inference
from rootflow.inference.diagnostics import grid_kl
from rootflow.transforms import Compose, Standardise, Transform

DRAWS, CELLS = 1_000_000, 128


class Unconstrained(Transform):
    """One layer that may fold; from latent to data only."""

    def __init__(self, features: int) -> None:
        super().__init__((features,))
        self.w, self.u, self.b = (
            nn.Parameter(torch.empty(n).uniform_(-0.01, 0.01)) for n in (features, features, 1)
        )

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        bend = torch.tanh(z @ self.w + self.b)
        slope = 1 + (self.w @ self.u) * (1 - bend.square())
        return z + bend[:, None] * self.u, torch.log(slope.abs() + 1e-7)

    def to_latent(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raise rootflow.errors.RootflowError("this layer has no inverse")


def cell_kl(posterior: inference.Posterior, seed: int) -> float:
    """KL(q, p) of the shares of cells in the target's window, in nats.

    Draws outside share one cell more. Miller and Madow's term for the noise of shares is taken off.
    """
    target = posterior.target
    (a, b), (c, d) = target.view
    flow = posterior._exact()
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(CELLS**2 + 1, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(DRAWS // 50_000):
            x = target.constrain(flow.sample((50_000,), generator=generator))[0]
            at = ((x - x.new_tensor([a, c])) / x.new_tensor([b - a, d - c]) * CELLS).floor().long()
            inside = ((at >= 0) & (at < CELLS)).all(1)
            cell = torch.where(inside, at[:, 0] * CELLS + at[:, 1], CELLS**2)
            counts += torch.bincount(cell, minlength=CELLS**2 + 1)
        fine = 4  # points of the target along a side of each cell
        ways = [lo + (torch.arange(CELLS * fine) + 0.5) * (hi - lo) / (CELLS * fine)
                for lo, hi in ((a, b), (c, d))]  # fmt: skip
        nodes = torch.cartesian_prod(*(w.double() for w in ways))
        p = (target.log_prob(nodes) - target.log_normaliser).exp()
    p = p.reshape(CELLS, fine, CELLS, fine).mean((1, 3)).flatten() * (b - a) * (d - c) / CELLS**2
    p = torch.cat([p, (1 - p.sum()).clamp_min(1e-8)[None]]).clamp_min(1e-300)
    q = counts / counts.sum()
    hit = q > 0
    kl = float((q[hit] * (q[hit] / p[hit]).log()).sum())
    return kl - (int(hit.sum()) - 1) / (2 * DRAWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", default="energy1,energy2,energy3,energy4")
    parser.add_argument("--lengths", default="2,4,8,16,32")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    common = {"steps": given.steps, "seed": given.seed, "lr": given.lr, "gaussian": False,
              "anneal": 0.3, "gradient": "plain", "patience": 10**6}  # fmt: skip
    for name in given.targets.split(","):
        for length in map(int, given.lengths.split(",")):
            torch.manual_seed(given.seed)
            free = Compose([Standardise(2), *(Unconstrained(2) for _ in range(length))])
            alone = {"blocks": length, "actnorm": False, "linear": None}
            for kind, flow, options in (
                ("rootflow", "planar", {"blocks": length}),
                ("rootflow, alone", "planar", alone),
                ("unconstrained", rootflow.Flow(free), None),
            ):
                begin = time.process_time()
                found = inference.fit(name, flow, options=options, **common)
                seconds = time.process_time() - begin
                row = {"target": name, "length": length, "layer": kind, "seed": given.seed,
                       "kl of cells": cell_kl(found, given.seed + 1)}  # fmt: skip
                if kind == "unconstrained":
                    row["claimed kl"] = found.target.log_normaliser - found.elbo.value
                    row["folds"] = sum(
                        float((m.w @ m.u).detach()) < -1
                        for m in found.flow.modules() if isinstance(m, Unconstrained)
                    )  # fmt: skip
                else:
                    log_q = found._exact().log_prob
                    row["kl"] = grid_kl(log_q, found.target, points=256).value
                print(json.dumps({**row, "cpu s": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
