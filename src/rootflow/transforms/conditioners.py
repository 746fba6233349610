"""Networks that turn some variables into the parameters of a map of others.

Everything here is feature-major: inputs ``(inputs, n)``, parameters theta ``(size, driven, n)``,
one contiguous row for each unit over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "Network", "Piece", "check_hidden", "dense", "found_in", "start"]

aten = torch.ops.aten
STEP = 4096  # about as many weights pay for another product
STEPS = 8  # products of a layer at most
LANES = 8  # a product with a multiple of so many columns is up to twice as fast


class Activation(NamedTuple):
    """An activation, the same in place, whether its slope is found from the result, its gradient.

    ``backward`` takes the gradient, which it overwrites, and the result or what was activated.
    """

    plain: Callable[[Tensor], Tensor]
    inplace: Callable[[Tensor], Tensor]
    from_result: bool
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "relu": Activation(
        F.relu, torch.relu_, True,
        lambda g, y: aten.threshold_backward.grad_input(g, y, 0, grad_input=g),
    ),
    "silu": Activation(
        F.silu, lambda a: F.silu(a, inplace=True), False,
        lambda g, y: aten.silu_backward.grad_input(g, y, grad_input=g),
    ),
    "elu": Activation(
        F.elu, lambda a: F.elu(a, inplace=True), True,
        lambda g, y: aten.elu_backward.grad_input(g, 1.0, 1.0, 1.0, True, y, grad_input=g),
    ),
    "gelu": Activation(
        F.gelu, lambda a: a.copy_(F.gelu(a)), False,
        lambda g, y: aten.gelu_backward.grad_input(g, y, grad_input=g),
    ),
    "tanh": Activation(
        torch.tanh, torch.tanh_, True,
        lambda g, y: aten.tanh_backward.grad_input(g, y, grad_input=g),
    ),
}  # fmt: skip


def found_in(name: str) -> Activation:
    """The activation of a conditioner. Raises ValueError naming the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_hidden(hidden: Sequence[int]) -> tuple[int, ...]:
    """The widths of the hidden layers. Raises ValueError without at least one positive width."""
    if not hidden or min(hidden) < 1:
        raise ValueError(f"hidden={tuple(hidden)!r}: give at least one positive width")
    return tuple(hidden)


def start(weight: Tensor, fan_in: int) -> Tensor:
    """Draw a weight and return it: uniform with variance 1 / (3 fan_in), as torch's own layers."""
    edge = 1 / math.sqrt(max(fan_in, 1))
    with torch.no_grad():
        return weight.uniform_(-edge, edge)


class Block(NamedTuple):
    """Units ``a:b`` of a layer; the prefix ``:p`` of the layer below holds all that they see."""

    a: int
    b: int
    p: int


Piece = tuple[Tensor, Tensor]  # of a block: biases (rows, 1) and matrix (rows, p), or gradients


class Network(nn.Module):
    r"""Parameters theta ``(size, driven, n)`` of inputs ``(inputs, n)``.

    ``layers`` holds the sorted degrees of the inputs, of the units of each hidden layer and of the
    driven dimensions: a unit sees those of the layer below whose degree is not above its own. What
    it sees is a prefix, so that dense products shrink to a staircase of blocks. With ``residual`` a
    hidden layer adds to what the activation before it was given (equal widths; after He et al.
    2016, arXiv:1603.05027). The last layer starts at zero weights, so theta starts at ``initial``
    ``(size,)`` everywhere; in memory the ``size`` rows of one dimension are neighbours.

    All weights and biases lie in one vector, layer by layer and block by block: one product masks
    them, and small networks spend most of a training step on what is done once for each parameter.
    """

    mask: Tensor | None

    def __init__(
        self, layers: Sequence[Tensor], initial: Tensor, activation: str, residual: bool
    ) -> None:
        super().__init__()
        found_in(activation)
        self.named, self.residual = activation, residual
        self.size, hidden = len(initial), tuple(len(m) for m in layers[1:-1])
        if residual and len(set(hidden)) > 1:
            raise ValueError(f"hidden={hidden!r}: residual layers need equal widths")
        ends = initial.repeat(len(layers[-1]))
        layers = [*layers[:-1], layers[-1].repeat_interleave(self.size)]
        self.widths = [len(m) for m in layers]
        self.blocks = [_blocks(m_in, m_out) for m_in, m_out in pairwise(layers)]
        values, masks = [], []
        for k, (m_in, m_out) in enumerate(pairwise(layers)):
            for a, b, p in self.blocks[k]:
                visible = (m_in[:p] <= m_out[a:b, None]).to(initial.dtype)
                fan_in = visible.sum(1, keepdim=True).clamp_min(1).sqrt()
                bias = start(torch.empty_like(fan_in), 1) / fan_in
                weight = start(torch.empty_like(visible), 1) / fan_in
                if k == len(hidden):
                    bias, weight = ends[a:b, None], weight * 0
                values += [bias, weight]
                masks += [torch.ones_like(bias), visible]
        self.shapes = [(len(v), v.shape[1]) for v in values]
        self.sizes = [v.numel() for v in values]
        self.values = nn.Parameter(torch.cat([v.flatten() for v in values]))
        mask = torch.cat([m.flatten() for m in masks])
        self.register_buffer("mask", None if bool(mask.all()) else mask, persistent=False)

    @property
    def activation(self) -> Activation:
        """Looked up by its name, since its functions cannot be pickled."""
        return ACTIVATIONS[self.named]

    def masked(self, values: Tensor) -> Tensor:
        """The vector of all weights and biases with zeros where nothing is seen."""
        return values if self.mask is None else values * self.mask

    def pieces(self, values: Tensor) -> list[list[Piece]]:
        """The vector of all weights and biases, or of their gradients, by layers and blocks."""
        parts = torch.split_with_sizes(values, self.sizes)
        views = iter([part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)])
        return [[(next(views), next(views)) for _ in blocks] for blocks in self.blocks]

    def adds(self, k: int) -> bool:
        """Whether layer k adds to what the activation before it was given."""
        return self.residual and 0 < k < len(self.blocks) - 1

    def theta(self, y: Tensor) -> Tensor:
        """The last layer's units ``(driven * size, n)`` as theta ``(size, driven, n)``."""
        return y.view(len(y) // self.size, self.size, y.shape[1]).transpose(0, 1)

    def forward(self, h: Tensor, values: Tensor | None = None) -> Tensor:
        """Theta ``(size, driven, n)`` by torch's own operations, for any derivative."""
        y, values = h, self.values if values is None else values
        for k, layer in enumerate(self.pieces(self.masked(values))):
            inputs, previous = self.activation.plain(y) if k else h, y
            steps = zip(self.blocks[k], layer, strict=True)
            parts = [torch.addmm(bias, w, inputs[: at.p]) for at, (bias, w) in steps]
            y = torch.cat(parts) if len(parts) > 1 else parts[0]
            y = previous + y if self.adds(k) else y
        return self.theta(y)

    def run(
        self, h: Tensor, layers: Sequence[Sequence[Piece]]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Every layer's input, what each activation's gradient needs, and theta."""
        inputs, kept, y = [h], [], h
        for k, layer in enumerate(layers[:-1]):
            previous, y = y, self._product(k, layer, h)
            if self.adds(k):
                y.add_(previous)
            fresh = self.residual or not self.activation.from_result
            h = self.activation.plain(y) if fresh else self.activation.inplace(y)
            kept.append(h if self.activation.from_result else y)
            inputs.append(h)
        return inputs, kept, self.theta(self._product(len(layers) - 1, layers[-1], h))

    def _product(self, k: int, layer: Sequence[Piece], h: Tensor) -> Tensor:
        """Layer k, each block reading the prefix it may see."""
        if len(layer) == 1:
            return torch.addmm(*layer[0], h[: self.blocks[k][0].p])
        y = h.new_empty(self.widths[k + 1], h.shape[1])
        for (a, b, p), (bias, w) in zip(self.blocks[k], layer, strict=True):
            torch.addmm(bias, w, h[:p], out=y[a:b])
        return y

    def backward(
        self,
        layers: Sequence[Sequence[Piece]],
        inputs: Sequence[Tensor],
        kept: Sequence[Tensor],
        g: Tensor,
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the input and of ``values``, where needed, from theta's.

        Each layer's gradient is used up before the next is made, which then finds its memory free
        and in the cache.
        """
        total, below = torch.empty_like(self.values), None
        g = g.transpose(0, 1).reshape(self.widths[-1], g.shape[2])
        for k, own in reversed(list(enumerate(self.pieces(total)))):
            if needed[1]:
                self._layer_gradient(k, own, inputs[k], g)
            below = self._pull(k, layers[k], g) if k or needed[0] else None
            if k and below is not None:
                below = self.activation.backward(below, kept[k - 1])
                g = below.add_(g) if self.adds(k) else below
        return below, self._masked(total) if needed[1] else None

    def _masked(self, gradient: Tensor) -> Tensor:
        return gradient if self.mask is None else gradient.mul_(self.mask)

    def _pull(self, k: int, layer: Sequence[Piece], g: Tensor) -> Tensor:
        """Gradient of layer k's input from that of its pre-activations."""
        below, blocks = None, zip(self.blocks[k], layer, strict=True)
        for (a, b, p), (_, w) in reversed(list(blocks)):  # the widest first
            if below is not None:
                below[:p].addmm_(w.mT, g[a:b])
            elif p == self.widths[k]:
                below = w.mT @ g[a:b]
            else:
                below = g.new_zeros(self.widths[k], g.shape[1])
                torch.mm(w.mT, g[a:b], out=below[:p])
        assert below is not None
        return below

    def values_gradient(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Gradient of ``values`` from every layer's input and gradient."""
        total = torch.empty_like(self.values)
        layers = zip(self.pieces(total), inputs, gradients, strict=True)
        for k, (layer, h, g) in enumerate(layers):
            self._layer_gradient(k, layer, h, g)
        return self._masked(total)

    def _layer_gradient(self, k: int, layer: Sequence[Piece], h: Tensor, g: Tensor) -> None:
        """Write the gradients of layer k's biases and matrices into ``layer``."""
        for (a, b, p), (bias, w) in zip(self.blocks[k], layer, strict=True):
            torch.sum(g[a:b], 1, keepdim=True, out=bias)
            torch.mm(g[a:b], h[:p].mT, out=w)


def _blocks(m_in: Tensor, m_out: Tensor) -> list[Block]:
    """Up to STEPS blocks of about equal height, cut where units begin to see more."""
    seen = torch.searchsorted(m_in, m_out, right=True).tolist()  # of each unit
    count = len(seen)
    steps = min(max(round(len(m_in) * count / STEP), 1), STEPS)
    starts = [i for i in range(1, count) if seen[i] > seen[i - 1]]
    wanted = [count * j / steps for j in range(1, steps)]
    cuts = {min(starts, key=lambda i: abs(i - at)) for at in wanted} if starts else set()
    wide = [min(-(-k // LANES) * LANES, len(m_in)) for k in seen]
    return [Block(a, b, wide[b - 1]) for a, b in pairwise([0, *sorted(cuts), count])]


def dense(
    inputs: int,
    driven: int,
    initial: Tensor,
    hidden: Sequence[int] = (128, 128),
    activation: str = "relu",
    residual: bool = False,
) -> Network:
    """A network in which all see all; without inputs theta is a constant, still learned."""
    widths = [inputs, *(check_hidden(hidden) if inputs else ()), driven]
    layers = [torch.zeros(width, dtype=torch.long, device="cpu") for width in widths]
    return Network(layers, initial, activation, residual)
