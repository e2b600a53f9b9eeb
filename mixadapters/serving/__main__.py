"""`python -m mixadapters.serving --base MODEL --adapters DIR`: the endpoint of a base model and its adapters."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixadapters.serving.composition import CompositionRouter
from mixadapters.serving.endpoint import Endpoint
from mixadapters.serving.engine import AdapterServer
from mixadapters.serving.folder import AdapterFolder
from mixadapters.serving.pooled_states import PooledStates
from mixadapters.serving.scheduler import SCHEDULERS

logger = logging.getLogger("mixadapters.serving")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKEN = "MIXADAPTERS_TOKEN"  # of the environment: arguments are seen by everybody on the machine


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


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def whole(given: str) -> int:
        if not given.isdecimal() or int(given) < least or (most is not None and int(given) > most):
            raise argparse.ArgumentTypeError(
                f"{given!r} must be a whole number from {least}{f' to {most}' if most else ''}"
            )
        return int(given)

    return whole


def _seconds(above: float = -1e-9) -> Callable[[str], float]:
    def seconds(given: str) -> float:
        found = float(given)
        if not above < found < math.inf:
            raise argparse.ArgumentTypeError(
                f"{given!r} must be seconds{' above 0' if above >= 0 else ', not below 0'}"
            )
        return found

    return seconds


def _device(given: str) -> str:
    try:
        torch.empty(0, device=given)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{given!r} is no device here: {str(error).splitlines()[0]}") from None
    return given


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
    parser.add_argument("--port", type=_whole(0, 65535), default=8000)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the base's weights")
    parser.add_argument("--device", type=_device, default="cpu", help="such as cuda, or cuda:1")
    parser.add_argument("--check-base-model", action=argparse.BooleanOptionalAction, default=True,
                        help="refuse LoRA folders that name another base model")  # fmt: skip
    parser.add_argument("--scheduler", choices=list(SCHEDULERS), default="fair", help="the order of prompts")
    parser.add_argument("--sampling", action="store_true", help="requests may give a temperature")
    parser.add_argument("--max-requests", type=_whole(1), default=256, help="running or waiting; more get status 429")
    parser.add_argument("--max-running", type=_whole(1), default=64, help="requests of a step")
    parser.add_argument("--max-batch-tokens", type=_whole(1), default=512, help="tokens of a step")
    parser.add_argument(
        "--cache-tokens", type=_whole(1), default=16384, help="keys and values of all requests together"
    )
    parser.add_argument("--max-resident", type=_whole(1), default=None, help="adapters on the device; default: all")
    parser.add_argument("--offload-folder", type=Path, help="the others wait in files there; default: in host memory")
    parser.add_argument("--deadline", type=_seconds(above=0.0), default=None, help="seconds for each request")
    parser.add_argument("--largest-body", type=_whole(1), default=2**20, help="bytes")
    parser.add_argument("--grace", type=_seconds(), default=30.0, help="seconds that running requests have at the end")
    return parser


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def http_server(options: argparse.Namespace, model: Any, tokenizer: Any) -> HttpServer:
    """The endpoint of a model, with all adapters of its folder.

    Raises:
        ValueError: an adapter with the base's name, an option out of range, or an open host without a token.
    """
    token = os.environ.get(TOKEN) or None
    if token is None and not loopback(options.host):
        raise ValueError(f"--host {options.host} is open to others: set a token in the environment, {TOKEN}")
    folder = AdapterFolder(options.adapters)
    router = None if options.router is None else CompositionRouter.load(options.router, PooledStates(model))
    engine = AdapterServer(
        model, tokenizer=tokenizer, router=router, max_requests=options.max_requests, max_running=options.max_running,
        max_batch_tokens=options.max_batch_tokens, cache_tokens=options.cache_tokens, sampling=options.sampling,
        max_resident=options.max_resident, scheduler=options.scheduler, check_base_model=options.check_base_model,
        offload_folder=options.offload_folder,
    )  # fmt: skip
    base = options.name or Path(options.base).name
    endpoint = Endpoint(
        engine, folder, base=base, token=token, deadline=options.deadline, largest_body=options.largest_body
    )
    endpoint.load_all()
    config = uvicorn.Config(
        endpoint.app(), host=options.host, port=options.port, log_level="info", access_log=False,
        timeout_graceful_shutdown=int(options.grace) + 5,
    )  # fmt: skip
    return HttpServer(config, engine, options.grace)


def main(given: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.base)
        model = AutoModelForCausalLM.from_pretrained(options.base, dtype=options.dtype).to(options.device)
    except (OSError, ValueError) as error:
        parser.error(f"--base {options.base}: {error}")
    try:
        server = http_server(options, model, tokenizer)
    except ValueError as error:
        parser.error(str(error))
    logger.info("adapters: %s", server.engine.adapters.names)
    server.serve_until_stopped()


if __name__ == "__main__":
    main()
