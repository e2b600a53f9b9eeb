"""Gates that remember, among packed requests: each goes on from its own request's tokens, whatever becomes of it."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from served import KINDS, generated

from mixadapters.core.mixture import Mixture
from mixadapters.serving import AdapterServer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
SMALL: dict[str, Any] = {"page_size": 8, "cache_tokens": 2048, "max_batch_tokens": 24}
PREFIX: dict[str, tuple[str, dict[str, Any]]] = {
    "gate": ("mixda", {"gate_granularity": "causal_prefix"}),
    "experts": ("moa", {"granularity": "causal_prefix"}),
    "plain": ("bottleneck", {}),
}


def counted(model: Any, folder: Path) -> Path:
    """Domains told apart by the tokens that they use."""
    found = get_peft_model(model, KINDS["mixda"](router={"kind": "counts"}))
    found.base_model.fit_gate({"a": [torch.arange(5, 40)], "b": [torch.arange(35, 70)]}, general=[torch.arange(5, 96)])
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "bank" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.4)
    found.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(causal, save, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("remembering")
    made = {name: save(root / name, kind, i, **fields) for i, (name, (kind, fields)) in enumerate(PREFIX.items())}
    return {**made, "counts": counted(causal(), root / "counts")}


def server_of(model: Any, folders: dict[str, Path], **options: Any) -> AdapterServer:
    server = AdapterServer(model, **SMALL | options)
    for name, folder in folders.items():
        server.load(name, folder)
    return server


@pytest.fixture(scope="module")
def asked(causal, folders) -> list[tuple[list[int], str, list[int]]]:
    """(prompt, adapter, what `generate` gives), with prompts that several steps read."""
    rng, quiet = random.Random(0), server_of(causal(), folders)
    names = ["gate", "experts", "counts", "plain", "__base__"] * 3
    prompts = [[rng.randrange(5, 96) for _ in range(rng.choice((2, 9, 60)))] for _ in names]
    return [(p, n, generated(quiet.model, p, n, 12)) for p, n in zip(prompts, names, strict=True)]


def test_gates_change_what_is_generated_by_what_came_before(causal, folders, asked) -> None:
    """Else nothing here would show that they are told it: the same tokens come another way after another prompt."""
    model = server_of(causal(), folders).model
    weights: list[torch.Tensor] = []
    mixtures = [m for m in model.modules() if isinstance(m, Mixture) and m.key.adapter == "counts"]
    hook = mixtures[0].router.register_forward_hook(lambda *a: weights.append(a[-1].probs[-1]))
    for first in (8, 60):
        generated(model, [first] * 6 + [90], "counts", 1)
    hook.remove()
    assert (weights[0] - weights[-1]).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_each_request_gets_what_it_gets_alone(causal, folders, asked, seed) -> None:
    """Random order and arrivals; prompts are read in pieces, beside each other."""
    rng = random.Random(seed)
    with server_of(causal(), folders, max_resident=(None, 2, 3)[seed]) as server:
        requests = {}
        for number in rng.sample(range(len(asked)), len(asked)):
            prompt, name, tokens = asked[number]
            requests[number] = server.submit(prompt, name, max_new_tokens=len(tokens))
            time.sleep(rng.choice((0, 0, 0.003)))
        for number, request in requests.items():
            assert request.result(60).tokens == asked[number][2]
        assert all(not request.memory.state for request in requests.values())


def test_request_that_is_put_back_for_want_of_room_begins_anew(causal, folders, asked) -> None:
    again: list[str] = []
    with server_of(causal(), folders, cache_tokens=160) as server:
        packed = server._book.packed

        def noted(ids: Any, lengths: Any, past: Any) -> Any:
            again.extend(one for one, before in zip(ids, past, strict=True) if before == 0)
            return packed(ids, lengths, past)

        server._book.packed = noted  # type: ignore[method-assign]
        requests = [server.submit(prompt, name, max_new_tokens=12) for prompt, name, _ in asked]
        found = [request.result(60).tokens for request in requests]
    assert len(again) > len(set(again))
    assert found == [tokens for *_, tokens in asked]


def test_prefixes_are_not_shared_past_a_gate(causal, folders, asked) -> None:
    """Pages of a prompt hold its keys, and not what a gate has gathered of it."""
    prompt = next(p for p, n, _ in asked if n == "counts" and len(p) == 60)
    with server_of(causal(), folders) as server:
        first, second = (server.submit(prompt, "counts", max_new_tokens=12).result(30).tokens for _ in range(2))
    assert first == second == next(tokens for p, _, tokens in asked if p == prompt)
