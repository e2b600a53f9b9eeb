"""All layers of routed experts of a model."""

from __future__ import annotations

from torch import nn

from mixadapters.surgery.blocks import base_layers
from mixadapters.surgery.mixtures import mixture_layers
from mixadapters.surgery.view import ExpertLayer, Routed, Watcher

__all__ = ["ExpertLayer", "Routed", "Watcher", "expert_layers", "require_layers"]


def expert_layers(model: nn.Module, adapter: str | None = None) -> list[ExpertLayer]:
    """The layers of routed experts of a model, in its order: those of its adapters, then those of the base.

    Args:
        model: with or without adapters, whatever wraps it.
        adapter: of this adapter alone; "" for the base alone. None: all.

    Raises:
        ValueError: no such adapter; or a base with experts of a type, or in a form, that is not in the table.
    """
    layers: list[ExpertLayer] = []
    if adapter != "":
        layers += mixture_layers(model, adapter)
    if adapter in (None, ""):
        layers += base_layers(model)
    return layers


def require_layers(layers: list[ExpertLayer]) -> list[ExpertLayer]:
    """The layers that were found in a model. Raises ValueError where there are none."""
    if not layers:
        raise ValueError("the model has no routed experts: no mixture of an adapter, and no MoE block in its base")
    return layers
