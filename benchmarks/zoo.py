"""Times the flows of this library beside others, on one thread, in paired rounds.

    python benchmarks/zoo.py --quick
    python benchmarks/zoo.py --json zoo.jsonl --table zoo.md
    python benchmarks/zoo.py --render zoo.jsonl

Each library lives in a process of its own (``peers.py``). In every round each gets a burst of calls
of the same operation on the same batch, one library after the other in changing order, so that a
busy machine disturbs all alike. Quoted are medians of the rounds and the medians of the ratios
within rounds. A run that finds its JSON file continues it.
"""

import argparse
import json
import math
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from peers import SIDES, versions
from side import ADAM, FLOWS, WORKS

GRID = {"features": (2, 6, 21, 63), "rows": (64, 512, 4096)}
QUICK = {"features": (6, 63), "rows": (512,)}
DEFAULT_SIDES = [side for side in SIDES if side != "rootflow-compiled"]
START, BURST = 300.0, 0.1  # seconds: patience for imports and compilation; one burst
ROUNDS = (2, 7)  # at least, at most
TITLES = {
    "maf": "MAF", "realnvp": "RealNVP (affine coupling)",
    "nsf-ar": "NSF autoregressive", "nsf-coupling": "NSF coupling",
    "naf": "NAF", "ffjord": "FFJORD", "cpflow": "Convex potential flow",
}  # fmt: skip
ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
Record = dict[str, Any]


class Process:
    """One library's worker process; killed when it takes too long and started again when asked."""

    def __init__(self, side: str, adam: str) -> None:
        self.side, self.adam = side, adam
        self.child: subprocess.Popen[str] | None = None

    def ask(self, patience: float, **command: Any) -> Record:
        """The worker's answer, or {"timeout": ...} or {"error": ...}; then the worker is gone."""
        if self.child is None:
            program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("peers.py"))]
            self.child = subprocess.Popen(
                [*program, self.side, self.adam],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, env=os.environ | ONE_THREAD,
            )  # fmt: skip
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            self.child.stdin.write(json.dumps(command) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            self.stop()
            return {"error": "the process died"}
        ready, _, _ = select.select([self.child.stdout], [], [], patience)
        line = self.child.stdout.readline() if ready else ""
        if line:
            reply: Record = json.loads(line)
            return reply
        self.stop()
        return {"error": "the process died"} if ready else {"timeout": patience}

    def stop(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
        self.child = None


class Bench:
    """The grid of one run; every finished figure is appended to ``path`` at once."""

    def __init__(self, sides: list[str], adam: str, limit: float, path: Path | None) -> None:
        self.processes = {side: Process(side, adam) for side in sides}
        self.limit, self.path = limit, path
        self.records: list[Record] = []
        self.slow: set[tuple[str, ...]] = set()
        if path and path.exists():
            self.records = read(path)
        self.done = {key_of(r) for r in self.records if r["kind"] == "cell"}
        if not self.records:
            run = {"kind": "run", "date": time.strftime("%Y-%m-%d"), "adam": adam}
            self.add({**run, "limit_s": limit, **machine(sides)})

    def add(self, record: Record) -> None:
        self.records.append(record)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def build(self, side: str, flow: str, features: int) -> Record:
        return self.processes[side].ask(START, do="build", flow=flow, features=features)

    def flow(self, flow: str, features: int, works: Iterable[str], rows: Iterable[int]) -> None:
        """All operations of one flow in one dimension, on models built for them."""
        cells = [(work, n) for work in works for n in rows]
        if all((flow, features, work, n) in self.done for work, n in cells):
            return
        sides = {}
        for side in self.processes:
            reply = self.build(side, flow, features)
            if "parameters" in reply:
                sides[side] = reply["parameters"]
            elif not reply.get("missing", "").startswith(("the same", "no ")):
                print(f"{flow} d={features} {side}: {reply}", file=sys.stderr)
            self.add({"kind": "model", "side": side, "flow": flow, "features": features, **reply})
        for work, n in cells:
            if (flow, features, work, n) not in self.done:
                cell = {"flow": flow, "features": features, "work": work, "rows": n}
                self.add({"kind": "cell", **cell, "sides": self.cell(cell, list(sides))})
                print(summary(self.records[-1]), flush=True)

    def cell(self, cell: Record, sides: list[str]) -> dict[str, Record]:
        """Rounds of one operation: per side the medians of its bursts, or why there are none."""
        result: dict[str, Record] = {}
        command = {"do": "run", "work": cell["work"], "rows": cell["rows"]}
        bursts: dict[str, float] = {}
        for side in sides:
            kind = (side, cell["flow"], str(cell["features"]), cell["work"])
            if kind in self.slow:
                result[side] = {"note": f"> {self.limit:g} s"}
                continue
            compiles = side in ("flowjax", "rootflow-compiled")
            reply = self.processes[side].ask(
                START if compiles else self.limit, **command, seconds=0.0
            )
            first = reply.get("wall", [math.nan])[0]
            if compiles and "wall" in reply:
                reply = self.processes[side].ask(self.limit, **command, seconds=0.0)
            if "wall" not in reply:
                note = f"> {self.limit:g} s" if "timeout" in reply else reply.get("error", "?")
                result[side] = {"note": note}
                if "timeout" in reply:
                    self.slow.add(kind)
                if self.processes[side].child is None:
                    self.build(side, cell["flow"], cell["features"])
                continue
            result[side] = {"first_s": first, "wall": [], "cpu": [], "value": reply["value"]}
            bursts[side] = max(reply["wall"][0], BURST)
        total = sum(bursts.values())
        rounds = round(self.limit / total) if total else 0
        order = list(bursts)
        for k in range(min(max(rounds, ROUNDS[0]), ROUNDS[1]) if order else 0):
            for side in order[k % len(order) :] + order[: k % len(order)]:
                if "note" in result[side]:
                    continue
                reply = self.processes[side].ask(3 * self.limit, **command, seconds=BURST)
                if "wall" not in reply:
                    result[side] = {"note": reply.get("error", "too slow")}
                    if self.processes[side].child is None:
                        self.build(side, cell["flow"], cell["features"])
                    continue
                # The first call of a burst finds the caches full of another library's data.
                for clock in ("wall", "cpu"):
                    times = reply[clock][1:] or reply[clock]
                    result[side][clock].append(statistics.median(times))
        return result

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()


def machine(sides: Iterable[str]) -> Record:
    """Processor, Python and the versions of every side."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    found = {"python": platform.python_version()}
    for side in sides:
        found |= versions(side)
    return {"machine": f"{model}, {os.cpu_count()} cores", "versions": found}


def key_of(cell: Record) -> tuple[str, int, str, int]:
    return cell["flow"], cell["features"], cell["work"], cell["rows"]


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ratios(side: Record, ours: Record, clock: str) -> list[float]:
    """side / ours within each round that both finished."""
    return [a / b for a, b in zip(side.get(clock, []), ours.get(clock, []), strict=False)]


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def summary(cell: Record) -> str:
    parts = [
        f"{side} {number(1000 * statistics.median(s['wall']))}" if s.get("wall") else f"{side} -"
        for side, s in cell["sides"].items()
    ]
    flow, features, work, rows = key_of(cell)
    return f"{flow} d={features} {work} {rows}: {', '.join(parts)} ms"


def entry(side: Record, ours: Record | None, clock: str) -> str:
    """Median milliseconds, and how often ours as long with the range over the rounds."""
    if not side.get(clock):
        return str(side.get("note", "-"))
    text = number(1000 * statistics.median(side[clock]))
    found = ratios(side, ours, clock) if ours is not None and ours is not side else []
    if found:
        low, middle, high = min(found), statistics.median(found), max(found)
        text += f" ({number(middle)}x, {number(low)}-{number(high)})"
    return text


def render(records: list[Record], clock: str = "wall", against: str = "rootflow") -> str:
    """The whole run as Markdown: machine, parameter counts that differ, one table for each flow."""
    run = next(r for r in records if r["kind"] == "run")
    listed = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [
        f"{run['date']}, {run['machine']}; {listed}; Adam {run['adam']} in every torch library.",
        f"Milliseconds of {clock} time a call, in brackets divided by {against}'s "
        "(median and range over the rounds). `-`: the library lacks the flow.",
    ]
    cells = [r for r in records if r["kind"] == "cell"]
    for flow in [f for f in FLOWS if any(c["flow"] == f for c in cells)]:
        own = [c for c in cells if c["flow"] == flow]
        sides = [s for s in SIDES if any(s in c["sides"] for c in own)]
        lines += ["", f"### {TITLES[flow]}", "", f"| work | d | batch | {' | '.join(sides)} |"]
        lines.append("|---" * (len(sides) + 3) + "|")
        order = {work: k for k, work in enumerate(WORKS)}
        for c in sorted(own, key=lambda c: (order[c["work"]], c["features"], c["rows"])):
            ours = c["sides"].get(against)
            row = [entry(c["sides"].get(side, {}), ours, clock) for side in sides]
            place = f"{c['work']} | {c['features']} | {c['rows']}"
            lines.append(f"| {place} | {' | '.join(row)} |")
        lines += ["", *counts(records, flow, sides)]
    used = {s for c in cells for s in c["sides"] if SIDES[s].note}
    lines += [f"- {side}: {SIDES[side].note}." for side in SIDES if side in used]
    return "\n".join([*lines, "", *behind(cells, clock, against)]) + "\n"


def behind(cells: list[Record], clock: str, against: str) -> list[str]:
    """Every cell in which another library was the faster one, the largest gap first."""
    found = []
    for c in cells:
        ours = c["sides"].get(against, {})
        for side, theirs in c["sides"].items():
            both = ratios(theirs, ours, clock) if side.partition("-")[0] != against else []
            if both and statistics.median(both) < 1:
                flow, features, work, rows = key_of(c)
                place = f"{TITLES[flow]} d={features} batch {rows} {work}"
                found.append((statistics.median(both), f"{place}: {side}"))
    if not any(against in c["sides"] for c in cells):
        return []
    if not found:
        return [f"No cell in which a library is faster than {against}."]
    listed = "; ".join(f"{text} {ratio:.2f}x" for ratio, text in sorted(found))
    return [f"{len(found)} figures below 1x: {listed}."]


def counts(records: list[Record], flow: str, sides: list[str]) -> list[str]:
    """Trained numbers of each side; a masked weight counts whether or not it is used."""
    found: dict[int, dict[str, int]] = {}
    for r in records:
        if r["kind"] == "model" and r["flow"] == flow and "parameters" in r:
            found.setdefault(r["features"], {})[r["side"]] = r["parameters"]
    lines = []
    for features, by_side in sorted(found.items()):
        groups: dict[int, list[str]] = {}
        for side in [s for s in sides if s in by_side]:
            groups.setdefault(by_side[side], []).append(side)
        texts = [f"{count:,} ({', '.join(names)})" for count, names in sorted(groups.items())]
        lines += [f"Parameters, d={features}: {'; '.join(texts)}.", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="d = 6 and 63, batch 512 only")
    parser.add_argument("--flow", choices=FLOWS, action="append", help="only this flow (repeat)")
    parser.add_argument("--features", type=int, action="append", help="only this d (repeat)")
    parser.add_argument("--rows", type=int, action="append", help="only this batch (repeat)")
    parser.add_argument("--work", choices=WORKS, action="append", help="only this operation")
    parser.add_argument("--side", choices=SIDES, action="append", help="only these sides (repeat)")
    parser.add_argument("--adam", choices=ADAM, default="fused", help="in every torch library")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds a call may take")
    parser.add_argument("--core", type=int, help="of all processes (default: the last allowed)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="figures, a line each")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the Markdown here")
    parser.add_argument("--render", type=Path, metavar="FILE", help="only render a finished run")
    args = parser.parse_args()
    if args.render:
        records = read(args.render)
    else:
        if hasattr(os, "sched_setaffinity"):
            core = max(os.sched_getaffinity(0)) if args.core is None else args.core
            os.sched_setaffinity(0, {core})
        grid = QUICK if args.quick else GRID
        bench = Bench(args.side or DEFAULT_SIDES, args.adam, args.limit, args.json)
        try:
            for flow in args.flow or FLOWS:
                for features in args.features or grid["features"]:
                    bench.flow(flow, features, args.work or WORKS, args.rows or grid["rows"])
        finally:
            bench.stop()
        records = bench.records
    text = render(records, args.clock)
    if args.table:
        args.table.write_text(text, encoding="utf-8")
    Console().print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
