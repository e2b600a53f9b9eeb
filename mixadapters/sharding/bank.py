"""A bank whose experts lie in several processes, each of which has all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixadapters.core.bank import AdapterBank, PackedExperts, Weights, packed
from mixadapters.core.context import ForwardContext
from mixadapters.core.engines import is_sharded
from mixadapters.core.routing import Routing
from mixadapters.sharding.exchange import enter, leave
from mixadapters.sharding.placement import Placement

MIXED = 0x9E3779B1  # a large odd number: blocks of rows that follow each other go to copies in no regular order


class ShardedBank(AdapterBank):
    """The experts of a bank, of which this process holds a part. Takes the place of the whole bank in its mixture.

        y = base_weight * base + sum over processes of what their own experts add

    Every process of the group runs the same rows. An expert that others hold is -1 in the indices; the op runs without
    base; one sum over the group makes the output, and one in the backward pass the gradients of tokens, of weights and
    of experts that lie in several processes, whose rows these share out. What lies elsewhere is not read here, gets no
    gradient, and may be empty; names, numbers and keys are those of the whole bank. `shard_experts` does this for a
    whole model, and empties it.

    Args:
        whole: the bank, whose experts this one takes over.
        group: the processes, of torch.distributed.

    Attributes:
        placement: which process holds which experts.
        used: (E,) rows that each expert has been chosen for since it was last set to 0.
        slots: experts of a row in the last forward.
    """

    used: Tensor

    def __init__(self, whole: AdapterBank, group: Any, placement: Placement) -> None:
        super().__init__(
            whole.in_features, whole.out_features, activation=whole.activation, glu=whole.glu, bias=whole.bias,
            layer_norm=whole.layer_norm, scale=whole.scale,
        )  # fmt: skip
        self.experts, self.scales = whole.experts, whole.scales
        self.group, self.rank = group, dist.get_rank(group)
        self.shapes = {name: [p.shape for p in expert.parameters()] for name, expert in self.experts.items()}
        self.slots = 0
        self.checks: Callable[[Tensor], None] | None = None  # what looks at the tokens of the next forward
        self.register_buffer("used", torch.zeros(len(self.experts), dtype=torch.float64), persistent=False)
        self.place(placement)

    def place(self, placement: Placement) -> None:
        """Say where experts lie; to move them, and to empty what others hold, is the caller's (`moving.move`).

        Raises:
            ValueError: a placement of other experts or processes, or one that leaves an expert out.
        """
        processes = dist.get_world_size(self.group)
        if len(placement.holders) != len(self.experts) or placement.devices != processes:
            raise ValueError(
                f"a placement of {len(placement.holders)} experts on {placement.devices} devices does not fit "
                f"{len(self.experts)} experts and {processes} processes"
            )
        for name, held in zip(self.experts, placement.holders, strict=True):
            if not held or list(held) != sorted(set(held)) or not 0 <= held[0] <= held[-1] < processes:
                raise ValueError(f"holders={held!r} of expert {name!r} must name processes of {processes}, ascending")
        self.placement = placement
        own = placement.on(self.rank)
        places = [own.index(e) if e in own else -1 for e in range(len(self.experts))]
        self.own = [list(self.experts)[e] for e in own]
        self.copied = [name for name, held in zip(self.experts, placement.holders, strict=True) if len(held) > 1]
        turns = [held.index(self.rank) if self.rank in held else 0 for held in placement.holders]
        self._tables = torch.tensor(
            [[*places, -1], [*map(len, placement.holders), 1], [*turns, 0]], device=self.used.device
        )  # the last column is that of -1

    def weights(self, context: ForwardContext | None) -> list[Weights]:
        raise RuntimeError(
            "the experts of this layer are spread over processes, and mixed batches, merging and surgery need all of "
            "them here: do that in `with sharding.whole():`, or after sharding.close()"
        )

    def refuse_change(self, verb: str) -> None:
        raise ValueError(
            f"{verb}: the experts of this adapter are spread over processes: do that in `with sharding.whole():`, in "
            "every process, or after sharding.close()"
        )

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError(
            "the experts of this layer are spread over processes, and a copy would have a part of them: copy the "
            "model in `with sharding.whole():`, or after sharding.close()"
        )

    def read_again(self, names: Sequence[str]) -> bool:
        """Take up what has become of the experts while all of them were here. Whether those of `names` have stayed."""
        self.shapes = {name: [p.shape for p in expert.parameters()] for name, expert in self.experts.items()}
        if self.names == list(names):
            return True
        self.used = self.used.new_zeros(len(self.experts))
        return False

    def pack(self, context: ForwardContext | None) -> Callable[..., Tensor]:
        return self.run

    def run(
        self,
        tokens: Tensor,
        routing: Routing,
        base: Tensor | None = None,
        base_weight: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """As `AdapterBank.forward`, in every process of the group. Raises RuntimeError where it is compiled."""
        if torch.compiler.is_compiling():
            raise RuntimeError("experts that are spread over processes cannot be compiled: leave torch.compile out")
        if self.checks is not None:
            self.checks(tokens)
            self.checks = None
        self._count(routing, len(tokens))
        shared = [p for name in self.copied for p in self.experts[name].parameters()]
        shapes = [shape for name in self.copied for shape in self.shapes[name]]
        given = [tokens, *([] if routing.weights is None else [routing.weights])]
        entered = enter(self.group, [*given, *shared], [*(t.shape for t in given), *shapes])
        tokens, weights = entered[0], None if routing.weights is None else entered[1]
        routing = self._mine(routing._replace(weights=weights), tokens)
        part = self._packed(dict(zip(shared, entered[len(given) :], strict=True)), tokens)(
            tokens, routing, dropout=dropout
        )
        trained = [p for p in self.experts.parameters() if p.requires_grad][:1]
        delta = leave(self.group, part, [*entered, *trained])
        if base is None:
            return delta
        start = base if base_weight is None else base * base_weight.to(base.dtype).unsqueeze(1)
        return start + delta.to(start.dtype)

    def _count(self, routing: Routing, rows: int) -> None:
        """Add the rows of each expert to `used`, unless activation checkpointing runs the layer again."""
        self.slots = len(self.experts) if routing.indices is None else routing.indices.shape[1]
        if torch._C._current_graph_task_id() != -1:
            return
        if routing.indices is None:
            self.used += rows
            return
        chosen = routing.indices.reshape(-1).long() + 1
        counts = chosen.new_zeros(len(self.experts) + 1).scatter_add_(0, chosen, torch.ones_like(chosen))
        self.used += counts[1:]

    def _mine(self, routing: Routing, tokens: Tensor) -> Routing:
        """The routing by the numbers of the experts that are here; -1 where a row goes to another process."""
        places, counts, turns = self._tables.to(tokens.device)
        indices, weights = routing.indices, routing.weights
        if indices is None:
            own = torch.nonzero(places[:-1] >= 0).flatten()
            if weights is not None:
                weights = weights[:, own]
            if not self.copied:
                return routing._replace(weights=weights)
            indices = own.expand(len(tokens), -1)
        indices = indices.long()
        mine = places[indices]
        if self.copied:
            block = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) // routing.run
            turn = ((block * MIXED) >> 15) % counts[indices]
            mine = torch.where(turn == turns[indices], mine, -1)
        return routing._replace(indices=mine, weights=weights)

    def _packed(self, shared: dict[Tensor, Tensor], tokens: Tensor) -> PackedExperts:
        """What this process runs. shared: parameters of experts with copies -> what has entered in their place."""
        found = []
        for name in self.own:
            weights = self.experts[name].weights(self.scales.get(name, self.scale))
            found.append(_replaced(weights, shared))
        if found:
            return packed(self.kind, [found])
        nothing: dict[str, Any] = {
            "ranks": (), "w_down": tokens.new_zeros(0, self.in_features),
            "w_up": tokens.new_zeros(self.out_features, 0),
        }  # fmt: skip
        return PackedExperts(self.kind, [0], nothing, None)

    def refuse_sharded(self) -> None:
        """Raise RuntimeError where an engine has taken the parameters of the experts apart."""
        if any(map(is_sharded, self.experts.parameters())):
            raise RuntimeError(
                "experts that are spread over processes cannot be sharded by FSDP or DeepSpeed ZeRO too: use one of "
                "them"
            )


def _replaced(weights: Weights, shared: dict[Tensor, Tensor]) -> Weights:
    def one(value: Any) -> Any:
        return shared.get(value, value) if isinstance(value, Tensor) else value

    norm = None if weights.norm is None else (one(weights.norm[0]), one(weights.norm[1]))
    parts = {name: one(value) for name, value in weights._asdict().items() if name != "norm"}
    return Weights(**parts, norm=norm)


def empty(parameters: Sequence[nn.Parameter] | Iterator[nn.Parameter]) -> None:
    """Give up what parameters hold."""
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)
        parameter.grad = None
