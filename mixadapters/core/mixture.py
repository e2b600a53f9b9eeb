"""A routed bank as an adapter, and mixed batches in which rows name their own adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mixadapters.core.adapter import Adapter, Chain
from mixadapters.core.bank import AdapterBank, run_banks
from mixadapters.core.context import ForwardContext
from mixadapters.core.routing import Routing

Insertion = Literal["parallel", "sequential"]


class Mixture(Adapter):
    """Adds to a layer's output what routed experts make of the layer's input, or of the output itself.

        y <- keep * y + sum_k w_k E_k(source),   source = x (parallel), y (sequential) or a tapped input

    Args:
        router: tokens, context -> Routing.
        bank: the experts.
        insertion: "parallel" or "sequential".
        tap: path of a tapped module whose input takes the place of x.
        dropout: on what the experts read, in training.
        observes: whether losses on the base model's stream see the experts.
        replaces: experts stand beside the layer (each is a full substitute for y), not on top of it.
    """

    def __init__(
        self,
        router: nn.Module,
        bank: AdapterBank,
        insertion: Insertion = "parallel",
        *,
        tap: str | None = None,
        dropout: float = 0.0,
        observes: bool = False,
        replaces: bool = False,
    ) -> None:
        super().__init__()
        self.router, self.bank = router, bank
        self.insertion, self.tap = insertion, tap
        self.dropout = nn.Dropout(dropout)
        self.observes, self.replaces = observes, replaces

    def source(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        """What the experts read: (..., K)."""
        if self.insertion == "sequential":
            return y
        return x if self.tap is None else context.tap(self.tap)

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        source = self.source(x, y, context).to(y.dtype)
        routing = self.router(source, context)
        tokens = self.dropout(source.reshape(-1, source.shape[-1]))
        return self.bank(tokens, routing, y.reshape(-1, y.shape[-1]), routing.keep).view_as(y)

    def observe(self, x: Tensor, y: Tensor, context: ForwardContext) -> list[Tensor]:
        source = self.source(x, y, context).to(y.dtype)
        tokens = source.reshape(-1, source.shape[-1])
        deltas = []
        for i, expert in enumerate(self.bank.experts.values()):
            if not any(p.requires_grad for p in expert.parameters()):
                continue
            only = Routing(torch.full((tokens.shape[0], 1), i, device=tokens.device))
            alone = self.bank(tokens, only).view_as(y)
            deltas.append(alone - y.detach() if self.replaces else alone)
        return deltas

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Exact where experts are linear and the routing is a constant: W + sum s w U D, or (1 + sum s w U D) W."""
        weights = getattr(self.router, "constant", lambda: None)()
        if weights is None:
            raise ValueError("its gate depends on the input, so no single weight equals it")
        bank = self.bank
        if bank.activation != "identity" or bank.glu or bank.layer_norm:
            what = "LayerNorm" if bank.layer_norm else "activation"
            raise ValueError(f"a bottleneck with its own {what} is not linear, so no single weight equals it")
        if self.tap is not None or (self.insertion == "parallel" and weight.shape[1] != bank.in_features):
            raise ValueError("its input is not the input of the layer that it would be folded into")
        delta = weight.new_zeros(bank.out_features, bank.in_features)
        shift = weight.new_zeros(bank.out_features)
        for expert, w in zip(bank.experts.values(), weights, strict=True):
            factor = w * (bank.scale if expert.scale is None else expert.scale.weight.to(weight.dtype))
            up = expert.up.weight.to(weight.dtype)
            delta = delta + factor * (up @ expert.down.weight.to(weight.dtype))
            if expert.up.bias is not None:
                shift = shift + factor * (up @ expert.down.bias.to(weight.dtype) + expert.up.bias.to(weight.dtype))
        old = weight.new_zeros(bank.out_features) if bias is None else bias
        if self.insertion == "parallel":
            weight, new = weight + delta, old + shift
        else:
            weight, new = weight + delta @ weight, old + delta @ old + shift
        return weight, new if bias is not None or bool(shift.any()) else None


def apply_rows(adapters: Sequence[Adapter], owner: Tensor, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
    """Each row through the adapter it names, in as few calls as the adapters' kinds allow.

    Args:
        owner: (B,) index into `adapters` of each row of y (B, ..., M); -1 leaves the row as it is, bit for bit.
    """
    if all(isinstance(adapter, Chain) for adapter in adapters):
        waiting = [list(adapter.stages.items()) for adapter in adapters]
        while any(waiting):
            # Next is a stage that no chain has further back, so that all chains which have it take it together.
            first = [stages[0][0] for stages in waiting if stages]
            later = {name for stages in waiting for name, _ in stages[1:]}
            name = next((name for name in first if name not in later), first[0])
            have = [i for i, stages in enumerate(waiting) if stages and stages[0][0] == name]
            owned = _renumber(owner, have, len(adapters))
            y = apply_rows([waiting[i].pop(0)[1] for i in have], owned, x, y, context)
        return y
    groups: dict[object, list[int]] = {}
    for i, adapter in enumerate(adapters):
        groups.setdefault(_group(adapter), []).append(i)
    before = y
    for members in groups.values():
        mine = [adapters[i] for i in members]
        owned = _renumber(owner, members, len(adapters))
        if type(mine[0]) is Mixture:
            new = _mixtures_in_one_call(mine, owned, x, before, context)
        else:
            new = mine[0](x, before, context)
        y = torch.where((owned >= 0).view(-1, *[1] * (y.dim() - 1)), new, y)
    return y


def _group(adapter: Adapter) -> object:
    if type(adapter) is not Mixture:
        return id(adapter)
    return (adapter.bank.kind, adapter.insertion, adapter.tap, adapter.dropout.p)


def _renumber(owner: Tensor, members: list[int], count: int) -> Tensor:
    """owner (B,) over `count` adapters -> index into `members`, -1 for the others."""
    table = torch.full((count + 1,), -1, dtype=torch.long)
    table[members] = torch.arange(len(members))
    return table.to(owner.device)[owner]  # -1 reads the last entry, which is -1


def _mixtures_in_one_call(
    mixtures: list[Mixture], owner: Tensor, x: Tensor, y: Tensor, context: ForwardContext
) -> Tensor:
    first = mixtures[0]
    source = first.source(x, y, context).to(y.dtype)
    tokens = first.dropout(source.reshape(-1, source.shape[-1]))
    rows = owner.repeat_interleave(tokens.shape[0] // owner.shape[0])
    if all(len(m.bank.experts) == 1 and getattr(m.router, "always_first", False) for m in mixtures):
        routing = Routing(rows.unsqueeze(1))
    else:
        routings = []
        for i, mixture in enumerate(mixtures):
            context.record.own_rows = rows == i
            routings.append(mixture.router(source, context))
        context.record.own_rows = None
        routing = _joined(routings, [m.bank for m in mixtures], rows)
    out = run_banks([m.bank for m in mixtures], tokens, routing, y.reshape(-1, y.shape[-1]), routing.keep)
    return out.view_as(y)


def _joined(routings: list[Routing], banks: list[AdapterBank], rows: Tensor) -> Routing:
    """Each row's slots from its own mixture's routing, experts numbered through; rows (N,) names the mixture."""
    sizes = [len(bank.experts) for bank in banks]
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
