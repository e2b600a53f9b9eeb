"""What a router is, and how one is named in a config."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from mixadapters.core.adapter import Site
from mixadapters.core.bank import Weights
from mixadapters.core.context import ForwardContext
from mixadapters.core.fields import check_integer
from mixadapters.core.losses import entropy, group_balance, importance, load, load_balance, router_z
from mixadapters.core.media import reads_media
from mixadapters.core.registry import LIBRARY, Registry, nearest
from mixadapters.core.routing import Routing
from mixadapters.routers.options import check_options
from mixadapters.routers.pooling import Pooling
from mixadapters.routers.schedules import Points, value_at

# Auxiliary losses, and the part of a routing of which each is made.
LOSSES = {"balance": "probs", "z": "logits", "entropy": "probs", "importance": "probs", "load": "chances"}
COEFFICIENTS: tuple[str, ...] = tuple(f"{name}_coef" for name in LOSSES)
# Of no use to a router in which nothing learns.
LOSS_OPTIONS: frozenset[str] = frozenset({*COEFFICIENTS, "balance_groups"})


class Router(nn.Module):
    """Decides, for each row, which experts of a bank it uses and how much.

    The mixture that owns it does the rest, for any router: hard and pinned routes, auxiliary losses, publication.

    Args:
        in_features: width d of the hidden states that it reads.
        experts: names of the experts, in order. `Routing.indices` number these.
        balance_coef, z_coef, entropy_coef, importance_coef, load_coef: weights of the auxiliary losses.
        balance_groups: lists of experts between which the balance loss balances, in place of single ones.
            `build_router` sets these for routers whose constructors do not pass them on.

    Raises:
        ValueError: names that are no different words, a width below 1, or a weight that is not finite.
    """

    refuses_packed: str | None = None  # why it cannot route requests that are packed into one row; None: it can
    by_text = False  # whether it decides by the tokens of the text, which parts that read images or sounds do not see
    by_request = False  # whether it can where a server says whose tokens these are, and keeps what it remembers
    learns = False  # whether its weights are made by training
    always_first = False  # every row uses expert 0 with weight 1: lets mixed batches skip the routing
    fields: tuple[str, ...] = ()  # batch fields that it reads
    scopes: frozenset[str] = frozenset({"module", "block", "model"})  # for how many layers one routing may be made
    scheduled: tuple[str, ...] = ()  # options that may change while it trains, by `set_option`
    without: frozenset[str] = frozenset()  # options of its bases that mean nothing here
    has_schedules = False  # whether its mixture's config has schedules for it
    usual_null_arms = 0  # arms without expert where the option `null_arms` is not given
    needs_fit = False  # whether `fit` makes it from the experts' weights
    made_by: str | None = None  # how it is made, for messages where it would be trained and nothing of it trains
    anywhere = False  # whether it decides the same at every layer of its scope, so that any of them may ask it first
    shares = False  # whether it takes `first`, the router of the adapter's first layer
    fixed_experts: str | None = None  # why its experts cannot come or go; None: they can

    def __init__(
        self,
        in_features: int,
        experts: list[str],
        *,
        balance_coef: float = 0.0,
        z_coef: float = 0.0,
        entropy_coef: float = 0.0,
        importance_coef: float = 0.0,
        load_coef: float = 0.0,
        balance_groups: Sequence[Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        check_integer("in_features", in_features, least=1)
        if isinstance(experts, str) or not experts or not all(isinstance(name, str) and name for name in experts):
            raise ValueError(f"experts={experts!r} must be a list of names, at least one")
        if len(set(experts)) < len(experts):
            raise ValueError(f"experts={list(experts)} names an expert twice")
        self.in_features, self.experts = in_features, list(experts)
        self.path = self.stack = ""  # where it sits: the adapted module; "encoder" or "decoder" in models with both
        self.weigh_losses(
            balance_coef=balance_coef,
            z_coef=z_coef,
            entropy_coef=entropy_coef,
            importance_coef=importance_coef,
            load_coef=load_coef,
            balance_groups=balance_groups,
        )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if isinstance(cls.scheduled, tuple):
            cls.scheduled = tuple(name for name in cls.scheduled if name not in cls.without)

    def weigh_losses(self, *, balance_groups: Sequence[Sequence[str]] | None = None, **weights: float) -> None:
        """Set the weights of the auxiliary losses, 0 (none) where left out; and the groups of the balance loss."""
        weights = {name: weights.get(name, 0.0) for name in COEFFICIENTS}
        check_options(**weights)
        for name, weight in weights.items():
            setattr(self, name, weight)
        if balance_groups is not None and (not _parted(balance_groups, self.experts) or not all(balance_groups)):
            raise ValueError(f"balance_groups={balance_groups!r:.200} must hold each expert of {self.experts} once")
        self.balance_groups = None if balance_groups is None else [list(group) for group in balance_groups]

    def bind(self, site: Site) -> None:
        """Called once the router has its place.

        Raises:
            ValueError: in a part of the model that reads images or sounds, it decides by sequences or by the text.
        """
        if reads_media(site.stack) and (said := self.refuses_packed or (self.by_text and type(self).__name__)):
            raise ValueError(
                f"{said} at {site.path!r}: {site.stack!r} reads images or sounds, which are no text, and any number "
                f"of them for each row; choose a router that decides by token (granularity='token') on hidden states, "
                f"or leave it out (exclude_modules={f'.*{re.escape(site.stack)}.*'!r}; of experts that are gathered, "
                "when they are trained)"
            )
        self.path, self.stack = site.path, site.stack

    @property
    def arms(self) -> list[str]:
        """Names of the columns of `Routing.probs`."""
        return list(self.experts)

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        """tokens (B, T, d) or (N, d) -> Routing over N = B * T rows. Its weights may have any floating dtype."""
        raise NotImplementedError

    def brief(self, tokens: Tensor) -> Routing | None:
        """As `forward`, bit for bit and the shortest way, where nothing is recorded and nobody asks; None where only
        `forward` will do."""
        return None

    def weigh_given(self, routing: Routing, tokens: Tensor) -> Routing:
        """What becomes of a routing that the batch has given by number, where the router has weights for it."""
        return routing

    def losses(self, routing: Routing, mask: Tensor | None) -> dict[str, tuple[Tensor, float]]:
        """Name -> (auxiliary loss of a routing that it has made in training, weight). One with losses of its own adds
        them to these.

        mask: (N,) bool, the rows that count; None: all.
        """
        weights = {name: getattr(self, f"{name}_coef") for name in LOSSES}
        return {name: (self.loss(name, routing, mask), weight) for name, weight in weights.items() if weight}

    def loss(self, name: str, routing: Routing, mask: Tensor | None) -> Tensor:
        """One of LOSSES.

        Raises:
            ValueError: the routing has not what it is computed from.
        """
        part = LOSSES[name]
        if (given := getattr(routing, part)) is None:
            coefficient = f"{name}_coef={getattr(self, f'{name}_coef')}"
            raise ValueError(f"{coefficient} needs Routing.{part}, which {type(self).__name__} does not give")
        if name == "balance":
            return self.balance(given, mask, routing.selected)
        if name == "importance":
            return importance(given[:, : len(self.experts)], mask)
        if name == "load":
            return load(given[:, : len(self.experts)], mask)
        return router_z(given, mask) if name == "z" else entropy(given, mask)

    def balance(self, probs: Tensor, mask: Tensor | None, selected: Tensor | None) -> Tensor:
        """The balance loss. Arms in none of `balance_groups` are groups of their own."""
        if self.balance_groups is None:
            return load_balance(probs, mask, selected)
        grouped = {name for group in self.balance_groups for name in group}
        groups = [*self.balance_groups, *([name] for name in self.arms if name not in grouped)]
        return group_balance(probs, mask, selected, [[self.arms.index(name) for name in group] for group in groups])

    def check_option(self, name: str, value: Any) -> None:
        """Raise ValueError if an option is none of `scheduled`, or the value is not one that it takes."""
        if name not in self.scheduled:
            raise ValueError(
                f"{type(self).__name__} has no option {name!r} that may change in training."
                f"{nearest(name, self.scheduled)} It has {sorted(self.scheduled)}"
            )
        check_options(**{name: value})

    def set_option(self, name: str, value: Any) -> None:
        """Change an option while the router trains.

        Raises:
            ValueError: as `check_option`.
        """
        self.check_option(name, value)
        setattr(self, name, value)

    def option_at(self, name: str, points: Points, progress: float) -> Any:
        """What a schedule makes of an option of this router at a share of the training."""
        return value_at(name, points, progress)

    def at_progress(self, progress: float) -> None:
        """Called before each training step with the share of the training that is done, for schedules of its own."""

    @property
    def moved_by(self) -> tuple[str, ...]:
        """The verbs of the tuner that move something of it with the steps of a training; see `core/progress.py`."""
        own = type(self).at_progress is not Router.at_progress
        return ("set_progress",) if own or self.has_schedules else ()

    def fit(self, weights: Mapping[str, Weights | None], kept: Collection[str] = ()) -> None:
        """Make the router from the weights of its experts; None: the expert has nothing at this place.

        kept: experts that are chosen as before, as others take their rows, or none does; given where there are any.
        """
        raise ValueError(f"{type(self).__name__} is not made from the experts' weights, so there is nothing to fit")

    def constant(self) -> list[float] | None:
        """The weight of each expert where it is the same for every input; None where it depends on it."""
        return None

    @classmethod
    def among(cls, options: Mapping[str, Any], experts: Sequence[str], everyone: Sequence[str]) -> dict[str, Any]:
        """Options that name all experts of a mixture, or say something of each, for a layer that has these alone.

        everyone: the experts of the mixture, in order.
        """
        groups: Any = options.get("balance_groups")
        if groups is None or not _parted(groups, everyone):
            return dict(options)  # the constructor says what is wrong with it
        here = [[name for name in group if name in experts] for group in groups]
        return {**options, "balance_groups": [group for group in here if group]}

    @classmethod
    def takes(cls, options: Mapping[str, Any]) -> set[str]:
        """Names of the options that it takes beside `options`: those of its constructor, and what that passes on."""
        kind: Any = cls
        return set(_taken_by_constructor(kind)) - cls.without


@lru_cache(maxsize=256)  # asked several times for each layer, and slow: a config's checks and an injection notice
def _taken_by_constructor(cls: type[Router]) -> frozenset[str]:
    names = set(LOSS_OPTIONS)
    for base in cls.__mro__:
        if "__init__" not in base.__dict__:
            continue
        parameters = list(inspect.signature(base.__dict__["__init__"]).parameters.values())
        kinds = {parameter.kind for parameter in parameters}
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return frozenset(names - {"self", "in_features", "experts", "first"})


@lru_cache(maxsize=256)
def _signature(cls: type) -> inspect.Signature:
    return inspect.signature(cls)


def _parted(groups: Any, experts: Sequence[str]) -> bool:
    """Whether lists of names hold each of the experts once."""
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, (list, tuple)) for group in groups):
        return False
    named = [name for group in groups for name in group]
    return len(named) == len(experts) and all(isinstance(name, str) for name in named) and set(named) == set(experts)


class PooledRouter(Router):
    """A router whose tokens decide together, as its pooling has them."""

    pooling: Pooling

    @property
    def granularity(self) -> str:
        return self.pooling.granularity

    @property
    def refuses_packed(self) -> str | None:  # type: ignore[override]
        return None if self.granularity == "token" else self.pooling.said

    @property
    def by_request(self) -> bool:  # type: ignore[override]
        return self.pooling.by_request


ROUTERS: Registry[Router] = Registry(
    "router", hint="A router of your own is known once the module that registers it has been imported.", base=Router
)


def options_of(cls: type[Router], options: Mapping[str, Any] | None = None) -> set[str]:
    """Names of the options that a router takes; `options` are those that it is given."""
    return cls.takes(options or {})


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
    takes = options_of(cls, options)
    for name in options:
        if name not in takes:
            raise ValueError(
                f"router {given['kind']!r}: {cls.__name__} takes no argument {name!r}.{nearest(str(name), takes)} It "
                f"takes {sorted(takes)}"
            )
    return cls, options


def build_router(
    spec: str | dict[str, Any], in_features: int, experts: list[str], *, first: Router | None = None, **defaults: Any
) -> Router:
    """A router from its name, or from {"kind": name, option: value}. `defaults` fill options that it takes.

    first: the router of the adapter's first layer, for those that share something with it.

    Raises:
        ValueError: unknown router, an option that it does not take, or one that it needs and is not given.
    """
    cls, options = read_spec(spec)
    takes = options_of(cls, options)
    given = {**{name: value for name, value in defaults.items() if name in takes}, **options}
    weights = {name: given.pop(name) for name in (*COEFFICIENTS, "balance_groups") if name in given}
    if cls.shares:
        given["first"] = first
    _check_call(spec if isinstance(spec, str) else spec["kind"], cls, in_features, experts, given)
    router = cls(in_features, experts, **given)
    if weights:
        now = {name: getattr(router, name) for name in (*COEFFICIENTS, "balance_groups")}
        router.weigh_losses(**now | weights)
    return router


def registered_by(spec: str | dict[str, Any] | None) -> dict[str, str]:
    """The module that registers the router of a config's field, and what it registers; {} for the library's own."""
    kind = spec["kind"] if isinstance(spec, dict) else spec
    module = LIBRARY if kind is None else ROUTERS[kind].__module__
    return {} if module.partition(".")[0] == LIBRARY else {module: f"the router {kind!r}"}


def _check_call(kind: str, cls: Any, in_features: int, experts: list[str], given: dict[str, Any]) -> None:
    """Raise ValueError where the constructor of a router cannot be called like this."""
    signature = _signature(cls)
    try:
        signature.bind(in_features, experts, **given)
    except TypeError as error:
        raise ValueError(
            f"router {kind!r}: {cls.__name__}{signature} is called with in_features, experts and {given}: {error}. "
            f"Give it in router={{'kind': {kind!r}, ...}}, or a default in the constructor"
        ) from None
