"""Routes that no router decides: those that the batch gives by number, and those that a caller has pinned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.context import ROUTES, ForwardContext
from mixadapters.core.fields import check_kind
from mixadapters.core.numbers import whole_numbers
from mixadapters.core.registry import nearest
from mixadapters.core.routing import Routing, RoutingKey


class HardRoutes(nn.Module):
    """One expert for each row or token, by the number that the batch gives it; -1 for none.

    Args:
        field: the batch field of the numbers, (B,) for rows or (B, T) for tokens.
        numbers: the number of each expert of the bank, in order. Other numbers have no expert here.
        total: how many numbers there are. None: as many as experts.

    Raises:
        ValueError: two experts of one number, or numbers that are not below `total`.
    """

    expert_of: Tensor

    def __init__(self, field: str, numbers: Sequence[int], total: int | None = None) -> None:
        super().__init__()
        self.field = field
        self.usual = -1  # the number of rows to which the batch gives none; -1: the router decides
        self.register_buffer("expert_of", torch.zeros(0, dtype=torch.long), persistent=False)
        self.number(numbers, total)

    def number(self, numbers: Sequence[int], total: int | None = None) -> None:
        """Give the experts new numbers."""
        total = len(numbers) if total is None else total
        if len(set(numbers)) < len(numbers) or not all(0 <= number < total for number in numbers):
            raise ValueError(f"numbers={list(numbers)} must be different, and between 0 and {total - 1}")
        place_of = {number: place for place, number in enumerate(numbers)}
        places = [place_of.get(number, -1) for number in range(total)]
        self.expert_of = torch.tensor([*places, -1], device=self.expert_of.device)  # the last is that of -1

    @property
    def total(self) -> int:
        return len(self.expert_of) - 1

    def forward(self, context: ForwardContext, rows: int, key: RoutingKey, stack: str = "") -> Routing | None:
        """The routing of `rows` rows; None where the batch has no such field, and there is no usual number.

        Raises:
            ValueError: numbers out of range.
        """
        given = context.record.values.get(self.field)
        if given is None:
            usual = torch.full((rows,), self.usual, device=self.expert_of.device)
            return None if self.usual < 0 else self.of(usual)
        by_token = whole_numbers(self.field, given).dim() == 2
        if by_token and stack == "decoder":
            raise ValueError(
                f"{self.field} has one number for each token, and this model reads two texts, in its encoder and its "
                "decoder: give one number for each row, (B,)"
            )
        # What `generate` adds to a row goes on with the number of its last token.
        numbers = (
            context.token_field(self.field, stack, after=None) if by_token else context.rows(self.field, rows, stack)
        )
        assert numbers is not None
        numbers = numbers.reshape(-1).long()
        if len(numbers) != rows:
            raise ValueError(
                f"{self.field} must have one number for each of the {rows} rows of this forward, or for those of its "
                f"batch, and not {len(numbers)}"
            )
        self._check(numbers, context, key.adapter)
        if context.record.own_rows is not None:  # those of other adapters may have more numbers, and are left out
            numbers = numbers.clamp(-1, self.total)
        return self.of(numbers)

    def of(self, numbers: Tensor) -> Routing:
        """numbers of any shape with N entries -> the routing of N rows."""
        table = self.expert_of
        return Routing(table[numbers.to(table.device)].reshape(-1, 1))

    def _check(self, numbers: Tensor, context: ForwardContext, adapter: str) -> None:
        """Refuse numbers out of range, once per forward and adapter: it waits for the device."""
        record, check = context.record, (adapter, self.field, self.total)
        if torch.compiler.is_compiling() or check in record.checked:
            return
        record.checked.add(check)
        own = numbers if record.own_rows is None else numbers[record.own_rows.to(numbers.device)]
        if bool(((own >= self.total) | (own < -1)).any()):
            raise ValueError(f"{self.field}={own.unique().tolist()} must lie between -1 (none) and {self.total - 1}")


def row_numbers(names: Sequence[str], order: Sequence[str], noun: str) -> Tensor:
    """(B,) the number of each name in `order`, -1 for "__base__". Raises ValueError for other names."""
    if isinstance(names, str):
        raise ValueError(f"names={names!r} must be a list with one name for each row; write [{names!r}]")
    check_kind("names", names, Iterable, "a list with one name for each row")
    number_of = {name: number for number, name in enumerate(order)} | {"__base__": -1}
    for name in names:
        if name not in number_of:
            raise ValueError(f"unknown {noun} {name!r}; have {list(order)}.{nearest(name, order)}")
    return torch.tensor([number_of[name] for name in names])


def spread_pins(routes: Mapping[Any, Any], experts: Mapping[RoutingKey, Sequence[str]]) -> dict[RoutingKey, Any]:
    """The pins of `routes` by whole key. Where several fit, keys go before patterns, later ones before earlier ones.

    Args:
        routes: `RoutingKey` (`path` and `step` may be left out) or pattern of "group/layer", such as "ffn/*", ->
            a Routing, or the numbers of experts: (B,), (B, T), (N,) or (N, k); or a function from what the router has
            decided to another Routing.
        experts: the names of the experts at each key of the model.

    Raises:
        ValueError: a key that no router has, or a value that is no routing of its experts.
    """
    check_kind("routes", routes, Mapping, "a dict of patterns, such as 'ffn/*', to routings")
    names = {key: f"{key.group}/{key.layer}" for key in experts}
    pins: dict[RoutingKey, Any] = {}
    for pattern, value in sorted(routes.items(), key=lambda item: isinstance(item[0], tuple)):
        if isinstance(pattern, tuple):
            found = [key for key in experts if RoutingKey(*pattern).covers(key)]
        else:
            found = [key for key, name in names.items() if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"pin_routes: no router at {pattern!r}; there are {sorted(set(names.values()))}")
        for key in found:
            _check_pin(value, key, len(experts[key]))
            pins[key] = value
    return pins


def _check_pin(value: Any, key: RoutingKey, experts: int) -> None:
    where = f"the route pinned at {key}"
    if callable(value):
        return
    if not isinstance(value, (Routing, Tensor)):
        raise ValueError(
            f"{where} is a {type(value).__name__}: pin a Routing, a tensor of numbers of experts, "
            "or a function of what the router decides"
        )
    indices = value.indices if isinstance(value, Routing) else value
    if indices is None:
        weights = value.weights if isinstance(value, Routing) else None
        if weights is not None and weights.shape[-1] != experts:
            raise ValueError(f"{where} weighs {weights.shape[-1]} experts, but there are {experts}")
        return
    whole_numbers(where, indices)
    if indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < experts:
        raise ValueError(
            f"{where} has indices between {int(indices.min())} and {int(indices.max())}; experts are numbered from 0 "
            f"to {experts - 1}, and -1 is none"
        )


def pinned_routing(key: RoutingKey, rows: int, context: ForwardContext, stack: str, device: Any) -> Routing | None:
    """The routing that is pinned at `key` for the rows of this forward; None where there is none.

    Raises:
        ValueError: it has another number of rows.
    """
    pin = context.record.values.get(ROUTES, {}).get(key)
    if pin is None or callable(pin):  # a function changes what the router decides
        return None
    if isinstance(pin, Routing):
        for name, part in pin._asdict().items():
            if isinstance(part, Tensor) and part.shape[0] != rows:
                raise ValueError(
                    f"the route pinned at {key} has {name} for {part.shape[0]} rows, but this forward has {rows}"
                )
        return pin.to(device)
    stream = context.stream(stack)
    if pin.shape[0] == rows:
        indices = pin.reshape(rows, -1)
    elif pin.shape == (stream.batch, stream.length):
        indices = pin.reshape(rows, 1)
    elif pin.dim() == 1 and pin.shape[0] * stream.copies == stream.batch:
        indices = stream.spread(pin, rows, f"the route pinned at {key}").unsqueeze(1)
    else:
        raise ValueError(
            f"the route pinned at {key} is {tuple(pin.shape)}, but this forward has {rows} rows, of a batch of "
            f"{stream.batch}: pin one number for each of its rows, or for each of its tokens"
        )
    return Routing(indices.to(device))


def real_rows(context: ForwardContext, stack: str, rows: int, device: Any) -> Tensor | None:
    """(rows,) bool: those that are no padding, and in a mixed batch belong to the adapter whose router runs.

    None where that is all of them, or not known. On `device`: layers of one model may lie on several.
    """
    mask, own = context.stream(stack).mask, context.record.own_rows
    mask = mask.reshape(-1) if mask is not None and mask.numel() == rows else None
    if mask is not None and own is not None:
        return (mask.to(own.device) & own).to(device)
    real = own if mask is None else mask
    return None if real is None else real.to(device)
