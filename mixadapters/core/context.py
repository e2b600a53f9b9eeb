"""What adapters may know of the current batch besides their own input.

One `ForwardContext` per root model, filled by permanent hooks on it: hooks added per call are ignored under
`torch.compile`. Each forward of the root opens a new `Record`; a layer that activation checkpointing runs again
sees the record of the forward that it first ran in.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mixadapters.core.cache import claim, gate_state
from mixadapters.core.joining import countable, join_losses
from mixadapters.core.routing import Routing, RoutingKey, find_routing
from mixadapters.core.sites import has_two_stacks, layer_index
from mixadapters.core.streams import Stream, read_stream, repeat_rows

ROUTES = "routes"  # the field that holds pinned routings by their keys
COMMON_FIELDS = ("adapter_names", "domain_ids", "prompt_mask", ROUTES)

Observer = Callable[[RoutingKey, Routing, "Tensor | None"], None]


class Objective(Protocol):
    """Changes what a root forward computes: its inputs, its outputs, its loss.

    Active in training; also in evaluation where the class says `in_eval = True`.
    """

    takes: tuple[str, ...]  # arguments that it removes from the forward of the base model

    def before(self, context: ForwardContext, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]: ...

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any: ...


@dataclass(eq=False)
class Record:
    """What one forward of the root model says to its adapters, and they to its end."""

    training: bool = False
    grad: bool = False  # whether gradients were recorded when the forward began
    open: bool = False  # between the root's first and last hook
    closed: bool = False  # after the root's last hook: layers that run now run again
    inputs: dict[str, Any] = field(default_factory=dict)  # arguments of the base model's forward, by name
    values: dict[str, Any] = field(default_factory=dict)  # arguments taken off, and pinned ones
    pinned: frozenset[str] = frozenset()  # the names of the pinned ones among them
    streams: dict[str, Stream] = field(default_factory=dict)  # by stack: "", "encoder", "decoder"
    taps: dict[str, Tensor] = field(default_factory=dict)  # by path of the tapped module
    shared: dict[str, Any] = field(default_factory=dict)  # what `Adapter.prepare` leaves for the layers
    routings: dict[RoutingKey, Routing] = field(default_factory=dict)  # what routers have decided
    state: dict[str, Tensor] = field(default_factory=dict)  # gate state until the model has made a cache
    losses: dict[str, Tensor] = field(default_factory=dict)  # weighted, summed by name
    main_loss: Tensor | None = None
    main_scale: float = 1.0
    own_rows: Tensor | None = None  # (N,) bool: the rows of a mixed batch that name the adapter whose router runs
    observed: list[Tensor] | None = None  # not None: adapters report and change nothing
    parent: Record | None = None

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, T) bool mask of the only, or the encoder's, stream."""
        stream = self.streams.get("") or self.streams.get("encoder")
        return None if stream is None else stream.mask


class _Checkpointed:
    """A checkpoint function whose second run of a layer sees the record of the first."""

    def __init__(self, context: ForwardContext, function: Any) -> None:
        self.context, self.function = context, function

    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler recomputes in its graph, not by running Python again
            return self.function(layer, *args, **kwargs)
        record = self.context.record

        def run(*inner: Any, **keywords: Any) -> Any:
            with self.context.using(record):
                return layer(*inner, **keywords)

        return self.function(run, *args, **kwargs)


class _StackHook:
    """Notes the sequence that a part of the model reads: in `generate` the encoder runs before any root forward."""

    def __init__(self, context: ForwardContext, stack: str, names: tuple[str, ...]) -> None:
        self.context, self.stack, self.names = context, stack, names

    def open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        running = self.context.running
        if running is not None and not self.stack:  # the root has read it
            return
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if running is None:
            values = self.context.held
            self.context.enter(
                Record(
                    module.training, torch.is_grad_enabled(), inputs=inputs, values=values, pinned=frozenset(values)
                )
            )
        self.context.record.streams[self.stack] = read_stream(inputs)
        if running is None:
            self.context.prepare()


class ForwardContext:
    """The context of one root model. Use `ForwardContext.of(model)`, which makes or finds it.

    Attributes:
        record: the current `Record`. Threads have their own while a forward runs.
        observers: called with each routing that is decided, in training, evaluation and `generate`: (key, routing,
            mask (N,) bool of the rows that count, or None: all).
        objectives: what changes inputs, outputs and loss of a training forward, in order.
        pinned: fields that hold over several forwards; see `pin`.
        loss_scale: factor on auxiliary losses that are attached to the outputs for want of a loss (1 / number of
            accumulated micro-batches); `StageCallback` sets it. None: nobody has said, and none accumulate.
        loss_log: running (sum, count) of each loss by name, detached; read and cleared by the callbacks.
        cache_owner: says which adapters are at work; a key-value cache that others have filled is then refused.
            None: no such check.
    """

    def __init__(self, argument_names: tuple[str, ...] = ()) -> None:
        self.fields: set[str] = set(COMMON_FIELDS)
        self.observers: list[Observer] = []
        self.objectives: list[Objective] = []
        self.staged: list[Objective] = []  # those of them that a StageCallback has attached
        self.pinned: dict[str, Any] = {}
        self.loss_scale: Tensor | float | None = None
        self.loss_log: dict[str, tuple[Tensor, int]] = {}
        self.preparing: list[Any] = []  # layers with an adapter to prepare before each forward
        self.hosted: set[str] = set()  # names of adapters that this model holds
        self.cache_owner: Callable[[], str] | None = None
        self._argument_names = argument_names
        self._layers: list[nn.Module] | None = None  # those that activation checkpointing may run again
        self._empty()

    def _empty(self) -> None:
        self._latest = Record()
        self._local = threading.local()
        # What the compiler finds in a first forward must not differ in kind from what it finds in the next.
        self._local.record, self._local.pinned = self._latest, {}

    def __getstate__(self) -> dict[str, Any]:
        # Tensors of a batch are no state of the model, and those with a history cannot be copied.
        left_out: dict[str, Any] = {"_latest": None, "_local": None, "loss_log": {}, "pinned": {}, "observers": []}
        return {**self.__dict__, **left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._empty()

    # The latest record serves threads that have none of their own, such as those of the autograd engine.
    @property
    def record(self) -> Record:
        return getattr(self._local, "record", None) or self._latest

    def enter(self, record: Record) -> None:
        """Make `record` the current one. No setter: torch 2.11 compiles nested models without it."""
        self._local.record = record
        self._latest = record

    @property
    def running(self) -> Record | None:
        """The record of the root forward that this thread is in; None outside one."""
        record = getattr(self._local, "record", None)
        return record if record is not None and record.open else None

    @property
    def own_fields(self) -> set[str]:
        """The fields that are no arguments of the base model's forward."""
        return self.fields.difference(self._argument_names)

    @property
    def held(self) -> dict[str, Any]:
        """The fields that hold for the next forward of this thread."""
        return {**self.pinned, **getattr(self._local, "pinned", {})}

    # --- attachment -------------------------------------------------------------------------------------------

    @classmethod
    def find(cls, model: nn.Module) -> ForwardContext | None:
        """The context of `model`, or None."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), cls):
                return hook.__self__
        return None

    @classmethod
    def of(cls, model: nn.Module) -> ForwardContext:
        """The context of `model`; the first call makes it and hooks it up."""
        found = cls.find(model)
        if found is not None:
            return found
        context = cls(_argument_names(model))
        model.register_forward_pre_hook(context.open, with_kwargs=True, prepend=True)
        model.register_forward_hook(context.close, with_kwargs=True, always_call=True)
        if has_two_stacks(model):
            for stack in ("encoder", "decoder"):
                part = getattr(model, f"get_{stack}")()
                hook = _StackHook(context, stack, _argument_names(part))
                part.register_forward_pre_hook(hook.open, with_kwargs=True)
        elif isinstance(part := getattr(model, getattr(model, "base_model_prefix", None) or "", None), nn.Module):
            hook = _StackHook(context, "", _argument_names(part))  # reward trainers call the model without its head
            part.register_forward_pre_hook(hook.open, with_kwargs=True)
        return context

    def detach(self, model: nn.Module) -> None:
        """Take the hooks of this context off `model` and everything in it."""
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    owner = getattr(hook, "__self__", None)
                    if owner is self or getattr(owner, "context", None) is self:
                        del hooks[key]
                        flags = ("_pre_hooks_with_kwargs", "_hooks_with_kwargs", "_hooks_always_called")
                        for extra in (f"_forward{flag}" for flag in flags):
                            getattr(module, extra).pop(key, None)
            function = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, _Checkpointed):
                module._gradient_checkpointing_func = function.function

    # --- hooks of the root ------------------------------------------------------------------------------------

    def open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        parent = self.running
        taken = self.own_fields.union(*(o.takes for o in self.objectives))
        held, given = self.held, {name: kwargs[name] for name in kwargs if name in self.fields | taken}
        kwargs = {name: value for name, value in kwargs.items() if name not in taken}
        values, pinned = {**held, **given}, frozenset(held).difference(given)
        record = Record(
            module.training, torch.is_grad_enabled(), open=True, values=values, pinned=pinned, parent=parent
        )
        self.enter(record)
        for objective in self._active(record):
            args, kwargs = objective.before(self, args, kwargs)
        kwargs = countable(kwargs) if record.grad else kwargs
        record.inputs = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
        record.streams[""] = read_stream(record.inputs)
        names = values.get("adapter_names")
        if names is not None and record.streams[""].batch not in (
            len(names),
            len(names) * values.get("row_groups", 1),
        ):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {record.streams[''].batch} respectively."
            )
        self._claim_cache(record, record.streams[""].cache)
        self._carry_into_checkpoints(module)
        self.prepare()
        return args, kwargs

    def _claim_cache(self, record: Record, cache: Any) -> None:
        if self.cache_owner is not None and cache is not None and not torch.compiler.is_compiling():
            names = record.values.get("adapter_names")
            who = self.cache_owner() if names is None else f"the rows' own adapters, {list(names)}"
            claim(cache, who, filled=record.streams[""].cached)

    def prepare(self) -> None:
        """Let adapters do what they do once per forward."""
        for host in self.preparing:
            host.prepare()

    def close(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        record = self.record
        try:
            if output is not None:  # None: the forward raised
                output = self._finish(record, module, output)
        finally:
            record.open, record.closed = False, True
            if record.parent is not None:
                self.enter(record.parent)
        return output

    def _active(self, record: Record) -> list[Objective]:
        if record.parent is not None:
            return []
        trains = record.training and record.grad  # not so in a reference pass
        return [o for o in self.objectives if trains or getattr(o, "in_eval", False)]

    def _finish(self, record: Record, module: nn.Module, output: Any) -> Any:
        for objective in self._active(record):
            output = objective.after(self, module, output)
        output = join_losses(record, module, output, self.loss_scale)
        cache = getattr(output, "past_key_values", None)
        if record.state and cache is not None:
            gate_state(cache).update(record.state)
        if cache is not record.streams[""].cache and hasattr(cache, "get_seq_length"):
            self._claim_cache(record, cache)
        return output

    def _carry_into_checkpoints(self, module: nn.Module) -> None:
        """Wrap the checkpoint functions that transformers sets on layers, whenever it has set new ones."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if self._layers is None:
            self._layers = [m for m in module.modules() if hasattr(m, "gradient_checkpointing")]
        for layer in self._layers:
            function = layer.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _Checkpointed):
                layer._gradient_checkpointing_func = _Checkpointed(self, function)

    # --- for adapters and routers -----------------------------------------------------------------------------

    def stream(self, stack: str = "") -> Stream:
        """The sequence that the layers of `stack` read in this forward."""
        return self.record.streams.get(stack) or self.record.streams.get("") or Stream()

    def tap(self, path: str) -> Tensor:
        """The input of the module at `path` in this forward."""
        if path not in self.record.taps:
            raise RuntimeError(f"the module {path!r} has not run before the layer that needs its input")
        return self.record.taps[path]

    def routing(self, key: RoutingKey) -> Routing:
        """What has been decided at `key` in this forward; `path` and `step` may be left out where that is clear.

        Raises:
            RuntimeError: no router has decided it yet, or several have.
        """
        return find_routing(self.record.routings, key)

    def as_sequences(self, tokens: Tensor, stack: str = "") -> Tensor:
        """tokens (B, T, d) or flattened (B*T, d) -> (B, T, d)."""
        if tokens.dim() == 3:
            return tokens
        batch = self.stream(stack).batch
        if tokens.dim() != 2 or batch == 0 or tokens.shape[0] % batch:
            raise ValueError(
                f"a gate over sequences needs hidden states (B, T, d) or (B*T, d) with B={batch}, got "
                f"{tuple(tokens.shape)}; use gate_granularity='token' here"
            )
        return tokens.unflatten(0, (batch, -1))

    def rows(self, field_name: str, count: int) -> Tensor | None:
        """A per-sequence field (B, ...) repeated to `count` rows: tokens of a flattened batch, beams of a search."""
        value = self.record.values.get(field_name)
        return None if value is None else repeat_rows(torch.as_tensor(value), count, field_name)

    def token_field(self, name: str, stack: str = "") -> Tensor | None:
        """(B, T) values of the tokens of this forward, from a field that has one for each token; None if not given.

        An argument covers the tokens of this forward, or with a cache the whole sequence so far. A pinned field covers
        the beginning of the sequence, such as the prompt of a generation; tokens after it have the value 0. Rows are
        repeated for beams.

        Raises:
            ValueError: the field has another length, or its rows do not divide those of the batch.
        """
        stream, record = self.stream(stack), self.record
        value = record.values.get(name, record.inputs.get(name))
        if value is None:
            return None
        value = repeat_rows(torch.as_tensor(value), stream.batch, name)
        length = stream.length or 0
        if name in record.pinned:
            value = nn.functional.pad(value, (0, 1))
        elif value.shape[1] == length:
            return value
        elif value.shape[1] != length + int(stream.past):
            raise ValueError(
                f"{name} has {value.shape[1]} values per row, but this forward reads {length} tokens"
                f"{f' after {int(stream.past)} in the cache' if stream.cached else ''}; give one value for each token"
            )
        position = torch.arange(length, device=value.device) + stream.past
        return value.index_select(1, position.clamp_max(value.shape[1] - 1))

    def add_loss(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Add weight * value (scalar) to the loss of this forward. Ignored when a layer is merely run again.

        Raises:
            ValueError: reentrant activation checkpointing would drop the gradient of the loss.
        """
        record = self.record
        if not record.open or (record.training and not record.grad):  # such as a reference pass
            return
        if record.training and not torch.is_grad_enabled():
            raise ValueError(
                f"the auxiliary loss {name!r} has no gradient inside reentrant activation checkpointing; pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        loss = weight * value
        record.losses[name] = record.losses[name] + loss if name in record.losses else loss
        if not torch.compiler.is_compiling():
            total, count = self.loss_log.get(name, (0.0, 0))
            self.loss_log[name] = (total + value.detach().float(), count + 1)

    def set_loss(self, value: Tensor) -> None:
        """Make `value` (scalar) the main loss of this forward."""
        self.record.main_loss = value

    def scale_loss(self, factor: float) -> None:
        """Multiply the main loss of this forward by `factor`."""
        self.record.main_scale *= factor

    # --- for callers ------------------------------------------------------------------------------------------

    @contextmanager
    def pin(self, **values: Any) -> Iterator[None]:
        """Hold fields fixed over several forwards: `with context.pin(domain_ids=ids): model.generate(...)`.

        Raises:
            ValueError: no adapter of the model reads a field of that name.
        """
        unknown = set(values) - self.fields
        if unknown:
            raise ValueError(f"no adapter of this model reads {sorted(unknown)}; fields are {sorted(self.fields)}")
        before = self.pinned
        self.pinned = {**before, **values}
        try:
            yield
        finally:
            self.pinned = before

    @contextmanager
    def pin_in_thread(self, **values: Any) -> Iterator[None]:
        """As `pin`, for forwards of this thread alone: servers run several requests at a time."""
        before = getattr(self._local, "pinned", {})
        self._local.pinned = {**before, **values}
        try:
            yield
        finally:
            self._local.pinned = before

    @contextmanager
    def using(self, record: Record) -> Iterator[None]:
        """Make `record` the current one inside the block."""
        before = getattr(self._local, "record", None)
        self._local.record = record
        try:
            yield
        finally:
            self._local.record = before

    def observe(self, module: nn.Module, **inputs: Any) -> list[Tensor]:
        """Run the base model's own stream on `inputs`, up to the last layer that has something to tell.

        Adapters compute on the stream and leave it unchanged.

        Returns:
            For each trainable expert of each observing adapter what it alone would add: (B, T, d).

        Raises:
            ValueError: no adapter observes, or reentrant activation checkpointing drops the gradient.
        """
        backbone = getattr(module, getattr(module, "base_model_prefix", "") or "", module)
        record = Record(module.training, torch.is_grad_enabled(), open=False, inputs=inputs, observed=[])
        record.streams[""] = read_stream(inputs)
        record.open = True
        self._carry_into_checkpoints(module)
        if has_two_stacks(module):
            inputs = {
                **inputs,
                "decoder_input_ids": inputs["input_ids"],
                "decoder_attention_mask": inputs.get("attention_mask"),
            }
        with self.using(record), _truncated(backbone):
            if backbone is module:
                module.forward(**inputs)
            else:
                backbone(**inputs)
        record.open = False
        if not record.observed:
            raise ValueError("no trainable adapter of this model observes the base model's stream; check the stage")
        if record.grad and not any(delta.requires_grad for delta in record.observed):
            raise ValueError(
                "what the adapters do to the base model's stream has no gradient inside reentrant activation "
                "checkpointing; pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return record.observed


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


@contextmanager
def _truncated(backbone: nn.Module) -> Iterator[None]:
    """Cut each stack of layers after the last one that holds an observing adapter."""
    depth: dict[str, int] = {}
    for path, module in backbone.named_modules():
        index = layer_index(path) if getattr(module, "observes", False) else None
        if index is not None:
            stack = path[: path.index(f".{index}.")]
            depth[stack] = max(depth.get(stack, 0), index + 1)
    cut: list[tuple[nn.Module, str, nn.ModuleList]] = []
    try:
        for path, layers in depth.items():
            parent, _, name = path.rpartition(".")
            owner, full = backbone.get_submodule(parent), backbone.get_submodule(path)
            if isinstance(full, nn.ModuleList):
                cut.append((owner, name, full))
                setattr(owner, name, full[:layers])
        yield
    finally:
        for owner, name, full in cut:
            setattr(owner, name, full)
