"""What learned routers make of a hidden state: features and logits, in float32 whatever the model's dtype is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "square": torch.square,
    "tanh": torch.tanh,
}
# f(c z) = c^n f(z): dividing by a temperature is then the same as other weights.
HOMOGENEOUS = (None, "relu", "square")


def score_layers(
    in_features: int, hidden: Sequence[int], arms: int, dropout: float, init_range: float = 0.0
) -> tuple[nn.Sequential, nn.Linear]:
    """Hidden ReLU layers of these widths; and the output layer: weights N(0, init_range^2), biases 0."""
    widths = [in_features, *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Dropout(dropout), nn.Linear(before, after), nn.ReLU()]
    output = nn.Linear(widths[-1], arms)
    nn.init.zeros_(output.weight)
    nn.init.zeros_(output.bias)
    if init_range:
        nn.init.normal_(output.weight, std=init_range)
    return nn.Sequential(*layers, nn.Dropout(dropout)), output


def exact(read: Tensor, normalize: bool) -> Tensor:
    """read (..., d) in float32 at least. `normalize`: as vectors of unit root mean square."""
    if read.dtype != torch.float32:
        read = read.to(torch.promote_types(read.dtype, torch.float32))
    return F.rms_norm(read, (read.shape[-1],)) if normalize else read


def linear(read: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As F.linear, in the dtype of `read`, under autocast too."""
    if weight.dtype != read.dtype or (bias is not None and bias.dtype != read.dtype):
        weight, bias = weight.to(read.dtype), None if bias is None else bias.to(read.dtype)
    if not torch.is_autocast_enabled(read.device.type):
        return F.linear(read, weight, bias)
    with torch.autocast(read.device.type, enabled=False):
        return F.linear(read, weight, bias)


def features(read: Tensor, hidden: nn.Sequential) -> Tensor:
    """read (..., d) -> what the output layer reads (..., h)."""
    for layer in hidden._modules.values():
        if isinstance(layer, nn.Linear):
            read = linear(read, layer.weight, layer.bias)
        elif layer.training or not isinstance(layer, nn.Dropout):  # dropout does nothing then, but costs a call
            read = layer(read)
    return read
