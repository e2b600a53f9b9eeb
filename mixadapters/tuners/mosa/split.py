"""One adapter whose entries belong to experts: the partition, the draws, and the weights that follow from them."""

from __future__ import annotations

import functools
import hashlib
import weakref
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mixadapters.core.bank import AdapterBank, Weights
from mixadapters.core.context import ForwardContext
from mixadapters.core.mixture import Mixture
from mixadapters.core.processes import rank
from mixadapters.core.routing import Routing
from mixadapters.routers import SingleRouter

GRANULARITIES = ("element", "row", "column", "rank")
HALVES = ("down", "up")
LAZY_NEEDS = "inactive_update='lazy' needs the optimizer LazyAdamW(parameters, peft_model=model)"
LAZY_REMEDY = "use it (Trainer: optimizer_cls_and_kwargs), or inactive_update='dense'"


def deal(shape: tuple[int, int], num_experts: int, granularity: str, name: str, seed: int) -> Tensor:
    """uint8 owner of every entry of a weight `shape`; the experts' parts differ by at most one unit.

    Units are entries, rows or columns, shuffled by a generator of their own and cut at n * i / num_experts, so the map
    depends on nothing but the arguments.

    Raises:
        ValueError: more experts than units.
    """
    rows, columns = shape
    units = {"element": rows * columns, "row": rows, "column": columns}[granularity]
    if num_experts > units:
        raise ValueError(
            f"num_experts={num_experts} is more than the {units} units (granularity={granularity!r}) of {name!r} "
            f"{shape}; lower it, or raise r"
        )
    generator = torch.Generator().manual_seed(stable_hash(f"partition {seed} {name}"))
    order = torch.randperm(units, generator=generator, device="cpu")
    # Unit order[j] goes to the expert i with n * i // N <= j < n * (i + 1) // N.
    cuts = torch.arange(1, num_experts + 1, device="cpu") * units // num_experts
    place = torch.arange(units, device="cpu")
    owner = torch.empty(units, dtype=torch.uint8, device="cpu")
    owner[order] = torch.searchsorted(cuts, place, right=True).to(torch.uint8)
    if granularity == "row":
        return owner.view(-1, 1).expand(rows, columns).contiguous()
    if granularity == "column":
        return owner.expand(rows, columns).contiguous()
    return owner.view(rows, columns)


def stable_hash(text: str) -> int:
    """62 bits, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 2


def scramble(x: Tensor) -> Tensor:
    """int64 -> int64 in [0, 2^31): SplitMix64 (Steele et al., OOPSLA 2014), integers alone, so equal on every device.

    Shifts there are of unsigned numbers, hence the masks.
    """
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    x = x ^ ((x >> 31) & (2**33 - 1))
    return (x >> 32) & (2**31 - 1)


_LAZY: weakref.WeakSet[SplitLinear] = weakref.WeakSet()  # projections that leave alone what was not drawn


def _refuse_other_optimizers(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before any step of any optimizer of torch: D of lazy projections is for one that knows their draws.

    Fused optimizers change weights without a trace in their version counter, so that afterwards is too late.
    """
    known: set[int] = getattr(optimizer, "split_weights", set)()
    others = {id(part.weight) for part in _LAZY if part.weight.grad is not None} - known
    if others and any(id(p) in others for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"{LAZY_NEEDS}, and {type(optimizer).__name__} was to make a step; {LAZY_REMEDY}")


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_refuse_other_optimizers)


class SplitLinear(nn.Module):
    """A projection W0 + D (out, in). Every entry of D, the parameter `weight`, has an owner.

    Args:
        plain: the projection at its start: W0 = 0 and D its weight if `zero`, else W0 its weight and D = 0.
        per_expert: one bias (N, out) per expert.
        lazy: note which experts were drawn since the last step of the optimizer.
    """

    weight: Tensor
    bias: Tensor | None
    base: Tensor | None
    owner: Tensor
    drawn: Tensor

    def __init__(
        self, plain: nn.Linear, owner: Tensor, num_experts: int, *, zero: bool, per_expert: bool, lazy: bool,
        init_weights: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_experts, self.per_expert, self.lazy = num_experts, per_expert, lazy
        self.register_buffer("base", None if zero else plain.weight.detach().clone())
        self.register_buffer("owner", owner, persistent=False)  # follows from the config
        self.register_buffer("drawn", torch.zeros(num_experts, dtype=torch.bool), persistent=False)
        self.weight = plain.weight
        if not zero and init_weights:
            nn.init.zeros_(self.weight)
        elif not zero:
            with torch.no_grad():
                self.weight.copy_(torch.randn_like(self.weight) * 0.1)
        self.bias = plain.bias
        if plain.bias is not None and per_expert:
            self.bias = nn.Parameter(plain.bias.detach().repeat(num_experts, 1))
        self._seen: int | None = None  # version of `weight` at the last draw
        if lazy:
            self._watch()

    def _watch(self) -> None:
        _watch_optimizers()
        _LAZY.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.lazy:
            self._watch()

    def of_expert(self, expert: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the drawn expert, an int64 scalar. D has no gradient where another one owns it."""
        weight = self.weight if self.base is None else self.base + self.weight
        elsewhere = torch.zeros_like(self.weight) if self.base is None else self.base
        bias = self.bias
        if bias is not None and self.per_expert:
            bias = bias.index_select(0, expert.view(1)).squeeze(0)
        return torch.where(self.owner == expert, weight, elsewhere), bias

    def merged(self, how: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of all experts: their mean W0 + D / N, or the sum W0 + D."""
        delta = self.weight / self.num_experts if how == "mean" else self.weight
        bias = self.bias
        if bias is not None and self.per_expert:
            bias = bias.mean(0) if how == "mean" else bias.sum(0)
        return delta if self.base is None else self.base + delta, bias

    def note(self, experts: Tensor) -> None:
        """Remember that `experts` (any shape) were drawn, for an optimizer that leaves the others alone.

        Raises:
            ValueError: an optimizer has changed D that knows nothing of draws.
        """
        if not torch.compiler.is_compiling():
            if self._seen not in (None, self.weight._version):
                raise ValueError(f"{LAZY_NEEDS}, and something else has changed the weights; {LAZY_REMEDY}")
            self._seen = self.weight._version
        self.drawn.index_fill_(0, experts.reshape(-1), True)

    def forget(self) -> None:
        """Forget the draws: the optimizer has made its step."""
        self.drawn.zero_()
        self._seen = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)


class SplitBank(AdapterBank):
    """A bank of one adapter, one or both of whose projections are split.

    In training forwards it gives one set of weights per pass, in all others one, merged. Buffers: `draws`, the number
    of training forwards so far, and `partition`, a checksum of the owner maps. Both are saved.
    """

    draws: Tensor
    partition: Tensor

    def __init__(
        self, plain: AdapterBank, name: str, *, num_experts: int, halves: tuple[str, ...], granularity: str,
        per_expert: bool, seed: int, merge: str, separate: bool, lazy: bool, sync_ranks: bool, init_weights: bool,
    ) -> None:  # fmt: skip
        super().__init__(
            plain.in_features, plain.out_features, activation=plain.activation, bias=plain.bias,
            layer_norm=plain.layer_norm, scale=plain.scale,
        )  # fmt: skip
        self.num_experts, self.merge, self.separate, self.sync_ranks = num_experts, merge, separate, sync_ranks
        self.lazy = lazy
        self.code = stable_hash(f"draws {seed} {name}")
        self.experts = plain.experts
        ((_, expert),) = plain.experts.items()
        check = num_experts
        for half in halves:
            linear = getattr(expert, half)
            kind = {"down": "row", "up": "column"}[half] if granularity == "rank" else granularity
            owner = deal(tuple(linear.weight.shape), num_experts, kind, f"{name}.{half}", seed)
            check = zlib.crc32(owner.numpy().tobytes(), check)
            zero = half == "up"
            split = SplitLinear(
                linear, owner, num_experts, zero=zero, per_expert=per_expert, lazy=lazy, init_weights=init_weights
            )
            setattr(expert, half, split)
        self.checksum = check
        self.register_buffer("partition", torch.tensor(check))
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def split_parts(self) -> list[SplitLinear]:
        """The split projections."""
        return [m for m in self.modules() if isinstance(m, SplitLinear)]

    @property
    def trains(self) -> bool:
        return any(part.weight.requires_grad for part in self.split_parts())

    def draw(self, passes: int) -> Tensor:
        """The experts of the next forward, int64 (passes, 2): for down and up. Counts the forward."""
        apart = 0 if self.sync_ranks else rank()
        places = torch.arange(2 * len(HALVES), device=self.draws.device)
        noise = scramble((self.draws << 2) + places + (self.code ^ (apart << 40)))
        self.draws += 1
        drawn = (noise % self.num_experts).view(2, len(HALVES))
        drawn = drawn[:passes] if self.separate else drawn[:1]
        if self.lazy:
            expert = next(iter(self.experts.values()))
            for column, half in enumerate(HALVES):
                part = getattr(expert, half)
                if isinstance(part, SplitLinear):
                    part.note(drawn[:, column])
        return drawn

    def prepare(self, context: ForwardContext) -> None:
        """Draw, once per root forward. Forwards without gradients, or with frozen weights, use the merged weights."""
        record = context.record
        if record.training and record.grad and self.trains:
            record.shared[self] = self.draw(record.passes)

    def weights(self, context: ForwardContext | None) -> list[Weights]:
        drawn = None if context is None else context.record.shared.get(self)
        return [self._weights(None)] if drawn is None else [self._weights(experts) for experts in drawn.unbind()]

    def _weights(self, experts: Tensor | None) -> Weights:
        ((_, expert),) = self.experts.items()
        weights = expert.weights(self.scale)
        for column, half in enumerate(HALVES):
            part = getattr(expert, half)
            if isinstance(part, SplitLinear):
                weight, bias = part.merged(self.merge) if experts is None else part.of_expert(experts[column])
                weights = weights._replace(**{half: weight, f"b_{half}": bias})
        return weights


class PassRouter(SingleRouter):
    """The only expert; where the bank has one set of weights for each pass, that of the row's pass.

    The passes of a row lie next to each other in the batch.
    """

    def __init__(self, in_features: int, experts: list[str], bank: SplitBank, stack: str) -> None:
        super().__init__(in_features, experts)
        self.__dict__["bank"] = bank  # no child: the mixture owns it
        self.stack = stack

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        drawn = context.record.shared.get(self.__dict__["bank"])
        if drawn is None or drawn.shape[0] == 1:
            return Routing()
        count = tokens.numel() // tokens.shape[-1]
        passes, batch = drawn.shape[0], context.stream(self.stack).batch
        numbers, run = torch.arange(passes, device=tokens.device).repeat(batch // passes), count // batch
        return Routing(numbers.repeat_interleave(run).unsqueeze(1), run=run)


class SplitMixture(Mixture):
    """An adapter with a split bank."""

    bank: SplitBank

    def prepare(self, context: ForwardContext) -> None:
        self.bank.prepare(context)
