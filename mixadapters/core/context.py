"""What adapters may know of the current batch besides their own input.

One `ForwardContext` per root model, filled by permanent hooks on it (`core/hooks.py`). Each forward of the root opens
a new `Record`; a layer that activation checkpointing runs again sees the record of the forward that it first ran in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mixadapters.core import hooks
from mixadapters.core.engines import Engine
from mixadapters.core.media import placeholders_of, reads_media
from mixadapters.core.record import Record, Recording, Records
from mixadapters.core.routing import Routing, RoutingKey, find_routing
from mixadapters.core.sites import has_two_stacks
from mixadapters.core.steps import Steps
from mixadapters.core.streams import MediaStream, PackedRequests, Stream, media_stream, read_stream, refuse_packed
from mixadapters.core.usage import UsageRecorder

ROUTES = "routes"  # the field that holds pinned routings by their keys
COMMON_FIELDS = ("adapter_names", "prompt_mask", ROUTES)

Observer = Callable[[RoutingKey, Routing, "Tensor | None"], None]
Change = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """Changes what a root forward computes: its inputs, its outputs, its loss.

    Active in training; also in evaluation where the class says `in_eval = True`. A class that says `passing = True` is
    attached for a block or a run only, and is not in copies of the model that are made then. Any class with these
    methods is one, derived from this or not.
    """

    takes: tuple[str, ...] = ()  # arguments that it removes from the forward of the base model

    def before(self, context: ForwardContext, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Arguments of the base model's forward in place of these."""
        return args, kwargs

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any: ...


class ForwardContext(Recording, hooks.Rooted):
    """The context of one root model. Use `ForwardContext.of(model)`, which makes or finds it.

    Attributes:
        record: the current `Record`. Threads have their own while a forward runs.
        observers: called with each routing that is decided, in training, evaluation and `generate`: (key, routing,
            mask (N,) bool of the rows that count, or None: all).
        usage: how routers have spread their weight in training; read and reset by the callbacks.
        steps: warns of a training in which nobody moves routers that move with its steps.
        objectives: what changes inputs, outputs and loss of a training forward, in order.
        loss_scale: factor on auxiliary losses that are attached to the outputs for want of a loss (1 / number of
            accumulated micro-batches); `StageCallback` sets it. None: nobody has said, and none accumulate.
        loss_log: running (sum, count) of each loss by name, detached; read and cleared by the callbacks.
        engine: looks at what shards the model over processes.
        cache_owner: says which adapters are at work; a key-value cache that others have filled is then refused.
            None: no such check.
    """

    def __init__(self, argument_names: tuple[str, ...] = (), placeholders: tuple[int, ...] = ()) -> None:
        self.fields: set[str] = set(COMMON_FIELDS)
        self.observers: list[Observer] = []
        self.usage = UsageRecorder()
        self.steps = Steps()
        self.objectives: list[Objective] = []
        self.staged: list[Objective] = []  # those of them that a StageCallback has attached
        self.loss_scale: Tensor | float | None = None
        self.loss_log: dict[str, tuple[Tensor, int]] = {}
        self.preparing: list[Any] = []  # layers with an adapter to prepare before each forward
        self.hosted: set[str] = set()  # names of adapters that this model holds
        self.deciding: set[str] = set()  # of those of them, perhaps removed since, that are more than one expert
        self.cache_owner: Callable[[], str] | None = None
        self.engine = Engine(self)
        self.argument_names = argument_names  # of the root's forward
        self.placeholders = placeholders  # tokens that stand for parts of images and sounds
        self.records = Records()
        self._hooks = hooks.RootHooks(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **left_out_of_copies(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.records = Records()

    @property
    def own_fields(self) -> set[str]:
        """The fields that are no arguments of the base model's forward."""
        return self.fields.difference(self.argument_names)

    # --- attachment -------------------------------------------------------------------------------------------

    @classmethod
    def find(cls, model: nn.Module) -> ForwardContext | None:
        """The context of `model`, or None. What wraps a model (PEFT, DDP, the compiler) has that of the model."""
        return hooks.find(cls, hooks.root_of(model))

    @classmethod
    def of(cls, model: nn.Module) -> ForwardContext:
        """The context of `model`; the first call makes it and hooks it up."""
        root = hooks.root_of(model)
        found = hooks.find(cls, root)
        if found is None:
            found = cls(hooks.names_of_arguments(root), placeholders_of(root))
            hooks.attach(found._hooks, root)
        return found

    def detach(self, model: nn.Module) -> None:
        """Take the hooks of this context off `model` and everything in it."""
        hooks.detach(self, model)

    def prepare(self) -> None:
        """Let adapters do what they do once per forward."""
        for host in self.preparing:
            for adapter in host.to_prepare():
                adapter.prepare(self)

    # --- for adapters and routers -----------------------------------------------------------------------------

    def stream(self, stack: str = "") -> Stream:
        """The sequence that the layers of `stack` read in this forward."""
        streams = self.record.streams
        found = streams.get(stack) or streams.get("") or next(iter(streams.values()), None) or Stream()
        if reads_media(stack) and not isinstance(found, MediaStream):
            found = streams[stack] = media_stream(found, stack, self.record.inputs, self.placeholders)
        return found

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
        if self.stream(stack).packed:
            if self.stream(stack).requests is None:
                raise refuse_packed("a router over sequences")
            return tokens.unsqueeze(0)
        batch = self.stream(stack).batch
        if tokens.dim() != 2 or batch == 0 or tokens.shape[0] % batch:
            raise ValueError(
                f"a router over sequences needs hidden states (B, T, d) or (B*T, d) with B={batch}, got "
                f"{tuple(tokens.shape)}; use granularity='token' here"
            )
        return tokens.unflatten(0, (batch, -1))

    def rows(self, name: str, count: int, stack: str = "") -> Tensor | None:
        """A field with one value for each row of the caller's batch, (B, ...), for `count` rows; None if not given.

        Raises:
            ValueError: the field has another length.
        """
        value = self.record.values.get(name)
        return None if value is None else self.stream(stack).spread(value, count, name)

    def token_field(self, name: str, stack: str = "", change: Change | None = None, after: int | None = 0) -> Any:
        """(B, T) values of the tokens of this forward, from a field that has one for each token; None if not given.

        An argument covers the tokens of this forward, or with a cache the whole sequence so far; a pinned field its
        beginning, such as the prompt of a generation.

        Args:
            change: (B, S) -> (B, S), made of the whole field before the tokens of this forward are cut out of it.
            after: the value of tokens after a pinned field; None: that of its last one.

        Raises:
            ValueError: the field has another length, or not one row for each of the batch.
        """
        stream, record = self.stream(stack), self.record
        if name in self.argument_names and name not in record.pinned:  # what repeats rows has repeated these, too
            value = record.inputs.get(name)
        else:
            value = record.values.get(name)
            value = None if value is None else stream.spread(value, stream.batch, name)
        if value is None:
            return None
        length = stream.length or 0
        if value.dim() != 2:
            raise ValueError(f"{name} {tuple(value.shape)} must be (B, T), with one value for each token")
        value = value if change is None else change(value)
        if name in record.pinned:
            value = value if after is None else nn.functional.pad(value, (0, 1), value=after)
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
        if (before := record.losses.get(name)) is not None:  # layers may lie on several devices
            loss = before + loss.to(before.device)
        record.losses[name] = loss
        if not torch.compiler.is_compiling():
            value = value.detach().float()
            total, count = self.loss_log.get(name, (torch.zeros_like(value), 0))
            self.loss_log[name] = (total + value.to(total.device), count + 1)

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

        Where blocks overlap, the one that began last decides; each takes along what it brought.

        Raises:
            ValueError: no adapter of the model reads a field of that name.
        """
        unknown = set(values) - self.fields
        if unknown:
            raise ValueError(f"no adapter of this model reads {sorted(unknown)}; fields are {sorted(self.fields)}")
        with self.records.pins.hold(values):
            yield

    def pin_in_thread(self, **values: Any) -> AbstractContextManager[None]:
        """As `pin`, for forwards of this thread alone: servers run several requests at a time."""
        return self.records.thread.pins.hold(values)

    def packing(self, requests: PackedRequests) -> AbstractContextManager[None]:
        """Say whose tokens the packed rows of this thread's forwards hold: what continuous batching alone knows."""
        return self.records.packing(requests)

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
        self._hooks.carry_into_checkpoints(module)
        if has_two_stacks(module):
            mask = inputs.get("attention_mask")
            inputs = {**inputs, "decoder_input_ids": inputs["input_ids"], "decoder_attention_mask": mask}
        with self.records.using(record), hooks.truncated(backbone):
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


def left_out_of_copies(context: ForwardContext) -> dict[str, Any]:
    """What a copy has instead: tensors with a history cannot be copied, and it is in no run and no block."""
    staying = [objective for objective in context.objectives if not getattr(objective, "passing", False)]
    empty: dict[str, Any] = {"records": None, "loss_log": {}, "observers": [], "usage": UsageRecorder()}
    return {**empty, "objectives": staying, "loss_scale": None}
