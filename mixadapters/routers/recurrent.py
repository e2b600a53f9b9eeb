"""A router that remembers what the routers of earlier layers have read of a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.adapter import Site
from mixadapters.core.context import ForwardContext
from mixadapters.core.routing import Routing
from mixadapters.routers.balancing import ChoiceBias
from mixadapters.routers.base import ROUTERS, Router, options_of, read_spec
from mixadapters.routers.learned import LearnedRouter
from mixadapters.routers.options import check_options
from mixadapters.routers.permutation import Permutation
from mixadapters.routers.pregate import PregateRouter
from mixadapters.routers.schedules import Points
from mixadapters.routers.score import exact, linear


@ROUTERS.register("recurrent")
class RecurrentRouter(Router):
    """A recurrent cell over layers, shared by them, whose state another router reads: h_i = cell(P_i x, h_(i-1)).

    Source: Qiu et al. 2024 (RMoE, arXiv 2408.06793). It is a recurrence over layers for each token, so nothing is kept
    for generation. Layers without a router pass the state on. The gradient flows through it, to all layers before.

    Args:
        base: what routes by the state: a name, or {"kind": name, option: value}. Its options may stand here too.
        width: of the state.
        cell: "gru" or "rnn".
        normalize: scale x to unit root mean square.
        first: the router of the adapter's first layer, whose cell is used. None: this is it.
    """

    learns = shares = True

    def __init__(
        self,
        in_features: int,
        experts: list[str],
        *,
        base: str | Mapping[str, Any] = "top_k",
        width: int = 128,
        cell: str = "gru",
        normalize: bool = True,
        first: Router | None = None,
        **options: Any,
    ) -> None:
        check_options(width=width, cell=cell, normalize=normalize)
        kind, given = read_spec(base if isinstance(base, str) else dict(base))
        if not issubclass(kind, LearnedRouter) or kind.needs_fit or kind.fields or issubclass(kind, PregateRouter):
            raise ValueError(f"base={base!r} does not learn to read a state; choose one such as 'top_k' or 'softmax'")
        super().__init__(in_features, experts)
        if "normalize" in options_of(kind):
            given = {"normalize": False, **given}
        self.base = kind(width, experts, **{**options, **given})
        self.width, self.normalize = width, normalize
        self.projection = nn.Linear(in_features, width)
        self.__dict__["first"] = first  # no child: its cell lies there, once
        kind_of_cell = nn.GRUCell if cell == "gru" else nn.RNNCell
        self.cell = kind_of_cell(width, width) if first is None else None
        self.chain = ""

    @classmethod
    def takes(cls, options: Mapping[str, Any]) -> set[str]:
        base = options.get("base", "top_k")
        kind, _ = read_spec(dict(base) if isinstance(base, Mapping) else base)
        return {"base", "width", "cell", "normalize"} | options_of(kind)

    def bind(self, site: Site) -> None:
        super().bind(site)
        self.base.bind(site)
        # Modules of cross-attention read tokens of the encoder or of the decoder: each kind has a chain of its own.
        self.chain = site.path.rpartition(".")[2] if site.group == "cross_attention" else ""

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        read = linear(exact(tokens, self.normalize), self.projection.weight, self.projection.bias)
        state = self.step(read.reshape(-1, self.width), context)
        return self.base(state.view(*tokens.shape[:-1], self.width), context)

    def step(self, read: Tensor, context: ForwardContext) -> Tensor:
        """read (N, w), the projected rows -> their new state (N, w), which the next layer finds.

        Raises:
            ValueError: the gradient would be lost by reentrant checkpointing, or the layer shares its weights with
                another and runs again by checkpointing.
        """
        record, owner = context.record, self.__dict__["first"]
        owner = self if owner is None else owner
        if record.training and record.grad and not record.closed and not torch.is_grad_enabled():
            raise ValueError(
                "router 'recurrent' passes a state from layer to layer, whose gradient reentrant activation "
                "checkpointing cuts; pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        chains = record.shared.setdefault(owner, {})
        found = chains.setdefault(self, [])  # what it has found in its runs
        if record.closed and len(found) > 1:
            raise ValueError(
                f"the layer {self.path!r} runs several times in a forward, and router 'recurrent' cannot tell which "
                "run activation checkpointing repeats: turn that off, or choose another router"
            )
        before = found[0] if record.closed and found else chains.get((self.stack, self.chain))
        if before is None:
            before = torch.zeros_like(read)
        state = advance(owner.cell, read, before)
        if not record.closed:
            found.append(before)
            chains[self.stack, self.chain] = state
        return state

    # --- what the base does ---------------------------------------------------------------------------------------

    @property
    def experts(self) -> list[str]:
        return self.base.experts

    @experts.setter
    def experts(self, names: list[str]) -> None:
        """They are the base's."""

    @property
    def arms(self) -> list[str]:
        return self.base.arms

    @property
    def k(self) -> int | None:
        return getattr(self.base, "k", None)

    @property
    def null_arms(self) -> int:
        return self.base.null_arms

    @property
    def refuses_packed(self) -> str | None:  # type: ignore[override]
        return self.base.refuses_packed

    @property
    def fixed_experts(self) -> str | None:  # type: ignore[override]
        return self.base.fixed_experts

    @property
    def scheduled(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.base.scheduled

    @property
    def moved_by(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.base.moved_by, *(("set_progress",) if self.has_schedules else ()))))

    @property
    def balancing(self) -> ChoiceBias | None:
        return getattr(self.base, "balancing", None)

    @property
    def permutation(self) -> Permutation | None:
        return getattr(self.base, "permutation", None)

    def check_option(self, name: str, value: Any) -> None:
        self.base.check_option(name, value)

    def option_at(self, name: str, points: Points, progress: float) -> Any:
        return self.base.option_at(name, points, progress)

    def set_option(self, name: str, value: Any) -> None:
        self.base.set_option(name, value)

    def at_progress(self, progress: float) -> None:
        self.base.at_progress(progress)

    def weigh_losses(self, **weights: Any) -> None:
        super().weigh_losses(**weights)
        if "base" in self._modules:
            self.base.weigh_losses(**weights)

    def losses(self, routing: Routing, mask: Tensor | None) -> dict[str, tuple[Tensor, float]]:
        return self.base.losses(routing, mask)

    def update_bias(self) -> None:
        self.base.update_bias()

    def add_expert(self, name: str, share: float) -> None:
        self.base.add_expert(name, share)

    def remove_expert(self, name: str, renormalize: bool) -> None:
        self.base.remove_expert(name, renormalize)

    def reorder(self, names: list[str]) -> None:
        self.base.reorder(names)


def advance(cell: Any, read: Tensor, state: Tensor) -> Tensor:
    """As the cell, in the dtype and on the device of `read` (N, w), under autocast too."""
    weights = [p.to(read) for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]
    with torch.autocast(read.device.type, enabled=False):
        run = torch.gru_cell if isinstance(cell, nn.GRUCell) else torch.rnn_tanh_cell
        return run(read, state.to(read), *weights)
