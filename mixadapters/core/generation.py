"""`generate` and continuous batching of an adapted model: what their forwards know of the caller's batch.

transformers calls these on the model, so they stand in the place of the model's own methods, each as an object that
holds a `ForwardContext`. (A `context` is that here; its module imports this one.)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.media import generates_beside_media
from mixadapters.core.record import Record
from mixadapters.core.rows import row_names
from mixadapters.core.streams import Stream
from mixadapters.core.walking import adapters_named


class Generate:
    """`generate` of a model. Its forwards have the fields of its batch, and know how often it repeats each row."""

    name = "generate"

    def __init__(self, context: Any, model: nn.Module) -> None:
        self.context, self.model = context, model
        self.before = model.__dict__.get(self.name)  # somebody else's, which is put back

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = self._taken(kwargs)
        fields = self.context.held | held
        deciding = self.context.deciding and "prompt_mask" not in fields  # most often there is nobody to be asked
        if deciding and reads_prompt(self.model, fields.get("adapter_names")):
            held |= prompt_of(self.model, *args, **kwargs)
        with self.context.records.generating(), self.context.pin_in_thread(**held):
            if self.context.running is not None or not generates_beside_media(self.model):
                return self.plain(*args, **kwargs)
            begun = self._begin(*args, **kwargs)
            try:
                return self.plain(*args, **kwargs)
            finally:
                begun.closed = True

    def _begin(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Record:
        """A record for what reads images before the first forward, as in transformers: these rows and fields."""
        arguments = {**kwargs, "input_ids": kwargs.get("input_ids", inputs)}
        tokens = next((v for n in ("input_ids", "inputs_embeds") if isinstance(v := arguments.get(n), Tensor)), None)
        record = Record.of_pinned(self.model.training, self.context.held, inputs=arguments)
        record.streams[""] = Stream(0 if tokens is None else tokens.shape[0])
        self.context.enter(record)
        self.context.prepare()
        return record

    def _taken(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The batch fields of adapters, taken out of `kwargs`: transformers refuses those that are no settings."""
        settings = getattr(self.model, "generation_config", None)
        own = [name for name in kwargs if name in self.context.own_fields and not hasattr(settings, name)]
        held = {name: kwargs.pop(name) for name in own}
        if held.get("adapter_names") is not None:
            held["adapter_names"] = row_names(held["adapter_names"], self.context, self.model)
        return held

    @property
    def plain(self) -> Any:
        """The method that this one stands for."""
        if self.before is not None:
            return self.before
        function = inspect.getattr_static(type(self.model), self.name)
        return function.__get__(self.model, type(self.model))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)


def reads_prompt(model: nn.Module, names: Sequence[str] | None = None) -> bool:
    """Whether one of these adapters asks which tokens are the prompt, as routers do that decide once for a request.

    names: None stands for the active ones.
    """
    deciding = (adapter for adapter in adapters_named(model, names) if not adapter.lone)
    return any(_asks(part) for adapter in deciding for part in adapter.modules())


def _asks(part: nn.Module) -> bool:
    by_request = hasattr(type(part), "granularity") and part.granularity == "request"
    return by_request or part.__dict__.get("reads_prompt", False)


def prompt_of(model: nn.Module, inputs: Any = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """{"prompt_mask": ones (B, T)} over the tokens that a decoder is to go on from, of the arguments of `generate`.

    The first forward of a generation may hold more than these: drafts of an assistant, or all without a cache. Empty
    where there is no telling, or where requests are packed into one row, which such routers refuse.
    """
    config = kwargs.get("generation_config") or (args[0] if args else None)
    packed = "paged" in (kwargs.get("cache_implementation"), getattr(config, "cache_implementation", None))
    given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), inputs)
    tokens = next((value for value in given if isinstance(value, Tensor)), None)
    if packed or tokens is None or tokens.dim() < 2 or getattr(model.config, "is_encoder_decoder", False):
        return {}
    return {"prompt_mask": torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)}


class Expand(Generate):
    """What `generate` repeats the rows of its batch with: beams, sequences to return."""

    name = "_expand_inputs_for_generation"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        thread = self.context.records.thread
        if thread.generates:
            thread.copies = self.__signature__.bind(*args, **kwargs).arguments.get("expand_size", 1)
        return self.plain(*args, **kwargs)


class Packing(Generate):
    """Continuous batching, which knows no batch fields and runs in a thread of its own: what it drops is refused."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fields = {name: kwargs[name] for name in kwargs if name in self.context.fields}
        self.context._hooks.refuse_packing(self.model, {**self.context.held, **fields})
        return self.plain(*args, **kwargs)


class PackedBatch(Packing):
    name = "generate_batch"


class PackedManager(Packing):
    name = "init_continuous_batching"


WRAPPED = (Generate, Expand, PackedBatch, PackedManager)


def wrap(model: nn.Module, context: Any) -> None:
    """Put these in the place of the methods that `model` has."""
    for kind in WRAPPED:
        if hasattr(model, kind.name):
            model.__dict__[kind.name] = kind(context, model)


def unwrap(model: nn.Module, context: Any) -> None:
    """Give `model` back what these have taken the place of, where they are of this context."""
    for kind in WRAPPED:
        wrapped = model.__dict__.get(kind.name)
        if isinstance(wrapped, Generate) and wrapped.context is context:
            del model.__dict__[kind.name]
            if wrapped.before is not None:
                model.__dict__[kind.name] = wrapped.before
