"""Networks and arrays that the tests of log-determinants share."""

import torch

from rootflow.lipschitz import LipschitzNet


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(features, hidden=(12, 9), *, seed=0, spread=1.0, **options):
    """A float64 network with all parameters moved away from their start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = LipschitzNet(features, hidden, **options).double()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p) * spread)
    return net
