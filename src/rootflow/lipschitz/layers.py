"""The linear maps of a network, their adjoints and their gradients, for dense and image layers.

What acts is told by the number of dimensions of its weight: 0 scales, 2 is a matrix on the last
axis (on images a 1 x 1 convolution), 4 a zero-padded convolution of stride one. Images are laid
out ``(..., height, width, channels)``: a 1 x 1 convolution is then one matrix product, and the
others run several times faster on a CPU than with channels first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["adjoint", "affine", "linear", "outer"]


def _first(x: Tensor) -> Tensor:
    """Images ``(n, channels, height, width)`` for torch, a view."""
    return x.flatten(0, -4).permute(0, 3, 1, 2)


def _convolve(x: Tensor, w: Tensor, b: Tensor | None = None, transposed: bool = False) -> Tensor:
    if x.shape[-1] == 1:  # torch could not tell the layout of one channel: add an empty one
        x, w = F.pad(x, (0, 1)), F.pad(w, (0,) * (7 if transposed else 5) + (1,))
    run = F.conv_transpose2d if transposed else F.conv2d
    padding = w.shape[2] // 2, w.shape[3] // 2
    out = run(_first(x), w, b, padding=padding).permute(0, 2, 3, 1)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def linear(x: Tensor, w: Tensor) -> Tensor:
    """W x, ``(..., in)`` to ``(..., out)``."""
    if w.dim() == 2:
        return x @ w.t()
    return _convolve(x, w) if w.dim() else x * w


def affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """W x + b for ``(rows, ..., in)``; b is ``(out,)``, or ``(rows, out)`` with a context."""
    if x.dim() == 2:
        return torch.addmm(b, x, w.t()) if w.dim() else torch.addcmul(b, x, w)
    if b.dim() == 2:
        return linear(x, w) + b[:, None, None]
    if w.dim() == 2:
        return F.linear(x, w, b)
    return _convolve(x, w, b) if w.dim() else torch.addcmul(b, x, w)


def adjoint(u: Tensor, w: Tensor) -> Tensor:
    """W^T u, ``(..., out)`` to ``(..., in)``."""
    if w.dim() == 2:
        return u @ w
    return _convolve(u, w, transposed=True) if w.dim() else u * w


def outer(u: Tensor, x: Tensor, w: Tensor, added: Tensor | None = None) -> Tensor:
    """Gradient of the sum of ``u * linear(x, w)`` with respect to w, plus ``added``."""
    if w.dim() == 2:
        rows = u.flatten(0, -2).t()
        x = x.flatten(0, -2)
        return rows @ x if added is None else torch.addmm(added, rows, x)
    if w.dim() == 0:
        gradient = (u * x).sum()
    else:
        padding = [w.shape[2] // 2, w.shape[3] // 2]
        gradient = torch.ops.aten.convolution_backward(
            _first(u), _first(x), w, None, [1, 1], padding, [1, 1], False, [0, 0], 1,
            [False, True, False],
        )[1]  # fmt: skip
    return gradient if added is None else gradient + added
