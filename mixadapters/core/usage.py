"""How routers spread their weight: running means over real rows, without waiting for the device; nothing is saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mixadapters.core.losses import entropy, real_only
from mixadapters.core.routing import Routing, RoutingKey


class Usage:
    """Running sums of the weights of some arms, and of their entropy. Full precision, whatever the model's."""

    def __init__(self, arms: Sequence[str]) -> None:
        self.arms = tuple(arms)
        self.weight: Tensor | float = 0.0  # (A,)
        self.entropy: Tensor | float = 0.0
        self.count: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, probs: Tensor, mask: Tensor | None) -> None:
        """probs (N, A), mask (N,) bool or None."""
        probs = probs.detach().float()
        rows = probs.new_tensor(float(probs.shape[0])) if mask is None else mask.sum().float()
        real = probs if mask is None else real_only(probs, mask)
        self.weight = self.weight + real.sum(0)
        self.entropy = self.entropy + entropy(probs, mask) * rows
        self.count = self.count + rows


class UsageRecorder:
    """An observer of routings that keeps the usage of every router. `report` says what it has seen."""

    def __init__(self) -> None:
        self.seen: dict[tuple[RoutingKey, tuple[str, ...]], Usage] = {}

    def __call__(self, key: RoutingKey, routing: Routing, mask: Tensor | None) -> None:
        assert routing.probs is not None
        usage = self.seen.get((key, routing.arms))
        if usage is None:
            usage = self.seen[key, routing.arms] = Usage(routing.arms)
        usage.add(routing.probs, mask)

    def reset(self) -> None:
        self.seen.clear()

    def count(self, key: RoutingKey) -> int:
        """How many rows have been routed at `key`."""
        return sum(int(usage.count) for (other, _), usage in self.seen.items() if other == key)

    def summaries(self, dead_below: float = 0.01) -> dict[RoutingKey, dict[str, float]]:
        """By router: mean weight per arm, mean entropy in nats, and how many arms get less than `dead_below`."""
        sums: dict[RoutingKey, dict[str, float]] = {}
        for (key, arms), usage in self.seen.items():
            mine = sums.setdefault(key, {})
            shares = zip(arms, torch.as_tensor(usage.weight).tolist(), strict=True)
            for name, value in (*((f"weight/{arm}", w) for arm, w in shares), ("entropy", usage.entropy)):
                mine[name] = mine.get(name, 0.0) + float(value)
        sums = {key: mine for key, mine in sums.items() if self.count(key) > 0}
        for key, mine in sums.items():
            mine.update({name: value / self.count(key) for name, value in mine.items()})
            mine["dead"] = float(sum(share < dead_below for name, share in mine.items() if name != "entropy"))
        return sums

    def report(self, per_layer: bool = False) -> dict[str, float]:
        """As logged: `gate/mean/<name>` over all routers, and with `per_layer` `gate/<module>/<name>` for each.

        Routers of a single arm, such as that of a task adapter, are reported only where no router has more.
        """
        report: dict[str, float] = {}
        values: dict[str, list[float]] = {}
        decide = {key for key, arms in self.seen if len(arms) > 1}
        summaries = {key: summary for key, summary in self.summaries().items() if key in decide or not decide}
        paths = Counter(key.path for key in summaries)
        adapters = Counter((key.path, key.adapter) for key in summaries)
        for key, summary in summaries.items():
            place = key.path if paths[key.path] == 1 else f"{key.path}/{key.adapter}"
            if adapters[key.path, key.adapter] > 1:
                place = f"{place}/{key.step}"
            for name, value in summary.items():
                values.setdefault(name, []).append(value)
                if per_layer:
                    report[f"gate/{place}/{name}"] = value
        return {**report, **{f"gate/mean/{name}": sum(all_) / len(all_) for name, all_ in values.items()}}
