"""Which rows meet which experts in which launch: the passes of a problem, and tables of sorted rows."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mixadapters.kernels.problem import Problem
from mixadapters.kernels.triton import configs
from mixadapters.kernels.triton.launch import recording


class Pass(NamedTuple):
    """One round of launches: it adds a window of experts for every row, or one slot of every row."""

    first: int = 0  # window of experts, in mode "all"
    last: int = 0
    indices: Tensor | None = None  # from its slot on
    weights: Tensor | None = None
    order: Tensor | None = None  # (N,) rows by expert, in mode "sorted"
    offsets: Tensor | None = None  # (E + 2,) where each expert begins in `order`; the last one is "none"
    tiles: Tensor | None = None  # (3, tiles) expert, begin and end of every tile


class Plan(NamedTuple):
    """The mode (see `kernels.py`), the widest window in columns and in experts, and the passes."""

    mode: str
    hidden: int
    experts: int
    passes: list[Pass]
    tables: tuple[Tensor, ...]  # order (k, N) and offsets (k, E + 2) in mode "sorted"; nothing else takes time


def windows(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Consecutive experts whose ranks fit into one program."""
    first, width, found = 0, 0, []
    for e, rank in enumerate(ranks):
        if width + rank > configs.WIDEST:
            found.append((first, e))
            first, width = e, 0
        width += rank
    return [*found, (first, len(ranks))]


def plan(p: Problem, training: bool, tables: tuple[Tensor, ...] = ()) -> Plan:
    """How `p` is run; `tables` from the plan of the forward saves the sorting in the backward.

    A mixture of all experts takes them in windows, each one product. Where rows choose, none is multiplied with the
    weights of an expert that it has not chosen, be it by 0: these may be infinite. Runs of rows, or few rows, make
    that free of sorting.
    """
    rows, num = p.x.shape[0], len(p.ranks)
    if p.indices is None:
        around = windows(p.ranks)
        passes = [Pass(a, b, weights=p.weights) for a, b in around]
        hidden = max(sum(p.ranks[a:b]) for a, b in around)
        return Plan("all", hidden, max(b - a for a, b in around), passes, ())
    slots = p.indices.shape[1]
    columns = [(p.indices[:, s:], None if p.weights is None else p.weights[:, s:]) for s in range(slots)]
    # In training nothing may depend on the number of rows: the compiler does not know it.
    few = not (training or p.batch_invariant) and rows * slots <= configs.FEW_ROWS
    if p.run >= 16 or few:
        passes = [Pass(indices=indices, weights=weights) for indices, weights in columns]
        return Plan("runs", max(p.ranks), 1, passes, ())
    order, offsets = tables or sort_rows(p.indices, num)
    tiles = tile_table(offsets, rows, configs.sorted_rows(p.x.dtype, max(p.ranks), p.gate is not None))
    passes = [
        Pass(0, 0, indices, weights, order[s], offsets[s], tiles[s]) for s, (indices, weights) in enumerate(columns)
    ]
    return Plan("sorted", max(p.ranks), 1, passes, (order, offsets))


def sort_rows(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Rows by expert for every slot, (k, N), and where each expert begins, (k, E + 2); int32, without waiting."""
    experts = torch.where(indices < 0, num_experts, indices).t().contiguous()
    experts, order = experts.sort(dim=1, stable=True)
    bounds = torch.arange(num_experts + 2, device=indices.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts, bounds.expand(experts.shape[0], -1).contiguous(), out_int32=True)
    return order.to(torch.int32), offsets


def tile_table(offsets: Tensor, rows: int, size: int) -> Tensor:
    """(k, 3, tiles) int32: expert (-1: none), begin and end of every tile; as many as there can be, some empty."""
    groups = offsets.shape[1] - 1
    number = (offsets.diff(dim=1) + size - 1) // size
    last = number.cumsum(1, dtype=torch.int32)
    tile = torch.arange(rows // size + groups, device=offsets.device, dtype=torch.int32)
    tile = tile.expand(offsets.shape[0], -1).contiguous()
    group = torch.searchsorted(last, tile, right=True).clamp_max(groups - 1)
    begin = offsets.gather(1, group) + (tile - (last - number).gather(1, group)) * size
    expert = torch.where(group == groups - 1, -1, group).to(torch.int32)
    return torch.stack([expert, begin, offsets.gather(1, group + 1)], dim=1)


def column_tables(ranks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each expert's columns begin, (E + 1,), and the expert of each column, (R,); int32."""
    # What is recorded may be a fake tensor: that must not stay in a cache.
    return _column_tables.__wrapped__(ranks, device) if recording() else _column_tables(ranks, device)


@lru_cache(maxsize=256)
def _column_tables(ranks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    starts, owners = [0], []
    for e, rank in enumerate(ranks):
        starts.append(starts[-1] + rank)
        owners += [e] * rank
    return (
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(owners, dtype=torch.int32, device=device),
    )
