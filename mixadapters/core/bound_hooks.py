"""Hooks that are bound methods: which objects they belong to.

The hooks of this library are, so that a copy or a pickle of a model has hooks that belong to the copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def owners(hooks: Mapping[int, Any]) -> Iterator[Any]:
    """The objects whose methods are among these hooks of a module, in order; None for a hook that is no method."""
    return (getattr(hook, "__self__", None) for hook in hooks.values())


def unhook(module: nn.Module, owner: Any) -> None:
    """Take the forward hooks that are methods of `owner` off a module."""
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(module, kind)
        for key in [key for key, found in zip(hooks, owners(hooks), strict=True) if found is owner]:
            del hooks[key]
            for flags in (f"{kind}_with_kwargs", "_forward_hooks_always_called"):  # no two hooks have one key
                getattr(module, flags).pop(key, None)
