"""Requests that name adapters, in one continuously batched model: each gets what it would get alone."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from served import KINDS, generated, tried

from mixadapters import BottleneckConfig
from mixadapters.core.rows import BASE
from mixadapters.serving import (
    AdapterRefused,
    AdapterServer,
    DeadlineExceeded,
    RequestCancelled,
    ServerBusy,
    ServerStopped,
    UnknownAdapter,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
SMALL = {"page_size": 8, "cache_tokens": 2048, "max_batch_tokens": 48}
PROMPTS = [[8, 6, 9], [6, 5, 14, 7, 11], [10], [7, 12, 6, 13, 7, 13, 6]]
LONG = [5 + (7 * i) % 60 for i in range(60)]


@pytest.fixture(scope="module")
def folders(save, tmp_path_factory) -> dict[str, Path]:
    """Sixteen adapters of four kinds."""
    root, kinds = tmp_path_factory.mktemp("adapters"), list(KINDS)
    ranks = {kinds[i % 4]: 2 + i % 3 for i in range(4)}
    return {f"a{i}": save(root / f"a{i}", kinds[i % 4], i, r=ranks[kinds[i % 4]] + i // 8) for i in range(16)}


@pytest.fixture(scope="module")
def server(causal, folders) -> Iterator[AdapterServer]:
    """One with sixteen adapters; tests that change it put it back."""
    server = AdapterServer(causal(), **SMALL)
    for name, folder in folders.items():
        server.load(name, folder)
    with server:
        yield server


@pytest.fixture(scope="module")
def alone(causal, folders) -> Any:
    """(prompt, adapter, tokens) -> what `generate` gives, of a model that no server runs."""
    quiet = tried(AdapterServer(causal(), **SMALL), folders)
    return lambda prompt, adapter, tokens: generated(quiet.model, prompt, adapter, tokens)


@pytest.fixture(scope="module")
def asked(alone) -> list[tuple[list[int], str, list[int]]]:
    """Prompts of random lengths, the adapter of each, and what it gets alone: two for each adapter and the base."""
    rng = random.Random(0)
    names = [BASE, *(f"a{i}" for i in range(16))] * 2
    prompts = [[rng.randrange(5, 96) for _ in range(rng.choice((1, 3, 8, 21, 55)))] for _ in names]
    return [(p, n, alone(p, n, 3 + i % 4)) for i, (p, n) in enumerate(zip(prompts, names, strict=True))]


def test_adapters_change_what_is_generated(asked, alone) -> None:
    changed = [alone(prompt, BASE, len(tokens)) != tokens for prompt, name, tokens in asked if name != BASE]
    assert sum(changed) > len(changed) / 2


@pytest.mark.parametrize("seed", range(4))
def test_each_request_gets_what_it_gets_alone(server, asked, seed) -> None:
    """Random order, arrivals and company, of which some is given up."""
    rng = random.Random(seed)
    order = rng.sample(range(len(asked)), len(asked))
    requests = {}
    for number in order:
        prompt, name, tokens = asked[number]
        requests[number] = server.submit(prompt, name, max_new_tokens=len(tokens))
        if rng.random() < 0.3:
            company = server.submit(prompt[::-1], rng.choice(server.adapters.names), max_new_tokens=30)
            threading.Timer(rng.random() / 50, company.cancel).start()
        time.sleep(rng.choice((0, 0, 0.002)))
    for number, request in requests.items():
        assert request.result(60) == (asked[number][2], "length")


def test_same_prompt_under_two_adapters_shares_no_prefix(server, alone) -> None:
    """The pages of a prompt that other requests have left are those of their adapter."""
    for name in ("a0", "a1", "a0", BASE):
        assert server.submit(LONG, name, max_new_tokens=5).result(30).tokens == alone(LONG, name, 5)


def test_requests_of_one_adapter_share_a_prefix(server) -> None:
    cache = server._book.manager.batch_processor.cache
    found, search = [], cache.search_prefix_match
    cache.search_prefix_match = lambda *args: found.append(search(*args)) or found[-1]
    try:
        prompt = LONG[::-1]
        for name in ("a2", "a3", "a2"):
            server.submit(prompt, name, max_new_tokens=2).result(30)
    finally:
        cache.search_prefix_match = search
    assert found[:2] == [0, 0]
    assert found[2] >= 48


def test_name_that_is_given_anew_shares_no_prefix_with_the_one_before(causal, folders) -> None:
    with AdapterServer(causal(), **SMALL) as server:
        server.load("x", folders["a0"])
        first = server.submit(LONG, "x", max_new_tokens=5).result(30)
        assert server.unload("x")
        server.load("x", folders["a4"])
        server.load("y", folders["a4"])
        second, fresh = (server.submit(LONG, name, max_new_tokens=5).result(30) for name in ("x", "y"))
    assert second == fresh != first


def test_tokens_come_one_by_one(server, alone) -> None:
    request = server.submit(PROMPTS[1], "a5", max_new_tokens=6)
    seen = []
    request.listen(lambda: seen.append((len(request.tokens), request.done)))
    assert list(request) == alone(PROMPTS[1], "a5", 6)
    counts = [count for count, _ in seen]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert seen[-1] == (6, True)
    assert list(request) == request.tokens  # a second reader


def test_request_ends_where_the_model_ends_a_text(causal, folders, alone) -> None:
    model = causal()
    tokens = alone(PROMPTS[3], BASE, 6)
    model.generation_config.eos_token_id = tokens[2]
    with AdapterServer(model, **SMALL) as server:
        result = server.submit(PROMPTS[3], max_new_tokens=6).result(30)
    assert result == (tokens[: tokens.index(tokens[2]) + 1], "stop")


# --- what is not done ---------------------------------------------------------------------------------------------


def test_cancelled_request_leaves_the_others_alone(server, alone) -> None:
    doomed = [server.submit(PROMPTS[0], "a6") for _ in range(3)]
    kept = server.submit(PROMPTS[1], "a6", max_new_tokens=20)
    next(iter(doomed[0]))
    for request in doomed:
        request.cancel()
    with pytest.raises(RequestCancelled):
        doomed[0].result(5)
    with pytest.raises(RequestCancelled):
        list(doomed[1])
    assert 0 < len(doomed[0].tokens) < 250
    assert kept.result(30).tokens == alone(PROMPTS[1], "a6", 20)
    assert server.waiting == 0


@pytest.mark.parametrize("watched", [True, False])
def test_request_whose_time_is_up_fails_whether_somebody_waits_or_not(server, watched) -> None:
    request = server.submit(PROMPTS[0], "a7", max_new_tokens=240, deadline=0.05)
    if watched:
        with pytest.raises(DeadlineExceeded, match=r"not done in 0\.05 s"):
            request.result()
    else:
        ended = threading.Event()
        request.when_done(ended.set)
        assert ended.wait(30)
    assert request.done
    assert isinstance(request.error, DeadlineExceeded)
    assert server.waiting == 0


def test_full_server_refuses_and_takes_requests_again(causal) -> None:
    with AdapterServer(causal(), max_requests=3, **SMALL) as server:
        held = [server.submit(PROMPTS[0], max_new_tokens=100) for _ in range(3)]
        with pytest.raises(ServerBusy, match="holds 3 requests, and takes no more than 3"):
            server.submit(PROMPTS[0], max_new_tokens=1)
        held[0].cancel()
        assert len(server.submit(PROMPTS[0], max_new_tokens=2).result(30).tokens) == 2
        for request in held:
            request.cancel()


def test_thousand_queued_requests_are_all_answered(server, alone, monkeypatch) -> None:
    monkeypatch.setattr(server, "max_requests", 1000)
    requests = [server.submit([5 + i % 90], f"a{i % 16}", max_new_tokens=1) for i in range(1000)]
    for request in requests[::100]:
        assert request.result(120).tokens == alone(request.prompt, request.adapter, 1)
    assert all(len(request.result(120).tokens) == 1 for request in requests)
    assert server.waiting == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "at least one"),
        ({"prompt": [5, 96]}, "from 0 to 95"),
        ({"prompt": [5, True]}, "must be token ids"),
        ({"prompt": "words"}, "no tokenizer"),
        ({"prompt": [5], "adapter": "a55"}, "no adapter 'a55'.*Did you mean"),
        ({"prompt": [5], "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"prompt": [5], "max_new_tokens": 256}, "more than the 256 tokens"),
        ({"prompt": [5], "deadline": 0}, "deadline=0"),
        ({"prompt": [5], "temperature": -1.0}, "temperature=-1.0"),
        ({"prompt": [5], "temperature": 1e-38}, "temperature=1e-38 must be 0, or 0.001 or more"),  # no row may be NaN
        ({"prompt": 5}, "prompt=5 must be text or token ids"),
        ({"prompt": [5], "temperature": 0.5}, "sampling=True"),
        ({"prompt": [5], "top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_what_no_request_can_have_is_refused_before_it_waits(server, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        server.submit(**arguments)
    assert server.waiting == 0


@pytest.mark.parametrize(
    "asked", [{"repetition_penalty": 1.05}, {"suppress_tokens": [5]}, {"num_beams": 2}, {"forced_eos_token_id": 0}]
)
def test_settings_of_the_model_that_no_request_gets_are_said(causal, asked) -> None:
    """Those of sampling are for `generate` alone, which samples where a request says nothing."""
    model = causal()
    model.generation_config.update(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, num_beams=1, suppress_tokens=[]
    )
    AdapterServer(model, **SMALL)
    model.generation_config.update(**asked)
    with pytest.warns(UserWarning, match=rf"generation_config has {next(iter(asked))}=.*other tokens than `generate`"):
        AdapterServer(model, **SMALL)


def test_sampling_server_is_greedy_where_no_temperature_is_given(causal, folders, alone) -> None:
    with AdapterServer(causal(), sampling=True, **SMALL) as server:
        server.load("a0", folders["a0"])
        hot = [server.submit(PROMPTS[1], "a0", max_new_tokens=12, temperature=5.0) for _ in range(3)]
        cold = server.submit(PROMPTS[1], "a0", max_new_tokens=12)
        low = server.submit(PROMPTS[1], "a0", max_new_tokens=12, temperature=5.0, top_p=1e-6)
        assert cold.result(30).tokens == low.result(30).tokens == alone(PROMPTS[1], "a0", 12)
        assert len({tuple(request.result(30).tokens) for request in hot}) > 1


# --- adapters that come and go ------------------------------------------------------------------------------------


def test_adapter_in_use_is_unloaded_when_its_requests_are_done(causal, folders, alone) -> None:
    with AdapterServer(causal(), **SMALL) as server:
        server.load("x", folders["a0"])
        server.load("y", folders["a1"])
        with pytest.raises(UnknownAdapter, match="'__base__' is the base model, which is not unloaded"):
            server.unload("__base__")
        running = [server.submit(PROMPTS[i], "x", max_new_tokens=40) for i in range(4)]
        next(iter(running[0]))
        assert not server.unload("x")
        with pytest.raises(UnknownAdapter, match=r"'x' \(it is being unloaded\); have \['__base__', 'y'\]"):
            server.submit(PROMPTS[0], "x", max_new_tokens=2)
        for prompt, request in zip(PROMPTS, running, strict=True):
            assert request.result(60).tokens == alone(prompt, "a0", 40)
        server.submit(PROMPTS[0], "y", max_new_tokens=1).result(30)
        assert server.adapters.names == ["y"]
        assert "x" not in server.context.hosted
        server.load("x", folders["a4"])
        assert server.submit(PROMPTS[0], "x", max_new_tokens=5).result(30).tokens == alone(PROMPTS[0], "a4", 5)


def test_adapters_load_while_requests_run(server, folders, alone) -> None:
    running = [server.submit(PROMPTS[i % 4], f"a{i}", max_new_tokens=40) for i in range(8)]
    next(iter(running[0]))
    server.load("late", folders["a9"])
    assert server.submit(PROMPTS[0], "late", max_new_tokens=5).result(30).tokens == alone(PROMPTS[0], "a9", 5)
    for i, request in enumerate(running):
        assert request.result(60).tokens == alone(PROMPTS[i % 4], f"a{i}", 40)
    assert server.unload("late")


def broken(folder: Path, how: str) -> None:
    weights = folder / "adapter_model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif how == "no config":
        (folder / "adapter_config.json").unlink()
    elif how == "bad pattern":
        config = {**json.loads((folder / "adapter_config.json").read_text()), "target_modules": "("}
        config.pop("digest", None)
        (folder / "adapter_config.json").write_text(json.dumps(config))
    elif how == "no JSON":
        (folder / "adapter_config.json").write_text("{")
    else:
        tensors = load_file(weights)
        if how == "not finite":
            tensors = {name: t.fill_(float("nan")) for name, t in tensors.items()}
        elif how == "embeddings":
            tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(96, 32)
        elif how == "missing":
            tensors.popitem()
        save_file(tensors, weights)
        config = folder / "adapter_config.json"  # of a save that was so
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "digest"}))


BROKEN = r"safetensors|type None|no adapter config|finite|cannot be read|embed_tokens|missing|lora_B|no regular"
BREAKS = ["no weights", "cut", "no config", "no JSON", "bad pattern", "not finite", "embeddings", "missing"]


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("kind", [0, 3])
def test_broken_folder_changes_nothing(server, folders, alone, tmp_path, monkeypatch, how, kind) -> None:
    """Neither where adapters of its form have been loaded, nor where it is the first."""
    shutil.copytree(folders[f"a{kind}"], tmp_path / "x")
    broken(tmp_path / "x", how)
    embeddings = server.model.get_input_embeddings().weight.clone()
    request = server.submit(PROMPTS[0], "a2", max_new_tokens=30)
    for forms in (server.adapters._forms, {}):
        monkeypatch.setattr(server.adapters, "_forms", forms)
        with pytest.raises(ValueError, match=BROKEN):
            server.load("x", tmp_path / "x")
    assert "x" not in server.adapters.names
    assert "x" not in server.model.peft_config
    assert torch.equal(server.model.get_input_embeddings().weight, embeddings)
    assert request.result(30).tokens == alone(PROMPTS[0], "a2", 30)


def test_lora_with_weights_beside_its_targets_is_refused(server, folders, tmp_path) -> None:
    shutil.copytree(folders["a3"], tmp_path / "x")
    config = tmp_path / "x" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match=r"holds weights for \[.*mlp\.down_proj.*which its own config does not adapt"):
        server.load("x", tmp_path / "x")


@pytest.mark.parametrize("given", ["a0", "a1", "a3"])
def test_adapter_of_the_same_base_by_another_path_is_served(causal, folders, tmp_path, monkeypatch, given) -> None:
    shutil.copytree(folders[given], tmp_path / "x")
    (tmp_path / "base").mkdir()
    config = tmp_path / "x" / "adapter_config.json"
    said = {**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(said))
    monkeypatch.chdir(tmp_path)
    model = causal()
    model.config._name_or_path = "base"
    AdapterServer(model, **SMALL).load("x", tmp_path / "x")
    model = causal()
    model.config._name_or_path = "another"
    with pytest.raises(
        ValueError, match=r"adapter 'x' was trained on .*this model is 'another'.*--no-check-base-model"
    ):
        AdapterServer(model, **SMALL).load("x", tmp_path / "x")
    AdapterServer(model, check_base_model=False, **SMALL).load("x", tmp_path / "x")


def test_name_that_is_taken_is_refused(server, folders) -> None:
    for name in ("a0", BASE):
        with pytest.raises(ValueError, match="is taken"):
            server.load(name, folders["a1"])


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("mixda", {"gate_granularity": "request"}, "gate_granularity='request' at"),
        ("moa", {"granularity": "request"}, "granularity='request' at"),
        ("moa", {"target_modules": ["lm_head"]}, "adapts 'lm_head'"),
        ("bottleneck", {"modules_to_save": ["lm_head"]}, "'lm_head' of its own"),
    ],
)
def test_adapter_that_cannot_be_right_is_refused_by_name(causal, save, tmp_path, kind, fields, reason) -> None:
    server = AdapterServer(causal(), **SMALL)
    with pytest.raises(AdapterRefused, match=f"'x' cannot be served: .*{reason}"):
        server.load("x", save(tmp_path / "x", kind, **fields))
    assert server.adapters.names == []
    assert not server.context.hosted


def test_adapters_that_the_model_has_are_served_or_refused(causal, save, tmp_path) -> None:
    model = get_peft_model(causal(), KINDS["mixda"]())
    model.add_adapter("whole", KINDS["mixda"](gate_granularity="request"))
    with AdapterServer(model, **SMALL) as server:
        assert server.adapters.names == ["default"]
        assert server.submit([5, 6], "default", max_new_tokens=2).result(30)
        with pytest.raises(AdapterRefused, match=r"'whole'.*request"):
            server.submit([5, 6], "whole", max_new_tokens=2)


def test_foreign_adapters_that_would_act_on_all_are_refused(causal) -> None:
    model = get_peft_model(causal(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PEFT's own adapters.*every request"):
        AdapterServer(model)


# --- begin and end ------------------------------------------------------------------------------------------------


def test_server_takes_requests_only_while_it_runs_and_can_begin_again(causal, folders) -> None:
    server = AdapterServer(causal(), **SMALL)
    server.load("a0", folders["a0"])
    implementation = server.model.config._attn_implementation
    with pytest.raises(ServerStopped):
        server.submit([5], max_new_tokens=2)
    results = []
    for _ in range(2):
        with server:
            with pytest.raises(RuntimeError, match="runs already"):
                server.start()
            results.append(server.submit(LONG, "a0", max_new_tokens=4).result(30))
        with pytest.raises(ServerStopped):
            server.submit([5], max_new_tokens=2)
    assert results[0] == results[1]
    assert server.model.config._attn_implementation == implementation


def test_stop_lets_requests_end_or_fails_them(causal) -> None:
    server = AdapterServer(causal(), **SMALL)
    server.start()
    short = server.submit([5], max_new_tokens=3)
    server.stop()
    assert len(short.result(1).tokens) == 3
    server.start()
    endless = [server.submit([5 + i], max_new_tokens=250) for i in range(20)]
    server.stop(timeout=0.05)
    assert all(request.done for request in endless)
    with pytest.raises(ServerStopped, match=r"failed|ended"):
        endless[-1].result(1)


def test_step_that_fails_ends_the_server_and_no_request_hangs(causal, monkeypatch) -> None:
    server = AdapterServer(causal(), **SMALL)
    with server:
        monkeypatch.setattr(server.model.model, "forward", lambda *a, **k: 1 / 0)
        request = server.submit([5], max_new_tokens=3)
        with pytest.raises(ServerStopped, match="division by zero"):
            request.result(30)
        server._book.manager._generation_thread.join(10)
        with pytest.raises(ServerStopped, match="division by zero"):
            server.submit([5], max_new_tokens=2)


@pytest.mark.parametrize(
    "sizes", [{"max_requests": 0}, {"page_size": 2}, {"cache_tokens": True}, {"max_running": 1.5}]
)
def test_sizes_are_checked(causal, sizes) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        AdapterServer(causal(), **sizes)


def test_model_that_generates_no_text_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="no causal language model"):
        AdapterServer(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no causal language model"):
        AdapterServer(get_peft_model(tiny("bert", "base"), BottleneckConfig(r=2)))
