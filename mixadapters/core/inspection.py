"""What a tuner offers to those who look at routings, or set them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mixadapters.core.context import ROUTES, ForwardContext
from mixadapters.core.layer import AdapterHost
from mixadapters.core.mixture import Mixture
from mixadapters.core.routes import spread_pins
from mixadapters.core.routing import RoutingKey
from mixadapters.core.usage import UsageRecorder


class RoutingVerbs:
    """Part of a tuner."""

    @property
    def context(self) -> ForwardContext:
        raise NotImplementedError

    def config_of(self, adapter_name: str) -> Any:
        raise NotImplementedError

    def named(self, adapter_name: str) -> str:
        raise NotImplementedError

    def hosts(self) -> Iterable[AdapterHost]:
        raise NotImplementedError

    def mixtures(self, adapter_name: str | None = None) -> dict[RoutingKey, Mixture]:
        """The mixtures whose routers have something to decide, by the key under which they publish.

        adapter_name: of this adapter alone, without a look at the others; None: of all.
        """
        adapter_name = None if adapter_name is None else self.named(adapter_name)
        tops = [adapter for host in self.hosts() for name, adapter in host.adapters.items()
                if adapter_name in (None, name)]  # fmt: skip
        inside = (part for adapter in tops for part in adapter.modules())
        return {part.key: part for part in inside if isinstance(part, Mixture) and not part.always_first}

    @contextmanager
    def pin_routes(self, routes: Mapping[Any, Any]) -> Iterator[None]:
        """Set what routers decide: `with tuner.pin_routes({"ffn/*": ids}): model.generate(...)`.

        Args:
            routes: see `spread_pins`. Those of a block inside go before those outside.

        Raises:
            ValueError: a key that no router has, or a value that is no routing of its experts.
        """
        pins = spread_pins(routes, {key: mixture.expert_names for key, mixture in self.mixtures().items()})
        with self.context.pin(**{ROUTES: {**self.context.held.get(ROUTES, {}), **pins}}):
            yield

    @contextmanager
    def record_usage(self) -> Iterator[UsageRecorder]:
        """How every router spreads its weight inside the block, in training, evaluation and `generate`.

        `with tuner.record_usage() as usage: trainer.evaluate()`; then `usage.report()` or `usage.summaries()`.
        """
        usage = UsageRecorder()
        self.context.observers.append(usage)
        try:
            yield usage
        finally:
            self.context.observers.remove(usage)
