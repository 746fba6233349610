"""The linear maps of a network, their adjoints and their gradients, for dense and image layers.

What acts is told by the number of dimensions of its weight: 0 scales, 2 is a matrix on the last
axis (on images a 1 x 1 convolution), 4 a zero-padded convolution of stride one. Images are laid
out ``(..., height, width, channels)``: a 1 x 1 convolution is then one matrix product, and the
others run several times faster on a CPU than with channels first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["adjoint", "affine", "bfloat16_gains", "linear", "outer"]

NARROW = 4  # convolutions to so few channels, in bfloat16 to three, waste most of a vector in torch
THIN = 16  # matrix products with fewer columns run several times faster from the transposed layout


def _first(x: Tensor) -> Tensor:
    """Images ``(n, channels, height, width)`` for torch, a view."""
    return x.flatten(0, -4).permute(0, 3, 1, 2)


def _narrow(x: Tensor, w: Tensor) -> Tensor:
    """Convolution to few channels: one matrix product for all taps, whose planes are then added."""
    few, many, rows, columns = w.shape
    padding = rows // 2, columns // 2
    flat = x.reshape(-1, *x.shape[-3:])
    n, height, width, _ = flat.shape
    taps = w.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, many) @ flat.view(-1, many).t()
    planes = taps.view(len(taps), n, -1).transpose(0, 1)
    out = F.fold(planes, (height, width), (rows, columns), padding=padding)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], few)


def _narrow_outer(u: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Gradient of the sum of ``u * _narrow(x, w)`` with respect to w."""
    few, many, rows, columns = w.shape
    padding = rows // 2, columns // 2
    planes = F.unfold(_first(u), (rows, columns), padding=padding)
    product = planes.transpose(0, 1).reshape(planes.shape[1], -1) @ x.reshape(-1, many)
    return product.view(few, rows, columns, many).flip(1, 2).permute(0, 3, 1, 2)


def _convolve(x: Tensor, w: Tensor, b: Tensor | None = None, transposed: bool = False) -> Tensor:
    few, many = (w.shape[1], w.shape[0]) if transposed else w.shape[:2]
    if few <= NARROW - (x.dtype == torch.bfloat16) < many:
        out = _narrow(x, w.transpose(0, 1).flip(2, 3) if transposed else w)
        return out if b is None else out + b
    if transposed and len(x) == 1:  # torch has a slow path for one image
        w, transposed = w.transpose(0, 1).flip(2, 3), False
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
        return u @ (w.t().contiguous().t() if w.shape[1] <= THIN else w)
    return _convolve(u, w, transposed=True) if w.dim() else u * w


def outer(u: Tensor, x: Tensor, w: Tensor, added: Tensor | None = None) -> Tensor:
    """Gradient of the sum of ``u * linear(x, w)`` with respect to w, plus ``added``."""
    if w.dim() == 2:
        if x.shape[-1] < u.shape[-1]:  # the wide one last
            return outer(x, u, w.t(), None if added is None else added.t()).t()
        u, x = u.flatten(0, -2).t(), x.flatten(0, -2)
        return u @ x if added is None else torch.addmm(added, u, x)
    if w.dim() == 0:
        gradient = (u * x).sum()
    elif w.shape[0] <= NARROW < w.shape[1]:
        gradient = _narrow_outer(u, x, w)
    else:
        padding = [w.shape[2] // 2, w.shape[3] // 2]
        gradient = torch.ops.aten.convolution_backward(
            _first(u), _first(x), w, None, [1, 1], padding, [1, 1], False, [0, 0], 1,
            [False, True, False],
        )[1]  # fmt: skip
    return gradient if added is None else gradient + added


def bfloat16_gains(x: Tensor, several_times: bool = False) -> bool:
    """Whether products in bfloat16 are faster than in the float32 of ``x``, on its device.

    ``several_times``: by units made for matrices, not by wider vectors alone.
    """
    if x.dtype != torch.float32:
        return False
    if x.device.type == "cpu":
        able: Any = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(able.get("amx_bf16") or (able.get("avx512_bf16") and not several_times))
    return x.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
