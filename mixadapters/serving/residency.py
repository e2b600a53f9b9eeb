"""Which adapters lie in the model, on its device; the others wait in host memory, or in files."""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixadapters.core.adapter import Adapter
from mixadapters.core.context import ForwardContext
from mixadapters.core.files import weights_of
from mixadapters.core.layer import AdapterHost
from mixadapters.core.walking import outside_adapters


class Parts(NamedTuple):
    """An adapter by the layers that it sits at."""

    config: Any
    at: list[tuple[AdapterHost, Adapter]]

    def tensors(self) -> dict[str, Tensor]:
        """Its weights and buffers, by a number of the layer and their names there."""
        return {
            f"{number}.{name}": tensor
            for number, (_, adapter) in enumerate(self.at)
            for name, tensor in (*adapter.named_parameters(), *adapter.named_buffers())
        }


class Reading:
    """The weights of an adapter on their way from a file into host memory: a thread reads, and nobody waits for it."""

    def __init__(self, path: Path, ready: Callable[[], None]) -> None:
        self.path, self.ready = path, ready
        self.done = False
        self.tensors: dict[str, Tensor] = {}
        self.error: Exception | None = None
        threading.Thread(target=self._read, name=f"reading {path.name}", daemon=True).start()

    def _read(self) -> None:
        try:
            with weights_of(self.path) as weights:  # mapped: a copy is all that comes into memory, and stays there
                self.tensors = {name: weights[name].clone() for name in weights}
        except Exception as error:  # for the requests that wait for it
            self.error = error
        self.done = True
        self.ready()


class Residents:
    """The adapters of a model, of which at most `most` lie in it: the one unused for longest makes room.

    All verbs are for moments in which no forward runs, and cost as much with a thousand adapters as with ten.

    Args:
        model: the root.
        most: None: all.
        idle: whether an adapter may leave the model now.
        folder: adapters outside the model lie in files of a folder that is made here, and goes with this object.
            None: in host memory.
        ready: called, in another thread, when an adapter has come from its file.
    """

    def __init__(
        self, model: Any, context: ForwardContext, most: int | None, idle: Callable[[str], bool],
        folder: Path | None = None, ready: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.model, self.context, self.most, self.idle = model, context, most, idle
        self.ready = ready
        self._folder = None if folder is None else tempfile.TemporaryDirectory(prefix="adapters-", dir=folder)
        self._files: dict[str, Path] = {}  # written once: a served adapter does not change
        self._away: dict[str, int] = {}  # those whose weights lie in their files alone -> bytes
        self._readings: dict[str, Reading] = {}
        self._written = 0
        self._parts: dict[str, Parts] = {}
        self._inside: OrderedDict[str, None] = OrderedDict()  # by when they were used last
        self._hosts: list[AdapterHost] = []
        self.evictions = 0
        self.find_hosts()

    def find_hosts(self) -> None:
        """Look for the model's layers with adapters, without a look into these."""
        hosts = (module for _, module in outside_adapters(self.model) if isinstance(module, AdapterHost))
        self._hosts = [host for host in hosts if host.context is self.context]

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
            False where there is no room, as all that are in it are in use, or where its weights are still to be read.

        Raises:
            OSError, ValueError: they cannot be read.
        """
        if name not in self._inside:
            if name in self._away and not self._has_come(name):
                return False
            if self.most is not None and len(self._inside) >= self.most and not self._evict_one():
                return False
            self._take_in(name)
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
        self._away.pop(name, None)
        self._readings.pop(name, None)
        if (path := self._files.pop(name, None)) is not None:
            path.unlink(missing_ok=True)

    # --- weights in files ---------------------------------------------------------------------------------------

    def coming(self, name: str) -> bool:
        """Whether the weights of an adapter are being read."""
        return name in self._readings and not self._readings[name].done

    def drop_unwanted(self, wanted: Callable[[str], bool]) -> None:
        """Forget what has been read for requests that have been given up."""
        for name in [name for name, reading in self._readings.items() if reading.done and not wanted(name)]:
            del self._readings[name]

    @property
    def filed_bytes(self) -> int:
        """Of the adapters whose weights lie in files alone."""
        return sum(self._away.values())

    def _has_come(self, name: str) -> bool:
        """Whether the weights have been read; the first question has them read."""
        if name not in self._readings:
            self._readings[name] = Reading(self._files[name], self.ready)
            return False
        reading = self._readings[name]
        if reading.done and reading.error is not None:
            raise self._readings.pop(name).error  # type: ignore[misc]
        return reading.done

    def _take_in(self, name: str) -> None:
        """What has been read becomes the adapter's weights."""
        if name in self._away:
            read = self._readings.pop(name).tensors
            for key, tensor in self._parts[name].tensors().items():
                tensor.data = read[key]
            del self._away[name]

    def _put_away(self, name: str) -> None:
        """The weights of an adapter that has left the model go to host memory, or to its file."""
        parts = self._parts[name]
        if self._folder is None:
            for _, adapter in parts.at:
                adapter.to(torch.device("cpu"))
            return
        tensors = parts.tensors()
        if name not in self._files:
            self._written += 1
            path = Path(self._folder.name) / f"{self._written}.safetensors"
            save_file({key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}, path)
            self._files[name] = path
        self._away[name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        for tensor in tensors.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype)

    def _make_room(self, kept: str) -> None:
        while self.most is not None and len(self._inside) > self.most and self._evict_one(kept):
            pass

    def _evict_one(self, kept: str | None = None) -> bool:
        name = next((name for name in self._inside if name != kept and self.idle(name)), None)
        if name is None:
            return False
        self._take_out(name)
        self._put_away(name)
        self.evictions += 1
        return True

    def _take_out(self, name: str) -> None:
        for host, _ in self._parts[name].at if name in self._parts else self.parts_of(name):
            host.adapters._modules.pop(name, None)
        self._inside.pop(name, None)
        self.context.hosted.discard(name)
        self.model.peft_config.pop(name, None)
