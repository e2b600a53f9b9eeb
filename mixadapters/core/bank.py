"""A bank of small experts of one kind: ranks may differ, one call runs them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters import kernels
from mixadapters.core.routing import Routing


class Scale(nn.Module):
    """A learnable factor, in a module of its own so that its key ends in `.weight`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), value))


class Expert(nn.Module):
    """The weights of one expert: `up(act(down(norm(x))))`, or `up(act(gate(x)) * down(x))` if gated.

    Starts as zero (`up` is 0) unless `init_weights` is False.
    """

    def __init__(self, bank: AdapterBank, rank: int, init_weights: bool) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Linear(bank.in_features, rank, bias=bank.bias)
        self.gate = nn.Linear(bank.in_features, rank, bias=bank.bias) if bank.glu else None
        self.up = nn.Linear(rank, bank.out_features, bias=bank.bias)
        self.norm = nn.LayerNorm(bank.in_features) if bank.layer_norm else None
        self.scale = Scale(1.0) if bank.scale is None else None
        if init_weights:
            nn.init.zeros_(self.up.weight)
            for part in (self.down, self.up, self.gate):
                if part is not None and part.bias is not None:
                    nn.init.zeros_(part.bias)


class Kind(NamedTuple):
    """What two banks must share to run in one call."""

    in_features: int
    out_features: int
    activation: str
    glu: bool
    bias: bool
    layer_norm: bool
    dtype: torch.dtype


class AdapterBank(nn.Module):
    """E experts from `in_features` to `out_features`, by name.

    Args:
        activation: one of `kernels.ACTIVATIONS`.
        glu: gated experts.
        bias: whether down, gate and up have one.
        layer_norm: each expert normalises its input by a LayerNorm of its own.
        scale: factor on every expert's output; None: one learnable factor per expert, from 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: str = "gelu",
        glu: bool = False,
        bias: bool = True,
        layer_norm: bool = False,
        scale: float | None = 1.0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.activation, self.glu, self.bias = activation, glu, bias
        self.layer_norm, self.scale = layer_norm, scale
        self.experts = nn.ModuleDict()

    def add(self, name: str, rank: int, init_weights: bool = True) -> None:
        """Append an expert. Raises ValueError where the name is taken or the rank is not positive."""
        if name in self.experts:
            raise ValueError(f"expert {name!r} exists already; have {self.names}")
        if rank <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {rank}")
        self.experts[name] = Expert(self, rank, init_weights)

    def remove(self, name: str) -> None:
        del self.experts[name]

    @property
    def names(self) -> list[str]:
        return list(self.experts)

    @property
    def kind(self) -> Kind:
        first = next(iter(self.experts.values()))
        return Kind(
            self.in_features, self.out_features, self.activation, self.glu, self.bias, self.layer_norm,
            first.down.weight.dtype,
        )  # fmt: skip

    def packed(self) -> dict[str, Any]:
        """The weights of all experts as `kernels.lowrank` takes them, computed anew from the parameters.

        Nothing is cached: parameters may be reassigned, moved, cast or gathered between two calls. A LayerNorm is
        folded in, D(g * n + b) = (D g) n + D b, so that all experts read the same normalised rows.
        """
        return _pack([(self, expert) for expert in self.experts.values()])

    def forward(
        self, tokens: Tensor, routing: Routing, base: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """tokens (N, K) -> (N, M): keep * base plus what the routing makes of the experts."""
        return run_banks([self], tokens, routing, base, keep)


def run_banks(
    banks: list[AdapterBank], tokens: Tensor, routing: Routing, base: Tensor | None, keep: Tensor | None = None
) -> Tensor:
    """One call over the experts of several banks of one kind, numbered through in order."""
    experts = [(bank, expert) for bank in banks for expert in bank.experts.values()]
    first = banks[0]
    if first.layer_norm:
        tokens = F.layer_norm(tokens, (first.in_features,))
    return kernels.lowrank(
        tokens,
        ranks=[expert.rank for _, expert in experts],
        indices=routing.indices,
        gates=routing.weights,
        base=base,
        base_weight=keep,
        act=first.activation,
        **_pack(experts),
    )


def _pack(experts: list[tuple[AdapterBank, Expert]]) -> dict[str, Any]:
    downs, down_biases = zip(*(_folded(e.down, e.norm) for _, e in experts), strict=True)
    packed: dict[str, Any] = {
        "w_down": _cat(downs),
        "b_down": _cat(down_biases),
        "w_up": _cat([e.up.weight for _, e in experts], dim=1),
        "b_up": None if experts[0][1].up.bias is None else torch.stack([e.up.bias for _, e in experts]),
    }
    if experts[0][1].gate is not None:
        gates, gate_biases = zip(*(_folded(e.gate, e.norm) for _, e in experts), strict=True)
        packed |= {"w_gate": _cat(gates), "b_gate": _cat(gate_biases)}
    if any(bank.scale != 1.0 for bank, _ in experts):
        like = experts[0][1].up.weight
        packed["scale"] = torch.cat(
            [like.new_full((1,), b.scale or 0.0) if e.scale is None else e.scale.weight for b, e in experts]
        )
    return packed


def _folded(linear: Any, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor | None]:
    if norm is None:
        return linear.weight, linear.bias
    shift = linear.weight @ norm.bias
    return linear.weight * norm.weight, shift if linear.bias is None else linear.bias + shift


def _cat(parts: Iterable[Any], dim: int = 0) -> Tensor | None:
    tensors = list(parts)
    if tensors[0] is None:
        return None
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
