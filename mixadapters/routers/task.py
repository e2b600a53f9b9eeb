"""The batch says where each row goes, and nothing else does."""

from __future__ import annotations

from torch import Tensor

from mixadapters.core.context import ForwardContext
from mixadapters.core.names import check_free
from mixadapters.core.routes import HardRoutes
from mixadapters.core.routing import Routing, RoutingKey
from mixadapters.routers.base import LOSS_OPTIONS, ROUTERS, Router


@ROUTERS.register("task")
class TaskRouter(Router):
    """The expert whose number the batch field `expert_ids` gives to a row, (B,), or a token, (B, T); -1 is none.

    Raises ValueError in a forward without the field.
    """

    fields = ("expert_ids",)
    without = LOSS_OPTIONS

    def __init__(self, in_features: int, experts: list[str]) -> None:
        super().__init__(in_features, experts)
        self.routes = HardRoutes("expert_ids", range(len(experts)))

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        rows = tokens.numel() // tokens.shape[-1]
        routing = self.routes(context, rows, RoutingKey(path=self.path), self.stack)
        if routing is None:
            raise ValueError(
                "router 'task' goes by the batch alone, which has no expert_ids: pass the number of an expert of "
                f"{self.experts} for each row, -1 for none; or choose a router that looks at the tokens"
            )
        return routing

    def add_expert(self, name: str, share: float) -> None:
        """A new expert, of the next number; there is no weight to share."""
        check_free("expert", name, self.experts)
        self.reorder([*self.experts, name])

    def remove_expert(self, name: str, renormalize: bool) -> None:
        """Later experts move up by one number."""
        self.reorder([other for other in self.experts if other != name])

    def reorder(self, names: list[str]) -> None:
        self.experts = list(names)
        self.routes.number(range(len(names)))
