"""What a router is, and how one is named in a config."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from mixadapters.core.adapter import Site
from mixadapters.core.context import ForwardContext
from mixadapters.core.fields import finite
from mixadapters.core.registry import Registry, nearest
from mixadapters.core.routing import Routing


class Router(nn.Module):
    """Decides, for each row, which experts of a bank it uses and how much.

    The mixture that owns it does the rest, for any router: hard and pinned routes, auxiliary losses, publication.

    Args:
        in_features: width d of the hidden states that it reads.
        experts: names of the bank's experts, in order.
        balance_coef, z_coef, entropy_coef: weights of the auxiliary losses. `build_router` sets them for routers whose
            constructors do not pass them on.

    Raises:
        ValueError: names that are no different words, a width below 1, or a weight that is not finite.
    """

    refuses_packed: str | None = None  # why it cannot route requests that are packed into one row; None: it can
    always_first = False  # every row uses expert 0 with weight 1: lets mixed batches skip the routing
    fields: tuple[str, ...] = ()  # batch fields that it reads

    def __init__(
        self,
        in_features: int,
        experts: list[str],
        *,
        balance_coef: float = 0.0,
        z_coef: float = 0.0,
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(in_features, int) or isinstance(in_features, bool) or in_features < 1:
            raise ValueError(f"in_features={in_features!r} must be a positive integer")
        if isinstance(experts, str) or not experts or not all(isinstance(name, str) and name for name in experts):
            raise ValueError(f"experts={experts!r} must be a list of names, at least one")
        if len(set(experts)) < len(experts):
            raise ValueError(f"experts={list(experts)} names an expert twice")
        self.in_features, self.experts = in_features, list(experts)
        self.path = self.stack = ""  # where it sits: the adapted module; "encoder" or "decoder" in models with both
        self.weigh_losses(balance_coef=balance_coef, z_coef=z_coef, entropy_coef=entropy_coef)

    def weigh_losses(self, *, balance_coef: float = 0.0, z_coef: float = 0.0, entropy_coef: float = 0.0) -> None:
        """Set the weights of the auxiliary losses; 0 is none."""
        for name, weight in (("balance_coef", balance_coef), ("z_coef", z_coef), ("entropy_coef", entropy_coef)):
            if not _is_number(weight) or (weight < 0 and name != "entropy_coef"):
                raise ValueError(f"{name}={weight!r} must be a finite number, not below 0")
        self.balance_coef, self.z_coef, self.entropy_coef = balance_coef, z_coef, entropy_coef

    def bind(self, site: Site) -> None:
        """Called once the router has its place."""
        self.path, self.stack = site.path, site.stack

    @property
    def arms(self) -> list[str]:
        """Names of the columns of `Routing.probs`."""
        return list(self.experts)

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        """tokens (B, T, d) or (N, d) -> Routing over N = B * T rows. Its weights may have any floating dtype."""
        raise NotImplementedError

    def constant(self) -> list[float] | None:
        """The weight of each expert where it is the same for every input; None where it depends on it."""
        return None


ROUTERS: Registry[Router] = Registry(
    "router", hint="A router of your own is known once the module that registers it has been imported.", base=Router
)
COEFFICIENTS = ("balance_coef", "z_coef", "entropy_coef")


def options_of(cls: type[Router]) -> set[str]:
    """Names of the options that a router takes: those of its constructor, and what that passes on to its bases'.

    The weights of the auxiliary losses are among them for every router.
    """
    names = set(COEFFICIENTS)
    for base in cls.__mro__:
        if "__init__" not in base.__dict__:
            continue
        parameters = list(inspect.signature(base.__dict__["__init__"]).parameters.values())
        kinds = {parameter.kind for parameter in parameters}
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return names - {"self", "in_features", "experts"}


def read_spec(spec: Any) -> tuple[type[Router], dict[str, Any]]:
    """The class and the options of a router's name, or of {"kind": name, option: value}.

    Raises:
        ValueError: no such form, unknown router, or an option that it does not take.
    """
    given = {"kind": spec} if isinstance(spec, str) else spec
    if not isinstance(given, dict) or not isinstance(given.get("kind"), str):
        raise ValueError(f"router={spec!r} is no name, and needs a 'kind'; have {sorted(ROUTERS)}")
    cls = ROUTERS[given["kind"]]
    options = {name: value for name, value in given.items() if name != "kind"}
    takes = options_of(cls)
    for name in options:
        if name not in takes:
            raise ValueError(
                f"router {given['kind']!r}: {cls.__name__} takes no argument {name!r}.{nearest(str(name), takes)} It "
                f"takes {sorted(takes)}"
            )
    return cls, options


def build_router(spec: str | dict[str, Any], in_features: int, experts: list[str], **defaults: Any) -> Router:
    """A router from its name, or from {"kind": name, option: value}. `defaults` fill options that it takes.

    Raises:
        ValueError: unknown router, an option that it does not take, or one that it needs and is not given.
    """
    cls, options = read_spec(spec)
    takes = options_of(cls)
    given = {**{name: value for name, value in defaults.items() if name in takes}, **options}
    weights = {name: given.pop(name) for name in COEFFICIENTS if name in given}
    _check_call(spec if isinstance(spec, str) else spec["kind"], cls, in_features, experts, given)
    router = cls(in_features, experts, **given)
    if weights:
        router.weigh_losses(**{name: getattr(router, name) for name in COEFFICIENTS} | weights)
    return router


def _check_call(kind: str, cls: type[Router], in_features: int, experts: list[str], given: dict[str, Any]) -> None:
    """Raise ValueError where the constructor of a router cannot be called like this."""
    signature = inspect.signature(cls)
    try:
        signature.bind(in_features, experts, **given)
    except TypeError as error:
        raise ValueError(
            f"router {kind!r}: {cls.__name__}{signature} is called with in_features, experts and {given}: {error}. "
            f"Give it in router={{'kind': {kind!r}, ...}}, or a default in the constructor"
        ) from None


def _is_number(value: object) -> bool:
    return finite(value)
