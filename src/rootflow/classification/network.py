r"""Classifiers whose blocks are residual or implicit, with certified Lipschitz constants.

The network of Lu et al. 2021 (arXiv:2103.09527), like a ResNet-18: a convolution, then four stages
of one block each, then an average over the pixels and a linear map to the scores of the classes.
Where a stage changes the number of channels, a 1 x 1 convolution of stride two follows its block.
The branches of a block are :math:`g = \phi(W_2 * \phi(W_1 * x))` with :math:`\phi` = ReLU and
3 x 3 kernels, of which each is scaled down to a norm of at most c, bounded from above, so that
:math:`\mathrm{Lip}(g) \le c^2`.

==========  ======================================  ================================
block       map from x to z                         Lipschitz constant, L = Lip(g)
==========  ======================================  ================================
vanilla     two times z = x + g(x), not restricted,  at most (1 + L)^2
            with batch normalisation inside g
residual    two times z = x + g(x)                  at most (1 + L)^2
implicit    x + g_x(x) = z + g_z(z)                 at most (1 + L_x) / (1 - L_z)
==========  ======================================  ================================

All three have the same number of convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..lipschitz import conv_bound
from ..solvers import Problem, find_root

__all__ = ["BLOCKS", "Classifier"]

BLOCKS = ("vanilla", "residual", "implicit")
STEM = 64  # channels of the published network
STAGES = ((64, 64), (64, 128), (128, 256), (256, 512))  # channels of x, channels inside g
SOLVER = "broyden"  # few, cheap steps: a restricted g is far from its bound on most images
PADDING = 8  # a training image is padded by this part of its sides, then cropped: by 4 for 32


class _Branch(nn.Module):
    """g, from and to ``(n, channels, *size)``; ``c`` None: not restricted, but normalised."""

    def __init__(self, channels: int, hidden: int, size: Sequence[int], c: float | None) -> None:
        super().__init__()
        self.size, self.c = tuple(size), c
        self.inner = nn.Parameter(_kernel(hidden, channels, 3))
        self.outer = nn.Parameter(_kernel(channels, hidden, 3))
        norms = (nn.Identity(), nn.Identity())
        if c is None:
            norms = (nn.BatchNorm2d(hidden), nn.BatchNorm2d(channels))  # type: ignore[assignment]
        self.norms = nn.ModuleList(norms)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Both kernels as they act, scaled by a constant down to the norm c."""
        if self.c is None:
            return self.inner, self.outer
        inner, outer = (
            w * (self.c / conv_bound(w, self.size)).clamp(max=1.0) for w in (self.inner, self.outer)
        )
        return inner, outer

    def bound(self) -> Tensor:
        """Upper bound on the Lipschitz constant of g in evaluation, a scalar."""
        total = self.inner.new_ones(())
        for kernel, norm in zip(self.kernels(), self.norms, strict=True):
            if isinstance(norm, nn.BatchNorm2d):  # a diagonal map, then a shift
                assert norm.running_var is not None
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                kernel = kernel * scale[:, None, None, None]
            total = total * conv_bound(kernel, self.size)
        return total

    def parts(self, x: Tensor, kernels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the first ReLU gives, and g(x)."""
        inner = F.relu(self.norms[0](F.conv2d(x, kernels[0], padding=1)))
        return inner, F.relu(self.norms[1](F.conv2d(inner, kernels[1], padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x, self.kernels())[1]


class _Residual(nn.Module):
    """Two residual maps one after the other."""

    def __init__(self, channels: int, hidden: int, size: Sequence[int], c: float | None) -> None:
        super().__init__()
        self.first, self.second = (_Branch(channels, hidden, size, c) for _ in range(2))

    def nets(self) -> tuple[_Branch, _Branch]:
        """Both branches."""
        return self.first, self.second

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.nets():
            x = x + branch(x)
        return x

    def bound(self) -> Tensor:
        """Upper bound on the Lipschitz constant of the block, a scalar."""
        return (1 + self.first.bound()) * (1 + self.second.bound())


class _Implicit(nn.Module):
    """x + g_x(x) = z + g_z(z), solved for z image by image."""

    def __init__(self, channels: int, hidden: int, size: Sequence[int], c: float) -> None:
        super().__init__()
        self.g_x, self.g_z = (_Branch(channels, hidden, size, c) for _ in range(2))

    def nets(self) -> tuple[_Branch, _Branch]:
        """Both branches."""
        return self.g_x, self.g_z

    def forward(self, x: Tensor) -> Tensor:
        return _root(self.g_z, x + self.g_x(x))

    def bound(self) -> Tensor:
        """Upper bound on the Lipschitz constant of the block, a scalar."""
        return (1 + self.g_x.bound()) / (1 - self.g_z.bound())


def _rows(x: Tensor) -> Tensor:
    """Flat rows of images, a view: they are laid out channels last, which is faster here."""
    return x.permute(0, 2, 3, 1).flatten(1)


def _images(rows: Tensor, shape: Sequence[int]) -> Tensor:
    _, channels, height, width = shape
    return rows.view(-1, height, width, channels).permute(0, 3, 1, 2)


def _root(g: _Branch, target: Tensor) -> Tensor:
    """The z with z + g(z) = target, with its implicit gradient."""
    assert g.c is not None
    kernels, shape, contraction = g.kernels(), target.shape, g.c**2
    with torch.no_grad():
        right = _rows(target)
        problem = Problem(
            lambda z, right: z - right + _rows(g.parts(_images(z, shape), kernels)[1]),
            (right,), frozenset({0}), contraction,
        )  # fmt: skip
        found = find_root(problem, right, method=SOLVER, adjoint="none").value
    inner, outer = g.parts(_images(found, shape), kernels)
    z = target - outer  # one more step; its derivative is the identity, the true one comes below
    if not z.requires_grad:
        return z
    near, far = inner.detach() > 0, outer.detach() > 0  # where the ReLUs are open
    fixed = tuple(kernel.detach() for kernel in kernels)

    def solve(v: Tensor) -> Tensor:
        """The u with (I + J)^T u = v, where J is the Jacobian of g at z."""
        right = _rows(v)
        scale = torch.linalg.vector_norm(right, dim=1, keepdim=True).clamp_min(1e-30)

        def residual(u: Tensor, right: Tensor, near: Tensor, far: Tensor) -> Tensor:
            back = F.conv_transpose2d(_images(u, shape) * far, fixed[1], padding=1) * near
            return u - right + _rows(F.conv_transpose2d(back, fixed[0], padding=1))

        tensors = (right / scale, near, far)
        problem = Problem(residual, tensors, frozenset({0, 1, 2}), contraction)
        u = find_root(problem, tensors[0], method=SOLVER, adjoint="none").value
        return _images(u * scale, shape)

    z.register_hook(solve)  # type: ignore[no-untyped-call]
    return z


class Classifier(nn.Module):
    """Log-probabilities of the classes of images.

    ``event``: channels, height and width of the images, given as uint8 with values below
    ``levels``. ``block``: one of ``BLOCKS``; ``c``: bound on the norm of each of their
    convolutions, for all but "vanilla". ``width`` scales all numbers of channels of the published
    network; ``pool``: images are averaged over squares of so many pixels a side first. In training
    mode images are padded and cropped at random (from ``draws``, which the training loop sets).

    Raises: ValueError for an unknown block, c outside (0, 1), or images that are too small.
    """

    def __init__(
        self,
        event: Sequence[int],
        classes: int,
        block: str = "implicit",
        *,
        c: float = 0.9,
        width: float = 1.0,
        pool: int = 1,
        levels: int = 256,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"block={block!r} is unknown; choose one of {', '.join(BLOCKS)}")
        if block != "vanilla" and not 0 < c < 1:
            raise ValueError(f"c={c} must lie strictly between 0 and 1")
        if width <= 0 or pool < 1 or event[1] % pool or event[2] % pool:
            raise ValueError(
                f"width={width} must be positive, and pool={pool} a whole number that divides the "
                f"sides of {event[2]} x {event[1]} pixels"
            )
        size = (event[1] // pool, event[2] // pool)
        if min(size) < 4:
            raise ValueError(f"images of {size[1]} x {size[0]} pixels are too small; use 4 or more")
        self.event = tuple(event)
        self.recipe = {
            "name": "classifier", "event": list(event), "classes": classes, "block": block,
            "c": c, "width": width, "pool": pool, "levels": levels,
        }  # fmt: skip
        self.pool, self.levels, self.draws = pool, levels, 0
        self.stem = _normalised(event[0], _scaled(STEM, width), 3, 1)
        stages: list[nn.Module] = []
        for channels, hidden in STAGES:
            inside, within = _scaled(channels, width), _scaled(hidden, width)
            if block == "implicit":
                stages.append(_Implicit(inside, within, size, c))
            else:
                stages.append(_Residual(inside, within, size, None if block == "vanilla" else c))
            if hidden != channels:
                stages.append(_normalised(inside, within, 1, 2))
                size = (-(-size[0] // 2), -(-size[1] // 2))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(within, classes)

    @property
    def blocks(self) -> list[_Residual | _Implicit]:
        """The four blocks, in order."""
        return [stage for stage in self.stages if isinstance(stage, _Residual | _Implicit)]

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities ``(n, classes)`` of images ``(n, *event)``."""
        dtype = self.head.weight.dtype
        x = images.to(dtype) * (2 / (self.levels - 1)) - 1
        if self.training:
            x = self._crop(x)
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool)
        x = self.stem(x).contiguous(memory_format=torch.channels_last)
        x = self.stages(x)
        return F.log_softmax(self.head(x.mean((2, 3))), dim=1)

    def log_prob(self, images: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities ``(n,)`` in nats of the labels ``(n,)``, classes from 0."""
        scores: Tensor = self(images)
        return scores.gather(1, labels[:, None])[:, 0]

    def _crop(self, x: Tensor) -> Tensor:
        """Each image moved by up to an eighth of its size in both directions, black coming in."""
        generator = torch.Generator().manual_seed(self.draws)
        n, _, height, width = x.shape
        tall, wide = height // PADDING, width // PADDING
        moved = F.pad(x, (wide, wide, tall, tall), value=-1.0)
        down, right = (
            torch.randint(2 * most + 1, (n, 1), generator=generator).to(x.device)
            + torch.arange(side, device=x.device)
            for most, side in ((tall, height), (wide, width))
        )
        rows = torch.arange(n, device=x.device)[:, None, None]
        return moved[rows, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _kernel(out: int, channels: int, side: int) -> Tensor:
    """Uniform weights of variance 2 / fan-in."""
    limit = math.sqrt(6 / (channels * side * side))
    return torch.empty(out, channels, side, side).uniform_(-limit, limit)


def _normalised(channels: int, out: int, side: int, stride: int) -> nn.Sequential:
    """A convolution without bias, batch normalisation and ReLU."""
    convolution = nn.Conv2d(channels, out, side, stride, side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())
