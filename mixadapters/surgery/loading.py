"""A model for surgery by its name: with an adapter or without, as the class that it was saved as."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from mixadapters.core.card import CLASSES
from mixadapters.core.folders import check_saved_pair
from mixadapters.surgery.compressed import INDEX, expand_compressed
from mixadapters.surgery.layouts import EXPERTS_FILE
from mixadapters.surgery.saving import load_pruned


def load_model(name: str, adapter: str | None = None, device: str = "cpu") -> nn.Module:
    """A base model, in evaluation, with the adapter if one is named. Folders of `save_compressed` are read too.

    Raises:
        ValueError: there is no such model or adapter, or it cannot be loaded; the error says which.
    """
    check_saved_pair(name, adapter)
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
