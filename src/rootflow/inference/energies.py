"""Targets with a formula and, all of them, exact draws and exact normalisers.

The energies of Rezende and Mohamed 2015 (arXiv:1505.05770, table 1), p(z) proportional to
exp(-U(z)): U1 is proper on the plane. U2, U3 and U4 do not confine z1 at all, so that their
integral over the plane is infinite; the paper draws them in the window from -4 to 4. Here their
support is that window in z1, where the density is exactly the one drawn, and every z2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import constraints

from .target import KnownTarget

__all__ = ["ENERGIES", "mixture"]

LOG_2PI = math.log(2 * math.pi)
WINDOW = 4.0  # z1 of energy2, energy3 and energy4 lies between -WINDOW and WINDOW


def normals(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.empty(n, d, dtype=torch.float64).normal_(generator=generator)


def uniforms(n: int, generator: torch.Generator) -> Tensor:
    return torch.empty(n, dtype=torch.float64).uniform_(generator=generator)


def w1(z1: Tensor) -> Tensor:
    """The wave that energy2, energy3 and energy4 follow."""
    return torch.sin(math.pi / 2 * z1)


def w2(z1: Tensor) -> Tensor:
    """How far the second branch of energy3 leaves the wave, around z1 = 1."""
    return 3 * torch.exp(-((z1 - 1) / 0.6).square() / 2)


def w3(z1: Tensor) -> Tensor:
    """How far the second branch of energy4 leaves the wave, beyond z1 = 1."""
    return 3 * torch.sigmoid((z1 - 1) / 0.3)


def two_bumps_on_a_ring(
    name: str,
    summary: str,
    radius: float,
    width: float,
    offset: float,
    bump: float,
    log_normaliser: float,
) -> KnownTarget:
    """((|z| - radius) / width)^2 / 2 - log of two Gaussian bumps of z1 at +-offset, sd ``bump``."""

    def bumps(z1: Tensor) -> Tensor:
        left, right = -((z1 + offset) / bump).square() / 2, -((z1 - offset) / bump).square() / 2
        return torch.logaddexp(left, right)

    def log_prob(z: Tensor) -> Tensor:
        length = (z.square().sum(-1) + 1e-300).sqrt()  # keeps its gradient at 0
        return bumps(z[..., 0]) - ((length - radius) / width).square() / 2

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        """Rejection: radius, then angle, each from a simple law above the right one."""
        reach = radius + 12 * width
        ceiling = float(bumps(torch.tensor(offset, dtype=torch.float64)))
        found, have = [], 0
        while have < n:
            r = radius + width * normals(4 * n + 16, 1, generator).squeeze(-1)
            angle = 2 * math.pi * uniforms(len(r), generator)
            z = r.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)
            chance = (r / reach).clamp(0, 1) * (bumps(z[:, 0]) - ceiling).exp()
            found.append(z[uniforms(len(r), generator) < chance])
            have += len(found[-1])
        return torch.cat(found)[:n]

    edge = radius + 9 * width
    return KnownTarget(
        log_prob, names=("z1", "z2"), name=name, summary=summary, sampler=sampler,
        log_normaliser=log_normaliser, box=((-edge, edge), (-edge, edge)),
        view=((-radius - 3, radius + 3), (-radius - 3, radius + 3)),
    )  # fmt: skip


def energy1() -> KnownTarget:
    """U1 = ((|z| - 2) / 0.4)^2 / 2 - log(exp(-((z1 - 2) / 0.6)^2 / 2) + the same at -2)."""
    return two_bumps_on_a_ring(
        "energy1", "U1: two arcs of a ring", 2, 0.4, 2, 0.6, 1.87750162610971
    )


def ring() -> KnownTarget:
    """The density that the first PyTorch code for planar flows showed: U1 twice as large."""
    return two_bumps_on_a_ring(
        "ring", "two long arcs of a ring of radius 4", 4, 0.4, 2, 0.8, 2.31328938254384
    )


def branches(
    name: str, summary: str, widths: tuple[float, ...], *leave: Callable[[Tensor], Tensor]
) -> KnownTarget:
    """Curves z2 = w1(z1) - leave(z1) in the window, blurred along z2 by Gaussians ``widths``."""

    def centres(z1: Tensor) -> Tensor:
        wave = w1(z1)
        return torch.stack([wave, *(wave - f(z1) for f in leave)], -1)

    def log_prob(z: Tensor) -> Tensor:
        sd = z.new_tensor(widths)
        energy = ((z[..., 1:] - centres(z[..., 0])) / sd).square() / 2
        return torch.logsumexp(-energy, -1)

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        sd = torch.tensor(widths, dtype=torch.float64)
        z1 = WINDOW * (2 * uniforms(n, generator) - 1)
        which = torch.multinomial(sd, n, replacement=True, generator=generator)
        z2 = centres(z1)[torch.arange(n), which]
        z2 = z2 + sd[which] * normals(n, 1, generator).squeeze(-1)
        return torch.stack([z1, z2], -1)

    # For each z1 the integral over z2 is that of Gaussians, wherever they lie.
    log_normaliser = math.log(2 * WINDOW * sum(widths)) + LOG_2PI / 2
    window = constraints.interval(-WINDOW, WINDOW)  # type: ignore[no-untyped-call]
    return KnownTarget(
        log_prob, names=("z1", "z2"), support={"z1": window},
        name=name, summary=summary, sampler=sampler, log_normaliser=log_normaliser,
        box=((-21.0, 21.0), (-6.5, 4.5)), view=((-WINDOW, WINDOW), (-WINDOW, WINDOW)),
    )  # fmt: skip


def energy2() -> KnownTarget:
    """U2 = ((z2 - w1) / 0.4)^2 / 2."""
    return branches("energy2", "U2: a wave", (0.4,))


def energy3() -> KnownTarget:
    """U3 = -log(exp(-((z2 - w1) / 0.35)^2 / 2) + exp(-((z2 - w1 + w2) / 0.35)^2 / 2))."""
    return branches("energy3", "U3: a wave that splits and joins", (0.35, 0.35), w2)


def energy4() -> KnownTarget:
    """U4 = -log(exp(-((z2 - w1) / 0.4)^2 / 2) + exp(-((z2 - w1 + w3) / 0.35)^2 / 2))."""
    return branches("energy4", "U4: a wave that splits for good", (0.4, 0.35), w3)


def banana() -> KnownTarget:
    """Haario, Saksman and Tamminen 1999: x1 ~ normal(0, 10), x2 ~ normal(3 - 0.03 x1^2, 1)."""

    def log_prob(x: Tensor) -> Tensor:
        bend = x[..., 1] - 3 + 0.03 * x[..., 0].square()
        return -(x[..., 0] / 10).square() / 2 - bend.square() / 2 - math.log(10) - LOG_2PI

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        wide, narrow = (normals(n, 2, generator) * torch.tensor([10.0, 1.0])).unbind(-1)
        return torch.stack([wide, narrow + 3 - 0.03 * wide.square()], -1)

    return KnownTarget(
        log_prob, names=("x1", "x2"), name="banana", summary="a bent Gaussian, scales 10 and 1",
        sampler=sampler, log_normaliser=0.0, box=((-65.0, 65.0), (-130.0, 12.0)),
        view=((-30.0, 30.0), (-30.0, 10.0)),
    )  # fmt: skip


def funnel() -> KnownTarget:
    """Neal 2003 (Annals of Statistics 31:705): v ~ normal(0, 3), nine x ~ normal(0, exp(v / 2))."""

    def log_prob(p: dict[str, Tensor]) -> Tensor:
        v, x = p["v"], p["x"]
        scaled = (x * torch.exp(-v / 2).unsqueeze(-1)).square().sum(-1)
        return -(v / 3).square() / 2 - math.log(3) - (scaled + 9 * v) / 2 - 5 * LOG_2PI

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        z = normals(n, 10, generator)
        v = 3 * z[:, :1]
        return torch.cat([v, z[:, 1:] * torch.exp(v / 2)], -1)

    return KnownTarget(
        log_prob, {"v": (), "x": 9}, name="funnel", sampler=sampler, log_normaliser=0.0,
        summary="scales of nine numbers range over e^9, ten dimensions",
    )  # fmt: skip


def mixture(
    name: str, summary: str, means: Tensor, sd: float, weights: Tensor | None = None
) -> KnownTarget:
    """Round Gaussians of one sd at ``means`` ``(modes, d)``; weights ``(modes,)`` add up to one."""
    means = means.double()
    modes, d = means.shape
    share = means.new_full((modes,), 1 / modes) if weights is None else weights.double()
    constant = share.log() - d * (math.log(sd) + LOG_2PI / 2)

    def log_prob(x: Tensor) -> Tensor:
        off = (x.unsqueeze(-2) - means) / sd
        return torch.logsumexp(constant - off.square().sum(-1) / 2, -1)

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(share, n, replacement=True, generator=generator)
        return means[which] + sd * normals(n, d, generator)

    box = None
    if d == 2:
        low, high = means.amin(0) - 7 * sd, means.amax(0) + 7 * sd
        box = ((float(low[0]), float(high[0])), (float(low[1]), float(high[1])))
    return KnownTarget(
        log_prob, d, name=name, summary=summary, sampler=sampler, log_normaliser=0.0, box=box
    )


def two_modes() -> KnownTarget:
    """Twelve sds apart: a fit that starts in one hardly ever hears of the other."""
    means = torch.tensor([[-6.0, 0.0], [6.0, 0.0]])
    return mixture("two-modes", "two far modes of weights 0.7 and 0.3", means, 1.0,
                   torch.tensor([0.7, 0.3]))  # fmt: skip


def eight_modes() -> KnownTarget:
    """Eight Gaussians of sd 0.5 on a circle of radius 4."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = 4 * torch.stack([angle.cos(), angle.sin()], -1)
    return mixture("eight-modes", "eight modes on a circle", means, 0.5)


def modes_16d() -> KnownTarget:
    """Four modes in sixteen dimensions, each pair 5.7 sds apart."""
    means = torch.zeros(4, 16)
    means[torch.arange(4), torch.arange(4)] = 4.0
    return mixture("modes-16d", "four modes in 16 dimensions", means, 1.0)


_ALL = (energy1, energy2, energy3, energy4, ring, banana, funnel, two_modes, eight_modes, modes_16d)
ENERGIES: dict[str, Callable[[], KnownTarget]] = {
    make.__name__.replace("_", "-"): make for make in _ALL
}
