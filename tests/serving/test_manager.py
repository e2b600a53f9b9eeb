"""What transformers' continuous batching is given beside: prefixes of one adapter only."""

from __future__ import annotations

import importlib.metadata
import inspect
import runpy
from types import SimpleNamespace

import pytest
from processes import Process
from transformers.generation.continuous_batching import cache, input_outputs, requests
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter

from mixadapters.serving import manager
from mixadapters.serving.manager import SALTED, ServingManager, salt_prefixes, salted

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("version", ["5.0.0", "5.18.0"])
def test_a_transformers_without_what_the_server_needs_is_named(version, monkeypatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=rf"transformers>=5\.19 is required.*{version}(.|\n)*the server needs"):
        runpy.run_path(manager.__file__)


def test_what_needs_no_server_is_imported_with_any_transformers() -> None:
    """`manager` refuses an earlier one when it is imported."""
    code = (
        "import sys; from mixadapters.serving import CompositionRouter, ConfidenceCascade, UnknownAdapter; "
        "assert 'mixadapters.serving.manager' not in sys.modules; "
        "from mixadapters.serving import AdapterServer; assert 'mixadapters.serving.manager' in sys.modules"
    )
    Process(code).finish()


def test_salted_tokens_are_equal_only_for_equal_tokens_and_salts() -> None:
    seen = {
        tuple(salted(tokens, salt)) for tokens in (TOKENS, TOKENS[:5], TOKENS[::-1]) for salt in ("a/1", "a/2", "b/1")
    }
    assert len(seen) == 9
    assert salted(TOKENS, "a/1") == salted(list(TOKENS), "a/1")
    assert salted(TOKENS, "a/1")[SALTED:] == TOKENS[SALTED:]
    for other in (TOKENS, salted(TOKENS, "b/1")):  # each of the first tells them apart: one alone may be another's
        assert not any(a == b for a, b in zip(salted(TOKENS, "a/1")[:SALTED], other, strict=False))
    assert all(-(2**31) <= token < 2**31 for token in salted([0, 2**31 - 1, 7], "a/1"))


def test_pages_are_found_under_the_salt_under_which_they_were_kept() -> None:
    searched, marked = [], []
    paged = SimpleNamespace(
        search_prefix_match=lambda request_id, ids: searched.append((request_id, ids)) or 0,
        mark_complete_blocks=lambda state, blocks: marked.append((state.request_id, state.initial_tokens, blocks)),
    )
    for _ in range(2):  # once only
        salt_prefixes(paged, lambda request_id: request_id[0])
    state = SimpleNamespace(request_id="a2", initial_tokens=TOKENS[:6], generated_tokens=TOKENS[6:], status="running")
    paged.search_prefix_match("a1", TOKENS)
    paged.search_prefix_match("b1", TOKENS)
    paged.mark_complete_blocks(state, {"full": 1})
    (_, a), (_, b) = searched
    assert a == salted(TOKENS, "a") != b
    assert marked == [("a2", a, {"full": 1})]
    assert state.initial_tokens == TOKENS[:6]


@pytest.mark.parametrize(
    ("owner", "name", "arguments"),
    [
        (ContinuousBatchingManager, "_create_batch_processor", ["self"]),
        (ContinuousBatchingManager, "_generation_step", ["self"]),
        (ContinuousBatchingManager, "_run_generation_loop", ["self"]),
        (ContinuousBatchingManager, "_generation_loop_body", ["self", "batch_processor", "bootstrapping"]),
        (OutputRouter, "deliver", ["self", "output"]),
        (OutputRouter, "deliver_batch", ["self", "outputs"]),
        (cache.PagedAttentionCache, "search_prefix_match", ["self", "request_id", "prompt_ids"]),
        (cache.PagedAttentionCache, "mark_complete_blocks", ["self", "state", "complete_blocks"]),
    ],
)  # fmt: skip
def test_piece_of_transformers_that_we_rely_on_is_there(owner, name, arguments) -> None:
    found = list(inspect.signature(getattr(owner, name)).parameters)
    assert [argument for argument in found if argument != "use_inference_mode"] == arguments  # that is handed on


def test_attributes_of_transformers_that_we_rely_on_are_there() -> None:
    assert set(requests.FutureRequestState.__slots__) >= {"state", "query_length"}
    assert "requests_in_batch" in inspect.getsource(input_outputs.ContinuousBatchingIOs.prepare_batch_tensors)
    assert "def use_prefix_sharing" in inspect.getsource(cache) or "self.use_prefix_sharing" in inspect.getsource(
        cache
    )


def test_the_loop_runs_in_the_modes_that_transformers_names_and_says_when_it_has_ended(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(ContinuousBatchingManager, "_run_generation_loop", lambda self, **modes: seen.append(modes))
    manager = object.__new__(ServingManager)
    manager.work = SimpleNamespace(ended=seen.append)
    manager.background_thread_status = SimpleNamespace(fatal_error=None)
    manager._run_generation_loop(use_inference_mode=False)
    assert seen == [{"use_inference_mode": False}, None]
