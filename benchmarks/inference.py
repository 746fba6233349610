"""Variational inference beside fitted Gaussians, and beside Pyro and zuko by time to a given ELBO.

    python benchmarks/inference.py posteriors [--targets gp_regr,arK] [--steps 400] [--seed 0]
    python benchmarks/inference.py race [--targets eight_schools_noncentered] [--seconds 30]
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import rootflow
from rootflow import inference
from rootflow.inference.examine import examine
from rootflow.inference.gaussian import fit_gaussian
from rootflow.inference.posteriors import POSTERIORS
from rootflow.transforms import ActNorm, Compose, Standardise

RACE = "eight_schools_noncentered,arK,garch11"
BEHIND = (0.2, 0.05)  # nats below the ELBO that rootflow ends with: what all have to reach
FRESH = 4000  # draws of each ELBO
EVERY = 0.2  # seconds of processor time between two of a peer's evaluations


def gaussian(target: inference.Target, seed: int, *, diagonal: bool) -> rootflow.Flow:
    """A Gaussian over the unconstrained parameters, at the best place of the first stage.

    The diagonal one has the conditional sds: what reverse KL finds where the target is Gaussian.
    """
    generator = torch.Generator().manual_seed(seed)
    found = fit_gaussian(target, examine(target, generator, torch.device("cpu")), generator)
    covariance = found.covariance
    if diagonal:
        covariance = torch.linalg.inv(covariance).diagonal().reciprocal().diag()
    place = Standardise(target.free_features)
    place.place(found.mean, covariance)
    # in the first one's coordinates ActNorm is diagonal, so it never leaves the family
    return rootflow.Flow(Compose([place, ActNorm(target.free_features)])).double()


def posteriors(targets: list[str], steps: int, seed: int) -> Iterator[dict[str, object]]:
    """Mean-field, full-rank, and the default flow: quality against the reference draws."""
    for name in targets:
        target = inference.target(name)
        flows: dict[str, Callable[[], rootflow.Flow | str]] = {
            "mean-field": partial(gaussian, target, seed, diagonal=True),
            "full-rank": partial(gaussian, target, seed, diagonal=False),
            "nsf-coupling": lambda: "nsf-coupling",
        }
        for kind, make in flows.items():
            begin = time.process_time()
            lr = {} if kind == "nsf-coupling" else {"lr": 1e-2, "anneal": 0.0}
            found = inference.fit(target, make(), steps=steps, seed=seed, **lr)
            seconds = time.process_time() - begin
            compared = found.compare(inference.reference(name))
            shift, ratio = compared.worst()
            yield {
                "target": name, "q": kind, "k-hat": found.khat, "elbo": found.elbo.value,
                "se": found.elbo.se, "worst mean, sd": abs(shift.shift),
                "worst sd ratio": ratio.sd_ratio, "verdict": found.verdict(compared).level,
                "steps": 0 if found.trace is None else found.trace.steps, "cpu s": seconds,
            }  # fmt: skip


Step = Callable[[], None]
Evaluate = Callable[[], Tensor]


def pyro_side(target: inference.Target, particles: int, lr: float) -> tuple[Step, Evaluate]:
    """AutoIAFNormal of two transforms, its density of the unconstrained parameters as a factor."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoIAFNormal

    k = target.free_features

    def model() -> None:
        flat = dist.Normal(torch.zeros(k), 1.0).to_event(1).mask(False)  # counts as nothing
        u = pyro.sample("u", flat)
        value = target.unconstrained_log_prob(u.reshape(-1, k))
        pyro.factor("density", value.reshape(u.shape[:-1]).to(u))

    pyro.clear_param_store()
    guide = AutoIAFNormal(model, hidden_dim=[64, 64], num_transforms=2)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": lr, "clip_norm": 10.0}), elbo)

    def evaluate() -> Tensor:
        posterior = guide.get_posterior()
        u = posterior.rsample((FRESH,))
        return target.unconstrained_log_prob(u) - posterior.log_prob(u).double()

    return svi.step, evaluate


def zuko_side(target: inference.Target, particles: int, lr: float) -> tuple[Step, Evaluate]:
    """A neural spline flow turned around, so that it samples in one pass, and Adam on the ELBO."""
    import zuko

    spline = zuko.flows.NSF(target.free_features, transforms=3, hidden_features=(64, 64))
    flow = zuko.flows.Flow(spline.transform.inv, spline.base)
    adam = torch.optim.Adam(flow.parameters(), lr=lr)

    def ratios(n: int) -> Tensor:
        u, log_q = flow().rsample_and_log_prob((n,))
        return target.unconstrained_log_prob(u).to(log_q) - log_q

    def step() -> None:
        loss = -ratios(particles).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in flow.parameters()):
            adam.step()

    return step, lambda: ratios(FRESH).double()


PEERS = {"pyro AutoIAFNormal": pyro_side, "zuko NSF": zuko_side}


def race(
    targets: list[str], steps: int, seconds: float, seed: int
) -> Iterator[dict[str, object]]:
    """Processor time until the ELBO over fresh draws is as near to rootflow's last as ``BEHIND``.

    rootflow's time is that of all it does, its first stage and its evaluations; a peer's is that of
    its steps alone. Each peer runs with every learning rate, and the best time of each counts.
    """
    for name in targets:
        target = inference.target(name)
        begin, track = time.process_time(), []

        def note(record: dict[str, object], begin: float = begin, track: list = track) -> None:
            track.append((time.process_time() - begin, record["elbo"]))

        ours = inference.fit(target, steps=steps, seed=seed, on_record=note)
        goals = [ours.elbo.value - behind for behind in BEHIND]
        yield {
            "target": name, "side": "rootflow", "elbo": ours.elbo.value, "se": ours.elbo.se,
            **{f"s to -{b}": first(track, goal) for b, goal in zip(BEHIND, goals, strict=True)},
            "cpu s": time.process_time() - begin,
        }  # fmt: skip
        for (side, make), lr in ((p, lr) for p in PEERS.items() for lr in (1e-2, 2e-3)):
            torch.manual_seed(seed)
            step, evaluate = make(target, 128, lr)
            spent, track, last = 0.0, [], (float("nan"), float("nan"))
            while spent < seconds and first(track, goals[-1]) is None:
                begin = time.process_time()
                while time.process_time() - begin < EVERY:
                    step()
                spent += time.process_time() - begin
                with torch.no_grad():
                    ratios = evaluate()
                last = float(ratios.mean()), float(ratios.std()) / len(ratios) ** 0.5
                track.append((spent, last[0]))
            yield {
                "target": name, "side": f"{side}, lr {lr:g}", "elbo": last[0], "se": last[1],
                **{f"s to -{b}": first(track, goal) for b, goal in zip(BEHIND, goals, strict=True)},
                "cpu s": spent,
            }  # fmt: skip


def first(track: list, goal: float) -> float | None:
    """The first time at which the ELBO was that high."""
    return next((at for at, elbo in track if elbo is not None and elbo >= goal), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", choices=("posteriors", "race"))
    parser.add_argument("--targets", help="comma-separated; default: all seven, or three")
    parser.add_argument("--steps", type=int, default=400, help="of each of rootflow's fits")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each peer in the race")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1)])  # the first of a process imports torch's compiler: a second
    names = given.targets or (RACE if given.work == "race" else ",".join(POSTERIORS))
    if given.work == "race":
        rows = race(names.split(","), given.steps, given.seconds, given.seed)
    else:
        rows = posteriors(names.split(","), given.steps, given.seed)
    for row in rows:
        print(json.dumps(row, default=float), flush=True)


if __name__ == "__main__":
    main()
