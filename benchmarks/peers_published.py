"""FFJORD on plain torchdiffeq, and convex potential flows as published, for ``peers.py``."""

import importlib
import itertools
import os
import sys
from typing import Any, ClassVar

from side import SMALL, TRANSFORMS, Missing, Side


class Torchdiffeq(Side):
    """FFJORD as published: dopri5 and the adjoint at 1e-5, trace by one random probe in training.

    Its field is the one of rootflow: tanh, time in every layer. The density is exact in log_prob.
    """

    packages = ("torchdiffeq", "torch")
    note = "plain FFJORD on torchdiffeq: dopri5 and adjoint at 1e-5, one probe while training"
    flows = ("ffjord",)
    options: ClassVar[dict[str, Any]] = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5}
    adjoint = True

    def build(self, flow: str, d: int) -> Any:
        import torch
        from torch import nn

        class Field(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                widths = [d, *SMALL, d]
                pairs = itertools.pairwise(widths)
                self.layers = nn.ModuleList(nn.Linear(a + 1, b) for a, b in pairs)
                self.probe: Any = None

            def velocity(self, t: Any, x: Any) -> Any:
                for k, layer in enumerate(self.layers):
                    x = layer(torch.cat([x, t.expand(len(x), 1)], 1))
                    x = torch.tanh(x) if k + 1 < len(self.layers) else x
                return x

            def forward(self, t: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
                with torch.enable_grad():
                    x = state[0].requires_grad_()
                    v = self.velocity(t, x)
                    graph = {"create_graph": self.training, "retain_graph": True}
                    if self.probe is not None:
                        (pulled,) = torch.autograd.grad(v, x, self.probe, **graph)
                        return v, (pulled * self.probe).sum(1)
                    pulled = [torch.autograd.grad(v[:, i].sum(), x, **graph)[0] for i in range(d)]
                    return v, sum(p[:, i] for i, p in enumerate(pulled))

        return Field()

    def solve(self, x: Any, times: tuple[float, float]) -> tuple[Any, Any]:
        import torchdiffeq

        field, torch = self.model, self.torch
        field.probe = torch.randn_like(x).sign() if field.training else None
        solve = torchdiffeq.odeint_adjoint if self.adjoint else torchdiffeq.odeint
        start = (x, x.new_zeros(len(x)))
        z, trace = solve(field, start, torch.tensor(times), **self.options)
        return z[-1], trace[-1]

    def density(self, x: Any) -> Any:
        z, log_det = self.solve(x, (0.0, 1.0))
        return self.torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + log_det

    def draw(self, rows: int) -> Any:
        return self.solve(self.torch.randn(rows, self.features), (1.0, 0.0))[0]


class TorchdiffeqRk4(Torchdiffeq):
    """The same with rootflow's eight steps of rk4 and the gradient of these steps."""

    note = "the same with eight steps of rk4, as rootflow, and their direct gradient"
    options: ClassVar[dict[str, Any]] = {"method": "rk4", "options": {"step_size": 0.125}}
    adjoint = False


class Published(Side):
    """Convex potential flows by the code of their authors, from the clone that CP_FLOW names."""

    packages = ("torch",)
    note = (
        "github.com/CW-Huang/CP-Flow: ICNN2 of two layers of 64 without its ActNorms; random "
        "gradient of log_det while training, exact in log_prob, L-BFGS over the batch to sample"
    )
    flows = ("cpflow",)

    def build(self, flow: str, d: int) -> Any:
        if "CP_FLOW" not in os.environ:
            raise Missing("no clone: CP_FLOW names none")
        sys.path.insert(0, os.environ["CP_FLOW"])
        flows, icnn = (importlib.import_module(f"lib.{name}") for name in ("flows", "icnn"))

        def block() -> Any:
            net = icnn.ICNN2(d, SMALL[0], len(SMALL))
            for k in range(len(SMALL)):
                net.actnorms[k] = self.torch.nn.Identity()
            net.actnorm0 = self.torch.nn.Identity()
            return flows.DeepConvexFlow(net, d, no_bruteforce=False)

        return self.torch.nn.ModuleList(block() for _ in range(TRANSFORMS))

    def density(self, x: Any) -> Any:
        total = 0.0
        for block in self.model:
            x, total = block.forward_transform(x.detach() if not block.training else x, total)
        return self.torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1) + total

    def draw(self, rows: int) -> Any:
        x = self.torch.randn(rows, self.features)
        with self.torch.enable_grad():
            for block in reversed(self.model):
                x = block.reverse(x).detach()
        return x
