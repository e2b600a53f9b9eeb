"""How routers spread their weight, and what they choose: running sums over real rows, without waiting for the device;
nothing is saved."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixadapters.core.losses import entropy, real_only
from mixadapters.core.processes import gathered, several
from mixadapters.core.routing import FROZEN, Routing, RoutingKey
from mixadapters.core.showing import span

WITHOUT_EXPERT = re.compile(rf"{FROZEN}|null\d+")  # arms; no expert may have such a name


class Usage:
    """Running sums of the weights of some arms, of their entropy, and of how many rows chose each. Full precision,
    whatever the model's."""

    def __init__(self, arms: Sequence[str]) -> None:
        self.arms = tuple(arms)
        self.weight: Tensor | float = 0.0  # (A,)
        self.entropy: Tensor | float = 0.0
        self.count: Tensor | float = 0.0
        self.chosen: Tensor | None = None  # (A,) rows; None: the router chooses none

    def __repr__(self) -> str:
        return f"<Usage of the arms {list(self.arms)}, {int(self.count):,} rows>"

    def add(self, probs: Tensor, mask: Tensor | None, selected: Tensor | None = None) -> None:
        """probs (N, A), mask (N,) bool or None, selected (N, A) bool or None."""
        probs = probs.detach().float()
        rows = probs.new_tensor(float(probs.shape[0])) if mask is None else mask.sum().float()
        real = probs if mask is None else real_only(probs, mask)
        self.weight = self.weight + real.sum(0)
        self.entropy = self.entropy + entropy(probs, mask) * rows
        self.count = self.count + rows
        if selected is not None:
            chosen = (selected if mask is None else selected & mask.unsqueeze(1)).sum(0)
            self.chosen = chosen if self.chosen is None else self.chosen + chosen

    def join(self, other: Usage) -> None:
        """Add what `other`, of the same arms, has seen."""
        self.weight, self.entropy = self.weight + other.weight, self.entropy + other.entropy
        self.count = self.count + other.count
        if other.chosen is not None:
            self.chosen = other.chosen if self.chosen is None else self.chosen + other.chosen

    def on_cpu(self) -> Usage:
        copy = Usage(self.arms)
        copy.weight = torch.as_tensor(self.weight).cpu()
        copy.entropy = torch.as_tensor(self.entropy).cpu()
        copy.count = torch.as_tensor(self.count).cpu()
        copy.chosen = None if self.chosen is None else self.chosen.cpu()
        return copy


class UsageRecorder:
    """An observer of routings that keeps the usage of every router. `report` says what it has seen, `plot` draws."""

    def __init__(self) -> None:
        self.seen: dict[tuple[RoutingKey, tuple[str, ...]], Usage] = {}

    def __repr__(self) -> str:
        keys = dict.fromkeys(key for key, _ in self.seen)
        if not keys:
            return "<UsageRecorder: no router has been seen>"
        arms, rows = span([len(arms) for _, arms in self.seen]), span([self.count(key) for key in keys])
        return f"<UsageRecorder: {len(keys)} routers, each of {arms} arms and {rows} rows; see report(), summaries()>"

    def __call__(self, key: RoutingKey, routing: Routing, mask: Tensor | None) -> None:
        assert routing.probs is not None
        usage = self.seen.get((key, routing.arms))
        if usage is None:
            usage = self.seen[key, routing.arms] = Usage(routing.arms)
        usage.add(routing.probs, mask, routing.selected)

    def reset(self) -> None:
        self.seen.clear()

    def over_processes(self) -> UsageRecorder:
        """What all processes have seen together. All of them call it, as often as each other."""
        if not several():
            return self
        whole = UsageRecorder()
        for seen in gathered({place: usage.on_cpu() for place, usage in self.seen.items()}):
            for place, usage in seen.items():
                whole.seen.setdefault(place, Usage(usage.arms)).join(usage)
        return whole

    def count(self, key: RoutingKey) -> int:
        """How many rows have been routed at `key`."""
        return sum(int(usage.count) for (other, _), usage in self.seen.items() if other == key)

    def summaries(self, dead_below: float = 0.01) -> dict[RoutingKey, dict[str, float]]:
        """By router: `weight/<arm>`, the mean weight of each arm; `entropy`, the mean, in nats; `cv`, the coefficient
        of variation of the experts' weights, 0 where all get as much; `dead`, how many arms get less than `dead_below`
        of the weight.

        Of routers that choose also: `load/<arm>`, its share of the choices; `max_over_mean`, the largest load of an
        expert over their mean; `active`, experts that a row uses; `null`, the share of choices without an expert; and
        `dead` is how many experts have less than `dead_below` of the mean load.
        """
        found: dict[RoutingKey, dict[str, float]] = {}
        for key in dict.fromkeys(key for key, _ in self.seen):
            rows = self.count(key)
            if not rows:
                continue
            mine = [usage for (other, _), usage in self.seen.items() if other == key]
            sums = _by_arm((usage.arms, torch.as_tensor(usage.weight).tolist()) for usage in mine)
            summary = {f"weight/{arm}": total / rows for arm, total in sums.items()}
            shares = list(summary.values())
            summary["entropy"] = sum(float(usage.entropy) for usage in mine) / rows
            summary["cv"] = _variation([total for arm, total in sums.items() if not WITHOUT_EXPERT.fullmatch(arm)])
            summary["dead"] = float(sum(share < dead_below for share in shares))
            chosen = _by_arm((usage.arms, usage.chosen.tolist()) for usage in mine if usage.chosen is not None)
            found[key] = summary | (_choices(chosen, rows, dead_below) if chosen else {})
        return found

    def report(self, per_layer: bool = False) -> dict[str, float]:
        """As logged: `gate/mean/<name>` over all routers, and with `per_layer` `gate/<module>/<name>` for each.

        Routers of a single arm, such as that of a task adapter, are reported only where no router has more.
        """
        report: dict[str, float] = {}
        values: dict[str, list[float]] = {}
        for place, summary in self.by_place().items():
            for name, value in summary.items():
                values.setdefault(name, []).append(value)
                if per_layer:
                    report[f"gate/{place}/{name}"] = value
        return {**report, **{f"gate/mean/{name}": sum(all_) / len(all_) for name, all_ in values.items()}}

    def by_place(self) -> dict[str, dict[str, float]]:
        """The summaries of the routers that `report` reports, by their modules' names."""
        decide = {key for key, arms in self.seen if len(arms) > 1}
        summaries = {key: summary for key, summary in self.summaries().items() if key in decide or not decide}
        paths = Counter(key.path for key in summaries)
        adapters = Counter((key.path, key.adapter) for key in summaries)
        places: dict[str, dict[str, float]] = {}
        for key, summary in summaries.items():
            place = key.path if paths[key.path] == 1 else f"{key.path}/{key.adapter}"
            places[place if adapters[key.path, key.adapter] == 1 else f"{place}/{key.step}"] = summary
        return places

    def plot(self, path: str | Path) -> None:
        """Write a picture: the share of each arm in each layer, and its mean over layers.

        Raises:
            ValueError: nothing has been recorded.
            ImportError: matplotlib is missing.
        """
        from mixadapters.core.charts import draw_usage  # only who draws needs matplotlib

        draw_usage(self.by_place(), path)


def _variation(values: Sequence[float]) -> float:
    """The standard deviation of `values` over their mean; 0 where there is none."""
    mean = sum(values) / max(len(values), 1)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5 / mean if mean else 0.0


def _by_arm(parts: Iterable[tuple[Sequence[str], list[float]]]) -> dict[str, float]:
    """Sums by arm, over times in which there were other arms."""
    sums: dict[str, float] = {}
    for arms, values in parts:
        for arm, value in zip(arms, values, strict=True):
            sums[arm] = sums.get(arm, 0.0) + value
    return sums


def _choices(chosen: dict[str, float], rows: int, dead_below: float) -> dict[str, float]:
    """What `summaries` says of the choices of a router. chosen: by arm, of so many rows."""
    total = max(sum(chosen.values()), 1.0)
    experts = [count for arm, count in chosen.items() if not WITHOUT_EXPERT.fullmatch(arm)]
    mean = sum(experts) / max(len(experts), 1)
    return {
        **{f"load/{arm}": count / total for arm, count in chosen.items()},
        "max_over_mean": max(experts, default=0.0) / mean if mean else 0.0,
        "active": sum(experts) / rows,
        "null": 1 - sum(experts) / total if sum(chosen.values()) else 0.0,
        "dead": float(sum(count < dead_below * mean or not count for count in experts)),
    }
