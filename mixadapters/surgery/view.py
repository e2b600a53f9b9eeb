"""What surgery sees of a layer of routed experts, whoever holds them: a mixture of ours, or a block of the base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.bank import Weights
from mixadapters.core.context import ForwardContext
from mixadapters.core.fields import check_kind
from mixadapters.core.numbers import whole_numbers
from mixadapters.core.showing import brief
from mixadapters.surgery.function import hidden_of


class Routed(NamedTuple):
    """What a layer of experts has decided for the N rows of one forward. Experts are numbered as in `names`."""

    inputs: Tensor  # (N, K) what the experts read
    indices: Tensor  # (N, k) int, -1 selects nothing
    weights: Tensor  # (N, k)
    logits: Tensor | None  # (N, E) of the experts; None where the router has none
    probs: Tensor | None  # (N, A) the router's distribution over its arms, of which some may be no experts
    mask: Tensor | None  # (N,) bool, False for padding and for rows of other adapters; None: all count
    norms: Callable[[], Tensor] | None = None  # -> (N, k) of the experts' outputs, before their weights; 0 for -1
    outputs: Callable[[], Tensor] | None = None  # -> (N, k, M) the outputs themselves

    def __repr__(self) -> str:
        return brief(self)


Watcher = Callable[[Routed], None]


class ExpertLayer(ABC):
    """A layer of routed experts: its weights, what it decides, and how experts leave it.

    Attributes:
        path: of the module that holds the experts, as in the model without adapters.
        kind: "bank" for a mixture of an adapter, "base" for an MoE block of the base model.
        adapter: name of the adapter; "" for the base.
        groups: of so many equal blocks of experts a row uses some; as many experts must stay in each.
        competes: whether experts that a row does not use take weight from those that it does. Then the weights of all
            rows grow where experts leave, unless their mass is preserved.
        stack: "encoder" or "decoder" in models that have both.
        adapted: whether adapters of PEFT sit on the experts.
    """

    path: str
    kind: Literal["bank", "base"]
    adapter: str = ""
    groups: int = 1
    competes: bool = False
    stack: str = ""
    adapted: bool = False

    @property
    def key(self) -> str:
        """The layer's name in usages and reports."""
        return self.path if self.kind == "base" else f"{self.path}/{self.adapter}"

    @property
    def router(self) -> str:
        """The key of the layer by whose router it goes. Layers of one router must lose the same experts."""
        return self.key

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.key!r}, {len(self.names)} experts>"

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the experts, in the order of their numbers."""

    @property
    @abstractmethod
    def form(self) -> str:
        """The type of the model that the layer is of, and what an expert reads and gives: "mixtral: 32 to 32"."""

    @property
    @abstractmethod
    def units(self) -> tuple[int, ...]:
        """Hidden units, or the rank, of each expert; () where experts compute their weights."""

    @property
    @abstractmethod
    def top_k(self) -> int | None:
        """Experts that a row uses. None: it varies, or all."""

    @property
    @abstractmethod
    def width(self) -> int:
        """K, of what an expert reads."""

    @property
    @abstractmethod
    def activation(self) -> str:
        """As in `kernels.ACTIVATIONS`, or the base's own."""

    @abstractmethod
    def weights(self, e: int) -> Weights:
        """Views of an expert's weights; what is written into them is written into the model.

        A gated expert is up(act(gate x) * down x), in the base too, whose names for these differ.
        """

    @abstractmethod
    def set_weights(self, e: int, weights: Weights) -> None:
        """Write an expert's weights.

        Raises:
            ValueError: they do not fit the layer.
        """

    @abstractmethod
    def run(self, e: int, x: Tensor) -> Tensor:
        """x (N, K) -> (N, M), what the expert makes of it."""

    @abstractmethod
    def router_rows(self) -> Tensor | None:
        """(E, d) the router's weights for each expert; None where it has no row for each."""

    @property
    @abstractmethod
    def router_entries(self) -> int:
        """Entries of the matrices by which a router multiplies a row here; 0 where that of another layer decides."""

    @abstractmethod
    def keep(self, order: Sequence[int], preserve_mass: bool = False) -> None:
        """Drop the experts that `order` does not name, and the router's columns for them.

        preserve_mass: the router keeps these columns, for which no expert then does anything. So a row whose experts
            all stay is unchanged; where one leaves, it gets nothing in its place.

        Raises:
            ValueError: no such experts, none of them, or too few for what the router chooses.
        """

    @abstractmethod
    def check_keep(self, order: Sequence[int], preserve_mass: bool = False) -> None:
        """Raise what `keep` would raise, and change nothing."""

    @abstractmethod
    def assign(self, expert_map: Sequence[int]) -> None:
        """Let one expert stand for several: the router stays, and rows of expert e go to expert_map[e].

        Raises:
            ValueError: one number for each expert is needed, and those who stand for others stand for themselves.
        """

    @abstractmethod
    def watch(self, callback: Watcher, outputs: bool = False) -> AbstractContextManager[None]:
        """Call back with what is `Routed` in every forward inside the block; once where checkpointing runs it again.

        outputs: whether `Routed.norms` and `Routed.outputs` are needed, which may cost time.
        """


def check_model(model: Any) -> None:
    """Raises ValueError where an argument is no model."""
    check_kind("model", model, nn.Module, "a model, as a torch.nn.Module")


def batches_of(name: str, given: Any) -> Iterator[Mapping[str, Any]]:
    """The batches of the argument `name`, one by one. Raises ValueError for what is none, and for no batch."""
    number = -1
    if isinstance(given, (str, Mapping, Tensor)) or not isinstance(given, Iterable):
        raise ValueError(
            f"{name}={given!r:.80} must be a list of batches, at least one, each a dict of the model's arguments"
        )
    for number, batch in enumerate(given):
        check_kind(f"batch {number} of {name}", batch, Mapping, "a dict of the model's arguments")
        yield batch
    if number < 0:
        raise ValueError(f"{name} holds no batch; give one or more (an iterator that has been read once is empty)")


def refuse_broken(layer: ExpertLayer) -> None:
    """Raise ValueError where experts have no weights yet, or some that are no finite numbers."""
    for e, name in enumerate(layer.names):
        tensors = list(layer.weights(e).tensors())
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(
                f"expert {name!r} at {layer.key!r} is on the meta device and has no weights: load them first"
            )
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise ValueError(
                f"expert {name!r} at {layer.key!r} has weights that are NaN or infinite: train it "
                "anew, or take it out (ExpertLayer.keep)"
            )


def check_order(layer: ExpertLayer, order: Sequence[int]) -> list[int]:
    """The numbers of experts to keep. Raises ValueError where they are none of the layer's."""
    kept, count = _whole("order", order), len(layer.names)
    if not kept or len(set(kept)) < len(kept) or not all(0 <= e < count for e in kept):
        raise ValueError(f"order={list(order)} at {layer.key!r} must be different numbers of its {count} experts")
    return kept


def check_map(layer: ExpertLayer, expert_map: Sequence[int]) -> list[int]:
    """Which expert stands for each. Raises ValueError as `ExpertLayer.assign`."""
    found, count = _whole("expert_map", expert_map), len(layer.names)
    if len(found) != count or not all(0 <= e < count and found[e] == e for e in found):
        raise ValueError(
            f"expert_map={list(expert_map)} at {layer.key!r} must have {count} numbers of experts, and those who "
            "stand for others must stand for themselves"
        )
    return found


def _whole(name: str, numbers: Any) -> list[int]:
    check_kind(name, numbers, Iterable, "numbers of experts")
    given = list(numbers)
    return whole_numbers(name, given).tolist() if given else []


def expert_output(weights: Weights, activation: str, x: Tensor) -> Tensor:
    """x (N, K) -> (N, M), what an expert of ours makes of it: scale (up act(down x) + b_up), or the gated form."""
    return F.linear(hidden_of(weights, x, activation), weights.up, weights.b_up) * weights.scale


@contextmanager
def context_of(model: nn.Module) -> Iterator[ForwardContext]:
    """What is known of each forward of `model`: of one with adapters, or of a bare one for the time of the block."""
    found = ForwardContext.find(model)
    if found is not None:
        yield found
        return
    made = ForwardContext.of(model)
    try:
        yield made
    finally:
        made.detach(model)
