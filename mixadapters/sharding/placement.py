"""Which experts lie on which devices: plans from numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mixadapters.core.fields import check_integer, check_kind, check_number


class Placement(NamedTuple):
    """The devices of each expert. Those of one expert share its rows evenly.

    Attributes:
        holders: by expert, its devices in ascending order.
        devices: how many there are.
    """

    holders: tuple[tuple[int, ...], ...]
    devices: int

    def on(self, device: int) -> list[int]:
        """The experts of a device, in order."""
        return [expert for expert, devices in enumerate(self.holders) if device in devices]

    def loads(self, load: Sequence[float]) -> list[float]:
        """By device, what it has to do where expert e has load[e].

        Raises:
            ValueError: another number of loads than experts.
        """
        if len(load) != len(self.holders):
            raise ValueError(f"{len(load)} loads for {len(self.holders)} experts; give each its own")
        found = [0.0] * self.devices
        for amount, devices in zip(load, self.holders, strict=True):
            for device in devices:
                found[device] += amount / len(devices)
        return found

    def max_over_mean(self, load: Sequence[float]) -> float:
        """How much longer than the average the busiest device takes; 1 is balance, and no load."""
        loads = self.loads(load)
        return max(loads) * self.devices / sum(loads) if sum(loads) else 1.0


def even_placement(experts: int, devices: int) -> Placement:
    """Each expert on one device, in turn.

    Raises:
        ValueError: a number out of range.
    """
    check_integer("experts", experts, least=0)
    check_integer("devices", devices, least=1)
    return Placement(tuple((expert % devices,) for expert in range(experts)), devices)


def plan_placement(
    load: Sequence[float], devices: int, slots: int | Sequence[int], t: int = 0, m: int = 0
) -> Placement:
    """Spread experts over devices by their load: the busiest may lie on several, whose rows are then shared out.

    With t <= m the t busiest experts lie on every device; else the devices * m places for copies go one by one to
    whichever of the t busiest has most to do for each copy. Then every other expert gets a device, the busiest first,
    each on the one that has least to do and a place left. Never worse than `even_placement` in the load of the busiest
    device.

    Source: Hecate (2025), algorithm 1 and its heterogeneous sharding; its t is what can be sent while others compute.

    Args:
        load: by expert, what it has to do, such as its rows; not negative.
        devices: how many there are.
        slots: experts of its own that a device has room for; one number, or one for each device.
        t: so many of the busiest experts may have copies.
        m: room of each device for copies, beside `slots`.

    Raises:
        ValueError: a number out of range, or fewer slots than experts.
    """
    room = _checked(load, devices, slots, t, m)
    order = sorted(range(len(load)), key=lambda expert: (-load[expert], expert))
    everywhere = min(t, m, len(load)) if t <= m else 0
    wanted = dict.fromkeys(order, 1) | dict.fromkeys(order[:everywhere], devices)
    if not everywhere:
        candidates = [expert for expert in order[:t] if load[expert] > 0]
        for _ in range(devices * m):
            candidates = [expert for expert in candidates if wanted[expert] < devices]
            if not candidates:
                break
            busiest = max(candidates, key=lambda expert: (load[expert] / wanted[expert], -expert))
            wanted[busiest] += 1
    best = _dealt(load, devices, room, wanted, m)
    even = even_placement(len(load), devices)
    fits = all(len(even.on(device)) <= room[device] for device in range(devices))
    return even if fits and max(even.loads(load)) < max(best.loads(load)) else best


def _checked(load: Sequence[float], devices: int, slots: int | Sequence[int], t: int, m: int) -> list[int]:
    """The slots of each device. Raises ValueError."""
    check_integer("devices", devices, least=1)
    check_integer("t", t, least=0)
    check_integer("m", m, least=0)
    room = [slots] * devices if isinstance(slots, int) else list(slots)
    if len(room) != devices or not all(type(count) is int and count >= 0 for count in room):
        raise ValueError(f"slots={slots!r} must be a number of places, or one for each of the {devices} devices")
    for expert, amount in enumerate(load):
        check_number(f"load[{expert}]", amount, least=0)
    if sum(room) < len(load):
        raise ValueError(
            f"slots={slots!r} on {devices} devices are {sum(room)} places for {len(load)} experts; give each device "
            f"{math.ceil(len(load) / devices)}"
        )
    return room


def _dealt(
    load: Sequence[float], devices: int, room: Sequence[int], wanted: Mapping[int, int], copies: int
) -> Placement:
    """Put each expert on as many devices as are wanted, or as have a place; in the order of `wanted`.

    A first place is one of the expert's own slots; those after it take the places for copies.
    """
    own, extra, busy = list(room), [copies] * devices, [0.0] * devices
    found: dict[int, tuple[int, ...]] = {}
    # Those with copies first: what is left to deal evens out what they leave uneven.
    for expert in sorted(wanted, key=lambda expert: -wanted[expert]):
        by_load = sorted(range(devices), key=lambda device: (busy[device], device))
        first = next(device for device in by_load if own[device])
        own[first] -= 1
        held = [first]
        for device in by_load:
            if device != first and len(held) < wanted[expert] and extra[device]:
                extra[device] -= 1
                held.append(device)
        for device in held:
            busy[device] += load[expert] / len(held)
        found[expert] = tuple(sorted(held))
    return Placement(tuple(found[expert] for expert in range(len(load))), devices)


def deal_tasks(rows: Mapping[str, int], devices: int, at_most: float = 1.25) -> list[dict[str, int]]:
    """Deal tasks of uneven size to devices: by device, how many rows of which task it takes.

    A large task is split over several devices and small ones share one: of the plans of `plan_placement` that keep the
    busiest device within `at_most` times the mean, but for whole rows, the one with the fewest copies, since the
    experts of a task go where its rows go. Deal anew when sizes change.

    Source: Shen et al. 2022 (SE-MoE, arXiv 2205.10034), elastic training of unbalanced tasks.

    Raises:
        ValueError: no task, or a number out of range.
    """
    check_kind("rows", rows, Mapping, "a dict of tasks to their rows")
    if not rows or not all(type(count) is int and count > 0 for count in rows.values()):
        raise ValueError(f"rows={dict(rows)!r} must name tasks and how many rows each has, 1 or more")
    check_number("at_most", at_most, least=1)
    load = list(rows.values())
    plan = next(filter(None, (_fewest_copies(load, devices, m, at_most) for m in range(len(load) + 1))))
    dealt: list[dict[str, int]] = [{} for _ in range(devices)]
    for (name, count), held in zip(rows.items(), plan.holders, strict=True):
        for place, device in enumerate(held):
            share = count * (place + 1) // len(held) - count * place // len(held)
            if share:
                dealt[device][name] = share
    return dealt


def _fewest_copies(load: Sequence[int], devices: int, m: int, at_most: float) -> Placement | None:
    """Of the plans with room for `m` copies on each device that are balanced, the one with the fewest; None: none is.

    More room makes more copies, and with room for all tasks everywhere there is balance. Copies go to the busiest,
    one by one: the other tasks, however many, are no candidates.
    """
    plans = [plan_placement(load, devices, len(load), t, m) for t in range(m, min(len(load), devices * m) + 1)]
    good = [plan for plan in plans if plan.max_over_mean(load) <= at_most]
    return min(good, key=lambda plan: (sum(map(len, plan.holders)), plan.max_over_mean(load)), default=None)
