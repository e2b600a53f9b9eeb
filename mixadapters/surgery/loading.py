"""A model for surgery by its name: with an adapter or without, as the class that it was saved as."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from mixadapters.core.card import CLASSES
from mixadapters.core.registry import nearest
from mixadapters.surgery.compressed import INDEX, expand_compressed
from mixadapters.surgery.layouts import EXPERTS_FILE
from mixadapters.surgery.saving import load_pruned

ADAPTER_FILE = "adapter_config.json"
PATIENCE = 10.0  # seconds for the hub's answer whether it has a repository


def check_name(what: str, name: str, file: str) -> None:
    """Find out whether a folder, or a repository of the hub, is there, without the hub's retries.

    Args:
        what: of the message, such as "MODEL".
        file: that it holds; what lies in the hub's cache needs no network.

    Raises:
        ValueError: there is none, or the hub cannot say so.
    """
    path = Path(name)
    if path.is_dir():
        if what == "MODEL" and (path / ADAPTER_FILE).is_file():
            raise ValueError(f"MODEL {name!r} is an adapter: name its base model first, and the folder by --adapter")
        if file == ADAPTER_FILE and not (path / file).is_file():
            raise ValueError(f"{what} {name!r} has no {file}: it is no saved adapter")
        return
    if path.exists():
        raise ValueError(f"{what} {name!r} is a file: name the folder that holds the model")
    missing = f"{what} {name!r}: there is no such folder"
    if _looks_like_a_path(name):
        beside = sorted(other.name for other in path.parent.iterdir()) if path.parent.is_dir() else []
        raise ValueError(f"{missing}.{nearest(path.name, beside)}")
    try:
        if isinstance(try_to_load_from_cache(name, file), str):
            return
        HfApi().repo_info(name, timeout=PATIENCE)
    except Exception as error:  # not there, not open, no network, no name of a repository
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"{missing} here, and the hub gives none of this name: {said}") from None


def check_names(model: str, adapter: str | None = None) -> None:
    """As `check_name`, of both. Raises ValueError also where one is in the place of the other."""
    check_name("MODEL", model, "config.json")
    if adapter is not None:
        check_name("--adapter", adapter, ADAPTER_FILE)


def _looks_like_a_path(name: str) -> bool:
    """Whether a name can be no repository of the hub, or lies in a folder that is here."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/") or name.count("/") > 1:
        return True
    return "/" in name and Path(name).parent.is_dir()


def load_model(name: str, adapter: str | None = None, device: str = "cpu") -> nn.Module:
    """A base model, in evaluation, with the adapter if one is named. Folders of `save_compressed` are read too.

    Raises:
        ValueError: there is no such model or adapter, or it cannot be loaded; the error says which.
    """
    check_names(name, adapter)
    task = None if adapter is None else _read("--adapter", adapter, PeftConfig).task_type
    config = _read("MODEL", name, AutoConfig)
    with _expanded("MODEL", name) as folder:
        if (Path(folder) / EXPERTS_FILE).is_file():  # what transformers cannot load
            base = _try("MODEL", name, lambda: load_pruned(folder, dtype="auto"))
        else:
            kind = _class_for(config, task)
            base = _try("MODEL", name, lambda: kind.from_pretrained(folder, dtype="auto"))
    base.config._name_or_path = base.name_or_path = name
    model: Any = base
    if adapter is not None:
        with _expanded("--adapter", adapter) as folder:
            model = _try("--adapter", adapter, lambda: PeftModel.from_pretrained(base, folder))
    try:
        return model.to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:  # no such device, or no room there
        raise ValueError(f"--device {device!r}: {error}") from None


@contextmanager
def _expanded(what: str, name: str) -> Iterator[str]:
    """The folder of a name; of one whose weights lie in codes a plain one, for the time of the block."""
    if not (Path(name) / INDEX).is_file():
        yield name
        return
    with tempfile.TemporaryDirectory() as parent:
        plain = Path(parent) / "plain"
        _try(what, name, lambda: expand_compressed(name, plain))
        yield str(plain)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model. Raises ValueError: it has none."""
    return _read("MODEL", name, AutoTokenizer)


def _class_for(config: Any, task: Any) -> Any:
    """What to load a base with: for the task of an adapter, or as the class that its config says it was saved as."""
    if task is not None:
        return getattr(transformers, CLASSES[str(getattr(task, "value", task))], AutoModel)
    named = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    whole = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if whole else AutoModel


def _read(what: str, name: str, kind: Any) -> Any:
    return _try(what, name, lambda: kind.from_pretrained(name))


def _try(what: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, SafetensorError) as error:
        raise ValueError(f"{what} {name!r} cannot be loaded: {error}") from None
