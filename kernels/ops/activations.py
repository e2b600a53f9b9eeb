"""The experts' activations, their derivatives, and the gated form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

_gelu_in_place: Any = getattr(torch._C._nn, "gelu_", None)
SMALL = 2**13  # values; at four times as many oneDNN is as fast


def activated(act: str, z: Tensor) -> Tensor:
    """act(z), (...), of a product that nobody else reads: its values may be written over.

    Torch leaves the GELU of values that lie one after the other to oneDNN, of which a call takes 6 us, and 25 where it
    comes cold into the cache. In another order they take a loop of torch's own, 1 us. There the last bit of a value
    depends on how many stand beside it, so that this is not for what promises bits.
    """
    if act != "gelu" or not _goes_past_onednn(z):
        return ACTIVATIONS[act](z)
    half = z.numel() // 2
    _gelu_in_place(z.as_strided((half, 2), (1, half)))
    return z


def _goes_past_onednn(z: Tensor) -> bool:
    # A graph has loops of its own, and a trace would keep the choice for other sizes. The compiler asks nothing below.
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    few = z.numel() <= SMALL and not z.numel() % 2 and z.is_cpu and z.is_contiguous() and _gelu_in_place is not None
    return few and not (z.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(z))


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
