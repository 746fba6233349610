r"""Value, exact Jacobian and both gradients of a network, each intermediate computed once.

With pre-activations a_k, slopes s_k = phi'(a_k) and tangents propagated from the input, the
Jacobian is W_n S_{n-1} W_{n-1} ... S_0 W_0. The first product needs no tangent array at all:
U_1 = s_0 V with the small matrix V[h, (i, j)] = W_0[h, i] W_1[j, h]. The gradient runs back through
the same arrays; forward and backward together cost 3 (d + 1) evaluations' worth of arithmetic, the
least that reverse mode can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import Activation
from .layers import adjoint, affine, linear, outer

__all__ = ["Tape", "Weights", "value_and_jacobian"]

CACHE_ELEMENTS = 2**18  # of the tangents worked on together, so that they stay in a core's cache


class Weights(NamedTuple):
    """What one call needs of a network: normalised matrices and biases, scales folded in.

    ``matrices[k]`` is any weight that ``layers`` knows; ``biases[k]`` is ``(width,)``, or
    ``(batch, width)`` when the network has a context.
    """

    matrices: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors in one flat tuple; ``rebuild`` is the way back."""
        return self.matrices + self.biases

    @staticmethod
    def rebuild(tensors: Sequence[Tensor]) -> Weights:
        """Weights from the tuple that ``tensors`` gave."""
        n = len(tensors) // 2
        return Weights(tuple(tensors[:n]), tuple(tensors[n:]))

    def rows(self, index: Tensor | slice) -> Weights:
        """The same network for a subset of the batch."""
        return Weights(self.matrices, tuple(b[index] if b.dim() == 2 else b for b in self.biases))

    def to(self, dtype: torch.dtype) -> Weights:
        """The same numbers rounded to ``dtype``."""
        return Weights.rebuild([t.to(dtype) for t in self.tensors()])


def _mixed(matrices: Sequence[Tensor], activation: Activation) -> tuple[Tensor, Tensor]:
    """W_0 as the activation sees it, ``(width, d)``, and V, ``(width, d * next width)``."""
    first = activation.mirror(matrices[0].t()).t()
    return first, (first[:, :, None] * matrices[1].t()[:, None, :]).flatten(1)


def value_and_jacobian(
    x: Tensor, weights: Weights, activation: Activation, grid: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Both g(x) and its Jacobian ``[b, i, o]``, nothing kept for gradients, in small chunks."""
    matrices, _ = weights
    if grid is not None and len(grid) > 1:
        with torch.no_grad():
            tapes = [
                Tape.record(x[k : k + 1], weights.rows(slice(k, k + 1)), activation, None, grid)
                for k in range(len(x))
            ]
        return torch.cat([t.value for t in tapes]), torch.cat([t.jacobian for t in tapes])
    mixed = _mixed(matrices, activation)[1]
    size = max(16, CACHE_ELEMENTS // max(mixed.shape[1], 1))
    values, jacobians = [], []
    for start in range(0, max(len(x), 1), size):
        rows = slice(start, start + size)
        h = x[rows]
        biases = weights.rows(rows).biases
        tangents = h
        for k, w in enumerate(matrices[:-1]):
            a = activation.spread(torch.addmm(biases[k], h, w.t()))
            h, slope, _ = activation.derivatives(a)
            if k == 0:
                tangents = (slope @ mixed).view(*x[rows].shape, matrices[1].shape[0])
            else:
                tangents = activation.mirror(tangents).mul_(slope[:, None]) @ matrices[k + 1].t()
        values.append(torch.addmm(biases[-1], h, matrices[-1].t()))
        jacobians.append(tangents)
    return torch.cat(values), torch.cat(jacobians)


@dataclass
class Tape:
    """One evaluation of a network, kept for its gradients. Plain tensor operations throughout.

    Rows are flat outside. Inside they have the shape ``grid``: one axis, or height, width and
    channels. Gradients are taken in the dtype of the weights, whatever that of the cotangents.
    """

    grid: tuple[int, ...]

    activation: Activation
    weights: Weights
    inputs: list[Tensor]  # of every layer: x, h_0, h_1, ...
    slopes: list[Tensor]
    bends: list[Tensor]  # -phi''
    pre: list[Tensor]  # U_k, tangents before activation k, (batch, m, width), where formed
    post: list[Tensor]  # T_k = s_k U_k
    seeds: Tensor | None
    mixed: tuple[Tensor, Tensor] | None  # see ``_mixed``; None with seeds
    value: Tensor
    jacobian: Tensor  # [b, i, o], derivative of output o along direction i

    @staticmethod
    def record(
        x: Tensor,
        weights: Weights,
        activation: Activation,
        seeds: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        pulls_only: bool = False,
    ) -> Tape:
        """Evaluate at x ``(batch, d)``, with derivatives along ``seeds`` ``(batch, m, d)``.

        Without seeds these are all unit vectors. ``pulls_only``: no derivatives along anything,
        and of the methods only ``pull``.
        """
        matrices, biases = weights
        grid = grid or x.shape[1:]
        x = x.to(biases[0].dtype)
        inputs, slopes, bends, pre, post = [x.view(-1, *grid)], [], [], [], []
        mixed, tangents = None, x
        if pulls_only:
            tangents = x[:, None, :0]
        elif seeds is None and len(grid) == 1:
            mixed = _mixed(matrices, activation)
        else:
            if seeds is None:
                unit = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
                seeds = unit.expand(len(x), *unit.shape)
            seeds = seeds.to(x).reshape(*seeds.shape[:2], *grid)
            tangents = linear(seeds, matrices[0])
        for k in range(len(matrices) - 1):
            a = activation.spread(affine(inputs[-1], matrices[k], biases[k]))
            if pulls_only:
                h, s = activation.value_and_slope(a)
                inputs.append(h)
                slopes.append(s)
                continue
            h, s, bend = activation.derivatives(a)
            if k == 0 and mixed is not None:
                tangents = (s @ mixed[1]).view(*x.shape, matrices[1].shape[0])
            else:
                pre.append(activation.mirror(tangents))
                post.append(s[:, None] * pre[-1])
                tangents = linear(post[-1], matrices[k + 1])
            inputs.append(h)
            slopes.append(s)
            bends.append(bend)
        value = affine(inputs[-1], matrices[-1], biases[-1]).flatten(1)
        return Tape(
            grid, activation, weights, inputs, slopes, bends, pre, post, seeds, mixed, value,
            tangents.flatten(2),
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.weights.biases[0].dtype

    def rounded(self, dtype: torch.dtype) -> Tape:
        """The same in another dtype, for ``pull`` alone."""
        slopes = [s.to(dtype) for s in self.slopes]
        return replace(self, weights=self.weights.to(dtype), slopes=slopes)

    def pull_jacobian(self, grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """From a gradient of the Jacobian ``[b, i, o]``: those of slopes and (by it) matrices."""
        matrices = self.weights.matrices
        slope_grads: list[Tensor] = []
        matrix_grads: list[Tensor] = []  # both from the last layer to the first
        layers = self.pre, self.post, self.slopes, matrices  # the first layer has no tangents
        grad = grad.to(self.dtype).reshape(*grad.shape[:2], *self.grid)
        for pre, post, s, w in zip(*map(reversed, layers), strict=False):
            matrix_grads.append(outer(grad, post, w))
            p = adjoint(grad, w)
            slope_grads.append(p[:, 0] * pre[:, 0] if p.shape[1] == 1 else (p * pre).sum(1))
            grad = self.activation.fold(p.mul_(s[:, None]))
        if self.mixed is None:
            assert self.seeds is not None
            matrix_grads.append(outer(grad, self.seeds, matrices[0]))
        else:
            first, v = self.mixed
            flat = grad.flatten(1)
            slope_grads.append(flat @ v.t())
            grad_v = (self.slopes[0].t() @ flat).view(*first.shape, -1)
            matrix_grads.append(torch.einsum("hij,hi->jh", grad_v, first))
            grad_first = torch.einsum("hij,jh->ih", grad_v, matrices[1])
            matrix_grads.append(self.activation.fold(grad_first).t())
        return slope_grads[::-1], matrix_grads[::-1]

    def pull_value(
        self, grad: Tensor | None, slope_grads: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """From gradients of g and of the slopes: gradients of x and of every pre-activation."""
        matrices = self.weights.matrices
        q = None
        if grad is not None:
            q = adjoint(grad.to(self.dtype).view(-1, *self.grid), matrices[-1])
        pulled: list[Tensor] = []
        for k in range(len(self.slopes) - 1, -1, -1):
            a = None if q is None else q * self.slopes[k]
            if slope_grads is not None:
                bend, s = self.bends[k], slope_grads[k]
                a = -bend * s if a is None else a.addcmul(bend, s, value=-1)
            assert a is not None
            a = self.activation.fold(a)
            pulled.append(a)
            q = adjoint(a, matrices[k])
        assert q is not None
        return q.flatten(1), pulled[::-1]

    def pull(self, u: Tensor, slopes: Sequence[Tensor] | None = None) -> Tensor:
        """J^T u for ``(rows, d)`` or ``(rows, m, d)``; with the slopes given, for some rows.

        In the dtype of u. Not differentiable.
        """
        matrices = self.weights.matrices
        several = u.dim() == 3
        shape, dtype = u.shape, u.dtype
        u = adjoint(u.to(self.dtype).reshape(*shape[:-1], *self.grid), matrices[-1])
        layers = zip(reversed(slopes or self.slopes), reversed(matrices[:-1]), strict=True)
        for s, w in layers:
            u = adjoint(self.activation.fold(u.mul_(s[:, None] if several else s)), w)
        return u.reshape(shape).to(dtype)

    def pull_weights(
        self, grad: Tensor | None, pulled: Sequence[Tensor], matrix_grads: list[Tensor] | None
    ) -> tuple[Tensor, ...]:
        """Gradients of all matrices and biases, in the order of ``Weights.tensors``."""
        pulls = [*pulled, None if grad is None else grad.to(self.dtype).view(-1, *self.grid)]
        matrices: list[Tensor] = []
        biases: list[Tensor] = []
        for k, (w, b) in enumerate(zip(*self.weights, strict=True)):
            v, extra = pulls[k], None if matrix_grads is None else matrix_grads[k]
            if v is None:
                matrices.append(torch.zeros_like(w) if extra is None else extra)
                biases.append(torch.zeros_like(b))
                continue
            matrices.append(outer(v, self.inputs[k], w, extra))
            pixels = v.flatten(1, -2).sum(1) if v.dim() > 2 else v
            biases.append(pixels if b.dim() == 2 else pixels.sum(0))
        return (*matrices, *biases)
