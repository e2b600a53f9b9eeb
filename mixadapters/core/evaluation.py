"""A model in evaluation for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mixadapters.core.fields import check_kind


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Inside the block all of the model is in evaluation; afterwards every module is as it was."""
    check_kind("model", model, nn.Module, "a model")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Inside the block all of the model is in training, but for what stays in evaluation; afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
