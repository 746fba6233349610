r"""Dense networks g: R^d -> R^d whose Lipschitz constant is certified from above."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import ACTIVATIONS
from .norms import norm_bound
from .tape import Tape, Weights

__all__ = ["LipschitzNet"]



class LipschitzNet(nn.Module):
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
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}"
            )
        if not 0 < lipschitz < 1:
            raise ValueError(f"lipschitz={lipschitz} must lie strictly between 0 and 1")
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden={tuple(hidden)} must hold at least one positive width")
        self.features, self.hidden, self.lipschitz = features, tuple(hidden), lipschitz
        self.activation = ACTIVATIONS[activation]
        widths_in = [features, *(h * self.activation.widen for h in hidden)]
        widths_out = [*hidden, features]
        self.weights = nn.ParameterList(
            torch.empty(o, i) for i, o in zip(widths_in, widths_out, strict=True)
        )
        self.biases = nn.ParameterList(torch.zeros(o) for o in widths_out)
        self.raw_scale = (
            nn.Parameter(torch.full((len(hidden),), math.log(math.expm1(0.5))))
            if self.activation.learned_scale
            else None
        )
        self.context_net = (
            nn.Sequential(nn.Linear(context, 64), nn.SiLU(), nn.Linear(64, sum(widths_out)))
            if context
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights of variance 1 / (3 fan-in), a zero last layer, biases over one period."""
        for w, b in zip(self.weights, self.biases, strict=True):
            nn.init.uniform_(w, -(w.shape[1] ** -0.5), w.shape[1] ** -0.5)
            nn.init.uniform_(b, -(w.shape[1] ** -0.5), w.shape[1] ** -0.5)
        nn.init.zeros_(self.weights[-1])
        nn.init.zeros_(self.biases[-1])
        if self.context_net is not None:
            for p in self.context_net[-1].parameters():
                nn.init.zeros_(p)

    def prepare(self, context: Tensor | None = None) -> Weights:
        """Normalised weights for this call; ``context`` is ``(batch, context)`` or None."""
        bounds = torch.stack([norm_bound(w) for w in self.weights])
        n = len(self.weights)
        shrink = (self.lipschitz / bounds.prod().clamp_min(self.lipschitz)).pow(1 / n)
        rate = F.softplus(self.raw_scale).clamp_min(1e-4) if self.raw_scale is not None else None
        extra = None
        if self.context_net is not None and context is not None:
            extra = self.context_net(context).split([b.numel() for b in self.biases], -1)
        matrices, biases = [], []
        scale_out: Tensor | float = bounds.new_ones(())
        for k, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            scale_in = bounds.new_ones(())
            if k < n - 1:
                scale_in = rate[k] if rate is not None else scale_in * self.activation.scale_in
            b = b if extra is None else b + extra[k]
            matrices.append(w * (shrink * scale_in * scale_out))
            biases.append(b * scale_in)
            divisor = rate[k] if rate is not None and k < n - 1 else 1
            scale_out = self.activation.scale_out / divisor
        return Weights(tuple(matrices), tuple(biases))

    def bound(self) -> Tensor:
        """Certified Lipschitz bound of g as it stands, a scalar at most ``lipschitz``."""
        return torch.stack([norm_bound(w) for w in self.weights]).prod().clamp(max=self.lipschitz)

    def value(self, x: Tensor, weights: Weights) -> Tensor:
        """Evaluate g: ``(batch, features)`` to ``(batch, features)``."""
        last = len(weights.matrices) - 1
        for k, (w, b) in enumerate(zip(*weights, strict=True)):
            x = torch.addmm(b, x, w.t())
            if k < last:
                x = self.activation(x)
        return x

    def rounding(self, x: Tensor, weights: Weights) -> Tensor:
        """Estimate ``(batch,)`` of the 2-norm error that floating point makes in ``value``.

        First-order running error analysis, with the square root of the inner dimension in place of
        the dimension (the probabilistic model of Higham and Mary 2019), and four units more for the
        rounding of the weights.
        """
        unit = torch.finfo(x.dtype).eps / 2
        h, error = x, x.new_zeros(len(x))
        last = len(weights.matrices) - 1
        for k, (w, b) in enumerate(zip(*weights, strict=True)):
            size = torch.linalg.vector_norm(h.abs() @ w.abs().t() + b.abs(), dim=-1)
            error = norm_bound(w) * error + (w.shape[1] ** 0.5 + 4) * unit * size
            h = torch.addmm(b, h, w.t())
            if k < last:
                h = self.activation(h)  # slopes of phi stay below 1.2
                error = 1.2 * error + 2 * unit * torch.linalg.vector_norm(h, dim=-1)
        return error

    def value_and_jacobian(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Evaluate g and its exact Jacobian ``[b, i, o]`` = d g_o / d x_i; fully differentiable."""
        tape = Tape.record(x, weights, self.activation)
        return tape.value, tape.jacobian
