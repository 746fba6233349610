"""The flows of seven libraries behind one interface, and the worker process that runs one of them.

    python benchmarks/peers.py SIDE

reads one JSON command a line and answers one JSON object a line: ``build`` a flow, then ``run`` one
of its operations for a while. ``zoo.py`` starts such a process for each library, so that threads,
allocators and global settings of one cannot disturb another.

Every flow has five transforms, conditioners with two hidden layers of 128, eight bins on [-5, 5]
and a reversal (or what the library has in its place) between the transforms, in float32. Where a
library's ready-made flow has other networks or additional layers, the same flow is put together
from the library's own layers. Continuous and convex potential flows have two hidden layers of 64;
a continuous flow is one field.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from peers_published import Published, Torchdiffeq, TorchdiffeqRk4
from side import (
    BINS,
    BOUND,
    CLASSIC,
    FLOWS,
    HIDDEN,
    RATE,
    SMALL,
    TRANSFORMS,
    WIDTH,
    Missing,
    Side,
    rows_of,
)  # fmt: skip


class Rootflow(Side):
    packages = ("torch",)
    flows = FLOWS

    def build(self, flow: str, d: int) -> Any:
        from rootflow.zoo import ZOO
        from rootflow.zoo import flow as make

        if flow not in ZOO:
            raise Missing(f"{flow} is not in the registry")
        wanted = {
            "blocks": TRANSFORMS, "hidden": HIDDEN, "bins": BINS, "interval": BOUND,
            "tails": "linear", "linear": "reverse", "actnorm": False,
        }  # fmt: skip
        if flow in ("ffjord", "cpflow"):
            wanted |= {"hidden": SMALL}
        if flow == "ffjord":
            wanted |= {"blocks": 1, "steps": 8}
        known = ZOO[flow].options()
        return make(flow, d, **{key: value for key, value in wanted.items() if key in known})


class RootflowCompiled(Rootflow):
    """The same through torch.compile, in both directions."""

    flows = CLASSIC

    def __init__(self, flow: str, features: int, adam: str) -> None:
        super().__init__(flow, features, adam)
        compiled = self.torch.compile(self.model.log_prob, fullgraph=True)
        inverse = self.torch.compile(self.model.inverse)
        self.density = compiled  # type: ignore[method-assign]
        self.draw = lambda rows: inverse(self.model.base.sample((rows,)))[0]  # type: ignore[method-assign]


class Zuko(Side):
    packages = ("zuko", "torch")
    note = (
        "couplings alternate a mask; the spline coupling is NSF(passes=2), as documented; naf has "
        "monotonic networks of 2 x 64 fed with 16 signals, and bisects on [-10, 10]; ffjord is CNF "
        "as it stands: dopri5 at 1e-5, exact trace by automatic differentiation"
    )
    flows = (*CLASSIC, "naf", "ffjord")

    def build(self, flow: str, d: int) -> Any:
        import zuko.flows as zf

        nets = {"transforms": TRANSFORMS, "hidden_features": HIDDEN}
        if flow == "maf":
            return zf.MAF(d, **nets)
        if flow == "realnvp":
            return zf.RealNVP(d, **nets)
        if flow == "naf":
            return zf.NAF(d, **nets)
        if flow == "ffjord":
            return zf.CNF(d, hidden_features=SMALL)
        return zf.NSF(d, bins=BINS, **nets, **({"passes": 2} if flow == "nsf-coupling" else {}))

    def density(self, x: Any) -> Any:
        return self.model().log_prob(x)

    def draw(self, rows: int) -> Any:
        return self.model().sample((rows,))


class ZukoParts(Zuko):
    """zuko's splines in its own coupling layer, which computes only what it transforms."""

    note = "spline coupling put together from zuko's layers"
    flows = CLASSIC

    def build(self, flow: str, d: int) -> Any:
        from zuko.flows import RealNVP
        from zuko.transforms import MonotonicRQSTransform

        if flow != "nsf-coupling":
            raise Missing("the same as zuko")
        shapes = [(BINS,), (BINS,), (BINS - 1,)]
        spline = {"univariate": MonotonicRQSTransform, "shapes": shapes}
        return RealNVP(d, transforms=TRANSFORMS, hidden_features=HIDDEN, **spline)


class Nflows(Side):
    packages = ("nflows", "torch")

    def build(self, flow: str, d: int) -> Any:
        import torch
        from nflows import transforms as nt
        from nflows.distributions import StandardNormal
        from nflows.flows import Flow
        from nflows.nn.nets import MLP

        class Net(MLP):
            def forward(self, x: Any, context: Any = None) -> Any:
                return super().forward(x)

        def net(inputs: int, outputs: int) -> Any:
            return Net([inputs], [outputs], HIDDEN)

        # Its masked networks have a first hidden layer and then num_blocks more.
        masked = {"hidden_features": WIDTH, "num_blocks": 1, "use_residual_blocks": False}
        spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
        half = {"mask": (torch.arange(d) >= d // 2).int(), "transform_net_create_fn": net}
        layers: dict[str, Callable[[], Any]] = {
            "maf": lambda: nt.MaskedAffineAutoregressiveTransform(d, **masked),
            "realnvp": lambda: nt.AffineCouplingTransform(**half),
            "nsf-ar": lambda: nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                d, **masked, **spline
            ),
            "nsf-coupling": lambda: nt.PiecewiseRationalQuadraticCouplingTransform(
                **half, **spline
            ),
        }
        chain = []
        for _ in range(TRANSFORMS):
            chain += [nt.ReversePermutation(d), layers[flow]()]
        return Flow(nt.CompositeTransform(chain), StandardNormal([d]))

    def draw(self, rows: int) -> Any:
        return self.model.sample(rows)


class Normflows(Side):
    packages = ("normflows", "torch")
    note = (
        "maf is fast in sampling and slow in density, the library's direction; its masked networks "
        "have no activation after the first layer; sampling computes the density too; random "
        "permutations (affine), alternating masks (spline coupling)"
    )

    def build(self, flow: str, d: int) -> Any:
        import normflows as nf
        from normflows.flows.neural_spline.autoregressive import (
            MaskedPiecewiseRationalQuadraticAutoregressive as MaskedSpline,
        )
        from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
        from normflows.utils.masks import create_alternating_binary_mask as alternating

        class Net(nf.nets.MLP):
            hidden_features = WIDTH  # by which its coupling scales the parameters of the bins

            def forward(self, x: Any, context: Any = None) -> Any:
                return super().forward(x)

        def net(inputs: int, outputs: int) -> Any:
            return Net([inputs, *HIDDEN, outputs])

        masked = {"num_blocks": 1, "use_residual_blocks": False}
        spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}

        def layer(k: int) -> list[Any]:
            if flow == "maf":
                return [self.direct(d, masked), nf.flows.Permute(d)]
            if flow == "realnvp":
                halves = net((d + 1) // 2, 2 * (d // 2))
                return [nf.flows.AffineCouplingBlock(halves), nf.flows.Permute(d)]
            if flow == "nsf-ar":
                spline_layer = MaskedSpline(d, WIDTH, **masked, **spline)
                return [nf.flows.Reverse(spline_layer), nf.flows.Permute(d)]
            mask = alternating(d, even=bool(k % 2))
            return [nf.flows.Reverse(PiecewiseRationalQuadraticCoupling(mask, net, **spline))]

        chain = [part for k in range(TRANSFORMS) for part in layer(k)]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(d, trainable=False), chain)

    def direct(self, d: int, masked: dict[str, Any]) -> Any:
        from normflows.flows import MaskedAffineAutoregressive

        return MaskedAffineAutoregressive(d, WIDTH, **masked)

    def draw(self, rows: int) -> Any:
        return self.model.sample(rows)[0]


class NormflowsReversed(Normflows):
    """normflows' masked layers inside its Reverse, which makes density the fast direction."""

    note = "maf with the layers turned round, so that density is the fast direction"

    def build(self, flow: str, d: int) -> Any:
        if flow != "maf":
            raise Missing("the same as normflows")
        return super().build(flow, d)

    def direct(self, d: int, masked: dict[str, Any]) -> Any:
        from normflows.flows import Reverse

        return Reverse(super().direct(d, masked))


class Torchflows(Side):
    packages = ("torchflows", "torch")
    note = "masked networks always use tanh; its two elementwise maps and ActNorms are left out"

    def build(self, flow: str, d: int) -> Any:
        from torch import nn
        from torchflows.bijections.base import BijectiveComposition
        from torchflows.bijections.finite.autoregressive import layers as tl
        from torchflows.bijections.finite.matrix.permutation import ReversePermutationMatrix
        from torchflows.flows import Flow

        kinds = {
            "maf": tl.AffineForwardMaskedAutoregressive, "realnvp": tl.AffineCoupling,
            "nsf-ar": tl.RQSForwardMaskedAutoregressive, "nsf-coupling": tl.RQSCoupling,
        }  # fmt: skip
        options: dict[str, Any] = {"conditioner_kwargs": {"n_hidden": WIDTH, "n_layers": 3}}
        if flow in ("realnvp", "nsf-coupling"):
            options["conditioner_kwargs"]["nonlinearity"] = nn.ReLU
        if flow.startswith("nsf"):
            options["transformer_kwargs"] = {"n_bins": BINS, "boundary": BOUND}
        chain = []
        for _ in range(TRANSFORMS):
            chain += [ReversePermutationMatrix((d,)), kinds[flow]((d,), **options)]
        return Flow(BijectiveComposition(chain))


class Flowjax(Side):
    """flowjax compiled by XLA; parameters travel as a flat list, the cheapest call there is."""

    packages = ("flowjax", "jax", "optax")
    note = "compiled; random permutations (d > 2); the two outer slopes of a spline are learned"

    def __init__(self, flow: str, features: int, adam: str) -> None:
        import equinox as eqx
        import jax
        import optax
        import paramax

        self.features, self.key = features, jax.random.key(0)
        self.put: Callable[..., Any] = jax.numpy.asarray
        trained, static = eqx.partition(
            self.build(flow, features),
            eqx.is_inexact_array,
            is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
        )
        self.weights, structure = jax.tree.flatten(trained)
        optimizer = optax.adam(RATE)
        self.state = optimizer.init(self.weights)

        def model(weights: Any) -> Any:
            return paramax.unwrap(eqx.combine(jax.tree.unflatten(structure, weights), static))

        def loss(weights: Any, x: Any) -> Any:
            return -model(weights).log_prob(x).mean()

        def step(weights: Any, state: Any, x: Any) -> Any:
            value, gradient = jax.value_and_grad(loss)(weights, x)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(weights, updates), state, value

        def draw(weights: Any, key: Any, rows: int) -> Any:
            return model(weights).sample(key, (rows,)).mean()

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.mean = jax.jit(lambda weights, x: -loss(weights, x))
        self.drawn = jax.jit(draw, static_argnums=2)

    def build(self, flow: str, d: int) -> Any:
        import jax
        from flowjax import flows
        from flowjax.bijections import RationalQuadraticSpline
        from flowjax.distributions import Normal

        # It counts inner knots: one fewer than bins.
        spline = RationalQuadraticSpline(knots=BINS - 1, interval=BOUND)
        kind = flows.coupling_flow
        if flow in ("maf", "nsf-ar"):
            kind = flows.masked_autoregressive_flow
        return kind(
            jax.random.key(0),
            base_dist=Normal(jax.numpy.zeros(d)),
            transformer=spline if flow.startswith("nsf") else None,
            flow_layers=TRANSFORMS, nn_width=WIDTH, nn_depth=len(HIDDEN),
        )  # fmt: skip

    def batch(self, rows: int) -> Any:
        return self.put(rows_of(self.features, rows))

    def count(self) -> int:
        return sum(w.size for w in self.weights)

    def train(self, x: Any) -> Any:
        self.weights, self.state, value = self.step(self.weights, self.state, x)
        return value.block_until_ready()

    def log_prob(self, x: Any) -> Any:
        return self.mean(self.weights, x).block_until_ready()

    def sample(self, x: Any) -> Any:
        return self.drawn(self.weights, self.key, len(x)).block_until_ready()


SIDES: dict[str, type[Side]] = {
    "rootflow": Rootflow,
    "rootflow-compiled": RootflowCompiled,
    "zuko": Zuko,
    "zuko-parts": ZukoParts,
    "nflows": Nflows,
    "normflows": Normflows,
    "normflows-reversed": NormflowsReversed,
    "torchflows": Torchflows,
    "torchdiffeq": Torchdiffeq,
    "torchdiffeq-rk4": TorchdiffeqRk4,
    "cp-flow": Published,
    "flowjax": Flowjax,
}


def versions(side: str) -> dict[str, str]:
    """Versions of what the side needs, as far as it is installed."""
    found = {}
    for name in SIDES[side].packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Worker:
    """One side's current flow and its batches."""

    def __init__(self, side: str, adam: str) -> None:
        self.kind, self.adam = SIDES[side], adam
        self.side: Side | None = None
        self.batches: dict[int, Any] = {}
        if side != "flowjax":
            import torch

            torch.set_num_threads(1)

    def build(self, flow: str, features: int) -> dict[str, Any]:
        if flow not in self.kind.flows:
            raise Missing(f"no {flow}")
        self.side, self.batches = self.kind(flow, features, self.adam), {}
        return {"parameters": int(self.side.count())}

    def run(self, work: str, rows: int, seconds: float) -> dict[str, Any]:
        """Call ``work`` at least once, for ``seconds``; wall and CPU time of every call."""
        if self.side is None:
            raise RuntimeError("build comes first")
        if rows not in self.batches:
            self.batches[rows] = self.side.batch(rows)
        x, call = self.batches[rows], getattr(self.side, work)
        wall, cpu, value = [], [], 0.0
        start = time.perf_counter()
        while not wall or time.perf_counter() - start < seconds:
            begin, begin_cpu = time.perf_counter(), time.process_time()
            value = call(x)
            wall.append(time.perf_counter() - begin)
            cpu.append(time.process_time() - begin_cpu)
        return {"wall": wall, "cpu": cpu, "value": float(value)}


def main() -> None:
    # Libraries may print; only answers may reach the other end of the pipe.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "fused")
    for line in sys.stdin:
        command = json.loads(line)
        action = command.pop("do")
        try:
            reply = {"build": worker.build, "run": worker.run}[action](**command)
        except (Missing, ModuleNotFoundError) as error:
            reply = {"missing": str(error)}
        except Exception as error:  # a peer may fail in any way, and that is a result
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
