"""A bank of small experts of one kind: ranks may differ, one call runs them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters import kernels
from mixadapters.core.arena import Arena, Slot, Stack, holders, read, stacked
from mixadapters.core.routing import Routing

if TYPE_CHECKING:
    from mixadapters.core.context import ForwardContext


class Weights(NamedTuple):
    """What one expert computes with: its parameters, or tensors computed from them."""

    down: Tensor  # (r, K)
    up: Tensor  # (M, r)
    b_down: Tensor | None = None  # (r,)
    b_up: Tensor | None = None  # (M,)
    gate: Tensor | None = None  # (r, K)
    b_gate: Tensor | None = None  # (r,)
    norm: tuple[Tensor, Tensor] | None = None  # weight and bias (K,) of a LayerNorm on the input
    scale: Tensor | float = 1.0  # a tensor has one entry


class Scale(nn.Module):
    """A learnable factor, in a module of its own so that its key ends in `.weight`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), value))


class Expert(nn.Module):
    """The weights of one expert: `up(act(down(norm(x))))`, or `up(act(gate(x)) * down(x))` if gated.

    Starts as zero (`up` is 0) unless `init_weights` is False.
    """

    arena: Arena | None = None  # where the parameters have their memory, once experts run together
    slot: Slot | None = None

    def __init__(self, bank: AdapterBank, rank: int, init_weights: bool) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Linear(bank.in_features, rank, bias=bank.bias)
        self.gate = nn.Linear(bank.in_features, rank, bias=bank.bias) if bank.glu else None
        self.up = nn.Linear(rank, bank.out_features, bias=bank.bias)
        lay_out(self)
        self.register_load_state_dict_post_hook(lay_out)
        self.norm = nn.LayerNorm(bank.in_features) if bank.layer_norm else None
        self.scale = Scale(1.0) if bank.scale is None else None
        if init_weights:
            nn.init.zeros_(self.up.weight)
            for part in (self.down, self.up, self.gate):
                if part is not None and part.bias is not None:
                    nn.init.zeros_(part.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("arena", "slot")}

    def weights(self, scale: float | None) -> Weights:
        """Its parameters. scale: the factor where it has none of its own."""
        gate, norm = self.gate, self.norm
        return Weights(
            self.down.weight, self.up.weight, self.down.bias, self.up.bias,
            None if gate is None else gate.weight, None if gate is None else gate.bias,
            None if norm is None else (norm.weight, norm.bias),
            float(scale or 0.0) if self.scale is None else self.scale.weight,
        )  # fmt: skip


def lay_out(expert: Expert, *_: Any) -> None:
    """Store `up.weight` (M, r) row by row of its transpose, as arenas do: weights that move keep their strides."""
    if type(expert.up) is nn.Linear and not expert.up.weight.T.is_contiguous():
        expert.up.weight.data = expert.up.weight.data.T.contiguous().T


class Kind(NamedTuple):
    """What two banks must share to run in one call."""

    in_features: int
    out_features: int
    activation: str
    glu: bool
    bias: bool
    layer_norm: bool


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
        self.kind = Kind(in_features, out_features, activation, glu, bias, layer_norm)
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

    def weights(self, context: ForwardContext | None) -> list[Weights]:
        """What the numbers of a routing stand for in this forward. A subclass may compute them, and their number.

        context: None stands for an evaluation outside a forward, such as a merge.
        """
        return [expert.weights(self.scale) for expert in self.experts.values()]

    def forward(
        self,
        tokens: Tensor,
        routing: Routing,
        context: ForwardContext | None,
        base: Tensor | None = None,
        keep: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """tokens (N, K) -> (N, M): keep * base plus what the routing makes of the experts.

        dropout: probability that they read an element of `tokens` as 0.
        """
        packed = pack([self], context)
        return packed(tokens, packed.placed(routing, tokens.shape[0]), base, keep, dropout, routing.run)


class Packed(NamedTuple):
    """The experts of several banks of one kind, for one call of the op."""

    kind: Kind
    sizes: list[int]  # experts of each bank
    numbers: list[int] | None  # the place of each expert among those of the op; None: in order
    arguments: dict[str, Any]

    def placed(self, routing: Routing, rows: int) -> Routing:
        """A routing of `rows` rows over the experts in order, by their places."""
        if self.numbers is None:
            return routing
        indices = routing.indices
        table = torch.tensor([*self.numbers, -1], device=self.arguments["w_down"].device)
        chosen = table[:-1].expand(rows, -1) if indices is None else table[indices.long()]  # -1 reads the last entry
        return routing._replace(indices=chosen)

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        base: Tensor | None = None,
        keep: Tensor | None = None,
        dropout: float = 0.0,
        run: int = 1,
    ) -> Tensor:
        """As `AdapterBank.forward`, by places; the routing is constant over every `run` consecutive rows."""
        seed = None
        if self.kind.layer_norm:
            tokens = F.layer_norm(F.dropout(tokens, dropout), (self.kind.in_features,))
            dropout = 0.0
        elif dropout:
            seed = torch.randint(2**63 - 1, (), device=tokens.device)
        return kernels.lowrank(
            tokens, indices=routing.indices, gates=routing.weights, base=base, base_weight=keep,
            act=self.kind.activation, dropout=dropout, seed=seed, run=run, **self.arguments,
        )  # fmt: skip


def pack(banks: Sequence[AdapterBank], context: ForwardContext | None) -> Packed:
    """The experts of `banks` by their arena; those whose weights are computed, one below the other."""
    tied = tie(banks)
    return concatenate(banks, context) if tied is None else tied.pack()


class Tied:
    """Banks of one kind whose experts are in one arena. Kept for the steps of one call of a model, no longer."""

    def __init__(
        self, banks: Sequence[AdapterBank], sizes: list[int], places: list[tuple[dict[str, Any], str]], stack: Stack
    ) -> None:
        self.kind, self.sizes = banks[0].kind, sizes
        self.numbers = None if stack.in_order else stack.numbers
        self._scales = [float(bank.scale or 0) for bank, n in zip(banks, sizes, strict=True) for _ in range(n)]
        self._stack, self._holders = stack, places

    def pack(self) -> Packed:
        leaves = read(self._holders) if torch.is_grad_enabled() else []
        arguments = self._stack.arguments(leaves, self._scales)
        return Packed(self.kind, self.sizes, self.numbers, arguments)


def tie(banks: Sequence[AdapterBank]) -> Tied | None:
    """Bring the experts of `banks` into one arena; None where they are computed, one alone, or cannot be moved.

    The compiler could not check that they have stayed there: under it, all are concatenated.
    """
    computed = any(
        bank.layer_norm or bank.scale is None or type(bank).weights is not AdapterBank.weights for bank in banks
    )
    experts_of: list[Any] = [bank._modules["experts"] for bank in banks]  # past `nn.Module.__getattr__`
    by_bank = [experts._modules for experts in experts_of]
    experts = [expert for some in by_bank for expert in some.values()]
    if computed or len(experts) == 1 or torch.compiler.is_compiling():
        return None
    places = holders(experts)
    stack = stacked(experts, places)
    return None if stack is None else Tied(banks, list(map(len, by_bank)), places, stack)


def concatenate(banks: Sequence[AdapterBank], context: ForwardContext | None) -> Packed:
    """The weights that `banks` give for this forward.

    A LayerNorm is folded in, D(g * n + b) = (D g) n + D b, so that all experts read the same normalised rows.
    """
    by_bank = [bank.weights(context) for bank in banks]
    weights = [w for some in by_bank for w in some]
    downs, down_biases = zip(*(_folded(w.down, w.b_down, w.norm) for w in weights), strict=True)
    arguments: dict[str, Any] = {
        "ranks": [w.down.shape[0] for w in weights],
        "w_down": _cat(downs),
        "b_down": _cat(down_biases),
        "w_up": _cat([w.up for w in weights], dim=1),
        "b_up": None if weights[0].b_up is None else torch.stack([w.b_up for w in weights if w.b_up is not None]),
    }
    if weights[0].gate is not None:
        gates, gate_biases = zip(*(_folded(w.gate, w.b_gate, w.norm) for w in weights), strict=True)
        arguments |= {"w_gate": _cat(gates), "b_gate": _cat(gate_biases)}
    if any(isinstance(w.scale, Tensor) or w.scale != 1.0 for w in weights):
        like = weights[0].up
        arguments["scale"] = torch.cat(
            [w.scale if isinstance(w.scale, Tensor) else like.new_full((1,), w.scale) for w in weights]
        )
    return Packed(banks[0].kind, [len(some) for some in by_bank], None, arguments)


def _folded(weight: Any, bias: Tensor | None, norm: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
    if norm is None:
        return weight, bias
    factor, shift = norm
    moved = weight @ shift
    return weight * factor, moved if bias is None else bias + moved


def _cat(parts: Iterable[Any], dim: int = 0) -> Tensor | None:
    tensors = list(parts)
    if tensors[0] is None:
        return None
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
