"""A forward, as a router sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixadapters.core.context import ForwardContext
from mixadapters.core.record import Record
from mixadapters.core.streams import Stream


def _forward(
    tokens: Tensor, mask: Tensor | None = None, *, training: bool = False, ids: Tensor | None = None, **values: Any
) -> ForwardContext:
    context = ForwardContext()
    context.enter(Record(training, torch.is_grad_enabled(), open=True, values=values))
    batch, length = tokens.shape[:2]
    context.record.streams[""] = Stream(batch, length, None if mask is None else mask.bool(), input_ids=ids)
    return context


@pytest.fixture
def forward() -> Callable[..., ForwardContext]:
    """forward(tokens (B, T, d), mask, training=..., ids=..., **fields) -> the context of a forward that has begun."""
    return _forward
