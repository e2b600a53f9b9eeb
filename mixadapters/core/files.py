"""Folders and hub repositories that hold a saved adapter, read before anything is made of them.

They come from strangers: what is read is the JSON of the config and the header of the weights. Nothing in them is run
or followed, and no memory is taken for what they claim.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixadapters.core.json_text import parse_json

LARGEST_CONFIG = 64 * 2**20  # bytes
PREFIX = "base_model.model."  # of the keys in a file
TOKENS = ".token_adapter.trainable_tokens_delta"  # ends the keys of trained tokens
HUB_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only", "proxies")


@dataclass(frozen=True)
class SavedAdapter:
    """What a saved adapter says of itself."""

    model_id: str  # as the user named it
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # key -> shape of the tensor
    other: str | None = None  # why the weights are not those that the config was saved with
    not_real: dict[str, str] = field(default_factory=dict)  # key -> dtype of what holds no real numbers
    not_finite: tuple[str, ...] = ()  # keys of what holds NaN or infinite values
    mapped: bool = False  # whether keys are renamed on loading, for another version of the base model

    @cached_property
    def widest(self) -> int:
        """The largest size of an axis in the file: no rank can be larger."""
        return max((size for shape in self.shapes.values() for size in shape), default=0)

    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the keys of a model that is no PeftModel; the prefix must be there for all, or for none."""
        keys = {key.removeprefix(PREFIX) for key in self.shapes}
        if len(keys) < len(self.shapes) or len({key.startswith(PREFIX) for key in self.shapes}) > 1:
            odd = next(key for key in sorted(self.shapes) if not key.startswith(PREFIX))
            raise ValueError(f"{self.model_id}: {odd!r} is no key of an adapter: it does not begin with {PREFIX!r}")
        return {key.removeprefix(PREFIX): shape for key, shape in self.shapes.items()}


class FileWeights(dict[str, Any]):
    """Weights that know which files, or which adapter of which config, they are of, also when PEFT copies them."""

    def __init__(self, weights: Mapping[str, Any], saved: SavedAdapter) -> None:
        super().__init__(weights)
        self.saved = saved

    def __missing__(self, key: str) -> Any:  # PEFT takes the weights of saved modules by key
        raise ValueError(
            f"{self.saved.model_id}: {key!r}, a weight of a saved module, is missing. Was it saved from another base "
            f"model or with another config? In a PeftModel every key begins with {PREFIX!r}"
        )

    def copy(self) -> FileWeights:
        return FileWeights(self, self.saved)

    def __reduce__(self) -> Any:  # a pickle holds weights, and no code of this library
        return OrderedDict, (), None, None, iter(self.items())


def read_config(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError, naming the file, where it is none."""
    try:
        if os.path.getsize(path) > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG} bytes")
        content = parse_json(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
    except ValueError as error:  # JSON and Unicode errors among them
        raise ValueError(f"{path} is no adapter config: {error}") from error
    return content


@contextmanager
def weights_of(path: str | Path) -> Iterator[Mapping[str, Any]]:
    """Key -> tensor of a file of weights, in memory only where one is taken. A pickle runs no code.

    Raises:
        ValueError: the file is cut, or no such file; the message names it.
    """
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(str(path), framework="pt") as opened:
                yield Safetensors(opened)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(content, Mapping):
                raise ValueError(f"{path} holds no weights by name, but a {type(content).__name__}: save it again")
            for key, tensor in content.items():
                if not isinstance(key, str) or not isinstance(tensor, Tensor):
                    raise ValueError(f"{path} holds no weights by name: {key!r:.100} is a {type(tensor).__name__}")
                if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                    raise ValueError(  # a few bytes that stand for gigabytes
                        f"{path}: {key!r:.100} is {tuple(tensor.shape)} of fewer entries, each of which stands for "
                        "many: save it contiguous, as safetensors"
                    )
            yield content
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as weights: {error}") from error


class Safetensors(Mapping[str, Any]):
    """An open file of safetensors as a mapping."""

    def __init__(self, opened: Any) -> None:
        self.opened = opened

    def __getitem__(self, key: str) -> Tensor:
        return self.opened.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.opened.keys())

    def __len__(self) -> int:
        return len(self.opened.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.opened.get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """As the format calls it: F32, BF16, F8_E4M3, I64, BOOL, C64 ..."""
        return str(self.opened.get_slice(key).get_dtype())


def read_adapter(
    model_id: Any, wanted: Callable[[Any], bool], *, subfolder: str | None = None, **options: Any
) -> SavedAdapter | None:
    """What the adapter in a folder, or of a hub id, says of itself; None where there is none to be found.

    Args:
        wanted: whether a `peft_type` is; of others nothing but the config is read.
        options: of the hub, such as `revision`.

    Raises:
        ValueError: a file is no JSON, or is cut.
    """
    config_path = _find(model_id, CONFIG_NAME, subfolder, options)
    if config_path is None:
        return None
    config = read_config(config_path)
    if not wanted(config.get("peft_type")):
        return None
    weights_path = _find(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder, options) or _find(
        model_id, WEIGHTS_NAME, subfolder, options
    )
    if weights_path is None:
        folder = os.path.join(str(model_id), subfolder or "")
        if os.path.isdir(folder):
            raise ValueError(
                f"{folder!r} holds {CONFIG_NAME} but no {SAFETENSORS_WEIGHTS_NAME} and no {WEIGHTS_NAME}: copy the "
                "weights there, or save the adapter again"
            )
        return SavedAdapter(str(model_id), config, {})
    with weights_of(weights_path) as weights:
        if isinstance(weights, Safetensors):
            shapes = {key: weights.shape(key) for key in weights}
            not_real = {key: name for key in weights if (name := weights.dtype(key))[0] not in "FB" or name == "BOOL"}
        else:
            shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
            not_real = {key: str(tensor.dtype) for key, tensor in weights.items() if not tensor.is_floating_point()}
        other = other_save(weights, config, weights_path)
        broken = () if other else not_finite(weights)
    return SavedAdapter(str(model_id), config, shapes, other, not_real, broken)


def not_finite(weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The keys of weights that hold NaN or infinite values."""
    return tuple(key for key in sorted(weights) if has_others(weights[key]))


def has_others(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds NaN or infinite values."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:  # 4 bits have none
        return False
    if tensor.element_size() == 1:  # torch sums none of 8 bits
        tensor = tensor.float()
    if bool(tensor.sum().isfinite()):  # one pass, a tenth of the time; only a sum that overflows lies
        return False
    return not bool(tensor.isfinite().all())


def other_save(weights: Mapping[str, Any], config: dict[str, Any], path: str) -> str | None:
    """Why weights, which were read from `path`, are not those that the config was saved with; None if they may be."""
    if config.get("digest") is None:
        return None
    kind, heads = str(config.get("peft_type")), config.get("modules_to_save")
    expected, *orders = str(config["digest"]).split() or [""]
    found = digest_of(weights, kind, heads)
    if found == expected or any(digest_of(rest, kind, heads) == expected for rest in _without_twins(weights)):
        return _reordered(config, kind, orders)
    twin = Path(path).with_name(WEIGHTS_NAME)
    if twin.is_file() and str(twin) != str(path):
        with weights_of(twin) as others:
            if digest_of(others, kind, heads) == expected:
                return (
                    f"{path} is of an earlier save than {CONFIG_NAME} and {twin.name} beside it, and PEFT reads it "
                    f"first: delete {Path(path).name}"
                )
    return (
        f"{path} is not what {CONFIG_NAME} was saved with: one of the two is of another save, or was changed (digest "
        f"{str(found)[:20]}, expected {expected[:20]}). If it was changed on purpose, take `digest` out "
        f"of {CONFIG_NAME}"
    )


def _without_twins(weights: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The weights without one of two keys that hold the same trained tokens, for each such key.

    Where embeddings are saved beside them, tokens that two tied tables share come twice.
    """
    tokens = [key for key in weights if key.endswith(TOKENS)]
    for one in tokens:
        if any(other != one and torch.equal(weights[other], weights[one]) for other in tokens):
            yield {key: weights[key] for key in weights if key != one}


def _reordered(config: dict[str, Any], kind: str, expected: list[str]) -> str | None:
    """Which order has been changed in a config since it was saved; files of earlier versions do not say theirs."""
    now = orders_of(kind, config)
    changed = sorted(name for name, digest in now.items() if expected and f"{name}={digest}" not in expected)
    if not changed:
        return None
    return (
        f"{changed[0]}={config.get(changed[0])} of {CONFIG_NAME} is not what the weights were saved with: in another "
        "order, numbers and weights would mean others. Put it back, or if it was changed on purpose, take `digest` "
        f"out of {CONFIG_NAME}"
    )


def orders_of(kind: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a config of this type that are orders (`order` in their metadata) -> a digest of their values."""
    names = _orders_in(PEFT_TYPE_TO_CONFIG_MAPPING.get(kind))
    return {name: hashlib.sha256(json.dumps(config.get(name)).encode()).hexdigest()[:16] for name in names}


@cache
def _orders_in(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.metadata.get("order")] if cls is not None else []


def _find(model_id: Any, name: str, subfolder: str | None, options: dict[str, Any]) -> str | None:
    local = os.path.join(str(model_id), subfolder or "", name)
    if os.path.isfile(local):
        return local
    if os.path.isdir(str(model_id)):
        return None
    given = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    try:
        return hf_hub_download(str(model_id), name, subfolder=subfolder, **given)
    except Exception:  # no such repository, no network: PEFT says so
        return None


def digest_of(weights: Mapping[str, Any], kind: str, heads: Any) -> str | None:
    """Of the keys, dtypes, shapes and contents of an adapter's own weights and heads; None where there are none.

    What PEFT may save beside (embeddings of a model whose vocabulary has grown) is no part of it.

    Args:
        weights: key of the file -> tensor.
        kind: of the adapter, as in `peft_type`.
        heads: its `modules_to_save`.
    """
    total, empty, own = hashlib.sha256(), True, f".{kind.lower()}_adapters."
    for key in sorted(weights, key=_without_prefix):
        name = _without_prefix(key)
        # PEFT goes by the end of a module's name: "head" saves "lm_head" too.
        head = heads and any(f"{head}." in name for head in heads) and not BESIDE & set(name.split("."))
        if head or own in name or name.endswith(TOKENS):
            tensor = weights[key].detach().cpu().contiguous()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            empty = False
    return None if empty else f"sha256:{total.hexdigest()}"


def _without_prefix(key: str) -> str:
    return key.removeprefix(PREFIX)


BESIDE = frozenset({"original_module", "modules_to_save"})  # in keys of embeddings that are saved modules too
_LOADING: ContextVar[SavedAdapter | None] = ContextVar("loading", default=None)


def being_loaded() -> SavedAdapter | None:
    """The files whose weights a verb of PEFT or transformers is about to load in this thread."""
    return _LOADING.get()


@contextmanager
def loading(saved: SavedAdapter | None) -> Iterator[None]:
    token = _LOADING.set(saved)
    try:
        yield
    finally:
        _LOADING.reset(token)
