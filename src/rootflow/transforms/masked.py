r"""A network whose i-th group of outputs sees only the inputs before i: the masked conditioner.

Every unit has a degree m and depends on x_1 .. x_m only. Units lie in order of their degree, so
what a unit may see of the layer below is a prefix of it. Dense products then shrink to a staircase
of blocks, and a sweep over the dimensions computes each unit exactly once. Feature-major
throughout: ``(units, n)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .conditioners import activation_named, check_hidden, start

__all__ = ["Masked"]

aten = torch.ops.aten
BLOCK = 48_000  # about as many weights of a staircase pay for another product


class Rule(NamedTuple):
    """An activation in place, whether its slope is found from the result, and its gradient."""

    inplace: Callable[[Tensor], Tensor]
    from_result: bool
    backward: Callable[[Tensor, Tensor], Tensor]  # of the gradient, in place, and what was kept


RULES = {
    "relu": Rule(
        torch.relu_, True, lambda g, y: aten.threshold_backward.grad_input(g, y, 0, grad_input=g)
    ),
    "silu": Rule(
        lambda a: F.silu(a, inplace=True),
        False,
        lambda g, y: aten.silu_backward.grad_input(g, y, grad_input=g),
    ),
    "elu": Rule(
        lambda a: F.elu(a, inplace=True),
        True,
        lambda g, y: aten.elu_backward.grad_input(g, 1.0, 1.0, 1.0, True, y, grad_input=g),
    ),
    "gelu": Rule(
        lambda a: a.copy_(F.gelu(a)),
        False,
        lambda g, y: aten.gelu_backward.grad_input(g, y, grad_input=g),
    ),
    "tanh": Rule(
        torch.tanh_, True, lambda g, y: aten.tanh_backward.grad_input(g, y, grad_input=g)
    ),
}


class Block(NamedTuple):
    """Units ``a:b`` of a hidden layer and the prefix ``:p`` of the layer below that they may see.

    In the last layer the outputs of dimensions ``a:b``, ordered as (size, dimension).
    """

    a: int
    b: int
    p: int


Piece = tuple[Tensor, Tensor]  # of a block: biases (rows, 1) and matrix (rows, p), or gradients


def degrees(width: int, low: int, high: int) -> Tensor:
    """Sorted degrees ``(width,)`` from ``low`` to ``high``, in equal numbers or spread evenly."""
    k, count = torch.arange(width, device="cpu"), high - low + 1
    if width >= count:
        return low + k * count // width
    return low + (k * (count - 1) + (width - 1) // 2) // max(width - 1, 1)


class Masked(nn.Module):
    r"""Parameters theta ``(size, features, n)``, theta[:, i] a function of x[:i] and the context.

    With ``residual`` a hidden layer adds to what the activation before it was given (equal widths).
    The last layer starts at zero weights, so theta starts at ``initial`` ``(size,)`` everywhere.
    With ``circle`` = B an input enters as cosine and sine of the angle pi x / B. Units of degree 0,
    which see the context alone, exist only with a context. Hidden layers narrower than the number
    of degrees are right but tell fewer prefixes apart.

    All weights and biases lie in one vector, layer by layer and block by block: one product masks
    them, and small networks spend most of a training step on what is done once for each parameter.

    Sources: Germain et al. 2015 (arXiv:1502.03509), section 3; Nash and Durkan 2019
    (arXiv:1904.05626), section 4, for residual layers.
    """

    mask: Tensor

    def __init__(
        self,
        features: int,
        initial: Tensor,
        context: int = 0,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        residual: bool = False,
        circle: float | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.rule = activation_named(activation), RULES[activation]
        hidden = check_hidden(hidden)
        if residual and len(set(hidden)) > 1:
            raise ValueError(f"hidden={hidden!r}: residual layers need equal widths")
        self.features, self.context, self.size = features, context, len(initial)
        self.residual, self.circle = residual, circle
        low = 0 if context else 1
        if low == features:  # one dimension without context: theta is a constant
            hidden = ()
        self.per = 1 if circle is None else 2
        dimensions = torch.arange(features, device="cpu")
        outside = torch.full((context,), -1, device="cpu")
        layers = [torch.cat([outside, (dimensions + 1).repeat_interleave(self.per)])]
        layers += [degrees(width, low, features - 1) for width in hidden]
        layers.append(dimensions)
        repeats = [1] * len(hidden) + [self.size]  # of each unit counted here
        self.widths = [len(m) for m in layers]
        # seen[k][i]: how many units of layer k have a degree below i.
        below = torch.arange(-1, features, device="cpu")
        self.seen = [torch.searchsorted(m, below, right=True).tolist() for m in layers]
        self.blocks: list[list[Block]] = []
        values, masks = [], []
        for k, (m_in, m_out) in enumerate(pairwise(layers)):
            count, copies = len(m_out), repeats[k]
            blocks = max(round(len(m_in) * count * copies / BLOCK), 1)
            cuts = [count * j // blocks for j in range(blocks + 1)]
            self.blocks.append([])
            for a, b in pairwise(cuts):
                if a == b:
                    continue
                p = self.seen[k][int(m_out[b - 1]) + 1]
                visible = (m_in[:p] <= m_out[a:b, None]).to(initial.dtype).repeat(copies, 1)
                fan_in = visible.sum(1, keepdim=True).clamp_min(1).sqrt()
                bias = start(torch.empty_like(fan_in), 1) / fan_in
                weight = start(torch.empty_like(visible), 1) / fan_in
                if k == len(hidden):
                    bias, weight = initial.repeat_interleave(b - a)[:, None], weight * 0
                self.blocks[k].append(Block(a, b, p))
                values += [bias, weight]
                masks += [torch.ones_like(bias), visible]
        self.shapes = [(len(v), v.shape[1]) for v in values]
        self.sizes = [v.numel() for v in values]
        self.values = nn.Parameter(torch.cat([v.flatten() for v in values]))
        self.register_buffer("mask", torch.cat([m.flatten() for m in masks]), persistent=False)

    def pieces(self, values: Tensor) -> list[list[Piece]]:
        """The vector of all weights and biases, or of their gradients, by layers and blocks."""
        parts = torch.split_with_sizes(values, self.sizes)
        views = iter([part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)])
        return [[(next(views), next(views)) for _ in blocks] for blocks in self.blocks]

    def dense(self, pieces: Sequence[Sequence[Piece]]) -> tuple[list[Tensor], list[Tensor]]:
        """Whole biases ``(units, 1)`` and matrices ``(units, visible below)`` of all layers.

        The outputs of one dimension are neighbours here: ``(features * size, ...)``.
        """
        biases, matrices = [], []
        for k, (blocks, layer) in enumerate(zip(self.blocks, pieces, strict=True)):
            copies, p = self.size if k == len(pieces) - 1 else 1, blocks[-1].p
            if copies > 1:
                layer = [(_regrouped(bias, copies), _regrouped(w, copies)) for bias, w in layer]
            if len(layer) == 1:
                bias, whole = layer[0]
            else:
                bias = torch.cat([own for own, _ in layer])
                whole = bias.new_zeros(len(bias), p)
                for at, (_, w) in zip(blocks, layer, strict=True):
                    whole[at.a * copies : at.b * copies, : at.p] = w
            biases.append(bias)
            matrices.append(whole)
        return biases, matrices

    def embed(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The first layer's input: context above x ``(features, n)`` or its circular features."""
        if self.circle is not None:
            angle = x * (math.pi / self.circle)
            x = torch.stack([angle.cos(), angle.sin()], 1).flatten(0, 1)
        return x if context is None else torch.cat([context, x])

    def turned(self, h: Tensor) -> Tensor:
        """Derivative ``(features, 2, n)`` of the circular features that the input h holds."""
        cosine, sine = h[self.context :].view(self.features, 2, -1).unbind(1)
        return torch.stack([-sine, cosine], 1) * (math.pi / (self.circle or 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Theta ``(size, features, n)`` of x ``(features, n)`` and context ``(context, n)``."""
        h = self.embed(x, context)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.plain(h, self.values)
        theta: Tensor = _Staircase.apply(self, h, self.values)  # type: ignore[no-untyped-call]
        return theta

    def plain(self, h: Tensor, values: Tensor) -> Tensor:
        """The same of an embedded input by torch's own operations, for any derivative."""
        parts = [h]
        for k, layer in enumerate(self.pieces(values * self.mask)):
            if k:
                y = torch.cat(parts)
                h = h + y if self.adds(k - 1) else y
            inputs = self.activation(h) if k else h
            steps = zip(self.blocks[k], layer, strict=True)
            parts = [torch.addmm(bias, w, inputs[: at.p]) for at, (bias, w) in steps]
        return torch.cat([y.view(self.size, len(y) // self.size, y.shape[1]) for y in parts], 1)

    def adds(self, k: int) -> bool:
        """Whether layer k adds to what the activation before it was given."""
        return self.residual and 0 < k < len(self.blocks) - 1

    def product(self, k: int, layer: Sequence[Piece], h: Tensor) -> Tensor:
        """Hidden layer k, each block reading the prefix it may see."""
        if len(layer) == 1:
            return torch.addmm(*layer[0], h[: self.blocks[k][0].p])
        y = h.new_empty(self.widths[k + 1], h.shape[1])
        for (a, b, p), (bias, w) in zip(self.blocks[k], layer, strict=True):
            torch.addmm(bias, w, h[:p], out=y[a:b])
        return y

    def outputs(self, layer: Sequence[Piece], h: Tensor) -> Tensor:
        """The last layer, contiguous in the shape of theta."""
        size, n = self.size, h.shape[1]
        if len(layer) == 1:
            return torch.addmm(*layer[0], h[: self.blocks[-1][0].p]).view(size, self.features, n)
        theta = h.new_empty(size, self.features, n)
        for (a, b, p), (bias, w) in zip(self.blocks[-1], layer, strict=True):
            bias, w = bias.view(size, b - a, 1), w.view(size, b - a, p)
            torch.baddbmm(bias, w, h[:p].expand(size, p, n), out=theta[:, a:b])
        return theta

    def rows(self, k: int, g: Tensor) -> list[Tensor]:
        """Of layer k's gradient ``(units, n)``, or theta's, the rows of each block."""
        if k < len(self.blocks) - 1:
            return [g[a:b] for a, b, _ in self.blocks[k]]
        return [g[:, a:b].flatten(0, 1) for a, b, _ in self.blocks[k]]

    def pull(self, k: int, layer: Sequence[Piece], rows: Sequence[Tensor]) -> Tensor:
        """Gradient of layer k's input from that of its pre-activations."""
        width = self.widths[k]
        if len(layer) == 1 and self.blocks[k][0].p == width:
            return layer[0][1].mT @ rows[0]
        below = rows[0].new_zeros(width, rows[0].shape[1])
        for at, (_, w), g in zip(self.blocks[k], layer, rows, strict=True):
            below[: at.p].addmm_(w.mT, g)
        return below

    def values_gradient(
        self, inputs: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        """Gradient of ``values`` from every layer's input and the rows of its gradient."""
        gradient = torch.empty_like(self.values)
        layers = zip(self.pieces(gradient), inputs, gradients, strict=True)
        for k, (layer, h, rows) in enumerate(layers):
            self.layer_gradient(k, layer, h, rows)
        return gradient.mul_(self.mask)

    def layer_gradient(
        self, k: int, layer: Sequence[Piece], h: Tensor, rows: Sequence[Tensor]
    ) -> None:
        """Write the gradients of layer k's biases and matrices into ``layer``."""
        for at, (bias, w), g in zip(self.blocks[k], layer, rows, strict=True):
            torch.sum(g, 1, keepdim=True, out=bias)
            torch.mm(g, h[: at.p].mT, out=w)

    def run(
        self, h: Tensor, layers: Sequence[Sequence[Piece]]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Every layer's input, what each activation's gradient needs, and theta."""
        inputs, kept, y = [h], [], h
        for k, layer in enumerate(layers[:-1]):
            previous, y = y, self.product(k, layer, h)
            if self.adds(k):
                y.add_(previous)
            fresh = self.residual or not self.rule.from_result
            h = self.activation(y) if fresh else self.rule.inplace(y)
            kept.append(h if self.rule.from_result else y)
            inputs.append(h)
        return inputs, kept, self.outputs(layers[-1], h)


def _regrouped(rows: Tensor, copies: int) -> Tensor:
    """Rows ordered as (copy, dimension) in the order (dimension, copy)."""
    return rows.view(copies, len(rows) // copies, rows.shape[1]).transpose(0, 1).reshape(rows.shape)


class _Staircase(torch.autograd.Function):
    """``Masked.plain`` with its gradient written out: fewer operations, none on a zero block."""

    @staticmethod
    def forward(ctx: Any, net: Masked, h: Tensor, values: Tensor) -> Tensor:
        masked = values * net.mask
        inputs, kept, theta = net.run(h, net.pieces(masked))
        ctx.net = net
        ctx.save_for_backward(values, masked, *inputs, *kept)
        return theta

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        net, count = ctx.net, len(ctx.net.blocks)
        values, masked, *saved = ctx.saved_tensors
        inputs, kept = saved[:count], saved[count:]
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # the caller will differentiate this result
            # Aliases: only the network is differentiated here, not what made its input.
            pair = inputs[0].view_as(inputs[0]), values.view_as(values)
            wanted = [t for t, need in zip(pair, needed, strict=True) if need]
            theta = net.plain(*pair)
            found = iter(torch.autograd.grad(theta, wanted, gradient, create_graph=True))
            return (None, *(next(found) if need else None for need in needed))
        layers, total = net.pieces(masked), torch.empty_like(values)
        g, rows, pulled = gradient, net.rows(count - 1, gradient), None
        # Each layer's gradient is used up before the next is made, which then finds its memory
        # free and in the cache.
        for k, own in reversed(list(enumerate(net.pieces(total)))):
            if needed[1]:
                net.layer_gradient(k, own, inputs[k], rows)
            if k:
                below = net.rule.backward(net.pull(k, layers[k], rows), kept[k - 1])
                g = below.add_(g) if net.adds(k) else below
                rows = net.rows(k - 1, g)
            elif needed[0]:
                pulled = net.pull(0, layers[0], rows)
        return None, pulled, total.mul_(net.mask) if needed[1] else None
