"""Mixed batches, in which each row names its own adapter.

A `MixedBatch` is one layer's plan: the calls that take the rows through their adapters. A `JointCall` is one call of
the operation for all adapters that can share it, a `LoneCall` any other adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters import kernels
from mixadapters.core.adapter import Adapter, Chain
from mixadapters.core.bank import AdapterBank, PackedExperts, pack
from mixadapters.core.context import ForwardContext
from mixadapters.core.losses import real_only
from mixadapters.core.mixture import Mixture
from mixadapters.core.routing import Routing


class MixedBatch:
    """Each row through the adapter it names, in as few calls as the adapters' kinds allow.

    Made anew for every call of a model, and kept for the steps of a `generate`, which runs with the adapters and the
    weights of its first step.

    Args:
        owner: index into `adapters` for each row of the batch, -1 for rows that stay as they are, bit for bit.
        stack: that the layer belongs to.
    """

    def __init__(self, adapters: Sequence[Adapter], owner: Sequence[int], stack: str = "") -> None:
        self._calls = list(_plan(adapters, tuple(owner), stack))

    def __call__(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        """y: (B, ..., M) or (B * T, M); each entry of `owner` stands for as many rows as it takes."""
        for call in self._calls:  # no row is in two of those that stand side by side
            y = call(x, y, context)
        return y


class JointCall:
    """Mixtures whose banks are of one kind: one call of the operation, in which experts are numbered through."""

    def __init__(self, mixtures: Sequence[Any], owner: tuple[int, ...], stack: str) -> None:
        self.mixtures, self.owner, self.stack = list(mixtures), owner, stack
        self.always_first = all(mixture.always_first for mixture in mixtures)
        # Past `nn.Module.__getattr__`, of which a batch over many adapters would notice.
        self.banks: list[Any] = [mixture._modules["bank"] for mixture in mixtures]
        self.packed: dict[AdapterBank, PackedExperts] = {}  # for the steps of a `generate`

    def __call__(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        first: Mixture = self.mixtures[0]
        source = first.source(x, y, context).to(y.dtype)
        tokens, base = source.reshape(-1, source.shape[-1]), y.reshape(-1, y.shape[-1])
        packed = pack(self.banks, context, self.packed)
        owners = rows_of(self.owner, len(tokens), y.device, context, self.stack)
        if self.always_first and not context.observers and all(size == 1 for size in packed.sizes):
            packed_row = context.stream().packed  # its requests have other numbers of tokens
            # Images and sounds of rows that all name one adapter may be any number.
            run = 1 if packed_row or len(tokens) % len(self.owner) else len(tokens) // len(self.owner)
            routing = Routing(owners, run=run)  # each mixture is its only expert
        else:
            routing = self._route(packed.sizes, owners, source, context)
        return packed(tokens, routing, base, routing.base_weight, first.rate).view_as(y)

    def _route(self, sizes: list[int], owners: Tensor, source: Tensor, context: ForwardContext) -> Routing:
        """What the mixtures' own routers say, each for its rows."""
        routings = []
        for i, mixture in enumerate(self.mixtures):
            context.record.own_rows = owners[:, 0] == i
            routings.append(mixture.dispatch(source, context))
        context.record.own_rows = None
        return _join_routings(routings, sizes, owners[:, 0])


class LoneCall:
    """An adapter that computes all rows, of which its own are taken."""

    def __init__(self, adapter: Adapter, owner: tuple[int, ...], stack: str) -> None:
        self.adapter, self.owner, self.stack = adapter, owner, stack

    def __call__(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        rows = rows_of(self.owner, y.numel() // y.shape[-1], y.device, context, self.stack)[:, 0] >= 0
        if torch.is_grad_enabled():  # of what is broken in other rows gradients see nothing, nor they of it
            own = rows_of(self.owner, y.shape[0], y.device, context, self.stack)[:, 0] >= 0
            x, y_read = real_only(x, own), real_only(y, own)
        else:
            y_read = y
        context.record.own_rows = rows
        new = self.adapter(x, y_read, context)
        context.record.own_rows = None
        return torch.where(rows.view(*y.shape[:-1], 1), new, y)


def rows_of(
    owner: tuple[int, ...], count: int, device: torch.device, context: ForwardContext, stack: str = ""
) -> Tensor:
    """(count, 1) owner of each row. Layers share it, and the steps of a `generate`."""
    record, requests = context.record, context.stream().requests
    kept = getattr(record.values.get("adapter_names"), "owners", None)
    if requests is not None:  # who the tokens are of, and how many, is of one step
        kept, owner = record.owners, tuple(owner[number] for number in requests.named)
    made = record.owners if kept is None or torch.compiler.is_compiling() else kept
    key = (owner, count, device, stack)
    if key not in made:
        rows = context.stream(stack).spread(torch.tensor(owner, device=device), count, "adapter_names")
        made[key] = kernels.constant(rows.unsqueeze(1))
    return made[key]


def _plan(adapters: Sequence[Adapter], owner: tuple[int, ...], stack: str) -> Iterator[JointCall | LoneCall]:
    """The calls for these adapters, in order. Chains are taken step by step."""
    if all(isinstance(adapter, Chain) for adapter in adapters):
        waiting = [list(adapter.steps.items()) for adapter in adapters]
        while any(waiting):
            # Next is a step that no chain has further back, so that all chains which have it take it together.
            first = [steps[0][0] for steps in waiting if steps]
            later = {name for steps in waiting for name, _ in steps[1:]}
            name = next((name for name in first if name not in later), first[0])
            have = [i for i, steps in enumerate(waiting) if steps and steps[0][0] == name]
            yield from _plan([waiting[i].pop(0)[1] for i in have], _renumber(owner, have), stack)
        return
    groups: dict[object, list[int]] = {}
    for i, adapter in enumerate(adapters):
        groups.setdefault(_group(adapter), []).append(i)
    for group, members in groups.items():
        mine, owned = [adapters[i] for i in members], _renumber(owner, members)
        yield LoneCall(mine[0], owned, stack) if group is mine[0] else JointCall(mine, owned, stack)


def _group(adapter: Adapter) -> object:
    """What adapters must have in common to run in one call."""
    if not isinstance(adapter, Mixture) or type(adapter).forward is not Mixture.forward:
        return adapter
    return (adapter.kind, adapter.rate)


def _renumber(owner: tuple[int, ...], members: list[int]) -> tuple[int, ...]:
    """Index into `members` for each entry of `owner`, -1 for the others."""
    number = {member: i for i, member in enumerate(members)}
    return tuple(number.get(one, -1) for one in owner)


def _join_routings(routings: list[Routing], sizes: list[int], owners: Tensor) -> Routing:
    """Each row's slots from its own mixture's routing, experts numbered through; owners (N,) names the mixture."""
    slots = max(size if r.indices is None else r.indices.shape[1] for r, size in zip(routings, sizes, strict=True))
    indices = torch.full((owners.shape[0], slots), -1, device=owners.device, dtype=torch.long)
    weights: Tensor | None = None
    base_weight: Tensor | None = None
    start = 0
    for i, (routing, size) in enumerate(zip(routings, sizes, strict=True)):
        mine = (owners == i).unsqueeze(1)
        chosen = routing.indices
        if chosen is None:
            chosen = torch.arange(size, device=owners.device).expand(owners.shape[0], -1)
        extra = slots - chosen.shape[1]
        shifted = nn.functional.pad(torch.where(chosen >= 0, chosen.long() + start, -1), (0, extra), value=-1)
        indices = torch.where(mine, shifted, indices)
        if routing.weights is not None:
            weights = torch.ones_like(indices, dtype=routing.weights.dtype) if weights is None else weights
            weights = torch.where(mine, nn.functional.pad(routing.weights, (0, extra)), weights)
        if routing.base_weight is not None:
            base_weight = torch.ones_like(routing.base_weight) if base_weight is None else base_weight
            base_weight = torch.where(mine.squeeze(1), routing.base_weight, base_weight)
        start += size
    return Routing(indices, weights, base_weight)
