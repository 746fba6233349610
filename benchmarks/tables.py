"""Fits zuko's spline flow and flows of rootflow to one table for equal time, side by side.

    python benchmarks/tables.py --minutes 10
    python benchmarks/tables.py --minutes 2 --batch 512 --flow nsf-ar --side all

All get the same rows (80/10/10 after a seeded permutation), the same threads and the same wall
time, one after the other. Printed are held-out nats per row with standard errors, in the units of
the data and in units where each training column has mean 0 and standard deviation 1.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """The rows of a table, float32, in the units of the data; scale: training deviations."""

    train: Tensor
    validation: Tensor
    test: Tensor
    centre: Tensor
    scale: Tensor

    @property
    def log_scale(self) -> float:
        """What a row's log-density gains, in nats, when the data are standardised."""
        return float(self.scale.double().log().sum())


@dataclass(frozen=True)
class Fit:
    """Outcome of one fit: log-density of each test row in nats, in the units of the data.

    ``cpu``: processor time of the fit in seconds; on a busy machine less than its wall time.
    """

    name: str
    log_prob: Tensor
    steps: int
    seconds: float
    cpu: float
    parameters: int

    def summary(self, log_scale: float) -> dict[str, float | int | str]:
        rows = self.log_prob.double()
        return {
            "flow": self.name,
            "test_log_prob": float(rows.mean()),
            "test_log_prob_standardised": float(rows.mean()) + log_scale,
            "test_log_prob_se": float(rows.std()) / math.sqrt(len(rows)),
            "steps": self.steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu,
            "parameters": self.parameters,
        }


def split(values: np.ndarray) -> Split:
    """Cuts values (n, d) into 80/10/10 after numpy's RandomState(0) permutation."""
    order = np.random.RandomState(0).permutation(len(values))
    values = values[order]
    first, second = int(0.8 * len(values)), int(0.9 * len(values))
    centre, scale = values[:first].mean(0), values[:first].std(0)
    parts = (values[:first], values[first:second], values[second:], centre, scale)
    return Split(*(torch.as_tensor(part, dtype=torch.float32) for part in parts))


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def descend(
    flow: torch.nn.Module,
    density: Callable[[Tensor], Tensor],
    data: Split,
    minutes: float,
    rows: int,
    rate: float = 1e-3,
) -> tuple[Tensor, int, float, float]:
    """Adam on standardised rows, the rate falling to 0 as a cosine of the time used.

    Returns the log-densities of the test rows in the units of the data, steps, wall and CPU time.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
    train = (data.train - data.centre) / data.scale
    budget, steps, start = 60 * minutes, 0, time.perf_counter()
    elapsed, cpu = 0.0, time.process_time()
    while elapsed < budget:
        for index in torch.randperm(len(train), generator=generator).split(rows):
            fraction = 0.5 * (1 + math.cos(math.pi * elapsed / budget))
            optimizer.param_groups[0]["lr"] = rate * fraction
            optimizer.zero_grad()
            (-density(train[index]).mean()).backward()
            optimizer.step()
            steps += 1
            elapsed = time.perf_counter() - start
            if elapsed >= budget:
                break
    cpu = time.process_time() - cpu
    test = (data.test - data.centre) / data.scale
    with torch.no_grad():
        log_prob = torch.cat([density(part) for part in test.split(2000)])
    return log_prob - data.log_scale, steps, elapsed, cpu


def fit_zuko(data: Split, minutes: float, rows: int, name: str) -> Fit:
    """zuko's autoregressive spline flow, whatever the name."""
    import zuko

    torch.manual_seed(0)
    flow = zuko.flows.NSF(data.train.shape[1], transforms=5, hidden_features=(128, 128), bins=8)
    found = descend(flow, lambda x: flow().log_prob(x), data, minutes, rows)
    return Fit("zuko NSF autoregressive", *found, count(flow))


def fit_same(data: Split, minutes: float, rows: int, name: str) -> Fit:
    """The flow of that name with its defaults in the very loop that zuko gets."""
    import rootflow

    torch.manual_seed(0)
    flow = rootflow.flow(name, features=data.train.shape[1])
    found = descend(flow, flow.log_prob, data, minutes, rows)
    return Fit(f"rootflow {name}, zuko's loop", *found, count(flow))


def fit_rootflow(data: Split, minutes: float, rows: int, name: str) -> Fit:
    """The flow of that name with its defaults, through rootflow.fit; it sees the raw rows."""
    import rootflow

    torch.manual_seed(0)
    flow = rootflow.flow(name, features=data.train.shape[1])
    start, cpu = time.perf_counter(), time.process_time()
    config = rootflow.FitConfig(minutes=minutes, seed=0, batch_size=rows)
    history = rootflow.fit(flow, data.train, data.validation, config=config)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    with torch.no_grad():
        log_prob = torch.cat([flow.log_prob(part) for part in data.test.split(2000)])
    return Fit(f"rootflow {name}", log_prob, history.steps, seconds, cpu, count(flow))


SIDES = {"zuko": fit_zuko, "same": fit_same, "rootflow": fit_rootflow}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, required=True, help="training time of each flow")
    parser.add_argument("--data", default="galaxies", help="a built-in table or a path")
    parser.add_argument("--flow", default="monotone", help="rootflow's side (default: monotone)")
    parser.add_argument(
        "--side",
        choices=[*SIDES, "both", "all"],
        default="both",
        help="same: rootflow's flow in zuko's loop; both: zuko and rootflow (default)",
    )
    parser.add_argument("--batch", type=int, default=512, help="rows of a step (default: 512)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes}: needs a positive time")
    if args.batch < 2:
        parser.error(f"--batch {args.batch}: needs at least 2 rows")
    torch.set_num_threads(args.threads)

    from rootflow.data.tables import read_table

    data = split(read_table(args.data).values)
    sides = {"both": ["zuko", "rootflow"], "all": list(SIDES)}.get(args.side, [args.side])
    fits = [SIDES[side](data, args.minutes, args.batch, args.flow) for side in sides]
    results = [fit.summary(data.log_scale) for fit in fits]

    budget = f"{args.minutes:g} min each, batch {args.batch}, {args.threads} thread(s)"
    table = Table(title=f"{args.data}: held-out nats per row, {budget}")
    for column in ("flow", "raw units", "standardised", "s.e.", "steps", "s", "CPU s"):
        table.add_column(column)
    table.add_column("parameters")
    for row in results:
        figures = (row[key] for key in ("test_log_prob", "test_log_prob_standardised"))
        table.add_row(
            str(row["flow"]),
            *(f"{value:.3f}" for value in figures),
            f"{row['test_log_prob_se']:.3f}",
            str(row["steps"]),
            f"{row['seconds']:.0f}",
            f"{row['cpu_seconds']:.0f}",
            str(row["parameters"]),
        )
    Console().print(table)
    if args.json:
        report = {"data": args.data, "threads": args.threads, "batch": args.batch}
        report["results"] = results
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
