"""Which adapters lie in the model, on its device; the others wait in host memory, or in files."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mixadapters.core.adapter import Adapter
from mixadapters.core.context import ForwardContext
from mixadapters.core.files import Safetensors, weights_of
from mixadapters.core.folders import ScratchFolder
from mixadapters.core.layer import AdapterHost
from mixadapters.core.walking import outside_adapters
from mixadapters.serving.forms import Form, Parts
from mixadapters.serving.requests import AdapterUnreadable

MARK = "written_by"  # in the metadata of a file: the object that has written it, and which of its files it is


class Reading:
    """The weights of an adapter on their way from a file into host memory: a thread reads, and nobody waits for it."""

    def __init__(self, path: Path, mark: str, ready: Callable[[], None]) -> None:
        self.path, self.mark, self.ready = path, mark, ready
        self.done = False
        self.tensors: dict[str, Tensor] = {}
        self.error: Exception | None = None
        threading.Thread(target=self._read, name=f"reading {path.name}", daemon=True).start()

    def _read(self) -> None:
        try:
            with weights_of(self.path) as weights:  # mapped: a copy is all that comes into memory, and stays there
                assert isinstance(weights, Safetensors)
                if (weights.opened.metadata() or {}).get(MARK) != self.mark:
                    raise ValueError(f"{self.path} is another file than the server has written there")
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
        self._folder = None if folder is None else ScratchFolder(folder, "adapters-")
        self._mark = uuid4().hex
        self._files: dict[str, Path] = {}  # written once: a served adapter does not change
        self._away: dict[str, int] = {}  # those whose weights lie in their files alone -> bytes
        self._readings: dict[str, Reading] = {}
        self._numbers = itertools.count(1)  # of files
        self._parts: dict[str, Parts] = {}  # of those in the model, and of those outside that have no form
        self._forms: dict[str, Form] = {}
        self._waiting: dict[str, dict[str, Tensor]] = {}  # weights of those outside the model, in host memory
        self._inside: OrderedDict[str, int] = OrderedDict()  # by when they were used last -> their stay
        self._stays = itertools.count(1)
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

    def stay(self, name: str) -> int | None:
        """A number that an adapter has as long as it is in the model; None where it is not there."""
        return self._inside.get(name)

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

    def parts_in(self, name: str) -> Parts:
        """The same with its config."""
        return Parts(self.model.peft_config[name], self.parts_of(name))

    def enlist(self, name: str, form: Form | None = None) -> None:
        """An adapter that is in the model is one of ours from now on; it or another may leave it for that."""
        self._parts[name] = self.parts_in(name)
        if form is not None:
            self._forms[name] = form
        self._inside[name] = next(self._stays)
        try:
            self._make_room()
        except AdapterUnreadable:
            self.forget(name)
            raise

    def wait(self, name: str, form: Form, weights: dict[str, Tensor]) -> None:
        """An adapter that is not in the model is one of ours from now on. Forwards may run meanwhile."""
        self._keep(name, weights)
        self._forms[name] = form

    def restore(self, name: str, form: Form, weights: dict[str, Tensor]) -> None:
        """An adapter whose file cannot be read waits in host memory."""
        self.forget(name)
        self._forms[name], self._waiting[name] = form, weights

    def use(self, name: str) -> bool:
        """Have an adapter in the model.

        Returns:
            False where there is no room, as all that are in it are in use, or where its weights are still to be read.

        Raises:
            ValueError: they cannot be read, or are lost.
            AdapterUnreadable: the one that was to make room cannot be written to its file.
        """
        if name not in self._inside:
            if name not in self._parts and name not in self._forms:
                raise ValueError("it has been lost")  # by a `restore` or a trial that has failed
            if name in self._away and not self._has_come(name):
                return False
            if self.most is not None and len(self._inside) >= self.most and not self._evict_one():
                return False
            self._put_in(name)
        self._inside.move_to_end(name)
        return True

    def forget(self, name: str) -> None:
        """An adapter is none of ours any more."""
        self._take_out(name)
        for kept in (self._parts, self._forms, self._waiting):
            kept.pop(name, None)
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
        return sum(list(self._away.values()))  # adapters may come meanwhile

    def _has_come(self, name: str) -> bool:
        """Whether the weights have been read; the first question has them read."""
        if name not in self._readings:
            path = self._files[name]
            self._readings[name] = Reading(path, self._mark_of(path), self.ready)
            return False
        reading = self._readings[name]
        if reading.done and isinstance(reading.error, (OSError, ValueError)):
            said = str(self._readings.pop(name).error).removeprefix(f"{reading.path} ")
            raise ValueError(f"its file {str(reading.path)!r}: {said}") from reading.error
        if reading.done and reading.error is not None:
            raise self._readings.pop(name).error  # type: ignore[misc]
        return reading.done

    def _put_in(self, name: str) -> None:
        """Put an adapter into the model, or leave both as they were."""
        form = self._forms.get(name)
        parts = self._parts[name] if form is None else form.parts.copied(name)
        weights = self._readings[name].tensors if name in self._away else self._waiting.get(name, {})
        tensors = parts.tensors()
        for key, tensor in weights.items():
            tensors[key].data = tensor
        try:
            for host, adapter in parts.at:
                host.adapters[name] = adapter
                host._move_adapter_to_device_of_base_layer(name)
        except BaseException:  # no room on the device
            for host, _ in parts.at:
                host.adapters._modules.pop(name, None)
            raise
        self._parts[name] = parts
        for kept in (self._away, self._readings, self._waiting):
            kept.pop(name, None)
        self.context.hosted.add(name)
        self.model.peft_config[name] = parts.config
        self._inside[name] = next(self._stays)

    def _put_away(self, name: str) -> None:
        """An adapter leaves the model, and its weights go to host memory, or to its file."""
        tensors = self._parts[name].tensors()
        self._keep(name, {key: tensor.detach().cpu() for key, tensor in tensors.items()})
        self._take_out(name)
        if name in self._forms:  # of which others are made
            del self._parts[name]
        for tensor in tensors.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype)

    def _keep(self, name: str, weights: dict[str, Tensor]) -> None:
        if self._folder is None:
            self._waiting[name] = weights
            return
        if name not in self._files:
            path = Path(self._folder.name) / f"{next(self._numbers)}.safetensors"
            whole = {key: tensor.clone().contiguous() for key, tensor in weights.items()}
            try:
                save_file(whole, path, {MARK: self._mark_of(path)})
            except (OSError, SafetensorError) as error:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                said = f"its file {str(path)!r} cannot be written: {error}"
                raise AdapterUnreadable(f"adapter {name!r} cannot wait outside the model: {said}") from error
            self._files[name] = path
        self._away[name] = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())

    def _mark_of(self, path: Path) -> str:
        return f"{self._mark} {path.name}"

    def _make_room(self) -> None:
        while self.most is not None and len(self._inside) > self.most and self._evict_one():
            pass

    def _evict_one(self) -> bool:
        name = next((name for name in self._inside if self.idle(name)), None)
        if name is None:
            return False
        self._put_away(name)
        self.evictions += 1
        return True

    def _take_out(self, name: str) -> None:
        parts = self._parts[name].at if name in self._parts else self.parts_of(name)
        for host, _ in parts:
            host.adapters._modules.pop(name, None)
        self._inside.pop(name, None)
        self.context.hosted.discard(name)
        self.model.peft_config.pop(name, None)
