"""What one forward says to its adapters, and which record is the current one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixadapters.core.media import reads_media
from mixadapters.core.routing import Routing, RoutingKey
from mixadapters.core.streams import PackedRequests, Stream
from mixadapters.core.trainers import TrainerLook


@dataclass(eq=False)
class Record:
    """What one forward of the root model says to its adapters, and they to its end."""

    training: bool = False
    grad: bool = False  # whether gradients were recorded when the forward began
    # Whether nothing was observed, said by the batch or pinned when it began, and nobody had chosen how the operation
    # runs: what has nothing to decide may then, until the end, go the shortest way where no gradients are recorded
    # step by step.
    plain: bool = False
    open: bool = False  # between the root's first and last hook
    closed: bool = False  # after the root's last hook: layers that run now run again
    inputs: dict[str, Any] = field(default_factory=dict)  # arguments of the base model's forward, by name
    values: dict[str, Any] = field(default_factory=dict)  # arguments taken off, and pinned ones: rows of the caller's
    pinned: frozenset[str] = frozenset()  # the names of the pinned ones among them
    copies: int = 1  # rows of `inputs` for each row of `values`: what `generate` or an objective repeats
    passes: int = 1  # how often an objective has put each row into the batch, to compare what comes of it
    streams: dict[str, Stream] = field(default_factory=dict)  # by stack, as `Site` has it
    acting: dict[Any, Any] = field(default_factory=dict)  # layer -> what acted there, for when it runs again
    checkpointed: bool = False  # whether activation checkpointing will run layers again
    trained: dict[Any, Any] = field(default_factory=dict)  # layer -> its parameters, and whether they trained there
    passed: dict[Any, None] = field(default_factory=dict)  # layers of which so far the weight alone has been read
    taps: dict[str, Tensor] = field(default_factory=dict)  # by path of the tapped module
    shared: dict[Any, Any] = field(default_factory=dict)  # what an adapter, router or objective keeps, by its owner
    runs: dict[str, int] = field(default_factory=dict)  # of a router with memory in this forward, by its mark
    checked: set[tuple[str, str, int]] = field(default_factory=set)  # (adapter, field, total) of hard routes in range
    routings: dict[RoutingKey, Routing] = field(default_factory=dict)  # what routers have decided
    decided: dict[str, Tensor] = field(default_factory=dict)  # logits of routers that decide for all layers, by router
    router_state: dict[str, Tensor] = field(default_factory=dict)  # until the model has made a cache
    losses: dict[str, Tensor] = field(default_factory=dict)  # weighted, summed by name
    main_loss: Tensor | None = None
    main_scale: float = 1.0
    owners: dict[object, Tensor] = field(default_factory=dict)  # of rows, where `adapter_names` do not keep them
    own_rows: Tensor | None = None  # (N,) bool: the rows of a mixed batch that name the adapter whose router runs
    observed: list[Tensor] | None = None  # not None: adapters report and change nothing
    parent: Record | None = None
    # Of a call outside a forward: the layers that have run in it. When one comes again, another call has begun.
    alone: set[Any] | None = None

    @classmethod
    def of_pinned(cls, training: bool, held: dict[str, Any], **said: Any) -> Record:
        """A record that knows the pinned fields, `held`, and no others: of a call outside a forward of the root.

        said: other attributes.
        """
        return cls(training, torch.is_grad_enabled(), values=held, pinned=frozenset(held), **said)

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, T) bool mask of the only, or the encoder's, stream."""
        stream = self.streams.get("") or self.streams.get("encoder")
        return None if stream is None else stream.mask


class _Block:
    """What one block holds; no two are equal."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


class Pins:
    """Fields that hold over several forwards, as long as the blocks that hold them."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []  # in the order in which they began

    @contextmanager
    def hold(self, values: dict[str, Any]) -> Iterator[None]:
        """Hold `values` inside the block. Blocks may end in any order, and in other threads than they began."""
        block = _Block(values)
        self.blocks.append(block)
        try:
            yield
        finally:
            self.blocks.remove(block)

    @property
    def values(self) -> dict[str, Any]:
        """What all blocks hold; of one field, what the last of them does."""
        held: dict[str, Any] = {}
        for block in self.blocks:
            held.update(block.values)
        return held


class _Thread:
    """What one thread is in the middle of."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.pins = Pins()
        self.again = False  # whether activation checkpointing runs a layer again
        self.generates = False  # whether a `generate` runs
        self.packed: dict[Any, Any] = {}  # bank -> its packed experts, for the steps of a `generate`
        self.copies = 1  # how often it has repeated each row of its batch
        self.requests: PackedRequests | None = None  # whose tokens its next packed row holds


class Records:
    """The record and the pinned fields of each thread, and those of all of them."""

    def __init__(self) -> None:
        self.latest = Record(closed=True)
        self.pins = Pins()
        self.trainers = TrainerLook()
        self._local = threading.local()
        # What the compiler finds in a first forward must not differ in kind from what it finds in the next.
        self.thread.record = self.latest

    @property
    def thread(self) -> _Thread:
        """What this thread is in the middle of."""
        try:
            return self._local.thread
        except AttributeError:  # its first forward
            self._local.thread = _Thread()
            return self._local.thread

    # The latest record serves threads that have none of their own, such as those of the autograd engine.
    @property
    def current(self) -> Record:
        return self.thread.record or self.latest

    @property
    def running(self) -> Record | None:
        """The record of the root forward that this thread is in; None outside one."""
        record = self.thread.record
        return record if record is not None and record.open else None

    @property
    def again(self) -> bool:
        """Whether a layer runs that has run before: by activation checkpointing, in a backward pass."""
        # The second question is for checkpoint functions that are none of transformers', and not wrapped.
        return self.thread.again or (self.current.closed and torch._C._current_graph_task_id() != -1)

    def enter(self, record: Record) -> None:
        """Make `record` the current one. No setter: torch 2.11 compiles nested models without it."""
        self.thread.record = record
        self.latest = record

    @contextmanager
    def using(self, record: Record) -> Iterator[None]:
        """Make `record` the current one inside the block."""
        thread = self.thread
        before = thread.record, thread.again
        thread.record, thread.again = record, not record.open
        try:
            yield
        finally:
            thread.record, thread.again = before

    @property
    def names(self) -> Any:
        """The `adapter_names` of the forward that runs, or outside one those that are pinned; None: rows name none."""
        return (self.held if self.outside else self.current.values).get("adapter_names")

    @property
    def outside(self) -> bool:
        """Whether what runs is in no forward of this thread, and in no second run of a layer."""
        record = self.thread.record
        live = record is not None and not record.closed and record.alone is None
        return not (live or self.thread.again or torch._C._current_graph_task_id() != -1)

    @property
    def held(self) -> dict[str, Any]:
        """The fields that hold for the next forward of this thread."""
        return {**self.pins.values, **self.thread.pins.values}

    @contextmanager
    def packing(self, requests: PackedRequests) -> Iterator[None]:
        """Packed rows of this thread hold the tokens of `requests`."""
        thread = self.thread
        before, thread.requests = thread.requests, requests
        try:
            yield
        finally:
            thread.requests = before

    @contextmanager
    def generating(self) -> Iterator[None]:
        """A `generate` of this thread: none of its rows is repeated yet."""
        thread = self.thread
        before = thread.generates, thread.copies, thread.packed
        thread.generates, thread.copies, thread.packed = True, 1, {}
        try:
            yield
        finally:
            thread.generates, thread.copies, thread.packed = before


class Recording:
    """Part of a context: which record is the current one, and which one a layer runs in."""

    records: Records

    def prepare(self) -> None:
        """Let adapters do what they do once per forward. The context does it."""
        raise NotImplementedError

    @property
    def record(self) -> Record:
        records = self.records
        return records.thread.record or records.latest

    def enter(self, record: Record) -> None:
        """Make `record` the current one."""
        self.records.enter(record)

    @property
    def running(self) -> Record | None:
        """The record of the root forward that this thread is in; None outside one."""
        return self.records.running

    @property
    def held(self) -> dict[str, Any]:
        """The fields that hold for the next forward of this thread."""
        return self.records.held

    def record_at(self, part: Any, x: Tensor | None = None, training: bool | None = None) -> Record:
        """The record that `part`, a layer, runs in: of this thread's forward; where it runs again, of its first run.

        Outside a forward (`get_image_features`, a tower or a layer called by itself) it is one of its own, which knows
        the pinned fields and no others: those of an earlier batch were of other rows.

        Args:
            x: its input; outside a forward it says how many rows there are, where that is no image or sound.
            training: whether it trains; None: `part` says it.
        """
        record = self.records.thread.record
        if record is not None and not record.closed and record.alone is None:
            return record
        if torch.compiler.is_compiling() or not self.records.outside:
            return self.record
        return self._alone(part, x, part.training if training is None else training)

    def _alone(self, part: Any, x: Tensor | None, training: bool) -> Record:
        """The record of a call outside a forward: that of the layers before, as long as they are of the same call."""
        record, held, grad = self.records.thread.record, self.records.held, torch.is_grad_enabled()
        same = record is not None and record.alone is not None and part not in record.alone and record.grad == grad
        if record is None or not same or not _is_same(record.values, held):
            record = Record.of_pinned(training, held, copies=self.records.thread.copies, alone=set())
            self.enter(record)
        assert record.alone is not None
        first, stack = not record.alone, getattr(part, "stack", "")
        record.alone.add(part)
        if x is not None and x.dim() > 2 and not reads_media(stack) and stack not in record.streams:
            rows = x.shape[1 if getattr(part, "tokens_first", False) else 0]
            record.streams[stack] = Stream(rows, copies=record.copies)
        if first:
            self.prepare()
        return record


def _is_same(values: dict[str, Any], held: dict[str, Any]) -> bool:
    """Whether two records hold the same objects."""
    return values.keys() == held.keys() and all(values[name] is held[name] for name in held)
