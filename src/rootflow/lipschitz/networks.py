r"""Networks g whose Lipschitz constant is certified from above: dense ones, and convolutional."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import ACTIVATIONS
from .conv import conv_bound
from .layers import affine
from .norms import norm_bound
from .tape import CACHE_ELEMENTS, Tape, Weights, value_and_jacobian

__all__ = ["CertifiedNet", "LipschitzConvNet", "LipschitzNet"]


class CertifiedNet(nn.Module):
    r"""What dense and convolutional networks share: weights, bounds and evaluation on flat rows.

    ``grid`` is the shape of a row inside the network, ``(d,)`` or ``(height, width, channels)``;
    ``shapes`` those of the weights; with ``preactivation`` the input passes an activation first.
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        shapes: Sequence[tuple[int, ...]],
        activation: str,
        lipschitz: float,
        context: int,
        preactivation: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < lipschitz < 1:
            raise ValueError(f"lipschitz={lipschitz} must lie strictly between 0 and 1")
        self.grid, self.features, self.lipschitz = grid, math.prod(grid), lipschitz
        self.activation, self.preactivation = ACTIVATIONS[activation], preactivation
        self.weights = nn.ParameterList(torch.empty(s) for s in shapes)
        widths = [*([grid[-1]] if preactivation else []), *(s[0] for s in shapes)]
        self.biases = nn.ParameterList(torch.zeros(w) for w in widths)
        self.width = math.prod(grid[:-1]) * max(widths)  # numbers of the widest layer of a row
        self.raw_scale = (
            nn.Parameter(torch.full((len(widths) - 1,), math.log(math.expm1(0.5))))
            if self.activation.learned_scale
            else None
        )
        self.context_net = (
            nn.Sequential(nn.Linear(context, 64), nn.SiLU(), nn.Linear(64, sum(widths)))
            if context
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights of variance 1 / (3 fan-in), a zero last layer, biases over one period."""
        biases = list(self.biases)[-len(self.weights) :]
        for w, b in zip(self.weights, biases, strict=True):
            limit = w[0].numel() ** -0.5
            nn.init.uniform_(w, -limit, limit)
            nn.init.uniform_(b, -limit, limit)
        nn.init.zeros_(self.weights[-1])
        nn.init.zeros_(self.biases[-1])
        if self.context_net is not None:
            for p in self.context_net[-1].parameters():
                nn.init.zeros_(p)

    def _norm(self, w: Tensor) -> Tensor:
        """Certified bound on the norm of one layer."""
        if w.dim() == 2:
            return norm_bound(w)
        return conv_bound(w, self.grid[:2]) if w.dim() else w.abs()

    def prepare(self, context: Tensor | None = None) -> Weights:
        """Normalised weights for this call; ``context`` is ``(batch, context)`` or None."""
        weights, own = list(self.weights), list(self.biases)
        bounds = torch.stack([self._norm(w) for w in weights])
        shrink = (self.lipschitz / bounds.prod().clamp_min(self.lipschitz)).pow(1 / len(bounds))
        rate = F.softplus(self.raw_scale).clamp_min(1e-4) if self.raw_scale is not None else None
        extra = None
        if self.context_net is not None and context is not None:
            extra = self.context_net(context).split([b.numel() for b in own], -1)
        last = len(own) - 1
        shares = [(w, shrink) for w in weights]
        if self.preactivation:
            shares.insert(0, (one := bounds.new_ones(()), one))
        matrices, biases = [], []
        scale_out: Tensor | float = 1.0
        for k, ((w, share), b) in enumerate(zip(shares, own, strict=True)):
            scale_in: Tensor | float = 1.0
            if k < last:
                scale_in = rate[k] if rate is not None else self.activation.scale_in
            b = b if extra is None else b + extra[k]
            matrices.append(w * (share * (scale_in * scale_out)))
            biases.append(b * scale_in if k < last else b)
            divisor = rate[k] if rate is not None and k < last else 1
            scale_out = self.activation.scale_out / divisor
        return Weights(tuple(matrices), tuple(biases))

    def bound(self) -> Tensor:
        """Certified Lipschitz bound of g as it stands, a scalar at most ``lipschitz``."""
        return torch.stack([self._norm(w) for w in self.weights]).prod().clamp(max=self.lipschitz)

    def value(self, x: Tensor, weights: Weights) -> Tensor:
        """Evaluate g: ``(batch, features)`` to ``(batch, features)``."""
        size = len(x) if len(self.grid) == 1 else max(1, CACHE_ELEMENTS // self.width)
        if len(x) <= size:
            return self._value(x, weights)
        parts = (slice(start, start + size) for start in range(0, len(x), size))
        return torch.cat([self._value(x[rows], weights.rows(rows)) for rows in parts])

    def _value(self, x: Tensor, weights: Weights) -> Tensor:
        h = x.view(-1, *self.grid)
        last = len(weights.matrices) - 1
        for k, (w, b) in enumerate(zip(*weights, strict=True)):
            h = affine(h, w, b)
            if k < last:
                h = self.activation(h)
        return h.flatten(1)

    def rounding(self, x: Tensor, weights: Weights) -> Tensor:
        """Estimate ``(batch,)`` of the 2-norm error that floating point makes in ``value``.

        First-order running error analysis, with the square root of the inner dimension in place of
        the dimension (the probabilistic model of Higham and Mary 2019), and four units more for the
        rounding of the weights.
        """
        unit = torch.finfo(x.dtype).eps / 2
        h, error = x.view(-1, *self.grid), x.new_zeros(len(x))
        last = len(weights.matrices) - 1
        for k, (w, b) in enumerate(zip(*weights, strict=True)):
            size = torch.linalg.vector_norm(affine(h.abs(), w.abs(), b.abs()).flatten(1), dim=-1)
            inner = w[0].numel() if w.dim() else 1
            error = self._norm(w) * error + (inner**0.5 + 4) * unit * size
            h = affine(h, w, b)
            if k < last:
                h = self.activation(h)  # slopes of phi stay below 1.2
                error = 1.2 * error + 2 * unit * torch.linalg.vector_norm(h.flatten(1), dim=-1)
        return error

    def record(
        self,
        x: Tensor,
        weights: Weights,
        seeds: Tensor | None = None,
        *,
        pulls_only: bool = False,
    ) -> Tape:
        """Evaluate g and keep what its gradients need; see ``Tape.record``."""
        return Tape.record(x, weights, self.activation, seeds, self.grid, pulls_only)

    def value_and_jacobian(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Evaluate g and its exact Jacobian ``[b, i, o]`` = d g_o / d x_i; fully differentiable."""
        tape = self.record(x, weights)
        return tape.value, tape.jacobian

    def jacobian(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """The same without a trace for gradients, and faster."""
        return value_and_jacobian(x, weights, self.activation, self.grid)


def _check(hidden: Sequence[int], activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}"
        )
    if not hidden or min(hidden) < 1:
        raise ValueError(f"hidden={tuple(hidden)} must hold at least one positive width")


class LipschitzNet(CertifiedNet):
    r"""Multilayer perceptron with a certified bound on its 2-norm Lipschitz constant.

    .. math:: g(x) = W_n \phi(\dots \phi(W_1 x + b_1) \dots) + b_n, \qquad
              \mathrm{Lip}(g) \le \prod_k \sigma(W_k) \le L

    where each sigma is bounded from above by ``norm_bound`` on every call, so no update is ever
    needed and the bound holds for every value of the parameters. Only the product is restricted:
    all layers shrink by one common factor when it exceeds L, so that a layer may be steep where
    another is flat.

    Shapes: input and output ``(batch, features)``; context ``(batch, context)`` enters through the
    biases only and is not restricted. The last layer starts at zero, so g starts at zero.

    Raises: ValueError for an unknown activation or a ``lipschitz`` outside (0, 1).
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (128, 128),
        *,
        activation: str = "sin",
        lipschitz: float = 0.97,
        context: int = 0,
    ) -> None:
        _check(hidden, activation)
        widen = ACTIVATIONS[activation].widen
        widths_in = [features, *(h * widen for h in hidden)]
        shapes = list(zip([*hidden, features], widths_in, strict=True))
        super().__init__((features,), shapes, activation, lipschitz, context)
        self.hidden = tuple(hidden)


class LipschitzConvNet(CertifiedNet):
    r"""Convolutional network on images with a certified bound on its 2-norm Lipschitz constant.

    As ``LipschitzNet``, with zero-padded convolutions of stride one: 1 x 1 kernels are bounded by
    ``norm_bound``, larger ones by ``conv_bound`` for the image at hand. ``kernels`` are the sides
    of the kernels, by default 3 first and last and 1 between. With ``preactivation`` the activation
    acts on the input first, as in the published image flows from the second block on.

    Shapes: ``event`` is ``(channels, height, width)``. All methods take flat rows
    ``(batch, height * width * channels)``, channels last, which ``rows`` makes from images
    ``(batch, channels, height, width)`` and ``images`` turns back.

    Source of the architecture: Chen et al. 2019 (arXiv:1906.02735).
    Raises: ValueError for an unknown activation, a ``lipschitz`` outside (0, 1), kernels that are
    even or not one more than hidden widths.
    """

    def __init__(
        self,
        event: Sequence[int],
        hidden: Sequence[int] = (128, 128),
        *,
        kernels: Sequence[int] | None = None,
        activation: str = "lipswish",
        preactivation: bool = False,
        lipschitz: float = 0.97,
        context: int = 0,
    ) -> None:
        _check(hidden, activation)
        kernels = [3, *[1] * (len(hidden) - 1), 3] if kernels is None else kernels
        if len(kernels) != len(hidden) + 1 or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(
                f"kernels={tuple(kernels)} must hold {len(hidden) + 1} odd numbers, "
                f"one more than hidden={tuple(hidden)}"
            )
        channels, height, width = event
        widen = ACTIVATIONS[activation].widen
        widths_in = [channels * (widen if preactivation else 1), *(h * widen for h in hidden)]
        shapes: list[tuple[int, ...]] = [
            (o, i) if k == 1 else (o, i, k, k)
            for o, i, k in zip([*hidden, channels], widths_in, kernels, strict=True)
        ]
        grid = (height, width, channels)
        super().__init__(grid, shapes, activation, lipschitz, context, preactivation)
        self.hidden, self.kernels = tuple(hidden), tuple(kernels)

    def rows(self, x: Tensor) -> Tensor:
        """Flat rows of images ``(batch, channels, height, width)``."""
        return x.permute(0, 2, 3, 1).flatten(1)

    def images(self, rows: Tensor) -> Tensor:
        """Images ``(batch, channels, height, width)`` of flat rows."""
        return rows.view(-1, *self.grid).permute(0, 3, 1, 2)
