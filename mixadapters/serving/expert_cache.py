"""Experts that do not all fit: which to keep, given the routes to come; and which requests to serve together.

A router that reads tokens alone ("pregate") decides before the base model runs, so what each step will need is known:
what to load next, and what will be missed last.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from math import inf
from typing import Generic, Literal, TypeVar

from torch import Tensor

from mixadapters.core.fields import check_integer, check_kind, one_of
from mixadapters.core.routing import Routing

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ExpertCache(Generic[K, V]):
    """At most `capacity` experts, loaded as steps ask for them.

    Where a step needs room, "lru" gives up the expert that has not been asked for the longest, and "belady" the one
    whose next use in the plan is the furthest (Belady 1966), which no other choice beats in loads. Experts of one step
    stay together.

        cache = ExpertCache(8, load, policy="belady", plan=request_experts(router.plan(input_ids), len(input_ids)))

    Args:
        capacity: experts.
        load: name of an expert -> what is kept of it, such as its weights on the device.
        policy: "belady" or "lru".
        plan: the experts of each step to come, in order; `extend` makes it longer. What is used again only beyond its
            end counts as never used again, and of several of these the least recently used goes first.
        drop: called with what is given up: (name, value).

    Attributes:
        hits: how many experts of steps were there.
        loads, prefetched: how many experts were loaded, and how many of these before their step.

    Raises:
        ValueError: a capacity below 1, another policy, or a plan for "lru", which reads none.
    """

    def __init__(
        self,
        capacity: int,
        load: Callable[[K], V],
        *,
        policy: Literal["belady", "lru"] = "lru",
        plan: Iterable[Collection[K]] | None = None,
        drop: Callable[[K, V], None] | None = None,
    ) -> None:
        check_integer("capacity", capacity, least=1)
        if not callable(load):
            raise ValueError(f"load={load!r:.80} must be a function from an expert to what is kept of it")
        one_of("policy", policy, ("belady", "lru"))
        if (plan is not None) != (policy == "belady"):
            raise ValueError(f"policy={policy!r} {'needs a' if plan is None else 'reads no'} plan")
        self.capacity, self.policy = capacity, policy
        self.hits = self.loads = self.prefetched = 0
        self._load, self._drop = load, drop
        self._resident: OrderedDict[K, V] = OrderedDict()  # least recently used first
        self._plan: deque[frozenset[K]] = deque()  # the steps to come
        self._uses: dict[K, list[int]] = {}  # numbers of those steps, the next one last
        self._step = 0
        if plan is not None:
            self.extend(plan)

    @property
    def resident(self) -> tuple[K, ...]:
        """The experts that are there, the least recently used first."""
        return tuple(self._resident)

    @property
    def hit_rate(self) -> float:
        """The share of the experts of steps that were there already; 0 before the first step."""
        return self.hits / max(self.hits + self.loads - self.prefetched, 1)

    def extend(self, plan: Iterable[Collection[K]]) -> None:
        """Further steps, after those that are planned.

        Raises:
            ValueError: the policy reads no plan, or a step needs more experts than fit. Nothing has been planned then.
        """
        if self.policy != "belady":
            raise ValueError(f"policy={self.policy!r} reads no plan")
        steps = [frozenset(step) for step in plan]
        for step in steps:
            self._check(step)
        first = self._step + len(self._plan)
        self._plan += steps
        for number in range(len(steps) - 1, -1, -1):
            for key in steps[number]:
                self._uses.setdefault(key, []).append(first + number)
        for key in frozenset[K]().union(*steps):
            self._uses[key].sort(reverse=True)

    def prefetch(self, experts: Collection[K]) -> None:
        """Load what the next step is expected to need, such as by a pre-gate. What it takes is then there, or not.

        Raises:
            ValueError: there are more than fit. Nothing has changed then.
        """
        expected, loads = dict.fromkeys(experts), self.loads
        self._check(expected)
        try:
            self._hold(expected)
        finally:
            self.prefetched += self.loads - loads

    def take(self, experts: Collection[K]) -> dict[K, V]:
        """The experts of the next step, loaded where they are not there.

        Raises:
            ValueError: there are more than fit, or by the plan this step has others. Nothing has changed then.
        """
        needed = dict.fromkeys(experts)
        self._check(needed)
        if self.policy == "belady":
            self._check_plan(needed)
        self.hits += sum(key in self._resident for key in needed)
        self._hold(needed)
        if self.policy == "belady":  # only now: a step whose loading failed may be taken again
            self._advance()
        return {key: self._resident[key] for key in needed}

    def _check(self, step: Collection[K]) -> None:
        if len(step) > self.capacity:
            raise ValueError(
                f"a step needs {len(step)} experts, {sorted(map(str, step))}, and capacity={self.capacity}; raise it, "
                "or make smaller batches (expert_aware_batches)"
            )

    def _check_plan(self, needed: Collection[K]) -> None:
        planned = self._plan[0] if self._plan else None
        if planned != frozenset(needed):
            by_plan = "there is none" if planned is None else f"it needs {sorted(map(str, planned))}"
            raise ValueError(
                f"step {self._step} asks for {sorted(map(str, needed))}, and by the plan {by_plan}; plan the steps "
                "that are taken, or use policy='lru'"
            )

    def _advance(self) -> None:
        """Go one step on in the plan."""
        self._step += 1
        for key in self._plan.popleft():
            self._uses[key].pop()
            if not self._uses[key]:
                del self._uses[key]

    def _hold(self, needed: Collection[K]) -> None:
        """Have these experts, the last used."""
        for key in needed:
            if key in self._resident:
                self._resident.move_to_end(key)
        self._make_room(needed)
        for key in needed:
            if key not in self._resident:
                self._resident[key] = self._load(key)
                self.loads += 1

    def _make_room(self, needed: Collection[K]) -> None:
        room = self.capacity - sum(key not in self._resident for key in needed)
        while len(self._resident) > room:
            others = [key for key in self._resident if key not in needed]  # least recently used first
            goes = others[0] if self.policy == "lru" else max(others, key=self._next_use)
            value = self._resident.pop(goes)
            if self._drop is not None:
                self._drop(goes, value)

    def _next_use(self, key: K) -> float:
        uses = self._uses.get(key)
        return uses[-1] if uses else inf


def request_experts(routing: Routing, batch: int, mask: Tensor | None = None) -> list[frozenset[int]]:
    """The experts that each request uses at any of its tokens.

    Args:
        routing: of N = batch * T rows, such as `PregateRouter.plan` gives it.
        mask: (batch, T), 0 at padding; None: all tokens are real.

    Raises:
        ValueError: a routing that chooses nothing, or whose rows are no whole requests.
    """
    return [frozenset[int]().union(*steps) for steps in token_experts(routing, batch, mask)]


def token_experts(routing: Routing, batch: int, mask: Tensor | None = None) -> list[list[frozenset[int]]]:
    """The experts of each token of each request; padding is left out. Arguments and errors of `request_experts`."""
    check_kind("routing", routing, Routing, "a Routing, such as PregateRouter.plan gives")
    indices = routing.indices
    if indices is None:
        raise ValueError("this routing weighs every expert, so there is nothing to plan; use a router that chooses")
    if batch < 1 or len(indices) % batch:
        raise ValueError(f"batch={batch} does not divide the {len(indices)} rows of the routing")
    rows = indices.reshape(batch, -1, indices.shape[1])
    real = [[True] * rows.shape[1]] * batch if mask is None else (mask != 0).tolist()
    if mask is not None and tuple(mask.shape) != tuple(rows.shape[:2]):
        raise ValueError(f"mask {tuple(mask.shape)} must be {tuple(rows.shape[:2])}, one value for each token")
    found = []
    for tokens, counted in zip(rows.tolist(), real, strict=True):
        chosen = [token for token, counts in zip(tokens, counted, strict=True) if counts]
        found.append([frozenset(expert for expert in token if expert >= 0) for token in chosen])
    return found


def expert_aware_batches(
    needs: Sequence[Collection[K]], max_experts: int, max_requests: int | None = None
) -> list[list[int]]:
    """Batches of requests that use at most `max_experts` different experts each, few batches being made.

    The oldest request that waits begins a batch, so none waits for ever; then always joins the one that brings the
    fewest new experts. Source: Cai et al. 2024 (Read-ME, arXiv 2410.19123), expert-aware batching; greedy, since the
    fewest batches are NP-hard to find.

    Args:
        needs: the experts of each request, in the order of arrival.
        max_experts: different experts of a batch.
        max_requests: requests of a batch; None: any number.

    Returns:
        Numbers of requests: each is in one batch.

    Raises:
        ValueError: a limit below 1, or a request that needs more experts than a batch may.
    """
    for name, limit in (("max_experts", max_experts), ("max_requests", max_requests)):
        if limit is not None:
            check_integer(name, limit, least=1)
    check_kind("needs", needs, Sequence, "a list with the experts of each request")
    if isinstance(needs, str) or not all(isinstance(need, Collection) and not isinstance(need, str) for need in needs):
        raise ValueError(f"needs={needs!r:.80} must be a list with a set of experts for each request")
    sets = [frozenset(need) for need in needs]
    for number, need in enumerate(sets):
        if len(need) > max_experts:
            raise ValueError(f"request {number} needs {len(need)} experts, and max_experts={max_experts}; raise it")
    waiting = list(range(len(sets)))
    batches = []
    while waiting:
        batch = [waiting.pop(0)]
        together = sets[batch[0]]
        while waiting and (max_requests is None or len(batch) < max_requests):
            joins = min(waiting, key=lambda number: len(sets[number] - together))
            if len(together | sets[joins]) > max_experts:
                break
            waiting.remove(joins)
            batch.append(joins)
            together |= sets[joins]
        batches.append(batch)
    return batches
