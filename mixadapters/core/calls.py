"""The calls of an adapted model, in which rows name their adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mixadapters.core.context import ForwardContext
from mixadapters.core.rows import row_names


class ModelCalls:
    """What `MixtureModel` does around the calls of its base model."""

    model: nn.Module

    @property
    def context(self) -> ForwardContext:
        return ForwardContext.of(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around `forward` and `generate`, whose `adapter_names` it then leaves out."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        with self.context.pin_in_thread(adapter_names=row_names(names, self.context, self.model)):
            yield
