"""A bank of small experts of one kind: ranks may differ, one call runs them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters import kernels
from mixadapters.core.names import check_free
from mixadapters.core.routing import Routing
from mixadapters.kernels import ACTIVATIONS, activated

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

    def tensors(self) -> Iterator[Tensor]:
        """All of them, those of the norm included."""
        for part in self:
            inside = part if isinstance(part, tuple) else (part,)
            yield from (tensor for tensor in inside if isinstance(tensor, Tensor))


class Scale(nn.Module):
    """A learnable factor, in a module of its own so that its key ends in `.weight`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), value))


class Expert(nn.Module):
    """The weights of one expert: `up(act(down(norm(x))))`, or `up(act(gate(x)) * down(x))` if gated.

    Starts as zero (`up` is 0) unless `init_weights` is False.
    """

    def __init__(self, bank: AdapterBank, rank: int, init_weights: bool, up_bias: bool = False) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Linear(bank.in_features, rank, bias=bank.bias)
        self.gate = nn.Linear(bank.in_features, rank, bias=bank.bias) if bank.glu else None
        self.up = nn.Linear(rank, bank.out_features, bias=bank.bias or up_bias)
        self.norm = nn.LayerNorm(bank.in_features) if bank.layer_norm else None
        self.scale = Scale(1.0) if bank.scale is None else None
        if init_weights:
            nn.init.zeros_(self.up.weight)
            for part in (self.down, self.up, self.gate):
                if part is not None and part.bias is not None:
                    nn.init.zeros_(part.bias)

    def weights(self, scale: float | None) -> Weights:
        """Its parameters. scale: the factor where it has none of its own."""
        inside: Any = self._modules  # past `nn.Module.__getattr__`, of which a batch over many adapters would notice
        down, up, gate, norm, scale_of = map(inside.get, ("down", "up", "gate", "norm", "scale"))
        return Weights(
            _held(down, "weight"), _held(up, "weight"), _held(down, "bias"), _held(up, "bias"),
            None if gate is None else _held(gate, "weight"), None if gate is None else _held(gate, "bias"),
            None if norm is None else (norm.weight, norm.bias),
            float(scale or 0.0) if scale_of is None else scale_of.weight,
        )  # fmt: skip


def _held(module: nn.Module, name: str) -> Any:
    """A parameter of `module`, or what a parametrization computes in its place."""
    return module._parameters[name] if name in module._parameters else getattr(module, name)


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

    keeps_packed = True  # whether a `generate` may keep its experts packed; not where they come and go

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
        self.scales: dict[str, float] = {}  # factors of experts that do not go by `scale`

    def add(
        self,
        name: str,
        rank: int,
        init_weights: bool = True,
        *,
        scale: float | None = None,
        up_bias: bool = False,
        place: int | None = None,
    ) -> None:
        """Append an expert.

        Args:
            scale: factor on its output, in place of the bank's.
            up_bias: a bias on its output, in a bank without biases.
            place: its number; None: after the others.

        Raises:
            ValueError: the name is taken or the rank is not positive.
        """
        check_free("expert", name, self.names)
        if rank <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {rank}")
        after = {} if place is None else {n: self.experts.pop(n) for n in self.names[place:]}
        self.experts[name] = Expert(self, rank, init_weights, up_bias)
        self.experts.update(after)
        if scale is not None:
            self.scales[name] = scale

    def copy(self, name: str, like: str) -> None:
        """Give an expert the weights of another of its size."""
        self.experts[name].load_state_dict(self.experts[like].state_dict())

    def refuse_change(self, verb: str) -> None:
        """Raise ValueError where no expert can come, go or get another size now: here none is elsewhere."""

    def remove(self, name: str) -> None:
        del self.experts[name]
        self.scales.pop(name, None)

    @property
    def names(self) -> list[str]:
        return list(self.experts)

    def weights(self, context: ForwardContext | None) -> list[Weights]:
        """What the numbers of a routing stand for in this forward. A subclass may compute them, and their number.

        context: None stands for an evaluation outside a forward, such as a merge.
        """
        if not self.scales:
            return [expert.weights(self.scale) for expert in self.experts.values()]
        return [expert.weights(self.scales.get(name, self.scale)) for name, expert in self.experts.items()]

    def alone(self, x: Tensor, y: Tensor) -> Tensor | None:
        """y (..., M) plus what the only expert makes of a few rows x (..., K) on a CPU, by plain products.

        None where it takes the op: dtypes differ, or the expert's layers are others than those that it was made with.
        """
        (expert,) = self._modules["experts"]._modules.values()  # past `nn.Module.__getattr__`, as below
        parts = expert._modules
        down, up, gate, scale = parts["down"], parts["up"], parts.get("gate"), parts.get("scale")
        if not type(down) is type(up) is nn.Linear:  # parametrized, for one
            return None
        before, after = down._parameters, up._parameters
        w_down, w_up = before["weight"], after["weight"]
        if not x.dtype == y.dtype == w_down.dtype == w_up.dtype:
            return None
        hidden = F.linear(x, w_down, before["bias"])
        if gate is not None:
            hidden = ACTIVATIONS[self.activation](gate(x)) * hidden
        elif self.activation != "identity":
            hidden = activated(self.activation, hidden)
        delta = F.linear(hidden, w_up, after["bias"])
        return y.add(delta, alpha=self.scale) if scale is None else y + delta * scale.weight

    def forward(
        self,
        tokens: Tensor,
        routing: Routing,
        context: ForwardContext | None,
        base: Tensor | None = None,
        base_weight: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """tokens (N, K) -> (N, M): base_weight * base plus what the routing makes of the experts.

        dropout: probability that they read an element of `tokens` as 0.
        """
        return self.pack(context)(tokens, routing, base, base_weight, dropout)

    def pack(self, context: ForwardContext | None) -> PackedExperts | Callable[..., Tensor]:
        """What runs the experts in this forward, called as `PackedExperts` are.

        They are packed in every forward; but all steps of a `generate` run with those of its first step.
        """
        if context is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return pack([self], context)
        thread = context.records.thread
        return pack([self], context, thread.packed if thread.generates else None)


class PackedExperts(NamedTuple):
    """The experts of several banks of one kind as the op takes them, numbered through bank after bank."""

    kind: Kind
    sizes: list[int]  # experts of each bank
    arguments: dict[str, Any]  # of `kernels.lowrank`
    few: kernels.Few | None  # the op for a few rows; None under gradients and the compiler

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        base: Tensor | None = None,
        base_weight: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """As `AdapterBank.forward`."""
        seed = None
        if self.kind.layer_norm:
            tokens = F.layer_norm(F.dropout(tokens, dropout), (self.kind.in_features,))
            dropout = 0.0
        elif dropout:
            seed = torch.randint(2**63 - 1, (), device=tokens.device)
        if seed is None and self.few is not None:
            y = self.few(tokens, routing.indices, routing.weights, base, base_weight, routing.run)
            if y is not None:
                return y
        return kernels.lowrank(
            tokens, indices=routing.indices, weights=routing.weights, base=base, base_weight=base_weight,
            act=self.kind.activation, dropout=dropout, seed=seed, run=routing.run, **self.arguments,
        )  # fmt: skip


def pack(
    banks: Sequence[AdapterBank], context: ForwardContext | None, kept: dict[AdapterBank, PackedExperts] | None = None
) -> PackedExperts:
    """The weights that `banks` give for this forward, one below the other: a copy, unless there is only one expert.

    kept: where they lie, by the first bank, for the next steps of a `generate`, which run with those of its first. Not
        so where gradients are recorded, under the compiler, and where a bank computes its weights.
    """
    if kept is not None and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        if banks[0] not in kept and all(map(keeps, banks)):
            kept[banks[0]] = pack(banks, context)
        if banks[0] in kept:
            return kept[banks[0]]
    return packed(banks[0].kind, [bank.weights(context) for bank in banks])


def packed(kind: Kind, by_bank: Sequence[Sequence[Weights]]) -> PackedExperts:
    """The weights of the experts of several banks of one kind, one below the other; of one expert at least.

    A LayerNorm is folded in, D(g * n + b) = (D g) n + D b, so that all experts read the same normalised rows.
    """
    weights = [w for some in by_bank for w in some]
    downs, down_biases = zip(*(norm_folded(w.down, w.b_down, w.norm) for w in weights), strict=True)
    # Several `up` are stacked as their transposes, which keeps each expert's weights together in memory.
    ups = [w.up for w in weights]
    arguments: dict[str, Any] = {
        "ranks": tuple(w.down.shape[0] for w in weights),
        "w_down": _cat(downs),
        "b_down": _cat(down_biases),
        "w_up": ups[0] if len(ups) == 1 else torch.cat([up.t() for up in ups]).t(),
        "b_up": _up_biases(weights),
        "scale": _scales(weights),
    }
    if weights[0].gate is not None:
        gates, gate_biases = zip(*(norm_folded(w.gate, w.b_gate, w.norm) for w in weights), strict=True)
        arguments |= {"w_gate": _cat(gates), "b_gate": _cat(gate_biases)}
    looked_at = torch.is_grad_enabled() or torch.compiler.is_compiling()
    few = None if looked_at else kernels.Few(kind.activation, arguments)
    return PackedExperts(kind, [len(some) for some in by_bank], arguments, few)


def keeps(bank: AdapterBank) -> bool:
    """Whether the bank's packed experts serve all steps of a `generate`: they do where they are its parameters, and no
    forward computes others."""
    return type(bank).weights is AdapterBank.weights and bank.keeps_packed


def _scales(weights: Sequence[Weights]) -> Tensor | None:
    """(E,) the experts' factors; None where all are 1."""
    scales, like = [w.scale for w in weights], weights[0].up
    numbers = [scale for scale in scales if not isinstance(scale, Tensor)]
    if len(numbers) == len(scales):
        return None if all(number == 1.0 for number in numbers) else like.new_tensor(numbers)
    return torch.cat([s if isinstance(s, Tensor) else like.new_full((1,), s) for s in scales])


def _up_biases(weights: Sequence[Weights]) -> Tensor | None:
    """(E, M) biases of the experts' outputs, 0 for those without; None where none has one."""
    if all(w.b_up is None for w in weights):
        return None
    return torch.stack([w.up.new_zeros(w.up.shape[0]) if w.b_up is None else w.b_up for w in weights])


def norm_folded(weight: Any, bias: Tensor | None, norm: tuple[Tensor, Tensor] | None) -> tuple[Any, Tensor | None]:
    """Weight (r, K) and bias (r,) with the factors and the shift of a LayerNorm on the input in them.

    What is left of the norm has no parameters. A projection that is None stays None.
    """
    if weight is None or norm is None:
        return weight, bias
    factor, shift = norm
    moved = weight @ shift
    return weight * factor, moved if bias is None else bias + moved


def _cat(parts: Iterable[Any]) -> Tensor | None:
    tensors = list(parts)
    if tensors[0] is None:
        return None
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
