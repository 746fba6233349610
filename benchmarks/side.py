"""What every side of the benchmarks shares: shapes, data, and one flow's three operations."""

from typing import Any, ClassVar

import numpy as np

TRANSFORMS, WIDTH, BINS, BOUND, RATE = 5, 128, 8, 5.0, 1e-3
HIDDEN = (WIDTH, WIDTH)
SMALL = (64, 64)
CLASSIC = ("maf", "realnvp", "nsf-ar", "nsf-coupling")
FLOWS = (*CLASSIC, "naf", "ffjord", "cpflow")
WORKS = ("train", "log_prob", "sample")
ADAM = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}


def rows_of(features: int, rows: int) -> np.ndarray:
    """The data of every side: correlated normal columns, variance 1."""
    noise = np.random.RandomState(0).standard_normal((rows, features))
    return ((noise + 0.5 * np.roll(noise, 1, axis=1)) / 1.25**0.5).astype(np.float32)


class Missing(Exception):
    """The library does not have this flow."""


class Side:
    """One library: ``build(flow, features)`` gives the model, the rest are its operations."""

    packages: ClassVar[tuple[str, ...]] = ()
    note: ClassVar[str] = ""
    flows: ClassVar[tuple[str, ...]] = CLASSIC

    def __init__(self, flow: str, features: int, adam: str) -> None:
        import torch

        torch.manual_seed(0)
        self.torch, self.features = torch, features
        self.model = self.build(flow, features)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=RATE, **ADAM[adam])

    def build(self, flow: str, d: int) -> Any:
        raise NotImplementedError

    def batch(self, rows: int) -> Any:
        return self.torch.from_numpy(rows_of(self.features, rows))

    def count(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def density(self, x: Any) -> Any:
        return self.model.log_prob(x)

    def draw(self, rows: int) -> Any:
        return self.model.sample((rows,))

    def train(self, x: Any) -> Any:
        self.model.train()
        self.optimizer.zero_grad()
        loss = -self.density(x).mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def log_prob(self, x: Any) -> Any:
        self.model.eval()
        with self.torch.no_grad():
            return self.density(x).mean()

    def sample(self, x: Any) -> Any:
        self.model.eval()
        with self.torch.no_grad():
            return self.draw(len(x)).mean()
