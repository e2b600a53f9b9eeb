"""The experts' activations, their derivatives, and the gated form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "tanh": torch.tanh,
}

_aten = torch.ops.aten
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda grad, z: grad,
    "relu": lambda grad, z: _aten.threshold_backward(grad, z, 0),
    "gelu": lambda grad, z: _aten.gelu_backward(grad, z),
    "gelu_tanh": lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh"),
    "silu": lambda grad, z: _aten.silu_backward(grad, z),
    "tanh": lambda grad, z: _aten.tanh_backward(grad, torch.tanh(z)),
}


def hidden(act: str, z: Tensor, v: Tensor | None) -> Tensor:
    """What the up projection reads: act(z), or act(v) * z where v comes from the gate projection."""
    return ACTIVATIONS[act](z) if v is None else ACTIVATIONS[act](v) * z


def hidden_backward(act: str, grad: Tensor, z: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of z and v."""
    if v is None:
        return _BACKWARD[act](grad, z), None
    return ACTIVATIONS[act](v) * grad, _BACKWARD[act](grad * z, v)
