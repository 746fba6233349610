r"""Certified upper bounds on the operator 2-norm of zero-padded convolutions, differentiable.

A k x k kernel with zero padding (k - 1)/2 on an h x w image is a corner of the circulant
convolution on a torus of N = h + (k - 1)/2 by M = w + (k - 1)/2 pixels: an output reads no further
than the seam. Its norm is therefore at most the largest singular value of the symbol

.. math:: A(\omega) = \sum_u K_u e^{-i \omega \cdot u}

at the N M frequencies of that torus. The image never crosses the seam, so the torus may be glued
with a change of sign along either axis, which moves the frequencies by half a step: each of the
four gluings bounds the norm, and the least bound counts. For small images that matters: the norm of
an averaging kernel on 8 x 8 pixels is bounded to 0.1 %, by the plain torus only to 9 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .norms import norm_bound

__all__ = ["conv_bound"]

LARGEST = 64  # frequencies per axis; beyond, the peak between them is bounded instead
GLUED = 24  # up to this many pixels a side the four gluings differ enough to be compared
CANDIDATES = 4
SLACK = 1e-3  # of the square of the bound, by which it exceeds the largest candidate
ASSEMBLED = 128  # up to this many inputs or outputs the whole operator is a matrix small enough


def _gram_lags(kernel: Tensor) -> Tensor:
    """Autocorrelation ``(lags, lags, n, n)`` of a kernel ``(m, n, k, l)``: symbol of A^H A."""
    _, n, rows, columns = kernel.shape
    flat = kernel.permute(2, 3, 1, 0).flatten(0, 2)
    products = (flat @ flat.t()).view(rows, columns, n, rows, columns, n)
    lags = kernel.new_zeros(2 * rows - 1, 2 * columns - 1, n, n)
    for p in range(rows):
        for q in range(columns):  # lag v - u, for u = (p, q) and every v
            window = lags[rows - 1 - p : 2 * rows - 1 - p, columns - 1 - q : 2 * columns - 1 - q]
            window += products[p, q].permute(1, 2, 0, 3)
    return lags


def _axis(pixels: int, k: int) -> tuple[int, float]:
    """Frequencies of one axis, and the factor by which the peak may exceed its samples.

    At its maximum a trigonometric polynomial of degree d lies above the cosine of d times the
    distance (M. Riesz 1914), and the next sample is at most pi over their number away.
    """
    torus = pixels + k // 2
    if torus <= LARGEST:
        return torus, 1.0
    return LARGEST, 1 / math.cos(math.pi * (k - 1) / LARGEST)


def _angle(angles: Tensor, rows: int, columns: int) -> Tensor:
    """Products ``(f, rows, columns)`` of frequencies ``(f, 2)`` and taps around the middle."""
    y = torch.arange(rows, dtype=angles.dtype, device=angles.device) - rows // 2
    x = torch.arange(columns, dtype=angles.dtype, device=angles.device) - columns // 2
    return angles[:, :1, None] * y[:, None] + angles[:, 1:, None] * x


def _grid(lags: Tensor, kernel: Sequence[int], image: Sequence[int]) -> tuple[Tensor, float]:
    """Frequencies ``(f, 2)`` of the best gluing, and what the eigenvalues between may exceed."""
    (rows, excess), (columns, more) = (_axis(p, k) for p, k in zip(image, kernel, strict=True))
    options = {"dtype": lags.dtype, "device": lags.device}
    # half steps of both axes; the other half plane holds the conjugates
    y, x = torch.arange(2 * rows, **options), torch.arange(columns + 1, **options)  # type: ignore[call-overload]
    grid = torch.stack(torch.meshgrid(math.pi * y / rows, math.pi * x / columns, indexing="ij"), -1)
    if max(image) > GLUED:
        return grid[::2, ::2].flatten(0, 1), excess * more
    # squared Frobenius norm over trace lies between the mean and the largest eigenvalue: enough to
    # choose by, and a form in the phases alone
    flat = lags.flatten(0, 1).flatten(1)
    angle = _angle(grid.flatten(0, 1), *lags.shape[:2]).flatten(1)
    c, s = angle.cos(), angle.sin()
    products, traces = flat @ flat.t(), lags.diagonal(dim1=2, dim2=3).sum(-1).flatten()
    height = ((c @ products) * c + (s @ products) * s).sum(1) / (c @ traces).clamp_min(1e-300)
    height = height.view(grid.shape[:2])
    gluings = [(a, b) for a in (0, 1) for b in (0, 1)]
    highest = torch.stack([height[a::2, b::2].max() for a, b in gluings])
    a, b = gluings[int(highest.argmin())]
    return grid[a::2, b::2].flatten(0, 1), excess * more


def _peak(lags: Tensor, kernel: Sequence[int], image: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A frequency ``(2,)`` of the highest symbol and a bound on the largest eigenvalue of all."""
    angles, excess = _grid(lags, kernel, image)
    phase = _angle(angles, *lags.shape[:2]).flatten(1)
    flat = lags.flatten(0, 1).flatten(1)
    symbols = torch.complex(phase.cos() @ flat, phase.sin() @ flat).view(-1, *lags.shape[2:])
    vectors = symbols.sum(2, keepdim=True)
    for _ in range(4):  # power iteration guesses where the peak is
        size = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        vectors = symbols @ (vectors / size.clamp_min(1e-300))
    guess = torch.linalg.vector_norm(vectors, dim=(1, 2))
    candidates = guess.topk(min(CANDIDATES, len(guess))).indices
    heights = torch.linalg.eigvalsh(symbols[candidates])[:, -1]
    top = heights.argmax()
    peak, bound = candidates[top], heights[top] * (1 + SLACK)
    shifted = -symbols
    shifted.diagonal(dim1=1, dim2=2).add_(bound)
    above = torch.linalg.cholesky_ex(shifted)[1].nonzero()[:, 0]
    if len(above):  # the guess was wrong
        heights = torch.linalg.eigvalsh(symbols[above])[:, -1]
        top = heights.argmax()
        peak, bound = above[top], heights[top]
    return angles[peak], bound * excess


def conv_bound(kernel: Tensor, size: Sequence[int]) -> Tensor:
    r"""Upper bound on the 2-norm of ``conv2d(x, kernel)`` with padding (k - 1)/2 of zeros.

    Where the largest eigenvalue of :math:`A(\omega)^H A(\omega)` peaks is guessed by power
    iteration; that no frequency exceeds the bound is then proved by a Cholesky factorisation at
    each, or all eigenvalues are computed. Everything runs in float64; the result is raised by the
    rounding of float32, so that it is never below the norm for the kernel as stored. The excess is
    that of the torus over the image (see the module), usually below 3 % from 7 x 7 pixels on, and
    0.1 % of slack; operators of at most 128 inputs or outputs are assembled, and the bound is their
    norm. The bound holds for any stride, which only drops rows. A 1 x 1 kernel is a
    matrix at each pixel: ``norm_bound``.

    Shapes: ``kernel`` ``(m, n, k, l)`` of odd sides; ``size`` height and width of the image;
    result a scalar, differentiable: its gradient is that of the eigenvalue at the peak.
    Sources: symbols, Sedghi et al. 2019 (arXiv:1805.10408); zero padding, Delattre et al. 2024
    (arXiv:2402.00240).
    Raises: ValueError for a kernel of even side.
    """
    m, n, rows, columns = kernel.shape
    if rows % 2 == 0 or columns % 2 == 0:
        raise ValueError(f"kernel has {rows} x {columns} taps; both numbers must be odd")
    if rows == columns == 1:
        return norm_bound(kernel[:, :, 0, 0])
    scale = kernel.detach().abs().amax().clamp_min(torch.finfo(kernel.dtype).tiny).double()
    v = kernel.double() / scale
    if m < n:
        v = v.transpose(0, 1)  # the symbol transposed: same singular values, smaller Gram matrix
    if (small := math.prod(size) * v.shape[1] <= ASSEMBLED):
        inputs = torch.eye(math.prod(size) * v.shape[1], dtype=v.dtype, device=v.device)
        images = inputs.view(-1, v.shape[1], *size)
        symbol = F.conv2d(images, v, padding=(rows // 2, columns // 2)).flatten(1).t()
    else:
        with torch.no_grad():
            angles, bound = _peak(_gram_lags(v), (rows, columns), size)
            angle = _angle(angles[None], rows, columns)[0]
            phase = torch.polar(torch.ones_like(angle), angle)
        symbol = (v * phase).sum((2, 3))
    highest = torch.linalg.eigvalsh(symbol.mH @ symbol)[-1].clamp_min(1e-300)
    excess = 1.0 if small else (bound / highest.detach()).clamp_min(0).sqrt()
    rounded: Tensor = (highest.sqrt() * excess * scale).to(kernel.dtype)
    return rounded * (1 + 4 * torch.finfo(torch.float32).eps)
