"""What tests of adapted models have in common: adapters that do something, and what a model says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def randomize(
    model: nn.Module, scale: float = 0.3, seed: int = 1, only: str = "", *, trained: bool = False,
    evaluation: bool = False,
) -> nn.Module:  # fmt: skip
    """Draw parameters anew, so that adapters and gates, which mostly start as nothing, do something.

    Args:
        scale: standard deviation.
        only: a part of the names of those that are drawn.
        trained: those that train, heads among them, and not those of adapters.
        evaluation: put the model into evaluation.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name and (parameter.requires_grad if trained else "adapters." in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval() if evaluation else model


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, of those that have one; the model has none afterwards."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any], **fields: Any) -> Tensor:
    """In the mode that the model has."""
    return model(**inputs, **fields).logits
