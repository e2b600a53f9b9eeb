"""The gate of counted tokens against naive Bayes by hand: prefixes, padding, caches, packed rows, arms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from mixadapters.core.adapter import Site
from mixadapters.core.cache import settle
from mixadapters.core.context import ForwardContext
from mixadapters.core.record import Record
from mixadapters.core.streams import Stream
from mixadapters.routers import CountsRouter
from mixadapters.routers.counts import TokenCounts, count_tokens

D, VOCAB = 4, 7
TEXTS = {"law": [1, 1, 1, 2, 3], "code": [4, 4, 5, 1, 4, 4, 5, 5, 4, 2], "frozen": [1, 2, 3, 4, 6]}
IDS = torch.tensor([[1, 4, 6, 2], [5, 0, 3, 3]])


def fitted(causal: bool = True, experts: tuple[str, ...] = ("law", "code"), **options: Any) -> CountsRouter:
    router = CountsRouter(D, list(experts), **options)
    router.bind(Site("ffn_output", "site", D, D, causal=causal))
    router.lead(list(experts), VOCAB)
    router.table.fit({arm: count(TEXTS[arm]) for arm in router.arms})
    return router.eval()


def count(ids: list[int]) -> Tensor:
    return count_tokens(torch.tensor(ids), VOCAB, "a text")


def context_of(ids: Tensor | None, mask: Tensor | None = None, *, training: bool = False, **stream: Any):
    context = ForwardContext()
    context.enter(Record(training, open=True))
    batch, length = (2, 4) if ids is None else ids.shape
    context.record.streams[""] = Stream(batch, length, None if mask is None else mask.bool(), input_ids=ids, **stream)
    return context


def probs(router: CountsRouter, ids: Tensor, mask: Tensor | None = None, **about: Any) -> Tensor:
    """(B, T, A)"""
    routing = router(torch.zeros(*ids.shape, D), context_of(ids, mask, **about))
    return routing.probs.unflatten(0, tuple(ids.shape))


def by_hand(ids: list[int], arms: list[str], smoothing: float = 0.3, temperature: float = 3.0) -> Tensor:
    """Naive Bayes of one text, each arm's text taken as one of the smallest one's size."""
    size = min(len(TEXTS[arm]) for arm in arms)
    logs = []
    for arm in arms:
        text = TEXTS[arm]
        each = [(text.count(i) / len(text) * size + smoothing) / (size + smoothing * VOCAB) for i in ids]
        logs.append(sum(math.log(p) for p in each) / temperature)
    return torch.tensor(logs).softmax(0)


ARMS = ["law", "code", "frozen"]


@pytest.mark.parametrize("options", [{}, {"smoothing": 2.0, "temperature": 0.7}])
def test_weights_are_naive_bayes_of_the_prefix(options) -> None:
    router = fitted(**options)
    found = probs(router, IDS)
    for row, ids in zip(found, IDS.tolist(), strict=True):
        for t in range(4):
            torch.testing.assert_close(row[t], by_hand(ids[: t + 1], ARMS, **options))
    routing = router(torch.zeros(2, 4, D), context_of(IDS))
    assert torch.equal(routing.weights, routing.probs[:, :2])
    assert routing.base_weight is None


def test_encoders_read_the_whole_sequence() -> None:
    found = probs(fitted(causal=False), IDS, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    for t in range(4):
        torch.testing.assert_close(found[0, t], by_hand(IDS[0].tolist(), ARMS))
        torch.testing.assert_close(found[1, t], by_hand([5, 0], ARMS))


def test_token_and_request_granularities() -> None:
    found = probs(fitted(granularity="token"), IDS)
    torch.testing.assert_close(found[1, 2], by_hand([3], ARMS))
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    found = probs(fitted(granularity="request"), IDS, mask)
    torch.testing.assert_close(found[1, 0], by_hand([0, 3, 3], ARMS))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_says_nothing(side) -> None:
    router, pad = fitted(), torch.full((2, 3), 4)
    ids = torch.cat([pad, IDS] if side == "left" else [IDS, pad], 1)
    ones, zeros = torch.ones(2, 4), torch.zeros(2, 3)
    mask = torch.cat([zeros, ones] if side == "left" else [ones, zeros], 1)
    found = probs(router, ids, mask)
    real = found[:, 3:] if side == "left" else found[:, :4]
    torch.testing.assert_close(real, probs(router, IDS))


def test_no_position_sees_the_future() -> None:
    router, other = fitted(), IDS.clone()
    other[:, 2:] = 5
    assert torch.equal(probs(router, IDS)[:, :2], probs(router, other)[:, :2])
    assert not torch.equal(probs(router, IDS)[:, 2:], probs(router, other)[:, 2:])


def test_packed_texts_begin_anew() -> None:
    router = fitted()
    positions = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 2]])
    found = probs(router, IDS, position_ids=positions)
    torch.testing.assert_close(found[0, 3], by_hand([6, 2], ARMS))
    torch.testing.assert_close(found[1, 3], by_hand([0, 3, 3], ARMS))


def test_a_cache_carries_the_evidence_on() -> None:
    router, cache = fitted(), DynamicCache()
    whole = probs(router, IDS)
    for past, ids in enumerate(IDS.split(1, dim=1)):
        context = context_of(ids, cache=cache, past=past)
        found = router(torch.zeros(*ids.shape, D), context).probs.unflatten(0, (2, 1))
        cache.update(torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2), 0)
        settle(cache, context.record.router_state)
        torch.testing.assert_close(found[:, 0], whole[:, past])


def test_layers_share_one_decision_and_one_table() -> None:
    first, later = fitted(), CountsRouter(D, ["code"])
    later.bind(Site("ffn_output", "later", D, D, causal=True))
    later.follow(first)
    context = context_of(IDS)
    one, two = (router(torch.zeros(2, 4, D), context) for router in (first, later))
    assert torch.equal(one.logits, two.logits)
    assert one.logits is context.record.decided[f"{first.mark}/"]
    assert torch.equal(two.weights, one.weights[:, 1:])
    assert later.arms == ARMS
    assert not later.state_dict()
    assert {key.rpartition(".")[2] for key in first.state_dict()} == {"counts", "totals", "size"}


def test_convex_leaves_the_rest_to_the_frozen_layer() -> None:
    router = fitted(convex=True)
    router.remove_expert("law", renormalize=False)
    routing = router(torch.zeros(2, 4, D), context_of(IDS))
    torch.testing.assert_close(routing.base_weight, 1 - routing.probs[:, 0])


# --- arms --------------------------------------------------------------------------------------------------------


def log_ratios(router: CountsRouter) -> dict[str, Tensor]:
    table = router.table
    rows = table.evidence(torch.arange(VOCAB).view(1, -1), 0.3)[0]
    return dict(zip(table.arms, rows.unbind(1), strict=True))


def test_adding_and_removing_leaves_the_others_likelihoods() -> None:
    router = fitted()
    before = log_ratios(router)
    router.add_expert("later", 0.05)
    with pytest.raises(ValueError, match=r"has not counted any text of \['later'\]: call tuner.fit_gate"):
        probs(router, IDS)
    router.table.fit({"later": count([0, 0, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6])})
    after = log_ratios(router)
    assert list(after) == ["law", "code", "later", "frozen"]
    assert all(torch.equal(after[arm], before[arm]) for arm in before)
    assert probs(router, torch.tensor([[6, 0, 6, 6]]))[0, -1].argmax() == 2
    three = probs(router, IDS)
    router.remove_expert("law", renormalize=False)
    assert (router.experts, router.arms) == (["code", "later"], ["code", "later", "null0", "frozen"])
    assert torch.equal(log_ratios(router)["null0"], before["law"])
    torch.testing.assert_close(probs(router, IDS), three[..., [1, 2, 0, 3]])
    router.remove_expert("later", renormalize=True)
    assert router.arms == ["code", "null0", "frozen"]


def test_size_of_a_text_is_no_evidence() -> None:
    router = CountsRouter(D, ["small", "large"])
    router.lead(router.experts, VOCAB)
    router.table.fit({"small": count([1, 2]), "large": count([1, 2] * 50), "frozen": count([3, 4])})
    found = log_ratios(router)
    torch.testing.assert_close(found["small"], found["large"])
    assert found["large"][6] == 0  # no text has it


def test_counts_survive_a_cast_to_half_precision() -> None:
    router = fitted()
    before = probs(router, IDS)
    assert torch.equal(probs(router.to(torch.bfloat16), IDS), before)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ids", "wrong"), [([[1, 7]], 7), ([[-1, 2]], -1)])
def test_unknown_ids_are_refused(ids, wrong) -> None:
    with pytest.raises(ValueError, match=rf"input_ids holds {wrong}, but the counts are of the ids 0 to 6"):
        probs(fitted(), torch.tensor(ids))
    with pytest.raises(ValueError, match=rf"a text holds the token id {wrong}; the model's are 0 to 6"):
        count(ids[0])


def test_embeddings_alone_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reads the token ids .* \(inputs_embeds only\): pass input_ids"):
        fitted()(torch.zeros(2, 4, D), context_of(None))


def test_rows_that_are_not_those_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="reads 6 rows of hidden states for 8 tokens of input_ids"):
        fitted()(torch.zeros(2, 3, D), context_of(IDS))


def test_a_gate_that_was_not_fitted_says_so() -> None:
    router = CountsRouter(D, ["law"])
    with pytest.raises(ValueError, match=r"has not counted any text of \['law'\]: call tuner.fit_gate"):
        probs(router, IDS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tax": count([1])}, r"unknown arm 'tax'; have \['law', 'code', 'frozen'\]"),
        ({"law": torch.ones(3)}, r"counts of 'law' are \(3,\); they must be \(7,\)"),
        ({"law": torch.zeros(VOCAB)}, "must be 0 to 2147483647, and not all 0"),
        ({"law": count([1]), "code": count([1])}, r"nothing has been counted of \['frozen'\]; give their text too"),
    ],
)
def test_counts_that_do_not_fit_change_nothing(given, message) -> None:
    table = TokenCounts(["law", "code"], VOCAB)
    with pytest.raises(ValueError, match=message):
        table.fit(given)
    assert not table.totals.any()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": 0}, "temperature=0 must be a finite number, above 0"),
        ({"smoothing": float("nan")}, "smoothing=nan must be a finite number, above 0"),
        ({"granularity": "word"}, "granularity='word' is unknown"),
        ({"convex": 1}, "convex=1 must be True or False"),
        ({"null_arms": -1}, "null_arms=-1 must be an integer, at least 0"),
    ],
)
def test_options_out_of_range_are_named(option, message) -> None:
    with pytest.raises(ValueError, match=message):
        CountsRouter(D, ["law"], **option)


def test_a_short_text_that_comes_later_weighs_the_others_as_before() -> None:
    """All counts are weighed as if their texts had the size of the smallest one when all were counted."""
    router = fitted()
    before = probs(router, IDS)
    router.add_expert("short", 0.05)
    router.first.table.fit({"short": count([0, 6])})
    after = probs(router, IDS)
    ratio = lambda p: p[..., 0] / p[..., 1]  # noqa: E731
    torch.testing.assert_close(ratio(after), ratio(before))


def test_domains_of_one_text_that_have_left_leave_no_arm_when_it_comes_back() -> None:
    table = TokenCounts(["a", "b", "c"], VOCAB)
    table.fit({"a": count([1, 2]), "b": count([1, 2]), "c": count([3]), "frozen": count([4, 5])})
    for name in ("a", "b"):
        table.remove(name, renormalize=False)
    assert table.null_arms == 2
    table.add("again")
    table.fit({"again": count([1, 2])})
    assert table.null_arms == 0
    assert table.counts.sum(0).tolist() == [1, 2, 2]  # of c, again and general text
