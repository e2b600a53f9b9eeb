"""`python -m mixadapters.serving --base MODEL --adapters DIR`: the endpoint of a base model and its adapters."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixadapters.serving.composition import CompositionRouter
from mixadapters.serving.endpoint import Endpoint
from mixadapters.serving.engine import AdapterServer
from mixadapters.serving.folder import AdapterFolder
from mixadapters.serving.pooled_states import PooledStates

logger = logging.getLogger("mixadapters.serving")
TOKEN = "MIXADAPTERS_TOKEN"  # of the environment: arguments are seen by everybody on the machine


class HttpServer(uvicorn.Server):
    """uvicorn, whose end is also that of the engine: requests that run have `grace` seconds, then they get an error.

    Args:
        engine: what answers.
        grace: seconds.
    """

    def __init__(self, config: uvicorn.Config, engine: AdapterServer, grace: float) -> None:
        super().__init__(config)
        self.engine, self.grace = engine, grace
        self._ending: threading.Thread | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.end_engine()
        super().handle_exit(sig, frame)

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


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixadapters.serving", description="Serve a base model with adapters, as OpenAI's API.",
        epilog=f"A token that clients must send is read from the environment: {TOKEN}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--base", required=True, help="causal language model of transformers: folder or hub id")
    parser.add_argument("--adapters", required=True, type=Path, help="folder whose subfolders are adapters")
    parser.add_argument("--router", type=Path, help="folder of a CompositionRouter, which serves the model 'auto'")
    parser.add_argument("--name", help="the base's name as a model; default: the last part of --base")
    parser.add_argument("--host", default="127.0.0.1", help="others than loopback need a token")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="auto", help="of the base's weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sampling", action="store_true", help="requests may give a temperature")
    parser.add_argument("--max-requests", type=int, default=256, help="running or waiting; more get status 429")
    parser.add_argument("--max-running", type=int, default=64, help="requests of a step")
    parser.add_argument("--max-batch-tokens", type=int, default=512, help="tokens of a step")
    parser.add_argument("--cache-tokens", type=int, default=16384, help="keys and values of all requests together")
    parser.add_argument("--max-resident", type=int, default=None, help="adapters on the device; default: all")
    parser.add_argument("--deadline", type=float, default=None, help="seconds for each request")
    parser.add_argument("--largest-body", type=int, default=2**20, help="bytes")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds that running requests have at the end")
    return parser


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def http_server(options: argparse.Namespace, model: Any, tokenizer: Any) -> HttpServer:
    """The endpoint of a model, with all adapters of its folder.

    Raises:
        ValueError: an adapter that cannot be served, an option out of range, or an open host without a token.
    """
    token = os.environ.get(TOKEN) or None
    if token is None and not loopback(options.host):
        raise ValueError(f"--host {options.host} is open to others: set a token in the environment, {TOKEN}")
    folder = AdapterFolder(options.adapters)
    router = None if options.router is None else CompositionRouter.load(options.router, PooledStates(model))
    engine = AdapterServer(
        model, tokenizer=tokenizer, router=router, max_requests=options.max_requests, max_running=options.max_running,
        max_batch_tokens=options.max_batch_tokens, cache_tokens=options.cache_tokens, sampling=options.sampling,
        max_resident=options.max_resident,
    )  # fmt: skip
    base = options.name or Path(options.base).name
    for name in folder.names():
        if name == base:
            raise ValueError(f"an adapter has the name of the base, {base!r}: give another by --name")
        engine.load(name, folder.find(name))
    endpoint = Endpoint(
        engine, folder, base=base, token=token, deadline=options.deadline, largest_body=options.largest_body
    )
    config = uvicorn.Config(
        endpoint.app(), host=options.host, port=options.port, log_level="info", access_log=False,
        timeout_graceful_shutdown=int(options.grace) + 5,
    )  # fmt: skip
    return HttpServer(config, engine, options.grace)


def main(given: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=options.dtype).to(options.device)
    try:
        server = http_server(options, model, tokenizer)
    except ValueError as error:
        parser.error(str(error))
    logger.info("adapters: %s", server.engine.adapters.names)
    server.serve_until_stopped()


if __name__ == "__main__":
    main()
