"""Two processes take the same steps as one on the union of their batches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import rootflow

Case = dict[str, Any]


def fitted(case: Case) -> tuple[list[float], float]:
    """Weights after six steps, and the best validation score."""
    g = torch.Generator().manual_seed(1)
    mixing = torch.tensor([[1.0, 0.4], [0.0, 0.3]], dtype=torch.float64)
    rows = torch.randn(96, 2, generator=g, dtype=torch.float64) @ mixing
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = rootflow.flow(case["flow"], features=2, **case["options"]).double()
    weight = torch.rand(80, generator=g, dtype=torch.float64) if case["weighted"] else None
    history = rootflow.fit(
        flow, rows[:80], rows[80:], sample_weight=weight,
        gaps=torch.full((2,), 0.01, dtype=torch.float64) if case["weighted"] else None,
        config=rootflow.FitConfig(steps=6, batch_size=case["batch"]),
    )  # fmt: skip
    weights = torch.cat([p.detach().reshape(-1) for p in flow.parameters()])
    return weights.tolist(), history.best_log_prob


def together(arguments: list[str], size: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Run one program in ``size`` processes that know of one another, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size),
              "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, *arguments], env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    done = []
    for child in running:
        out, err = child.communicate(timeout=200)
        done.append(subprocess.CompletedProcess(arguments, child.returncode, out, err))
    return done


CASES = [
    {"flow": flow, "options": {"blocks": 2, "hidden": [8, 8]}, "batch": 20, "weighted": weighted}
    for flow, weighted in (("monotone", False), ("monotone", True), ("realnvp", True))
]


def test_two_processes_equal_one_on_the_union_batch() -> None:
    first, second = together([__file__])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    *answers, refused = json.loads(first.stdout)
    for case, (weights, score) in zip(CASES, answers, strict=True):
        alone, alone_score = fitted(case)
        assert score == pytest.approx(alone_score, abs=1e-10)
        torch.testing.assert_close(
            torch.tensor(weights, dtype=torch.float64), torch.tensor(alone, dtype=torch.float64),
            rtol=0, atol=1e-10,
        )  # fmt: skip
    assert "batch_size=21 does not divide among 2 processes; give a multiple of 2" in refused
    assert second.stdout == ""


def test_the_command_line_writes_one_run(tmp_path: Path) -> None:
    table, run = tmp_path / "table.csv", tmp_path / "run"
    rows = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    table.write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in rows.tolist()))
    command = ["-m", "rootflow", "fit", str(table), "--flow", "realnvp", "--steps", "4", "--json",
               "--set", "blocks=2", "--set", "hidden=[8]", "--set", "batch_size=32"]  # fmt: skip
    first, second = together([*command, "--out", str(run)])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert json.loads(first.stdout)["steps"] == 4
    assert (second.stdout, second.stderr) == ("", "")
    drawn = rootflow.load(run).sample((3,), generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 2)


if __name__ == "__main__":  # one of the processes
    dist.init_process_group("gloo")
    try:
        answers: list[Any] = [fitted(case) for case in CASES]
        try:
            fitted({**CASES[-1], "batch": 21})
        except ValueError as error:
            answers.append(str(error))
        if dist.get_rank() == 0:
            print(json.dumps(answers))
    finally:
        dist.destroy_process_group()
