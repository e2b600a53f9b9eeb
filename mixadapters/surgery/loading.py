"""A model for surgery by its name: with an adapter or without, as the class that it was saved as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from mixadapters.core.card import CLASSES
from mixadapters.surgery.saving import EXPERTS_FILE, load_pruned


def load_model(name: str, adapter: str | None = None, device: str = "cpu") -> nn.Module:
    """A base model, in evaluation, with the adapter if one is named.

    Raises:
        ValueError: there is no such model or adapter, or it cannot be loaded; the error says which.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(f"MODEL {name!r} is an adapter: name its base model first, and the folder by --adapter")
    if adapter is not None and Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"--adapter {adapter!r} has no adapter_config.json: it is no saved adapter")
    task = None if adapter is None else _read("--adapter", adapter, PeftConfig).task_type
    config = _read("MODEL", name, AutoConfig)
    if (Path(name) / EXPERTS_FILE).is_file():  # what transformers cannot load
        base = _try("MODEL", name, lambda: load_pruned(name, dtype="auto"))
    else:
        base = _read("MODEL", name, _class_for(config, task), dtype="auto")
    model: Any = base
    if adapter is not None:
        model = _try("--adapter", adapter, lambda: PeftModel.from_pretrained(base, adapter))
    try:
        return model.to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:  # no such device, or no room there
        raise ValueError(f"--device {device!r}: {error}") from None


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


def _read(what: str, name: str, kind: Any, **options: Any) -> Any:
    return _try(what, name, lambda: kind.from_pretrained(name, **options))


def _try(what: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, SafetensorError) as error:
        raise ValueError(f"{what} {name!r} cannot be loaded: {error}") from None
