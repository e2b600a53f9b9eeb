"""The calls of an adapted model: forward and generation, in which rows say what they want."""

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

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's. A field of the batch that is a setting of its generation too (`guidance_scale`) is the
        adapters' here."""
        settings = getattr(self.model, "generation_config", None)
        held = {name: kwargs.pop(name) for name in self.context.own_fields & kwargs.keys() if hasattr(settings, name)}
        with self.context.pin_in_thread(**held):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around `forward` and `generate`, whose `adapter_names` it then leaves out."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        with self.context.pin_in_thread(adapter_names=row_names(names, self.context, self.model)):
            yield
