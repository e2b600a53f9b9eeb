"""`python -m mixadapters.serving --base MODEL --adapters DIR`: the endpoint of a base model and its adapters.

Arguments and folders are checked before torch and the rest are imported.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from mixadapters.core.folders import MODEL_FILE, check_saved
from mixadapters.core.starting import import_what_waits, number, whole
from mixadapters.serving.hosts import TOKEN, token_for

logger = logging.getLogger("mixadapters.serving")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULERS = ("fair", "fifo")


def _device(given: str) -> str:
    if given == "cpu":
        return given
    import torch

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
    parser.add_argument("--port", type=whole(0, 65535), default=8000)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the base's weights")
    parser.add_argument("--device", type=_device, default="cpu", help="such as cuda, or cuda:1")
    parser.add_argument("--check-base-model", action=argparse.BooleanOptionalAction, default=True,
                        help="refuse LoRA folders that name another base model")  # fmt: skip
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="fair", help="the order of prompts")
    parser.add_argument("--sampling", action="store_true", help="requests may give a temperature")
    parser.add_argument("--max-requests", type=whole(1), default=256, help="running or waiting; more get status 429")
    parser.add_argument("--max-running", type=whole(1), default=64, help="requests of a step")
    parser.add_argument("--max-batch-tokens", type=whole(1), default=512, help="tokens of a step")
    parser.add_argument(
        "--cache-tokens", type=whole(1), default=16384, help="keys and values of all requests together"
    )
    parser.add_argument("--max-resident", type=whole(1), default=None, help="adapters on the device; default: all")
    parser.add_argument("--offload-folder", type=Path, help="the others wait in files there; default: in host memory")
    parser.add_argument("--deadline", type=number(above=0.0), default=None, help="seconds for each request")
    parser.add_argument("--largest-body", type=whole(1), default=2**20, help="bytes")
    parser.add_argument(
        "--grace", type=number(least=0.0), default=30.0, help="seconds that running requests have at the end"
    )
    return parser


def check(options: argparse.Namespace) -> None:
    """Raises ValueError: an open host without a token, or folders that are not there."""
    token_for(options.host)
    if not options.adapters.is_dir():
        raise ValueError(f"--adapters {str(options.adapters)!r}: there is no such folder")
    check_saved("--base", options.base, MODEL_FILE)


def main(given: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO)
    try:
        check(options)
        import_what_waits()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from mixadapters.serving.http_server import http_server

        try:
            tokenizer = AutoTokenizer.from_pretrained(options.base)
            model = AutoModelForCausalLM.from_pretrained(options.base, dtype=options.dtype).to(options.device)
        except (OSError, ValueError) as error:
            raise ValueError(f"--base {options.base}: {error}") from error
        server = http_server(options, model, tokenizer)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    logger.info("adapters: %s", server.engine.adapters.names)
    server.serve_until_stopped()


if __name__ == "__main__":
    main()
