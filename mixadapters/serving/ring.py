"""Experts of a few layers on the device at a time: those that run next, in a ring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixadapters.core.bank import AdapterBank
from mixadapters.core.fields import check_integer
from mixadapters.core.hooks import root_of
from mixadapters.core.layer import AdapterHost, MixtureLayer
from mixadapters.core.sites import layer_index
from mixadapters.surgery.blocks import base_layers


class ExpertRing:
    """Keeps the experts of `resident_layers` layers on the device, the others in host memory.

    While a layer runs, those after it are there or on their way: entering layer i gives up what lies behind it and
    begins to load layer i + K - 1, on a stream of its own where the device has streams. Outputs are equal. Layers come
    round: after the last is the first, of the next forward. On a CPU nothing is copied, but what is not resident is
    empty all the same, so that residency is the same, and counted.

        with ExpertRing(model, resident_layers=2) as ring:
            model.generate(**inputs)

    Inside the block nothing trains, is saved, or comes and goes.

    Source: Shen et al. 2022 (SE-MoE, arXiv 2205.10034), ring memory offload for inference.

    Args:
        model: with adapters of this library that wrap their layers, such as `MoAConfig`'s; or with a mixture of
            experts of its own, whose modules are called `experts`.
        resident_layers: K.
        pin: keep what is in host memory in pages that a GPU reads at full speed.

    Attributes:
        layers: the paths of the layers in the ring, in order.
        resident: numbers of those whose experts are on the device.
        peak: the most of them at any time.
        loads: how often a layer was loaded, the first ones not counted.

    Raises:
        ValueError: no experts in any layer, experts outside the layers, a number that is none, or a ring on this model
            already.
    """

    def __init__(self, model: nn.Module, resident_layers: int, *, pin: bool = True) -> None:
        check_integer("resident_layers", resident_layers, least=1)
        found = _by_layer(model)
        self.layers = list(found)
        self.size = min(resident_layers, len(self.layers))
        self.resident: list[int] = []
        self.peak = self.loads = 0
        self._banks = [bank for modules in found.values() for _, bank in modules if isinstance(bank, AdapterBank)]
        if any(not bank.keeps_packed for bank in self._banks):
            raise ValueError("these experts are in an ExpertRing already: close it before")
        self._slots = [_Slot([holds for _, holds in modules], pin) for modules in found.values()]
        self._handles: list[RemovableHandle] = []
        for place, modules in enumerate(found.values()):
            for runs, holds in modules:
                self._handles.append(runs.register_forward_pre_hook(_Enter(self, place)))
                self._handles.append(holds.register_state_dict_pre_hook(_refuse_to_save))
        for bank in self._banks:
            bank.keeps_packed = False  # a `generate` would hold on to copies of all of them
        self._hosts = [runs for modules in found.values() for runs, _ in modules if isinstance(runs, AdapterHost)]
        for host in self._hosts:
            host.closed = _away(host.path)
        for slot in self._slots:
            slot.release()
        for place in range(self.size):
            self._load(place)
        self.loads = 0

    def __enter__(self) -> ExpertRing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Bring all experts back to the device, and end the ring."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for place, slot in enumerate(self._slots):
            if place not in self.resident:
                slot.load()
            slot.arrive()
        for bank in self._banks:
            bank.keeps_packed = True
        for host in self._hosts:
            host.closed = None
        self.resident = list(range(len(self._slots)))

    @property
    def resident_bytes(self) -> int:
        """What the experts on the device take."""
        return sum(self._slots[place].bytes for place in self.resident)

    def enter(self, place: int) -> None:
        """Layer `place` runs now.

        Raises:
            RuntimeError: gradients are recorded, or experts have come or gone since the ring began.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("an ExpertRing gives up experts that a backward pass would need: use torch.no_grad()")
        self._slots[place].check(self.layers[place])
        window = [(place + ahead) % len(self._slots) for ahead in range(self.size)]
        for other in [other for other in self.resident if other not in window]:
            self._slots[other].release()
            self.resident.remove(other)
        for other in window:
            if other not in self.resident:
                self._load(other)
        self._slots[place].arrive()

    def _load(self, place: int) -> None:
        self._slots[place].load()
        self.resident.append(place)
        self.loads += 1
        self.peak = max(self.peak, len(self.resident))


class _Enter:
    """A hook before a module of one layer. An object, so that copies of the model have the copy's ring."""

    def __init__(self, ring: ExpertRing, place: int) -> None:
        self.ring, self.place = ring, place

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.ring.enter(self.place)


class _Slot:
    """The experts of one layer: their weights in host memory, and on the device while it is resident.

    Args:
        holders: banks of adapters, and modules of a base's experts.
    """

    def __init__(self, holders: list[nn.Module], pin: bool) -> None:
        self.holders = holders
        self.parameters = [p for holds in holders for p in _experts(holds)]
        self.devices = [p.device for p in self.parameters]
        self.kept = [_in_host_memory(p, pin) for p in self.parameters]
        self.bytes = sum(t.numel() * t.element_size() for t in self.kept)
        self._arrivals: dict[torch.device, Any] = {}

    def check(self, path: str) -> None:
        found = [p for holds in self.holders for p in _experts(holds)]
        if len(found) != len(self.parameters) or any(a is not b for a, b in zip(found, self.parameters, strict=True)):
            raise RuntimeError(f"experts of {path!r} have come or gone since the ExpertRing began: close it before")

    @torch.inference_mode(False)
    def load(self) -> None:
        """Begin to bring the weights to the device."""
        for parameter, kept, device in zip(self.parameters, self.kept, self.devices, strict=True):
            if device.type != "cuda":
                parameter.data = kept if device.type == "cpu" else kept.to(device)
                continue
            with torch.cuda.stream(_copying(device)):
                parameter.data = kept.to(device, non_blocking=True)
        for device in {device for device in self.devices if device.type == "cuda"}:
            self._arrivals[device] = _copying(device).record_event()

    def arrive(self) -> None:
        """Let what comes now wait for the weights."""
        for device, arrival in self._arrivals.items():
            stream = torch.cuda.current_stream(device)
            stream.wait_event(arrival)
            for parameter in self.parameters:
                if parameter.device == device:
                    parameter.data.record_stream(stream)
        self._arrivals.clear()

    @torch.inference_mode(False)
    def release(self) -> None:
        for parameter, kept, device in zip(self.parameters, self.kept, self.devices, strict=True):
            parameter.data = kept.new_empty(0, device=device)


_STREAMS: dict[torch.device, Any] = {}


def _copying(device: torch.device) -> Any:
    """The stream on which weights come to this device."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


def _experts(holds: nn.Module) -> Iterator[nn.Parameter]:
    return (holds.experts if isinstance(holds, AdapterBank) else holds).parameters()


def _in_host_memory(parameter: nn.Parameter, pin: bool) -> Tensor:
    kept = parameter.data.cpu()
    return kept.pin_memory() if pin and parameter.device.type == "cuda" else kept


def _by_layer(model: nn.Module) -> dict[str, list[tuple[nn.Module, nn.Module]]]:
    """path of a layer -> (what runs there, what holds the experts that it needs), layers in the model's order.

    Raises:
        ValueError: there are none, or some lie in no layer.
    """
    root = root_of(model)
    found: list[tuple[str, nn.Module, nn.Module]] = []
    for path, module in root.named_modules():
        if isinstance(module, MixtureLayer):
            banks = (part for part in module.adapters.modules() if isinstance(part, AdapterBank))
            found += [(path, module, bank) for bank in banks]
    for layer in base_layers(root):
        experts = root.get_submodule(layer.path)
        found.append((layer.path, experts, experts))
    order = {path: place for place, (path, _) in enumerate(root.named_modules())}
    layers: dict[str, list[tuple[nn.Module, nn.Module]]] = {}
    for path, runs, holds in sorted(found, key=lambda one: order[one[0]]):
        index = layer_index(path)
        if index is None:
            raise ValueError(
                f"the experts at {path!r} lie in no numbered layer, so a ring does not know when they run"
            )
        parts = path.split(".")
        layers.setdefault(".".join(parts[: parts.index(str(index)) + 1]), []).append((runs, holds))
    if not layers:
        raise ValueError("no layer of this model has experts of this library's adapters, nor of its own")
    return layers


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError(_away(prefix))


def _away(path: str) -> str:
    return f"the experts at {path!r} are in an ExpertRing, most of them not here: close it before"
