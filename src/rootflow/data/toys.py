"""Eight two-dimensional densities to learn, with samples, exact log-densities and true entropies.

Every toy is a population density: fresh independent draws with uniform angles and fair labels, so
that a held-out mean of ``-log_prob`` cannot fall below ``entropy()`` except by noise. The formulas
are those of the toy sets of Grathwohl et al. 2019 (FFJORD, arXiv:1810.01367), reused by the
residual and implicit flow papers. Densities are closed forms or one-dimensional quadratures with
relative errors below 1e-8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.special import erfc, log_ndtr

__all__ = ["TOYS", "Toy"]


class Draws:
    """n independent draws at a time, in float64, from one generator."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.generator = generator
        self.pair = torch.empty(n, 2, dtype=torch.float64, device=generator.device)

    def uniform(self) -> Tensor:
        return torch.empty_like(self.pair[:, 0]).uniform_(generator=self.generator)

    def normal_pair(self) -> Tensor:
        return torch.empty_like(self.pair).normal_(generator=self.generator)

    def pick(self, choices: int) -> Tensor:
        return (self.uniform() * choices).long()


@dataclass(frozen=True)
class Toy:
    """One density on the plane.

    ``draw`` makes an (n, 2) float64 sample; ``density`` maps (n, 2) finite float64 points to (n,)
    log-densities in nats; ``true_entropy`` is in nats.
    """

    name: str
    summary: str
    draw: Callable[[Draws], Tensor]
    density: Callable[[Tensor], Tensor]
    true_entropy: float
    chunk: int = 128  # rows per pass, so that intermediate tensors stay in cache

    def sample(
        self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return n fresh independent rows, shape (n, 2), on the generator's device."""
        if n < 0:
            raise ValueError(f"{self.name}.sample: n must not be negative, got {n}")
        return self.draw(Draws(n, generator)).to(dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, float64 whatever the dtype of x; x is (..., 2), result (...).

        Outside the support and beyond 1e15 it is -inf, at NaN it is NaN. Differentiable.
        """
        if x.ndim == 0 or x.shape[-1] != 2:
            raise ValueError(f"{self.name}.log_prob: x must be (..., 2), got {tuple(x.shape)}")
        rows = x.to(torch.float64).reshape(-1, 2)
        finite = (rows.abs() < 1e15).all(-1)
        safe = torch.where(finite.unsqueeze(-1), rows, 0.0)
        value = torch.cat([self.density(part) for part in torch.split(safe, self.chunk)])
        value = torch.where(finite, value, -math.inf)
        return torch.where(rows.isnan().any(-1), math.nan, value).reshape(x.shape[:-1])

    def entropy(self) -> float:
        """Differential entropy in nats: the least mean of -log_prob that a model can reach."""
        return self.true_entropy


def vectors(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y], -1)


@lru_cache
def nodes(low: float, high: float, count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights between low and high; converges fast on smooth curves."""
    node, weight = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(count))
    half = (high - low) / 2
    return low + half * (1 + node), half * weight


def blurred(x: Tensor, centres: Tensor, weights: Tensor, sd: float) -> Tensor:
    """Log-density of a mixture of round Gaussians; also that of a curve cut into short pieces."""
    x, centres = x / sd, centres.to(x.device) / sd
    constants = weights.log().to(x.device) - centres.square().sum(-1) / 2
    logits = torch.addmm(constants, x, centres.T)
    # What is far below the largest does not count, and subnormal numbers slow exp down 20 times.
    logits = torch.maximum(logits, logits.detach().amax(-1, keepdim=True) - 100)
    return logits.logsumexp(-1) - x.square().sum(-1) / 2 - math.log(2 * math.pi * sd**2)


def draw_checkerboard(draws: Draws) -> Tensor:
    across = 4 * draws.uniform() - 2
    up = draws.uniform() - 2 * draws.pick(2) + across.floor().remainder(2)
    return 2 * vectors(across, up)


def checkerboard_density(x: Tensor) -> Tensor:
    half = x / 2
    square = half.floor().clamp(-2, 1).sum(-1).remainder(2) == 0
    on_line = ((half == half.floor()) & (half.abs() < 2)).any(-1)  # where rounding may put a draw
    inside = (half.abs() <= 2).all(-1) & (square | on_line)
    return torch.where(inside, x.sum(-1) * 0 - math.log(32), -math.inf)


EIGHTHS = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
EIGHT, EIGHT_SD = 4 / 1.414 * vectors(EIGHTHS.cos(), EIGHTHS.sin()), 0.5 / 1.414


def draw_8gaussians(draws: Draws) -> Tensor:
    return EIGHT.to(draws.pair.device)[draws.pick(8)] + EIGHT_SD * draws.normal_pair()


def draw_swissroll(draws: Draws) -> Tensor:
    t = 1.5 * math.pi * (1 + 2 * draws.uniform())
    return (vectors(t * t.cos(), t * t.sin()) + draws.normal_pair()) / 5


def swissroll_density(x: Tensor) -> Tensor:
    t, weight = nodes(1.5 * math.pi, 4.5 * math.pi, 224)
    return blurred(x, vectors(t * t.cos(), t * t.sin()) / 5, weight / (3 * math.pi), 0.2)


def draw_rings(draws: Draws, radii: tuple[float, ...], sd: float) -> Tensor:
    angle = 2 * math.pi * draws.uniform()
    radius = draws.pair.new_tensor(radii)[draws.pick(len(radii))]
    return vectors(radius * angle.cos(), radius * angle.sin()) + sd * draws.normal_pair()


def rings_density(x: Tensor, radii: tuple[float, ...], sd: float) -> Tensor:
    """A circle of radius R under Gaussian noise: exp(-(r^2 + R^2) / 2 sd^2) I0(r R / sd^2)."""
    distance = (x.square().sum(-1, keepdim=True) + 1e-300).sqrt()  # keeps its gradient at 0
    radius = x.new_tensor(radii)
    bessel: Tensor = torch.special.i0e(distance * radius / sd**2).log()
    logits = bessel - ((distance - radius) / sd).square() / 2
    return logits.logsumexp(-1) - math.log(2 * math.pi * sd**2 * len(radii))


def moon(t: Tensor, side: Tensor) -> Tensor:
    """The upper moon for side 1, for side -1 the same one turned half way round."""
    return side.unsqueeze(-1) * vectors(2 * t.cos() - 1, 2 * t.sin() - 0.5) + t.new_tensor([0, 0.3])


def draw_moons(draws: Draws) -> Tensor:
    return moon(math.pi * draws.uniform(), 2 * draws.pick(2) - 1) + 0.2 * draws.normal_pair()


def moons_density(x: Tensor) -> Tensor:
    t, weight = nodes(0.0, math.pi, 80)
    both = torch.cat([moon(t, torch.ones_like(t)), moon(t, -torch.ones_like(t))])
    return blurred(x, both, weight.repeat(2) / (2 * math.pi), 0.2)


def draw_2spirals(draws: Draws) -> Tensor:
    s = 3 * math.pi * draws.uniform().sqrt()
    arm = vectors(-s * s.cos(), s * s.sin()) + vectors(draws.uniform(), draws.uniform()) / 2
    sign = (2 * draws.pick(2) - 1).unsqueeze(-1)
    return sign * arm / 3 + 0.1 * draws.normal_pair()


def spirals_density(x: Tensor) -> Tensor:
    """Integrate over s the density of (a point of the arm + uniform box + Gaussian), both arms."""
    s, weight = (part.to(x.device) for part in nodes(0.0, 3 * math.pi, 320))
    mass = weight * s / (3 * math.pi) ** 2  # p(s) ds, half of it per arm
    unit = 0.3 * math.sqrt(2)  # makes a Gaussian tail erfc / 2
    total, sides = torch.ones_like(s), []
    # The second arm is the first one mirrored; the density of a box is 4.
    for point, centre in zip(torch.cat([x, -x]).T, (-s * s.cos(), s * s.sin()), strict=True):
        offset = (point.unsqueeze(-1) * (3 / unit) - (centre + 0.25) / unit).abs()
        near, far = offset - 0.25 / unit, offset + 0.25 / unit  # to the sides of the box
        # erfc(18) is 1e-143: cut there, no product is a subnormal number, which would be slow.
        total = total * (erfc(near.clamp(max=18.0)) - erfc(far.clamp(max=18.0)))
        sides.append((near, far))
    total = (total @ mass).view(2, -1).sum(0)
    lost = total.detach() < 1e-120  # the cut may matter: add these rows up as logarithms
    value = torch.where(lost, 1.0, total).log()
    if lost.any():
        logs = mass.log() + math.log(4)
        for pair in sides:
            parts = (side.view(2, len(x), -1)[:, lost] * -math.sqrt(2) for side in pair)
            high, low = (log_ndtr(part) for part in parts)
            logs = logs + high + torch.log1p(-(low - high).exp())
        value = value.masked_scatter(lost, logs.logsumexp(-1).logsumexp(0))
    return value + math.log(9)


FIFTH = 2 * math.pi / 5


def draw_pinwheel(draws: Draws) -> Tensor:
    first, second = (draws.normal_pair() * draws.pair.new_tensor([0.3, 0.1])).unbind(-1)
    first = first + 1
    angle = FIFTH * draws.pick(5).double() + first.exp() / 4
    cos, sin = angle.cos(), angle.sin()
    return 2 * vectors(first * cos + second * sin, second * cos - first * sin)


def turn(a: Tensor, r: Tensor) -> Tensor:
    """Where the pinwheel turns a latent point with angle a and length r to, up to fifths."""
    return a - (r * a.cos()).exp() / 4


def slope(a: Tensor, r: Tensor) -> Tensor:
    return 1 + r * a.sin() * (r * a.cos()).exp() / 4


def bisect(rising: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where ``rising`` turns positive between low and high; high where it never does."""
    for _ in range(54):
        middle = (low + high) / 2
        above = rising(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high


def pinwheel_roots(r: Tensor, phase: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All a in (-pi, pi] with turn(a, r) = phase + a multiple of FIFTH: (a, multiple, row)."""
    # turn rises, then falls unless r is small, then rises again; its slope is least at a known a.
    least = -(2 * r / (1 + (1 + 4 * r.square()).sqrt())).acos()
    folded, edge = slope(least, r) < 0, torch.full_like(r, math.pi)
    top = torch.where(folded, bisect(lambda a: -slope(a, r), -edge, least), least)
    dip = torch.where(folded, bisect(lambda a: slope(a, r), least, 0 * r), least)
    found = []
    for low, high, sign in ((-edge, top, 1), (top, dip, -1), (dip, edge, 1)):
        before, after = (((turn(end, r) - phase) / FIFTH).floor() for end in (low, high))
        count = ((after - before) * sign).clamp(min=0).long()
        row = torch.repeat_interleave(count)
        rank = torch.arange(len(row), device=r.device) - (count.cumsum(0) - count)[row]
        multiple = FIFTH * (before[row] + (rank + 1 if sign > 0 else -rank))
        rising = partial(lambda a, k, r, to: k * (turn(a, r) - to), k=sign, r=r[row],
                         to=phase[row] + multiple)
        found.append((bisect(rising, low[row], high[row]), multiple, row))
    a, multiple, row = (torch.cat(parts) for parts in zip(*found, strict=True))
    return a, multiple, row


def pinwheel_density(x: Tensor) -> Tensor:
    """Sum over all latent points f (a Gaussian) and labels l that the pinwheel maps to x.

    The map turns f by the angle -(FIFTH l + exp(f0) / 4) and doubles it: the length of f is known,
    its angle a root of ``turn``, and d x / d f has determinant 4 slope. Exact for length(x) < 12;
    beyond (log-density below -130) the winding is frozen, else one x would have thousands of roots.
    """
    r, phase = (x.square().sum(-1) + 1e-300).sqrt() / 2, torch.atan2(x[:, 1], x[:, 0])
    reach = r.clamp(max=6.0)
    with torch.no_grad():
        a, multiple, row = pinwheel_roots(reach, phase)
    size = reach[row]  # the next line moves nothing, but carries the gradient
    a = a - (turn(a, size) - phase[row] - multiple) / slope(a, size).detach()
    first, second = (r[row] * a.cos() - 1) / 0.3, r[row] * a.sin() / 0.1
    logits = -(first.square() + second.square()) / 2 - slope(a, size).abs().log()
    most = torch.full_like(r, -math.inf).scatter_reduce(0, row, logits.detach(), "amax")
    total = torch.zeros_like(r).index_add(0, row, (logits - most[row]).exp())
    return most + total.log() - math.log(5 * 4 * 2 * math.pi * 0.3 * 0.1)


EIGHT_DENSITY = partial(blurred, centres=EIGHT, weights=EIGHTHS * 0 + 0.125, sd=EIGHT_SD)


def rings(name: str, summary: str, radii: tuple[float, ...], sd: float, entropy: float) -> Toy:
    draw = partial(draw_rings, radii=radii, sd=sd)
    return Toy(name, summary, draw, partial(rings_density, radii=radii, sd=sd), entropy)


_ALL = (
    Toy("checkerboard", "8 of 16 squares", draw_checkerboard, checkerboard_density, math.log(32)),
    Toy("8gaussians", "8 Gaussians on a circle", draw_8gaussians, EIGHT_DENSITY, 2.831880),
    Toy("swissroll", "one spiral band", draw_swissroll, swissroll_density, 2.669646),
    rings("circles", "two wide rings", (3.0, 1.5), 0.24, 3.268136),
    rings("rings", "four thin rings", (3.0, 2.25, 1.5, 0.75), 0.08, 2.623183),
    Toy("moons", "two interleaved half circles", draw_moons, moons_density, 2.393879),
    Toy("2spirals", "two interleaved spirals", draw_2spirals, spirals_density, 2.645450),
    Toy("pinwheel", "five twisted blades", draw_pinwheel, pinwheel_density, 2.317788, chunk=8192),
)
TOYS: dict[str, Toy] = {toy.name: toy for toy in _ALL}
