from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer

from mixadapters.core.cache import RouterStateLayer, router_state, settle

CONFIG = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16,
)  # fmt: skip


def filled(cache, batch: int = 3, length: int = 5):
    """A cache of `length` tokens, with the history of a gate, (B, T, 2), and one vector per row, (B, 2)."""
    keys = torch.arange(batch).view(-1, 1, 1, 1).expand(-1, 2, length, 4).float()
    for layer in range(2):
        getattr(cache, "self_attention_cache", cache).update(keys, keys, layer)
    settle(cache, {"vector": torch.arange(batch * 2.0).view(batch, 2)})
    state = router_state(cache)
    state["history"] = torch.arange(batch * length * 2.0).view(batch, length, 2)
    return cache, state["history"].clone(), state["vector"].clone()


def test_state_is_made_once_and_the_cache_stays_what_it_was() -> None:
    cache = DynamicCache(config=CONFIG)
    state = router_state(cache)
    assert state == {}
    assert router_state(cache) is state
    assert type(cache) is DynamicCache
    assert router_state(DynamicCache(config=CONFIG)) is not state
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, DynamicLayer, RouterStateLayer]


def test_cache_that_still_makes_its_layers_has_a_state_once_they_are_there() -> None:
    cache = DynamicCache()
    assert router_state(cache) is None
    keys = torch.zeros(1, 2, 3, 4)
    for layer in range(2):
        cache.update(keys, keys, layer)
        assert router_state(cache) is None
    settle(cache, {})
    assert len(cache.layers) == 2  # nothing to keep
    settle(cache, {"a": torch.ones(1, 2)})
    assert router_state(cache)["a"].tolist() == [[1, 1]]
    cache.update(keys, keys, 1)
    assert cache.layers[1].get_seq_length() == 6
    assert len(cache.layers) == 3


def make(kind: str):
    config = CONFIG
    if kind.startswith("sliding"):
        config = LlamaConfig(**{**CONFIG.to_dict(), "sliding_window": 4})
    return StaticCache(config=config, max_cache_len=8) if kind.endswith("static") else DynamicCache(config=config)


# What versions of transformers ask of a cache; those that a version does not know, nothing in it asks.
QUESTIONS = {
    "get_seq_length": lambda c: int(c.get_seq_length()),
    "get_max_length": lambda c: c.get_max_length(),
    "get_mask_sizes": lambda c: c.get_mask_sizes(2, 0),
    "is_compileable": lambda c: c.is_compileable,
    "is_croppable": lambda c: c.is_croppable,
    "is_initialized": lambda c: c.is_initialized,
    "is_sliding": lambda c: [c.is_sliding.index(value) for value in (True, False) if value in c.is_sliding],
    "is_dummy": lambda c: [dummy for dummy in c.is_dummy if not dummy],
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding dynamic", "sliding static"])
def test_what_asks_a_cache_gets_the_same_answers_with_and_without_state(kind, question) -> None:
    plain, kept = make(kind), make(kind)
    if not hasattr(type(plain), question):
        pytest.skip(f"this version of transformers has no {question}")
    router_state(kept)["vector"] = torch.ones(2, 2)
    keys = torch.zeros(2, 2, 3, 4)
    for cache in (plain, kept):
        for layer in range(2):
            cache.update(keys, keys, layer)
    ask = QUESTIONS[question]
    assert ask(plain) == ask(kept)


def test_state_needs_nothing_of_a_layer_but_what_the_oldest_supported_transformers_has(monkeypatch) -> None:
    """Before version 5.23 there are no dummy layers: all layers are of `CacheLayerMixin`, which is abstract."""
    monkeypatch.delattr(cache_utils, "DummyLayer", raising=False)
    spec = importlib.util.find_spec("mixadapters.core.cache")
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    assert issubclass(old.RouterStateLayer, cache_utils.CacheLayerMixin)
    cache = DynamicCache(config=CONFIG)
    old.router_state(cache)["vector"] = torch.ones(2, 2)
    keys = torch.zeros(2, 2, 3, 4)
    for layer in range(2):
        cache.update(keys, keys, layer)
    cache.reorder_cache(torch.tensor([1]))
    assert cache.is_initialized
    assert cache.is_compileable is DynamicCache(config=CONFIG).is_compileable
    assert torch.equal(old.router_state(cache)["vector"], torch.ones(1, 2))


def test_state_moves_with_the_rows() -> None:
    cache, history, vector = filled(DynamicCache())
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(router_state(cache)["history"], history[[2, 0, 0]])
    assert torch.equal(router_state(cache)["vector"], vector[[2, 0, 0]])
    assert cache.layers[1].keys[:, 0, 0, 0].tolist() == [2, 0, 0]

    cache, history, vector = filled(DynamicCache())
    cache.batch_repeat_interleave(2)
    assert torch.equal(router_state(cache)["history"], history.repeat_interleave(2, 0))
    assert torch.equal(router_state(cache)["vector"], vector.repeat_interleave(2, 0))
    assert cache.layers[0].keys.shape[0] == 6

    cache, history, vector = filled(DynamicCache())
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(router_state(cache)["history"], history[[1]])
    assert cache.layers[0].keys.shape[0] == 1


def test_history_is_cropped_with_the_tokens() -> None:
    cache, history, vector = filled(DynamicCache())
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    assert torch.equal(router_state(cache)["history"], history[:, :3])
    assert torch.equal(router_state(cache)["vector"], vector)
    cache.crop(-3)
    assert router_state(cache) == {}


def test_reset_forgets() -> None:
    cache, _, _ = filled(StaticCache(config=CONFIG, max_cache_len=8))
    cache.reset()
    assert router_state(cache) == {}
    assert int(cache.get_seq_length()) == 0


def test_copies_keep_a_state_of_their_own() -> None:
    cache, history, _ = filled(DynamicCache())
    twin = copy.deepcopy(cache)
    twin.crop(-4)
    assert torch.equal(router_state(cache)["history"], history)
    assert router_state(twin)["history"].shape == (3, 1, 2)


@pytest.mark.parametrize("verb", ["reorder_cache", "batch_select_indices"])
def test_caches_of_both_stacks_take_the_state_along(verb) -> None:
    cache, history, _ = filled(EncoderDecoderCache(DynamicCache(), DynamicCache()))
    getattr(cache, verb)(torch.tensor([1, 2]))
    assert torch.equal(router_state(cache)["history"], history[[1, 2]])
    assert cache.self_attention_cache.layers[0].keys.shape[0] == 2
