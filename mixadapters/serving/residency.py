"""Which adapters lie in the model, on its device; the others wait in host memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from mixadapters.core.adapter import Adapter
from mixadapters.core.context import ForwardContext
from mixadapters.core.layer import AdapterHost


class Parts(NamedTuple):
    """An adapter by the layers that it sits at."""

    config: Any
    at: list[tuple[AdapterHost, Adapter]]


class Residents:
    """The adapters of a model, of which at most `most` lie in it: the one unused for longest makes room.

    All verbs are for moments in which no forward runs, and cost as much with a thousand adapters as with ten.

    Args:
        model: the root.
        most: None: all.
        idle: whether an adapter may leave the model now.
    """

    def __init__(self, model: Any, context: ForwardContext, most: int | None, idle: Callable[[str], bool]) -> None:
        self.model, self.context, self.most, self.idle = model, context, most, idle
        self._parts: dict[str, Parts] = {}
        self._inside: OrderedDict[str, None] = OrderedDict()  # by when they were used last
        self._hosts: list[AdapterHost] = []
        self.evictions = 0
        self.find_hosts()

    def find_hosts(self) -> None:
        """Look for the model's layers with adapters, without a look into these."""
        found: list[AdapterHost] = []
        waiting: list[Any] = [self.model]
        while waiting:
            module = waiting.pop()
            if isinstance(module, AdapterHost) and module.context is self.context:
                found.append(module)
            skipped = getattr(module, "adapter_layer_names", ()) if isinstance(module, AdapterHost) else ()
            waiting += [child for name, child in module._modules.items() if child is not None and name not in skipped]
        self._hosts = found

    def parts_of(self, name: str) -> list[tuple[AdapterHost, Adapter]]:
        """The adapter of a name in the model, by its layers."""
        return [(host, host.adapters[name]) for host in self._hosts if name in host.adapters]

    def __contains__(self, name: str) -> bool:
        return name in self._inside

    def __len__(self) -> int:
        return len(self._inside)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the model has no adapters but those that come: what walks it walks the base model."""
        aside = [(host, host.adapters._modules) for host in self._hosts]
        configs = dict(getattr(self.model, "peft_config", {}))
        for host, _ in aside:
            host.adapters._modules = {}
        if configs:
            self.model.peft_config.clear()
        try:
            yield
        finally:
            for host, modules in aside:
                new, host.adapters._modules = host.adapters._modules, modules
                modules.update(new)
            if configs:
                came = dict(self.model.peft_config)
                self.model.peft_config.clear()
                self.model.peft_config.update(configs | came)

    def enlist(self, name: str) -> None:
        """An adapter that is in the model is one of ours from now on; another may leave for it."""
        self._parts[name] = Parts(self.model.peft_config[name], self.parts_of(name))
        self._inside[name] = None
        self._make_room(name)

    def use(self, name: str) -> bool:
        """Have an adapter in the model.

        Returns:
            False where there is no room: all that are in it are in use.
        """
        if name not in self._inside:
            if self.most is not None and len(self._inside) >= self.most and not self._evict_one():
                return False
            config, at = self._parts[name]
            for host, adapter in at:
                host.adapters[name] = adapter
                host._move_adapter_to_device_of_base_layer(name)
            self.context.hosted.add(name)
            self.model.peft_config[name] = config
            self._inside[name] = None
        self._inside.move_to_end(name)
        return True

    def forget(self, name: str) -> None:
        """An adapter is none of ours any more."""
        self._take_out(name)
        self._parts.pop(name, None)

    def _make_room(self, kept: str) -> None:
        while self.most is not None and len(self._inside) > self.most and self._evict_one(kept):
            pass

    def _evict_one(self, kept: str | None = None) -> bool:
        name = next((name for name in self._inside if name != kept and self.idle(name)), None)
        if name is None:
            return False
        self._take_out(name)
        for _, adapter in self._parts[name].at:
            adapter.to(torch.device("cpu"))
        self.evictions += 1
        return True

    def _take_out(self, name: str) -> None:
        for host, _ in self._parts[name].at if name in self._parts else self.parts_of(name):
            host.adapters._modules.pop(name, None)
        self._inside.pop(name, None)
        self.context.hosted.discard(name)
        self.model.peft_config.pop(name, None)
