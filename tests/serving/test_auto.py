"""Requests for "auto": a router chooses their adapter from their text."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from served import generated, word_tokenizer

from mixadapters.serving import AdapterServer, CompositionRouter, PooledStates, UnknownAdapter
from mixadapters.serving.__main__ import arguments
from mixadapters.serving.http_server import HttpServer, http_server

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
PROMPTS = {"law": [10, 12, 11, 14], "code": [60, 66, 61, 63], "__base__": [90, 85, 88, 91]}
SMALL = {"page_size": 8, "cache_tokens": 2048, "max_batch_tokens": 48}


def learned(model: Any) -> CompositionRouter:
    """Sends texts of the tokens 10 to 19 to "law", 60 to 69 to "code", and 80 to 91 to the base."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.cat(
        [torch.randint(low, high, (12, 5), generator=draw) for low, high in ((10, 20), (60, 70), (80, 92))]
    )
    kinds = [kind for kind in ("laws", "programs", "others") for _ in range(12)]
    router = CompositionRouter(PooledStates(model), {"laws": "law", "programs": "code", "others": "__base__"})
    return router.fit(ids, categories=kinds)


@pytest.fixture(scope="module")
def folder(save, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for name, kind, seed in (("law", "bottleneck", 1), ("code", "lora", 2)):
        save(root / name, kind, seed)
    return root


@pytest.fixture(scope="module")
def served(causal, folder, tmp_path_factory) -> Iterator[HttpServer]:
    """By the command line, with a router that was saved."""
    place = tmp_path_factory.mktemp("router")
    learned(causal()).save(place)
    given = ["--base", "tiny", "--adapters", str(folder), "--router", str(place), "--cache-tokens", "2048",
             "--max-batch-tokens", "48"]  # fmt: skip
    server = http_server(arguments().parse_args(given), causal(), word_tokenizer())
    with server.engine:
        yield server


@pytest.fixture(scope="module")
def alone(causal, folder) -> Any:
    quiet = AdapterServer(causal(), **SMALL)
    for name in ("law", "code"):
        quiet.load(name, folder / name)
    return lambda prompt, adapter: generated(quiet.model, prompt, adapter, 6)


def test_requests_get_the_adapter_that_the_router_chooses(served, alone) -> None:
    """Among others, and from several threads at a time."""
    found: dict[str, Any] = {}

    def ask(name: str) -> None:
        found[name] = served.engine.submit(PROMPTS[name], "auto", max_new_tokens=6)

    others = [served.engine.submit([7, 8, 9 + i], "law", max_new_tokens=20) for i in range(3)]
    threads = [threading.Thread(target=ask, args=(name,)) for name in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, request in found.items():
        assert request.adapter == name
        assert request.result(60).tokens == alone(PROMPTS[name], name)
    for request in others:
        request.result(60)
    assert served.engine.waiting == 0


def test_the_endpoint_serves_auto_as_a_model(served, alone) -> None:
    client = TestClient(served.config.app)
    models = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert models == ["tiny", "law", "code", "auto"] or models == ["tiny", "code", "law", "auto"]
    assert client.get("/v1/models/auto").json()["parent"] == "tiny"
    body = {"model": "auto", "prompt": PROMPTS["code"], "max_tokens": 6}
    answer = client.post("/v1/completions", json=body).json()
    expected = word_tokenizer().decode(alone(PROMPTS["code"], "code"), skip_special_tokens=True)
    assert answer["choices"][0]["text"] == f" {expected}"  # it goes on with the prompt
    assert answer["model"] == "auto"


def test_auto_without_a_router_and_choices_that_there_are_not_are_refused(causal, folder) -> None:
    model = causal()
    with AdapterServer(model, **SMALL) as server, pytest.raises(UnknownAdapter, match="no adapter 'auto'"):
        server.submit([7, 8], "auto")
    with AdapterServer(model, router=lambda input_ids: ["gone"], **SMALL) as server:
        with pytest.raises(UnknownAdapter, match="no adapter 'gone'"):
            server.submit([7, 8], "auto", max_new_tokens=2)
        assert server.waiting == 0
        with pytest.raises(ValueError, match="an adapter is called 'auto'"):
            server.load("auto", folder / "law")
