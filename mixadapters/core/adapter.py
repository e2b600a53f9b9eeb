"""What sits at a frozen layer: one map from its input and output to its new output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mixadapters.core.routing import NO_LAYER

if TYPE_CHECKING:
    from mixadapters.core.context import ForwardContext


@dataclass(frozen=True)
class Site:
    """A place in the base model that takes an adapter."""

    role: str  # what the place is, as in `core.sites`: "ffn_output", "attention_output" ...
    path: str  # name of the frozen module, as in `named_modules()`
    in_features: int
    out_features: int
    stack: str = ""  # "encoder" or "decoder" in models that have both; the path of a part that reads images or sounds
    causal: bool = False  # a position must not see later ones
    taps: tuple[tuple[str, str], ...] = ()  # (role, path of the module whose input is kept) pairs
    adapter: str = ""  # name of the adapter that is put here
    group: str = ""  # the sublayer: "attention", "cross_attention" or "ffn"; "" where that cannot be told
    layer: int = NO_LAYER  # index of the layer; NO_LAYER outside the layers

    def tap(self, role: str) -> str | None:
        """Path of the tap for `role`, to be read with `context.tap(path)`; None where this site has none."""
        return dict(self.taps).get(role)


class Adapter(nn.Module):
    """A map (x, y, context) -> y, with x the input and y the output of a frozen layer. Shapes (..., d), kept."""

    observes = False  # whether `observe` has something to tell
    lone = False  # whether it is one expert for every row, with nothing to decide: it then has `alone`

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        raise NotImplementedError

    def alone(self, x: Tensor, y: Any) -> Tensor | None:
        """As `forward`, the shortest way, where the forward's record is `plain` and nobody but the compiler records
        gradients; None where only `forward` will do."""
        return None

    def bind(self, site: Site, step: str = "") -> None:
        """Called once the adapter has its place: at `site`, as this step of a chain if it is one."""
        for name, part in self.named_children():
            if isinstance(part, Adapter):
                part.bind(site, name)

    @property
    def prepares(self) -> bool:
        """Whether there is something to do in `prepare`."""
        return type(self).prepare is not Adapter.prepare

    def prepare(self, context: ForwardContext) -> None:
        """Called once per root forward, before its layers run and outside checkpointed regions."""

    def observe(self, x: Tensor, y: Tensor, context: ForwardContext) -> list[Tensor]:
        """What each trainable expert alone would add to y; used by losses on the base model's own stream."""
        return []

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight (M, K) and bias (M,) of the linear layer that equals the frozen one with this adapter.

        Raises:
            ValueError: there is none; the message says why.
        """
        raise ValueError(f"{type(self).__name__} is not a linear map of the layer's input: no single weight equals it")


class Chain(Adapter):
    """Adapters in order; each takes the output of the one before."""

    def __init__(self, **steps: Adapter) -> None:
        super().__init__()
        for name, step in steps.items():
            self.add_module(name, step)

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return any(step.observes for step in self.steps.values())

    @property
    def steps(self) -> dict[str, Adapter]:
        return dict(self.named_children())

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        for step in self.children():
            y = step(x, y, context)
        return y

    @property
    def prepares(self) -> bool:
        return any(step.prepares for step in self.steps.values())

    def prepare(self, context: ForwardContext) -> None:
        for step in self.steps.values():
            step.prepare(context)

    def observe(self, x: Tensor, y: Tensor, context: ForwardContext) -> list[Tensor]:
        return [delta for step in self.steps.values() if step.observes for delta in step.observe(x, y, context)]

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for step in self.steps.values():
            weight, bias = step.fold(weight, bias)
        return weight, bias
