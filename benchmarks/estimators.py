"""Held-out log-density of scikit-learn's density estimators and of FlowDensity on the galaxies.

    python benchmarks/estimators.py [--rows 5000] [--flows nsf-coupling,nsf-ar,maf]

The mixture's components and the kernel's bandwidth are those that score best on 1,000 rows of their
own; the flows keep their defaults. All scores are of the same 2,000 further rows.
"""

import argparse
import time

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity

import rootflow
from rootflow.data import read_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--flows", default="nsf-coupling,nsf-ar,maf")
    arguments = parser.parse_args()
    rows = read_table("galaxies").values
    train, chosen, test = rows[: arguments.rows], rows[40_000:41_000], rows[50_000:52_000]
    scale = train.std(0)  # the kernel is round; the Jacobian of the scaling is counted below
    grid = Table("estimator", "nats per row", "standard error", "fit, processor s")

    def add(name, fit, scores, least=0.0):
        start = time.process_time()
        fitted = fit()
        seconds = time.process_time() - start
        values = scores(fitted) - least
        error = values.std() / len(values) ** 0.5
        grid.add_row(name, f"{values.mean():.3f}", f"{error:.3f}", f"{seconds:.1f}")

    def mixture():
        fits = [
            GaussianMixture(k, random_state=0, max_iter=500, reg_covar=1e-8).fit(train)
            for k in (5, 10, 20, 40)
        ]
        return max(fits, key=lambda fitted: fitted.score(chosen))

    def kernel():
        fits = [KernelDensity(bandwidth=h).fit(train / scale) for h in (0.03, 0.05, 0.1, 0.2)]
        return max(fits, key=lambda fitted: fitted.score(chosen / scale))

    add("KernelDensity, best of 4 bandwidths", kernel,
        lambda fitted: fitted.score_samples(test / scale), np.log(scale).sum())  # fmt: skip
    add("GaussianMixture, best of 5 to 40", mixture, lambda fitted: fitted.score_samples(test))
    for name in arguments.flows.split(","):
        density = rootflow.FlowDensity(name, random_state=0)
        add(f"FlowDensity({name!r})", lambda d=density: d.fit(train),
            lambda fitted: fitted.score_samples(test))  # fmt: skip
    Console().print(grid)


if __name__ == "__main__":
    main()
