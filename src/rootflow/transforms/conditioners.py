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
STEPS = 4  # products of a layer at most


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
    """Units ``a:b`` of a hidden layer and the prefix ``:p`` of the layer below that they may see.

    In the last layer the outputs of dimensions ``a:b``, ordered as (size, dimension).
    """

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
    ``(size,)`` everywhere.

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
        self.widths, self.size = [len(m) for m in layers], len(initial)
        hidden = tuple(self.widths[1:-1])
        if residual and len(set(hidden)) > 1:
            raise ValueError(f"hidden={hidden!r}: residual layers need equal widths")
        self.blocks: list[list[Block]] = []
        values, masks = [], []
        for k, (m_in, m_out) in enumerate(pairwise(layers)):
            copies = self.size if k == len(hidden) else 1
            self.blocks.append(_blocks(m_in, m_out, copies))
            for a, b, p in self.blocks[k]:
                visible = (m_in[:p] <= m_out[a:b, None]).to(initial.dtype).repeat(copies, 1)
                fan_in = visible.sum(1, keepdim=True).clamp_min(1).sqrt()
                bias = start(torch.empty_like(fan_in), 1) / fan_in
                weight = start(torch.empty_like(visible), 1) / fan_in
                if k == len(hidden):
                    bias, weight = initial.repeat_interleave(b - a)[:, None], weight * 0
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

    def forward(self, h: Tensor, values: Tensor | None = None) -> Tensor:
        """Theta ``(size, driven, n)`` by torch's own operations, for any derivative."""
        parts, values = [h], self.values if values is None else values
        for k, layer in enumerate(self.pieces(self.masked(values))):
            if k:
                y = torch.cat(parts) if len(parts) > 1 else parts[0]
                h = h + y if self.adds(k - 1) else y
            inputs = self.activation.plain(h) if k else h
            steps = zip(self.blocks[k], layer, strict=True)
            parts = [torch.addmm(bias, w, inputs[: at.p]) for at, (bias, w) in steps]
        return torch.cat([y.view(self.size, len(y) // self.size, y.shape[1]) for y in parts], 1)

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
        return inputs, kept, self._outputs(layers[-1], h)

    def _product(self, k: int, layer: Sequence[Piece], h: Tensor) -> Tensor:
        """Hidden layer k, each block reading the prefix it may see."""
        if len(layer) == 1:
            return torch.addmm(*layer[0], h[: self.blocks[k][0].p])
        y = h.new_empty(self.widths[k + 1], h.shape[1])
        for (a, b, p), (bias, w) in zip(self.blocks[k], layer, strict=True):
            torch.addmm(bias, w, h[:p], out=y[a:b])
        return y

    def _outputs(self, layer: Sequence[Piece], h: Tensor) -> Tensor:
        """The last layer, contiguous in the shape of theta."""
        size, driven, n = self.size, self.widths[-1], h.shape[1]
        if len(layer) == 1:
            return torch.addmm(*layer[0], h[: self.blocks[-1][0].p]).view(size, driven, n)
        theta = h.new_empty(size, driven, n)
        for (a, b, p), (bias, w) in zip(self.blocks[-1], layer, strict=True):
            bias, w = bias.view(size, b - a, 1), w.view(size, b - a, p)
            torch.baddbmm(bias, w, h[:p].expand(size, p, n), out=theta[:, a:b])
        return theta

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
        total, pulled = torch.empty_like(self.values), None
        rows = self.rows(len(layers) - 1, g)
        for k, own in reversed(list(enumerate(self.pieces(total)))):
            if needed[1]:
                self._layer_gradient(k, own, inputs[k], rows)
            if k:
                below = self.activation.backward(self._pull(k, layers[k], rows), kept[k - 1])
                g = below.add_(g) if self.adds(k) else below
                rows = self.rows(k - 1, g)
            elif needed[0]:
                pulled = self._pull(0, layers[0], rows)
        return pulled, self._masked(total) if needed[1] else None

    def _masked(self, gradient: Tensor) -> Tensor:
        return gradient if self.mask is None else gradient.mul_(self.mask)

    def rows(self, k: int, g: Tensor) -> list[Tensor]:
        """Of layer k's gradient ``(units, n)``, or theta's, the rows of each block."""
        if k < len(self.blocks) - 1:
            return [g[a:b] for a, b, _ in self.blocks[k]]
        return [g[:, a:b].flatten(0, 1) for a, b, _ in self.blocks[k]]

    def _pull(self, k: int, layer: Sequence[Piece], rows: Sequence[Tensor]) -> Tensor:
        """Gradient of layer k's input from that of its pre-activations."""
        below, blocks = None, zip(self.blocks[k], layer, rows, strict=True)
        for at, (_, w), g in reversed(list(blocks)):  # the widest first
            if below is not None:
                below[: at.p].addmm_(w.mT, g)
            elif at.p == self.widths[k]:
                below = w.mT @ g
            else:
                below = g.new_zeros(self.widths[k], g.shape[1])
                torch.mm(w.mT, g, out=below[: at.p])
        assert below is not None
        return below

    def values_gradient(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Gradient of ``values`` from every layer's input and gradient."""
        total = torch.empty_like(self.values)
        layers = zip(self.pieces(total), inputs, gradients, strict=True)
        for k, (layer, h, g) in enumerate(layers):
            self._layer_gradient(k, layer, h, self.rows(k, g))
        return self._masked(total)

    def _layer_gradient(
        self, k: int, layer: Sequence[Piece], h: Tensor, rows: Sequence[Tensor]
    ) -> None:
        """Write the gradients of layer k's biases and matrices into ``layer``."""
        for at, (bias, w), g in zip(self.blocks[k], layer, rows, strict=True):
            torch.sum(g, 1, keepdim=True, out=bias)
            torch.mm(g, h[: at.p].mT, out=w)


def _blocks(m_in: Tensor, m_out: Tensor, copies: int) -> list[Block]:
    """Up to STEPS blocks of about equal height, cut where units begin to see more."""
    seen = torch.searchsorted(m_in, m_out, right=True).tolist()  # of each unit
    count = len(seen)
    steps = min(max(round(len(m_in) * count * copies / STEP), 1), STEPS)
    starts = [i for i in range(1, count) if seen[i] > seen[i - 1]]
    wanted = [count * j / steps for j in range(1, steps)]
    cuts = {min(starts, key=lambda i: abs(i - at)) for at in wanted} if starts else set()
    return [Block(a, b, seen[b - 1]) for a, b in pairwise([0, *sorted(cuts), count])]


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
