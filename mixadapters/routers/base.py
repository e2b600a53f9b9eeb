"""What a router is, and how one is named in a config."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from mixadapters.core.context import ForwardContext
from mixadapters.core.registry import Registry, nearest
from mixadapters.core.routing import Routing


class Router(nn.Module):
    """Decides, for each row, which experts of a bank it uses and how much.

    Args:
        in_features: width d of the hidden states that it reads.
        experts: names of the bank's experts, in order.
    """

    always_first = False  # every row uses expert 0 with weight 1: lets mixed batches skip the routing

    def __init__(self, in_features: int, experts: list[str]) -> None:
        super().__init__()
        self.in_features, self.experts = in_features, list(experts)

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        """tokens (B, T, d) or (N, d) -> Routing over N = B * T rows."""
        raise NotImplementedError

    def constant(self) -> list[float] | None:
        """The weight of each expert where it is the same for every input; None where it depends on it."""
        return None


ROUTERS: Registry[Router] = Registry("router")


def build_router(spec: str | dict[str, Any], in_features: int, experts: list[str], **defaults: Any) -> Router:
    """A router from its name, or from {"kind": name, argument: value}. `defaults` fill arguments that it takes.

    Raises:
        ValueError: unknown router, or an argument that it does not take.
    """
    given = {"kind": spec} if isinstance(spec, str) else dict(spec)
    if "kind" not in given:
        raise ValueError(f"router={spec!r} needs a 'kind'; have {sorted(ROUTERS)}")
    cls = ROUTERS[given.pop("kind")]
    takes = inspect.signature(cls.__init__).parameters
    for name in given:
        if name not in takes:
            raise ValueError(f"{cls.__name__} takes no argument {name!r}.{nearest(name, takes)}")
    known = {name: value for name, value in defaults.items() if name in takes}
    return cls(in_features, experts, **{**known, **given})
