"""The names of the package itself: those that come late are seen as well as those that are there at once."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
from transformers import TrainerCallback

import mixadapters
import mixadapters.training


def test_every_public_name_is_listed_and_there() -> None:
    assert set(mixadapters.__all__) <= set(dir(mixadapters))
    assert all(getattr(mixadapters, name).__name__ == name for name in mixadapters.__all__ if name != "ROUTERS")
    with pytest.raises(AttributeError, match="has no attribute 'StageCalback'"):
        mixadapters.StageCalback  # noqa: B018


def test_every_callback_is_a_public_name() -> None:
    modules = [info.name for info in pkgutil.iter_modules(mixadapters.training.__path__, "mixadapters.training.")]
    found = {
        name
        for module in map(importlib.import_module, modules)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, TrainerCallback) and value.__module__ == module.__name__
    }
    assert "StageCallback" in found
    assert {name for name in found if name[0] != "_"} - {"RunCallback"} <= set(mixadapters.__all__)  # others' base
