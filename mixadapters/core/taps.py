"""The hook that keeps what a module reads, for adapters that sit elsewhere."""

from __future__ import annotations

from typing import Any

from torch import nn

from mixadapters.core.bound_hooks import owners


class Tap:
    """Keeps what a module receives, for adapters that sit elsewhere: a permanent forward pre-hook.

    The hook is a bound method, so copies and pickles of the model have their own taps on their own context.
    """

    def __init__(self, path: str, context: Any, turned: bool = False) -> None:
        self.path = path
        self.context = context
        self.turned = turned

    @classmethod
    def attach(cls, module: nn.Module, path: str, context: Any, turned: bool = False) -> Tap:
        """Keep the input of `module`, (B, T, d) or (N, d), in `context.record.taps[path]`; the same tap every time.

        turned: the module reads (T, B, d).
        """
        for owner in owners(module._forward_pre_hooks):
            if isinstance(owner, cls) and owner.path == path and owner.context is context:
                return owner
        tap = cls(path, context, turned)
        module.register_forward_pre_hook(tap.keep, with_kwargs=True)
        return tap

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read = args[0] if args else kwargs["hidden_states"]
        record = self.context.record_at(self, training=module.training)
        record.taps[self.path] = read.transpose(0, 1) if self.turned else read
