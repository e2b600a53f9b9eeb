"""The modules of a model, and their paths, without those of its adapters, of which there may be many."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# What FSDP, torch.compile and activation checkpointing put into names.
WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


def plain_path(path: str) -> str:
    """The path of a module, or the key of a parameter, as it is in a model without adapters."""
    return re.sub(r"(^|\.)base_layer(?=\.|$)", "", path).removeprefix(".")


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their paths, in the order of `named_modules()`, but for those inside adapters of any type.

    A layer of a tuner is among them, and of what it holds the frozen module alone. So a walk takes as long with a
    thousand adapters as with one.
    """
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        children = module._modules
        if isinstance(module, BaseTunerLayer):
            children = {name: child for name, child in children.items() if name == "base_layer"}
        before = f"{path}." if path else ""
        waiting += [(f"{before}{name}", child) for name, child in reversed(children.items()) if child is not None]


def adapters_named(model: nn.Module, names: Sequence[str] | None) -> Iterator[nn.Module]:
    """The adapters of this library with these names, layer by layer. names: None stands for the active ones."""
    for _, layer in outside_adapters(model):
        adapters = getattr(layer, "adapters", None) if isinstance(layer, BaseTunerLayer) else None
        if isinstance(adapters, nn.ModuleDict):
            wanted = layer.active_adapters if names is None else dict.fromkeys(names)
            yield from (adapters[name] for name in wanted if name in adapters)
