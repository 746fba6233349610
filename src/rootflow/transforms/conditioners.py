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

    ``residual``: equal widths, each hidden layer after the first adds to what it was given, the
    activation standing before it (after He et al. 2016, arXiv:1603.05027). Without inputs the
    network is the constant alone, still learned.
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
        widths = [inputs, *check_hidden(hidden)] if inputs else []
        if residual and len(set(hidden)) > 1:
            raise ValueError(f"hidden={tuple(hidden)!r}: residual layers need equal widths")
        self.activation, self.residual = activation_named(activation), residual
        self.names = [(f"weight{k}", f"bias{k}") for k in range(len(widths) or 1)]
        for (weight, b), i, o in zip(self.names, widths, widths[1:], strict=False):
            self.register_parameter(weight, nn.Parameter(start(torch.empty(o, i), i)))
            self.register_parameter(b, nn.Parameter(torch.zeros(o, 1)))
        weight, b = self.names[-1]
        last = nn.Parameter(torch.zeros(len(bias), widths[-1])) if inputs else None
        self.register_parameter(weight, last)
        self.register_parameter(b, nn.Parameter(bias.reshape(-1, 1).clone()))

    def forward(self, h: Tensor) -> Tensor:
        """Outputs ``(outputs, n)`` of inputs ``(inputs, n)``."""
        last = len(self.names) - 1
        for k, (weight, bias) in enumerate(self.names):  # attributes: a ParameterList is slow
            w: Tensor | None = getattr(self, weight)
            b: Tensor = getattr(self, bias)
            if w is None:
                return b.expand(-1, h.shape[1])
            y = torch.addmm(b, w, self.activation(h) if k else h)
            h = h + y if self.residual and 0 < k < last else y
        return h
