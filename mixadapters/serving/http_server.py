"""The process that serves: uvicorn around the endpoint of a model and its folder of adapters."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from mixadapters.serving.composition import CompositionRouter
from mixadapters.serving.endpoint import Endpoint
from mixadapters.serving.engine import AdapterServer
from mixadapters.serving.folder import AdapterFolder
from mixadapters.serving.hosts import token_for
from mixadapters.serving.pooled_states import PooledStates


class HttpServer(uvicorn.Server):
    """uvicorn, whose end is also that of the engine: requests that run have `grace` seconds, then they get an error.

    Args:
        engine: what answers.
        grace: seconds.
    """

    should_exit: bool
    force_exit: bool

    def __init__(self, config: uvicorn.Config, engine: AdapterServer, grace: float) -> None:
        super().__init__(config)
        self.engine, self.grace = engine, grace
        self._ending: threading.Thread | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in order. Not uvicorn's own, which raises the signal again at the end: nothing after it would be run."""
        self.end_engine()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    def end_engine(self) -> None:
        """Take no more requests. Connections close when theirs are answered."""
        if self._ending is None:
            self._ending = threading.Thread(target=self.engine.stop, args=(self.grace,))
            self._ending.start()

    def serve_until_stopped(self) -> None:
        """Serve until SIGINT or SIGTERM, or until `should_exit` is set."""
        self.engine.start()
        try:
            self.run()
        finally:
            self.end_engine()
            assert self._ending is not None
            self._ending.join()


def http_server(options: argparse.Namespace, model: Any, tokenizer: Any) -> HttpServer:
    """The endpoint of a model, with all adapters of its folder.

    Raises:
        ValueError: an adapter with the base's name, an option out of range, or an open host without a token.
    """
    token = token_for(options.host)
    folder = AdapterFolder(options.adapters)
    router = None if options.router is None else CompositionRouter.load(options.router, PooledStates(model))
    engine = AdapterServer(
        model, tokenizer=tokenizer, router=router, max_requests=options.max_requests, max_running=options.max_running,
        max_batch_tokens=options.max_batch_tokens, cache_tokens=options.cache_tokens, sampling=options.sampling,
        max_resident=options.max_resident, scheduler=options.scheduler, check_base_model=options.check_base_model,
        offload_folder=options.offload_folder,
    )  # fmt: skip
    base = options.name or Path(options.base).resolve().name
    endpoint = Endpoint(
        engine, folder, base=base, token=token, deadline=options.deadline, largest_body=options.largest_body
    )
    endpoint.load_all()
    config = uvicorn.Config(
        endpoint.app(), host=options.host, port=options.port, log_level="info", access_log=False,
        timeout_graceful_shutdown=int(options.grace) + 5,
    )  # fmt: skip
    return HttpServer(config, engine, options.grace)
