"""Mixed batches, in which each row names its own adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters import kernels
from mixadapters.core.adapter import Adapter, Chain
from mixadapters.core.bank import AdapterBank, Packed, Tied, concatenate, tie
from mixadapters.core.context import ForwardContext
from mixadapters.core.mixture import Mixture
from mixadapters.core.routing import Routing


class RowNames(list[str]):
    """The adapters that the rows of one call of a model name, with what its layers have made of them."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        self.batches: dict[nn.Module, MixedBatch] = {}
        self.owners: dict[object, Tensor] = {}


class MixedBatch:
    """Each row through the adapter it names, in as few calls as the adapters' kinds allow.

    Made anew for every call of a model, and kept for the steps of a `generate`, in which adapters and their parameters
    stay the same objects. Their values may change.

    Args:
        owner: index into `adapters` for each row of the batch, -1 for rows that stay as they are, bit for bit.
    """

    def __init__(self, adapters: Sequence[Adapter], owner: Sequence[int]) -> None:
        self._calls = list(_calls(adapters, tuple(owner)))

    def __call__(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        """y: (B, ..., M) or (B * T, M); each entry of `owner` stands for as many rows as it takes."""
        for call in self._calls:  # no row is in two of those that stand side by side
            y = call(x, y, context)
        return y


def _calls(adapters: Sequence[Adapter], owner: tuple[int, ...]) -> Iterator[_Together | _Alone]:
    if all(isinstance(adapter, Chain) for adapter in adapters):
        waiting = [list(adapter.stages.items()) for adapter in adapters]
        while any(waiting):
            # Next is a stage that no chain has further back, so that all chains which have it take it together.
            first = [stages[0][0] for stages in waiting if stages]
            later = {name for stages in waiting for name, _ in stages[1:]}
            name = next((name for name in first if name not in later), first[0])
            have = [i for i, stages in enumerate(waiting) if stages and stages[0][0] == name]
            yield from _calls([waiting[i].pop(0)[1] for i in have], _renumber(owner, have))
        return
    groups: dict[object, list[int]] = {}
    for i, adapter in enumerate(adapters):
        groups.setdefault(_group(adapter), []).append(i)
    for group, members in groups.items():
        mine, owned = [adapters[i] for i in members], _renumber(owner, members)
        yield _Alone(mine[0], owned) if group is mine[0] else _Together(mine, owned)


def _group(adapter: Adapter) -> object:
    """What adapters must have in common to run in one call."""
    if not isinstance(adapter, Mixture) or type(adapter).forward is not Mixture.forward:
        return adapter
    return (adapter.kind, adapter.rate)


def _renumber(owner: tuple[int, ...], members: list[int]) -> tuple[int, ...]:
    """Index into `members` for each entry of `owner`, -1 for the others."""
    place = {member: i for i, member in enumerate(members)}
    return tuple(place.get(one, -1) for one in owner)


def _rows(owner: tuple[int, ...], count: int, device: torch.device, context: ForwardContext) -> Tensor:
    """(count, 1) owner of each row. Layers share it, and the steps of a `generate`."""
    if count % len(owner):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(owner)} and {count} "
            "respectively."
        )
    record = context.record
    kept = getattr(record.values.get("adapter_names"), "owners", None)
    made = record.shared.setdefault("owners", {}) if kept is None or torch.compiler.is_compiling() else kept
    key = (owner, count, device)
    if key not in made:
        rows = torch.tensor(owner, device=device).repeat_interleave(count // len(owner))
        made[key] = kernels.constant(rows.unsqueeze(1))
    return made[key]


class _Alone:
    """An adapter that computes all rows, of which its own are taken."""

    def __init__(self, adapter: Adapter, owner: tuple[int, ...]) -> None:
        self.adapter, self.owner = adapter, owner

    def __call__(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        own = _rows(self.owner, y.shape[0], y.device, context)[:, 0] >= 0
        return torch.where(own.view(-1, *[1] * (y.dim() - 1)), self.adapter(x, y, context), y)


class _Together:
    """Mixtures whose banks are of one kind, in one call."""

    def __init__(self, mixtures: Sequence[Any], owner: tuple[int, ...]) -> None:
        self.first: Mixture = mixtures[0]
        self.owner = owner
        # Past `nn.Module.__getattr__`, as in `arena.holders`.
        self.banks: list[AdapterBank] = [mixture._modules["bank"] for mixture in mixtures]
        self.mixtures = list(mixtures)
        self.always_first = all(mixture.always_first for mixture in mixtures)
        self.tied: Tied | None = None

    def __call__(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        self.tied = self.tied or tie(self.banks)
        packed = concatenate(self.banks, context) if self.tied is None else self.tied.pack()
        source = self.first.source(x, y, context).to(y.dtype)
        tokens, base = source.reshape(-1, source.shape[-1]), y.reshape(-1, y.shape[-1])
        if self.always_first and not context.observers and all(size == 1 for size in packed.sizes):
            routing, run = self._by_owner(packed, len(tokens), y.device, context), len(tokens) // len(self.owner)
        else:
            routing, run = packed.placed(self._by_routers(packed, source, context), len(tokens)), 1
        return packed(tokens, routing, base, routing.keep, self.first.rate, run).view_as(y)

    def _by_owner(self, packed: Packed, count: int, device: torch.device, context: ForwardContext) -> Routing:
        owner, numbers = self.owner, packed.numbers
        if numbers is not None:
            owner = tuple(numbers[one] if one >= 0 else -1 for one in owner)
        return Routing(_rows(owner, count, device, context))

    def _by_routers(self, packed: Packed, source: Tensor, context: ForwardContext) -> Routing:
        rows = _rows(self.owner, source.numel() // source.shape[-1], source.device, context)[:, 0]
        routings = []
        for i, mixture in enumerate(self.mixtures):
            context.record.own_rows = rows == i
            routings.append(mixture.route(source, context))
        context.record.own_rows = None
        return _joined(routings, packed.sizes, rows)


def _joined(routings: list[Routing], sizes: list[int], rows: Tensor) -> Routing:
    """Each row's slots from its own mixture's routing, experts numbered through; rows (N,) names the mixture."""
    slots = max(size if r.indices is None else r.indices.shape[1] for r, size in zip(routings, sizes, strict=True))
    indices = torch.full((rows.shape[0], slots), -1, device=rows.device, dtype=torch.long)
    weights: Tensor | None = None
    keep: Tensor | None = None
    start = 0
    for i, (routing, size) in enumerate(zip(routings, sizes, strict=True)):
        mine = (rows == i).unsqueeze(1)
        chosen = routing.indices
        if chosen is None:
            chosen = torch.arange(size, device=rows.device).expand(rows.shape[0], -1)
        extra = slots - chosen.shape[1]
        shifted = nn.functional.pad(torch.where(chosen >= 0, chosen.long() + start, -1), (0, extra), value=-1)
        indices = torch.where(mine, shifted, indices)
        if routing.weights is not None:
            weights = torch.ones_like(indices, dtype=routing.weights.dtype) if weights is None else weights
            weights = torch.where(mine, nn.functional.pad(routing.weights, (0, extra)), weights)
        if routing.keep is not None:
            keep = torch.ones_like(routing.keep) if keep is None else keep
            keep = torch.where(mine.squeeze(1), routing.keep, keep)
        start += size
    return Routing(indices, weights, keep)
