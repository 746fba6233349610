"""Plain networks that turn some variables into the parameters of a map of the others.

Everything here is feature-major: inputs ``(inputs, n)``, outputs ``(outputs, n)``, one contiguous
row for each unit over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "Dense", "activation_named", "check_hidden", "start"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "elu": F.elu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
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


class Dense(nn.Module):
    """A network from ``(inputs, n)`` to ``(outputs, n)``, started at the constant ``bias``.

    ``residual``: equal widths, each pair of hidden layers adds to what it was given (Durkan et al.
    2019, arXiv:1906.04032, appendix B.1).
    """

    def __init__(
        self,
        inputs: int,
        bias: Tensor,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        residual: bool = False,
    ) -> None:
        super().__init__()
        widths = [inputs, *check_hidden(hidden)]
        if residual and len(set(hidden)) > 1:
            raise ValueError(f"hidden={tuple(hidden)!r}: residual layers need equal widths")
        self.activation, self.residual = activation_named(activation), residual
        pairs = list(zip(widths, widths[1:], strict=False))
        self.weights = nn.ParameterList(nn.Parameter(start(torch.empty(o, i), i)) for i, o in pairs)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(o, 1)) for _, o in pairs)
        self.weights.append(nn.Parameter(torch.zeros(len(bias), widths[-1])))
        self.biases.append(nn.Parameter(bias.reshape(-1, 1).clone()))

    def forward(self, h: Tensor) -> Tensor:
        """Outputs ``(outputs, n)`` of inputs ``(inputs, n)``."""
        last = len(self.weights) - 1
        for k, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = torch.addmm(b, w, h)
            if k < last:
                y = self.activation(y)
            h = h + y if self.residual and 0 < k < last else y
        return h
