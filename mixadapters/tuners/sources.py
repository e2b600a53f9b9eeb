"""Trained adapters that become experts of a mixture: folders and hub ids, read strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from peft.config import PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor, nn

from mixadapters.core.files import read_adapter


def read_folder(where: str, spec: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Config and weights, in host memory, of the adapter that spec["source"] names.

    where: names the field at the beginning of messages.

    Raises:
        ValueError: there is none, or it is not whole.
    """
    source, revision = spec["source"], spec.get("revision")
    try:
        found = read_adapter(source, lambda kind: True, revision=revision)
        if found is not None and found.other is not None:
            raise ValueError(found.other)
        saved = PeftConfig.from_pretrained(source, revision=revision)
        return saved, dict(load_peft_weights(source, device="cpu", revision=revision))
    except (ValueError, OSError, KeyError, TypeError) as error:  # of PEFT, for what is no adapter of its types
        raise ValueError(f"{where} cannot be read as an adapter folder or hub id: {error}") from error


def check_base_model(model: nn.Module, saved: Any, spec: dict[str, Any], where: str) -> None:
    """Refuse an adapter of another base model, by the names that both give."""
    theirs = saved.base_model_name_or_path
    ours = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    if spec.get("check_base_model", True) and theirs and ours and theirs != ours:
        raise ValueError(
            f"{where} was trained on {theirs!r}, this model is {ours!r}; if they are the same, say so by "
            "{'source': ..., 'check_base_model': False}"
        )


def same_module(a: str, b: str) -> bool:
    """Whether two paths name the same module of a backbone, with or without a head around it."""
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def rank_of(by_path: dict[str, int], path: str) -> int:
    """The rank at a module, 0 where there is none."""
    return by_path.get(path) or next((n for p, n in by_path.items() if same_module(p, path)), 0)


def places_of(paths: Iterable[str], modules: Iterable[str]) -> dict[str, list[str]]:
    """path -> the modules that it names, with or without a head around the backbone."""
    by_end: dict[str, list[str]] = {}
    for module in modules:
        by_end.setdefault(module.rpartition(".")[2], []).append(module)
    return {path: [m for m in by_end.get(path.rpartition(".")[2], ()) if same_module(m, path)] for path in paths}


def public_origin(origin: str) -> str:
    """Where an expert came from, for others: a hub id as it is, of a local path the last part."""
    local = os.path.exists(origin) or "\\" in origin or origin.count("/") != 1 or origin.startswith((".", "/", "~"))
    return PurePath(origin.replace("\\", "/")).name if local else origin


def refuse_unsaveable(what: str, value: Any) -> None:
    """Refuse what JSON cannot hold when the config is made, not when a trained adapter is saved."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{what}={value!r} of type {type(value).__name__} cannot be saved in a config; use a number, a string, a "
            "list or a dict of these"
        ) from None
