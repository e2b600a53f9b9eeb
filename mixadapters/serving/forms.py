"""Adapters of one form: of the same type, with the same config, and weights of the same names, shapes and dtypes.

They are the same modules with other numbers. So the first of a form is put into the model and tried; of the next ones
the numbers are read and looked at, and their modules are made when a request names them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load
from torch import Tensor

from mixadapters.core.adapter import Adapter
from mixadapters.core.files import PREFIX, Safetensors, SavedAdapter, other_save, read_config, weights_of
from mixadapters.core.folders import nearest_folder
from mixadapters.core.layer import AdapterHost
from mixadapters.core.routing import RoutingKey
from mixadapters.tuners.registration import config_class
from mixadapters.tuners.sources import same_module

LORA = "expert0"  # the name of a PEFT LoRA in the mixture of one expert that it is served as
LORA_PARTS = {f"lora_{part}": f"bank.experts.{LORA}.{ours}" for part, ours in (
    ("A.weight", "down.weight"), ("B.weight", "up.weight"), ("B.bias", "up.bias"))}  # fmt: skip
SETS = ("target_modules", "exclude_modules", "modules_to_save")  # of a config: PEFT writes them in any order
# Weights up to this size need no trial of their own, as those of their form were finite in one with weights of the
# size below: factors that a matrix of 10^8 entries makes up for, were all of one sign, lie between.
LARGEST, TRIED = 1e2, 1e4
LONGEST_HEADER = 2**24  # bytes; a form with a longer one is not known again
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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

    @property
    def remember(self) -> bool:
        """Whether it has routers that keep something of a request's earlier tokens."""
        return any(getattr(part, "by_request", False) for _, adapter in self.at for part in adapter.modules())

    def copied(self, name: str) -> Parts:
        """The same under another name. What layers share, such as a router, their copies share."""
        outside = {id(host): host for host, _ in self.at} | {id(host.context): host.context for host, _ in self.at}
        adapters = copy.deepcopy([adapter for _, adapter in self.at], outside)
        for part in (part for adapter in adapters for part in adapter.modules()):
            if isinstance(getattr(part, "key", None), RoutingKey):
                part.key = part.key._replace(adapter=name)
        return Parts(self.config, [(host, adapter) for (host, _), adapter in zip(self.at, adapters, strict=True)])


@dataclass(eq=False)
class Form:
    """What is known of all adapters of a form.

    Args:
        parts: one of them, without weights.
        places: key of a file -> key in `Parts.tensors` of the weight that it is.
        dtypes: of these in the model.
    """

    parts: Parts
    places: dict[str, str]
    dtypes: dict[str, torch.dtype]
    remembers: bool  # whether such adapters have routers that keep something of a request's earlier tokens

    @property
    def open(self) -> bool:
        """Whether its layers take adapters, as they did when the form was tried."""
        return not any(host.closed or host.merged_adapters for host, _ in self.parts.at)

    def weights(self, given: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The weights of a file by their keys in `Parts.tensors`; None where a forward must tell whether they will do.

        Those are of a size with which it might not be finite, or are no finite numbers.
        """
        least, most = torch.cat([tensor.reshape(-1) for tensor in given.values()]).aminmax()
        if not (float(least) >= -LARGEST and float(most) <= LARGEST):
            return None
        return {place: given[key].to(self.dtypes[key]) for key, place in self.places.items()}


class Found(NamedTuple):
    """An adapter in a folder."""

    path: Path  # of its weights
    kind: str
    saved: SavedAdapter
    key: str  # of its form
    form: Form | None = None
    weights: dict[str, Tensor] | None = None  # as `Form.weights`, where the form is known and they need no trial


def read_folder(folder: str | Path, forms: Mapping[str, Form]) -> Found:
    """What lies in a folder. Weights of a known form come into memory, of others the header alone.

    Args:
        forms: by their keys.

    Raises:
        ValueError: there is no such folder, or it holds no adapter with weights in safetensors, none of our types or
            LoRA, or files of two saves.
    """
    folder = Path(folder)
    path, config = folder / SAFETENSORS_WEIGHTS_NAME, folder / CONFIG_NAME
    if not folder.is_dir():
        raise ValueError(
            f"{str(folder)!r}: there is no such folder.{nearest_folder(str(folder))} The server reads no hub ids: "
            "fetch the adapter by huggingface_hub.snapshot_download first, and give its folder"
        )
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no {SAFETENSORS_WEIGHTS_NAME}; save the adapter there")
    said = read_config(config) if config.is_file() else {}
    kind: Any = said.get("peft_type")
    if kind != "LORA" and config_class(kind) is None:
        raise ValueError(
            f"{str(folder)!r} holds an adapter of type {kind!r}; served are LORA and the types of this library"
        )
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(8)  # that of safetensors begins with its length
        header += file.read(min(int.from_bytes(header, "little"), LONGEST_HEADER))
        key = form_key(said, header, size)
        form = forms.get(key)
        whole = header + file.read(size - len(header)) if form is not None else b""
    if form is not None and len(whole) == size:
        given = load(whole)
        _refuse_other_save(given, said, path)
        if (weights := form.weights(given)) is not None:
            return Found(path, kind, SavedAdapter(str(folder), said, {}), key, form, weights)
    with weights_of(path) as mapped:
        assert isinstance(mapped, Safetensors)
        _refuse_other_save(mapped, said, path)
        shapes = {name: mapped.shape(name) for name in mapped}
    return Found(path, kind, SavedAdapter(str(folder), said, shapes), key)


def _refuse_other_save(weights: Mapping[str, Any], config: dict[str, Any], path: Path) -> None:
    if reason := other_save(weights, config, str(path)):
        raise ValueError(reason)


def form_key(config: Mapping[str, Any], header: bytes, size: int) -> str:
    """The same for adapters of one form. What says nothing but which numbers the weights are is left out.

    Args:
        header: of the file of weights: their names, shapes and dtypes, and where they lie in it.
        size: bytes of the file.
    """
    said = {
        name: sorted(value, key=str) if name in SETS and isinstance(value, list) else value
        for name, value in config.items()
        if name != "digest"
    }
    return hashlib.sha256(json.dumps([said, size]).encode() + header).hexdigest()


def form_of(found: Found, parts: Parts, trial: Callable[[], str | None]) -> Form | None:
    """The form of an adapter that lies in the model, tried; None where others like it must be tried one by one.

    So it is where a weight in the model is something else than one of the file, or no floating-point number, and where
    very large or no weights might make numbers that are not finite.

    Args:
        trial: a forward of the adapter -> why it fails, None if it does not.
    """
    places, tensors = _places(found, parts), parts.tensors()
    own = {f"{number}.{name}" for number, (_, adapter) in enumerate(parts.at) for name in adapter.state_dict()}
    changed = any(
        getattr(part, "tunings", ()) or getattr(part, "watchers", ())
        for _, adapter in parts.at
        for part in adapter.modules()
    )
    if changed or own != set(places.values()) or not _are_those(found.path, places, tensors):
        return None
    weights = {place: tensors[place] for place in places.values()}
    if not _finite_at_any_size(weights, trial):
        return None
    without = parts.copied("")
    for name, tensor in without.tensors().items():
        if name in weights:
            tensor.data = torch.empty(0, dtype=tensor.dtype)
    return Form(without, places, {key: weights[place].dtype for key, place in places.items()}, parts.remember)


def _places(found: Found, parts: Parts) -> dict[str, str]:
    """Key of the file -> key in `Parts.tensors` of the weight that it must be; what is none is left out."""
    places = {}
    for key in found.saved.shapes:
        path, rest = key.removeprefix(PREFIX), ""
        if found.kind == "LORA":
            part = next((part for part in LORA_PARTS if path.endswith(f".{part}")), "")
            path, rest = path.removesuffix(f".{part}"), LORA_PARTS.get(part, "")
            at = [number for number, (host, _) in enumerate(parts.at) if same_module(host.path, path)]
        else:
            path, _, rest = path.partition(f".{parts.at[0][0].prefix}adapters.")
            at = [number for number, (host, _) in enumerate(parts.at) if host.path == path]
        if rest and len(at) == 1:
            places[key] = f"{at[0]}.{rest}"
    return places if len(set(places.values())) == len(found.saved.shapes) else {}


def _are_those(path: Path, places: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the weights in the model are those of the file, of one floating-point dtype there."""
    with weights_of(path) as given:
        dtypes = {given[key].dtype for key in given}
        if given.keys() != places.keys() or len(dtypes) > 1 or not dtypes <= set(FLOATS):
            return False
        return all(
            torch.equal(given[key].to(tensors[place].dtype), tensors[place].cpu()) for key, place in places.items()
        )


def _finite_at_any_size(weights: Mapping[str, Tensor], trial: Callable[[], str | None]) -> bool:
    """Whether the trial ends well with weights of 0, and with ones far beyond those that go without a trial."""
    kept = {name: tensor.data for name, tensor in weights.items()}
    drawn = torch.Generator().manual_seed(0)
    try:
        for size in (0.0, TRIED):
            for tensor in weights.values():
                signs = torch.randint(0, 2, tensor.shape, generator=drawn) * 2.0 - 1.0
                tensor.data = (size * signs).to(tensor.device, tensor.dtype)
            if trial() is not None:
                return False
    finally:
        for name, tensor in weights.items():
            tensor.data = kept[name]
    return True
