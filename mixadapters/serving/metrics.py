"""What a server counts, in the form that Prometheus reads."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mixadapters.serving.engine import AdapterServer
from mixadapters.serving.requests import Request

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one endpoint, in a registry of its own. No name of an adapter is in them: there may be many."""

    def __init__(self, server: AdapterServer) -> None:
        self.server, self.begun = server, int(time.time())
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "mixadapters", "registry": self.registry}
        timed = {"buckets": SECONDS, **common}
        self._answers = Counter("answers", "Answers of the endpoint.", ["path", "status"], **common)
        self._requests = Counter("requests", "Requests that have ended.", ["how"], **common)
        self._read = Counter("prompt_tokens", "Tokens of prompts of requests that have ended.", **common)
        self._written = Counter("generated_tokens", "Tokens generated for requests that have ended.", **common)
        self._first = Histogram("first_token_seconds", "From a request to its first token.", **timed)
        self._wait = Histogram("wait_seconds", "From a request to its adapter's place in the model.", **timed)
        self._whole = Histogram("request_seconds", "From a request to its end.", **timed)
        self.registry.register(self)

    def answered(self, path: str, status: int) -> None:
        self._answers.labels(path, str(status)).inc()

    def finished(self, request: Request) -> None:
        self._read.inc(len(request.prompt))
        self._written.inc(len(request.tokens))
        self._whole.observe(time.monotonic() - request.created)
        if request.began is not None:
            self._wait.observe(request.began)
        if request.first_token is not None:
            self._first.observe(request.first_token)
        # Last, so that whoever reads that a request has ended reads all else of it.
        self._requests.labels("done" if request.error is None else type(request.error).__name__).inc()

    def collect(self) -> list[Metric]:
        """What is so now, and what the server itself has counted."""
        adapters = self.server.adapters
        gauges = {
            "requests_held": ("Requests that the server holds, running or waiting.", self.server.waiting),
            "adapters": ("Adapters that requests may name.", len(adapters.names)),
            "filed_bytes": ("Weights of adapters that lie in files alone.", adapters.residents.filed_bytes),
            "resident_adapters": ("Those of them that lie in the model.", len(adapters.residents)),
            "up": ("Whether the server takes requests.", int(self.server.running)),
        }
        counts = {
            "adapter_hits": ("Requests whose adapter lay in the model.", adapters.hits),
            "adapter_misses": ("Requests whose adapter was not in the model.", adapters.misses),
            "adapter_evictions": ("Adapters that have left the model for others.", adapters.residents.evictions),
        }
        return [
            *(GaugeMetricFamily(f"mixadapters_{name}", text, value) for name, (text, value) in gauges.items()),
            *(CounterMetricFamily(f"mixadapters_{name}", text, value) for name, (text, value) in counts.items()),
        ]

    def text(self) -> bytes:
        return generate_latest(self.registry)
