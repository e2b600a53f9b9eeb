"""The calls of an adapted model: forward and generation, in which rows say what they want."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.context import ForwardContext
from mixadapters.core.rows import row_names


class ModelCalls:
    """What `MixtureModel` does around the calls of its base model."""

    model: nn.Module

    @property
    def context(self) -> ForwardContext:
        return ForwardContext.of(self.model)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's, which refuses the batch fields of adapters: they hold over the whole generation."""
        held = {name: kwargs.pop(name) for name in list(kwargs) if name in self.context.own_fields}
        if held.get("adapter_names") is not None:
            held["adapter_names"] = row_names(held["adapter_names"], self.context, self.model)
        if "prompt_mask" not in held and self._reads_prompt():
            held |= prompt_of(self.model, *args, **kwargs)
        with self.context.pin_in_thread(**held):
            return self.model.generate(*args, **kwargs)

    def _reads_prompt(self) -> bool:
        """Whether a router of this model decides once for each request."""
        routers = (part for part in self.model.modules() if hasattr(type(part), "granularity"))
        return any(router.granularity == "request" for router in routers)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around `forward` and `generate`, whose `adapter_names` it then leaves out."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        with self.context.pin_in_thread(adapter_names=row_names(names, self.context, self.model)):
            yield


def prompt_of(model: nn.Module, inputs: Any = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """{"prompt_mask": ones (B, T)} over the tokens that a decoder is to go on from, of the arguments of `generate`.

    The first forward of a generation may hold more than these: drafts of an assistant, or all without a cache. Empty
    where there is no telling, or where requests are packed into one row, which such routers refuse.
    """
    config = kwargs.get("generation_config") or (args[0] if args else None)
    packed = "paged" in (kwargs.get("cache_implementation"), getattr(config, "cache_implementation", None))
    given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("inputs"), inputs)
    tokens = next((value for value in given if isinstance(value, Tensor)), None)
    if packed or tokens is None or tokens.dim() < 2 or getattr(model.config, "is_encoder_decoder", False):
        return {}
    return {"prompt_mask": torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)}
