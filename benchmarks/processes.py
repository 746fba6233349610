"""Training steps per second of one process, two threads, and two processes, on the galaxy table.

    python benchmarks/processes.py [--flow monotone] [--batch 512] [--steps 60]

Each line is one `rootflow fit` of its own; the budget is in steps, so all do the same work. Seconds
are those of the fit without its start, validation and report.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = {
    "1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1),
}  # fmt: skip


def steps_per_second(processes: int, threads: int, words: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        start = [sys.executable, "-m"]
        if processes > 1:
            start += ["torch.distributed.run", "--standalone"]
            start += [f"--nproc-per-node={processes}", "-m"]
        command = [*start, "rootflow", "fit", "galaxies", "--out", str(run), "--quiet", *words]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command += ["--threads", str(threads)]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    first, last = train[1], train[-1]  # the first step also starts things
    return (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--flow", default="monotone")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    words = ["--flow", args.flow, "--steps", str(args.steps), "--set", f"batch_size={args.batch}",
             "--set", "validation_rows=1"]  # fmt: skip
    alone = None
    print("| processes | steps per second | ratio |\n|---|---|---|")
    for name, (processes, threads) in CASES.items():
        rate = steps_per_second(processes, threads, words)
        alone = alone or rate
        print(f"| {name} | {rate:.2f} | {rate / alone:.2f} |", flush=True)


if __name__ == "__main__":
    main()
