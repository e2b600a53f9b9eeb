"""What learned routers make of a hidden state: logits, in float32 whatever the model's dtype is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def score_layers(
    in_features: int, hidden: Sequence[int], arms: int, dropout: float
) -> tuple[nn.Sequential, nn.Linear]:
    """Hidden ReLU layers of these widths, and the output layer, which starts at zero."""
    widths = [in_features, *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Dropout(dropout), nn.Linear(before, after), nn.ReLU()]
    output = nn.Linear(widths[-1], arms)
    nn.init.zeros_(output.weight)
    nn.init.zeros_(output.bias)
    return nn.Sequential(*layers, nn.Dropout(dropout)), output


def score(read: Tensor, hidden: nn.Sequential, output: nn.Linear, normalize: bool) -> Tensor:
    """read (..., d) -> logits (..., A), in float32 at least. `normalize`: of vectors of unit root mean square."""
    kind = torch.promote_types(read.dtype, torch.float32)
    read = read.to(kind)
    if normalize:
        read = F.rms_norm(read, (read.shape[-1],))
    with torch.autocast(read.device.type, enabled=False):
        for layer in hidden:
            read = (
                F.linear(read, layer.weight.to(kind), layer.bias.to(kind))
                if isinstance(layer, nn.Linear)
                else layer(read)
            )
        return F.linear(read, output.weight.to(kind), output.bias.to(kind))
