"""The gate of MixDA against loops: granularities, pools, padding, prompts, caches, losses, numerics, surgery."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig

from mixadapters.core.adapter import Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.context import ForwardContext
from mixadapters.core.mixture import Mixture
from mixadapters.core.record import Record
from mixadapters.core.routes import HardRoutes
from mixadapters.core.routing import Routing, RoutingKey
from mixadapters.core.streams import Stream
from mixadapters.core.usage import UsageRecorder
from mixadapters.routers import ROUTERS, LearnedRouter, Router, SigmoidGate, SoftmaxGate
from mixadapters.routers.base import build_router

D, NAMES = 6, ["a", "b", "c"]
KEY = RoutingKey("default", "ffn", 0, "site")


def make(gate: str = "softmax", seed: int = 3, names: list[str] = NAMES, stack: str = "", **options: Any) -> Any:
    torch.manual_seed(seed)
    router = build_router({"kind": gate, **options}, D, names)
    router.bind(Site("ffn_output", "site", D, D, stack))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return router.eval()


def context_of(
    tokens: Tensor, mask: Tensor | None = None, *, training: bool = False, cache: Any = None, past: int = 0,
    position_ids: Tensor | None = None, labels: Tensor | None = None, copies: int = 1, **values: Tensor,
) -> ForwardContext:  # fmt: skip
    context = ForwardContext()
    inputs = {} if labels is None else {"labels": labels}
    context.enter(Record(training, torch.is_grad_enabled(), open=True, inputs=inputs, values=values))
    mask = None if mask is None else mask.bool()
    context.record.streams[""] = Stream(*tokens.shape[:2], mask, position_ids, cache, past, copies)
    return context


def route(router: Router, tokens: Tensor, context: ForwardContext, **options: Any) -> Routing:
    """As a mixture routes, which owns the router."""
    bank = AdapterBank(D, D)
    for name in router.experts:
        bank.add(name, 1)
    mixture = Mixture(router, bank, **options)
    mixture.key = KEY
    return mixture.route(tokens, context)


def run(router: LearnedRouter, tokens: Tensor, mask: Tensor | None = None, **about: Any) -> Tensor:
    """(B, T, A): the distribution over the arms of each token."""
    with torch.no_grad():
        probs = router(tokens, context_of(tokens, mask, **about)).probs
    return probs.view(*tokens.shape[:2], -1)


MASKS = {
    "right": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]),
    "left": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]),
}


ONE_LAYER = LlamaConfig(hidden_size=2, num_hidden_layers=1, num_attention_heads=1)


def tokens_and_mask(side: str = "right") -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 5, D), MASKS[side]


# --- against a loop ----------------------------------------------------------------------------------------------


def score(router: LearnedRouter, v: Tensor) -> Tensor:
    """Logits of one vector (d,)."""
    if router.normalize:
        v = v / (v.square().mean() + torch.finfo(v.dtype).eps).sqrt()
    for layer in router.hidden:
        v = layer.weight @ v + layer.bias if isinstance(layer, nn.Linear) else layer(v)
    return router.output.weight @ v + router.output.bias


def naive(router: LearnedRouter, tokens: Tensor, mask: Tensor, prompt: Tensor | None = None) -> Tensor:
    """The gate's distribution, token by token: (B, T, A)."""
    rows = []
    for x, m in zip(tokens, mask.bool(), strict=True):
        real = [t for t in range(len(x)) if m[t]]
        row = []
        for t in range(len(x)):
            if router.granularity == "token":
                logits = score(router, x[t])
            elif router.granularity == "causal_prefix":
                seen = [score(router, x[s]) for s in real if s <= t]
                logits = torch.stack(seen).mean(0) if seen else torch.zeros_like(router.output.bias)
            elif router.granularity == "request":
                logits = torch.stack([score(router, x[s]) for s in real]).mean(0)
            else:
                pooled = {
                    "masked_mean": torch.stack([x[s] for s in real]).mean(0),
                    "first": x[real[0]],
                    "last_valid": x[real[-1]],
                    "last": x[-1],
                }[router.pooling.pool]
                logits = score(router, pooled)
            logits = logits / router.temperature
            row.append(logits.sigmoid() if isinstance(router, SigmoidGate) else logits.exp() / logits.exp().sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("convex", [False, True], ids=["delta", "convex"])
@pytest.mark.parametrize("granularity", ["token", "sequence", "causal_prefix", "request"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_weights_equal_a_loop(gate, granularity, convex, side) -> None:
    tokens, mask = tokens_and_mask(side)
    router = make(gate, granularity=granularity, convex=convex, temperature=0.7)
    routing = router(tokens, context_of(tokens, mask))
    expected = naive(router, tokens, mask).flatten(0, 1)
    torch.testing.assert_close(routing.probs, expected)
    torch.testing.assert_close(routing.weights, expected[:, :3])
    if convex:
        torch.testing.assert_close(routing.base_weight, expected[:, -1])
    else:
        assert routing.base_weight is None
    arms = 3 + (gate == "softmax" or convex)
    assert routing.probs.shape == (15, arms)
    if gate == "softmax":
        torch.testing.assert_close(routing.probs.sum(1), torch.ones(15))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pool", ["masked_mean", "first", "last_valid", "last"])
def test_pools_equal_a_loop(pool, side) -> None:
    tokens, mask = tokens_and_mask(side)
    router = make(granularity="sequence", pool=pool)
    found = run(router, tokens, mask)
    torch.testing.assert_close(found, naive(router, tokens, mask))
    assert torch.equal(found[:, 0], found[:, -1])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("granularity", ["token", "sequence", "causal_prefix", "request"])
def test_hidden_layers_equal_a_loop(granularity, normalize) -> None:
    tokens, mask = tokens_and_mask()
    router = make(granularity=granularity, hidden=[5, 4], normalize=normalize, dropout=0.3)
    torch.testing.assert_close(run(router, tokens, mask), naive(router, tokens, mask))


@pytest.mark.parametrize("granularity", ["token", "sequence", "causal_prefix", "request"])
def test_gradients_equal_those_of_a_loop(granularity) -> None:
    tokens, mask = tokens_and_mask("left")
    router, twin = make(granularity=granularity, hidden=[4]), make(granularity=granularity, hidden=[4])
    direction = torch.randn(3, 5, 4)
    probs = router(tokens, context_of(tokens, mask)).probs
    (probs.view(3, 5, -1) * direction).sum().backward()
    (naive(twin, tokens, mask) * direction).sum().backward()
    for one, other in zip(router.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_starts_uniform_and_a_bias_starts_near_the_frozen_layer() -> None:
    tokens, mask = tokens_and_mask()
    fresh = build_router("softmax", D, NAMES)
    torch.testing.assert_close(run(fresh, tokens, mask), torch.full((3, 5, 4), 0.25))
    biased = build_router("softmax", D, NAMES, convex=True, frozen_bias=math.log(3 * 99))
    torch.testing.assert_close(run(biased, tokens, mask)[..., -1], torch.full((3, 5), 0.99))


def test_scale_of_the_input_does_not_matter_when_normalized() -> None:
    tokens, mask = tokens_and_mask()
    torch.testing.assert_close(run(make(), tokens * 1000, mask), run(make(), tokens, mask))
    assert not torch.allclose(run(make(normalize=False), tokens * 2, mask), run(make(normalize=False), tokens, mask))


def test_temperature_sharpens_and_flattens() -> None:
    tokens, mask = tokens_and_mask()
    sharp, plain, flat = (run(make(temperature=t), tokens, mask) for t in (1e-3, 1.0, 1e3))
    assert (sharp.max(-1).values > 0.999).float().mean() > 0.9
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25), atol=5e-3, rtol=0)
    assert torch.equal(sharp.argmax(-1), plain.argmax(-1))


def test_gate_may_read_a_tapped_input_of_another_width() -> None:
    tokens, mask = tokens_and_mask()
    router = make()
    wide = torch.randn(3, 5, 11)
    context = context_of(wide, mask)
    context.record.taps["elsewhere"] = tokens
    probs = route(router, wide, context, router_tap="elsewhere").probs
    torch.testing.assert_close(probs.view(3, 5, -1), naive(router, tokens, mask))
    with pytest.raises(RuntimeError, match="'elsewhere' has not run"):
        route(router, wide, context_of(wide, mask), router_tap="elsewhere")


@pytest.mark.parametrize("granularity", ["token", "sequence", "causal_prefix", "request"])
def test_flattened_tokens_give_the_same(granularity) -> None:
    tokens, mask = tokens_and_mask()
    router = make(granularity=granularity)
    context = context_of(tokens, mask)
    torch.testing.assert_close(router(tokens.flatten(0, 1), context).probs, run(router, tokens, mask).flatten(0, 1))


def test_tokens_that_are_no_sequences_are_refused_except_by_a_token_gate() -> None:
    tokens, mask = tokens_and_mask()
    odd = torch.randn(14, D)
    with pytest.raises(ValueError, match=r"a router over sequences needs hidden states.* granularity='token'"):
        make(granularity="sequence")(odd, context_of(tokens, mask))
    assert make()(odd, context_of(tokens, mask)).probs.shape == (14, 4)


# --- padding and composition of the batch ------------------------------------------------------------------------

INVARIANT = [
    ("token", "masked_mean"),
    ("sequence", "masked_mean"),
    ("sequence", "first"),
    ("sequence", "last_valid"),
    ("causal_prefix", "masked_mean"),
    ("request", "masked_mean"),
]


def with_padding(tokens: Tensor, side: str, count: int) -> tuple[Tensor, Tensor]:
    """tokens (1, T, d) and garbage at `count` positions of padding."""
    garbage, real = torch.randn(1, count, D) * 50, torch.ones(1, tokens.shape[1])
    parts = [(tokens, real), (garbage, torch.zeros(1, count))]
    parts = parts if side == "right" else parts[::-1]
    return torch.cat([p for p, _ in parts], 1), torch.cat([m for _, m in parts], 1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("granularity", "pool"), INVARIANT)
def test_weights_do_not_depend_on_padding_or_neighbours(granularity, pool, side) -> None:
    router = make(granularity=granularity, pool=pool)
    tokens = torch.randn(1, 4, D)
    alone = run(router, tokens, torch.ones(1, 4))
    padded, mask = with_padding(tokens, side, 6)
    batch = torch.cat([torch.randn(1, 10, D), padded])
    together = run(router, batch, torch.cat([torch.ones(1, 10), mask]))[1:]
    torch.testing.assert_close(together[mask.bool()], alone[0], atol=1e-5, rtol=0)


def test_pool_last_of_the_released_code_reads_padding() -> None:
    """The fault that `last_valid` mends; kept for cross-checks only."""
    router = make(granularity="sequence", pool="last")
    tokens = torch.randn(1, 4, D)
    padded, mask = with_padding(tokens, "right", 2)
    assert not torch.allclose(run(router, padded, mask)[0, 0], run(router, tokens, torch.ones(1, 4))[0, 0], atol=1e-3)


@pytest.mark.parametrize("pool", ["masked_mean", "first", "last_valid", "last"])
@pytest.mark.parametrize("granularity", ["token", "sequence", "causal_prefix", "request"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_rows_of_padding_alone_are_finite_with_their_gradients(gate, granularity, pool) -> None:
    tokens, mask = tokens_and_mask()
    mask = mask.clone()
    mask[1] = 0
    tokens = tokens.masked_fill(mask.unsqueeze(-1) == 0, 0.0).requires_grad_()
    router = make(gate, granularity=granularity, pool=pool, balance_coef=1.0, z_coef=1.0, entropy_coef=1.0).train()
    about = {"prompt_mask": mask} if granularity == "request" else {}
    context = context_of(tokens, mask, training=True, **about)
    probs = router(tokens, context).probs
    (probs.square().sum() + sum(context.record.losses.values())).backward()
    assert probs.isfinite().all()
    assert tokens.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in router.parameters())
    nothing = router(tokens.detach(), context_of(tokens, torch.zeros(3, 5), training=True, **about))
    assert nothing.probs.isfinite().all()


@pytest.mark.parametrize("granularity", ["token", "sequence", "causal_prefix", "request"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1)])
def test_one_row_and_one_token(granularity, shape) -> None:
    router = make(granularity=granularity)
    tokens = torch.randn(*shape, D)
    found = run(router, tokens, torch.ones(shape))
    assert found.shape == (*shape, 4)
    torch.testing.assert_close(found, naive(router, tokens, torch.ones(shape)))


@pytest.mark.parametrize("granularity", ["sequence", "request"])
def test_missing_mask_is_refused_where_padding_would_matter(granularity) -> None:
    router, tokens = make(granularity=granularity), torch.randn(2, 4, D)
    with pytest.raises(ValueError, match=rf"^granularity='{granularity}' needs to know the padding.*attention_mask"):
        run(router, tokens)
    assert run(router, tokens[:1]).shape == (1, 4, 4)  # one row has no padding


@pytest.mark.parametrize("granularity", ["token", "causal_prefix"])
def test_missing_mask_means_no_padding_where_the_future_does_not_matter(granularity) -> None:
    router, tokens = make(granularity=granularity), torch.randn(2, 4, D)
    torch.testing.assert_close(run(router, tokens), run(router, tokens, torch.ones(2, 4)))


@pytest.mark.parametrize("granularity", ["sequence", "request"])
def test_packed_documents_are_refused_by_gates_that_would_mix_them(granularity) -> None:
    router, tokens = make(granularity=granularity), torch.randn(1, 5, D)
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match=r"position_ids restart inside a row.*'causal_prefix'"):
        run(router, tokens, torch.ones(1, 5), position_ids=packed)
    run(router, tokens, torch.ones(1, 5), position_ids=torch.arange(5)[None])


def test_causal_prefix_starts_anew_with_each_packed_document() -> None:
    router, tokens = make(granularity="causal_prefix"), torch.randn(1, 7, D)
    packed = run(router, tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 0, 1]]))
    apart = [run(router, part) for part in tokens.split([3, 2, 2], dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1))


def test_position_ids_of_left_padding_are_no_packing() -> None:
    tokens, mask = tokens_and_mask("left")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for granularity in ("causal_prefix", "request"):
        router = make(granularity=granularity)
        found = run(router, tokens, mask, position_ids=positions)
        torch.testing.assert_close(found, naive(router, tokens, mask))


# --- causality and prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "causal_prefix"])
def test_gate_never_sees_the_future(granularity) -> None:
    router, tokens = make(granularity=granularity), torch.randn(2, 6, D)
    before = run(router, tokens, torch.ones(2, 6))
    for t in range(1, 6):
        changed = tokens.clone()
        changed[:, t:] = torch.randn_like(changed[:, t:]) * 9
        after = run(router, changed, torch.ones(2, 6))
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


def test_request_gate_reads_the_tokens_before_the_first_label() -> None:
    tokens, mask = tokens_and_mask("left")
    labels = torch.tensor([[-100, -100, 7, -100, 8], [-100, -100, -100, 7, 8], [-100, -100, -100, -100, -100]])
    prompt = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    router = make(granularity="request")
    for training in (True, False):
        found = run(router, tokens, mask, training=training, labels=labels)
        torch.testing.assert_close(found, naive(router, tokens, prompt))
        answer_changed = torch.where(prompt.unsqueeze(-1) > 0, tokens, torch.randn_like(tokens))
        again = run(router, answer_changed, mask, training=training, labels=labels)
        torch.testing.assert_close(again, found)


def test_request_gate_takes_a_prompt_mask_before_labels() -> None:
    tokens, mask = tokens_and_mask()
    prompt = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    router = make(granularity="request")
    found = run(router, tokens, mask, training=True, labels=torch.zeros(3, 5).long(), prompt_mask=prompt)
    torch.testing.assert_close(found, naive(router, tokens, prompt))


def test_request_gate_never_pools_padding_that_a_prompt_mask_covers() -> None:
    tokens, mask = tokens_and_mask()
    router = make(granularity="request")
    found = run(router, tokens, mask, training=True, prompt_mask=torch.ones(3, 5))
    torch.testing.assert_close(found, naive(router, tokens, mask))


def test_request_gate_refuses_to_train_without_knowing_the_prompt() -> None:
    tokens, mask = tokens_and_mask()
    router = make(granularity="request")
    with pytest.raises(ValueError, match=r"must know the prompt in training.*prompt_mask.*labels with -100"):
        run(router, tokens, mask, training=True)
    with pytest.raises(ValueError, match="labels cover a row from its first token"):
        run(router, tokens, mask, training=True, labels=torch.zeros(3, 5).long())
    left = MASKS["left"]
    with pytest.raises(ValueError, match="labels cover a row from its first token"):  # padding is no prompt
        run(router, tokens, left, training=True, labels=torch.where(left * torch.tensor([[0], [1], [1]]) > 0, 7, -100))


def test_request_of_an_encoder_is_all_that_it_reads() -> None:
    """The labels are those of the decoder, however long they are."""
    tokens, mask = tokens_and_mask()
    router = make(granularity="request", stack="encoder")
    for about in ({}, {"labels": torch.zeros(3, 5).long()}, {"labels": torch.zeros(3, 9).long()}):
        found = run(router, tokens, mask, training=True, **about)
        torch.testing.assert_close(found, naive(router, tokens, mask))


def test_prompt_mask_follows_repeated_rows() -> None:
    tokens, mask = tokens_and_mask()
    prompt = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    router = make(granularity="request")
    twice, masks = tokens.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    expected = run(router, tokens, mask, prompt_mask=prompt).repeat_interleave(2, 0)
    torch.testing.assert_close(run(router, twice, masks, copies=2, prompt_mask=prompt), expected)
    with pytest.raises(ValueError, match=r"`prompt_mask` should be the same.*3 and 6"):
        run(router, twice, masks, prompt_mask=prompt)


def test_prompt_mask_of_another_shape_is_refused() -> None:
    tokens, mask = tokens_and_mask()
    with pytest.raises(ValueError, match=r"prompt_mask has 4 values per row.* 5 tokens"):
        run(make(granularity="request"), tokens, mask, training=True, prompt_mask=torch.ones(3, 4))


# --- caches ------------------------------------------------------------------------------------------------------


class Steps:
    """Feeds a gate piece by piece, with a key-value cache that grows as a model's would."""

    def __init__(self, router: LearnedRouter, batch: int) -> None:
        self.router, self.cache, self.past = router, DynamicCache(config=ONE_LAYER), 0
        self.batch = batch

    def feed(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        found = run(self.router, tokens, mask, cache=self.cache, past=self.past)
        length = tokens.shape[1]
        self.cache.update(torch.zeros(len(tokens), 1, length, 2), torch.zeros(len(tokens), 1, length, 2), 0)
        self.past += length
        return found


@pytest.mark.parametrize("split", [[3, 1, 1, 1, 1], [1] * 7, [4, 3], [6, 1]])
@pytest.mark.parametrize("padding", [0, 2])
def test_causal_prefix_in_pieces_equals_the_whole(split, padding) -> None:
    router = make(granularity="causal_prefix")
    tokens, mask = torch.randn(2, 7, D), torch.ones(2, 7)
    mask[1, :padding] = 0
    whole = run(router, tokens, mask)
    steps = Steps(router, 2)
    pieces = [steps.feed(t, m) for t, m in zip(tokens.split(split, 1), mask.split(split, 1), strict=True)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_request_is_frozen_after_the_prompt() -> None:
    router = make(granularity="request")
    tokens, mask = tokens_and_mask("left")
    steps = Steps(router, 3)
    prompt = steps.feed(tokens, mask)
    for _ in range(3):
        later = steps.feed(torch.randn(3, 1, D) * 9, torch.ones(3, 1))
        assert torch.equal(later[:, 0], prompt[:, 0])


@pytest.mark.parametrize("granularity", ["causal_prefix", "request"])
def test_state_follows_the_rows_of_the_cache(granularity) -> None:
    router = make(granularity=granularity)
    tokens, more = torch.randn(3, 4, D), torch.randn(3, 2, D)
    steps = Steps(router, 3)
    steps.feed(tokens, torch.ones(3, 4))
    expected = copy.deepcopy(steps).feed(more, torch.ones(3, 2))

    order = torch.tensor([2, 0, 0])
    beams = copy.deepcopy(steps)
    beams.cache.reorder_cache(order)
    torch.testing.assert_close(beams.feed(more[order], torch.ones(3, 2)), expected[order])
    chosen = copy.deepcopy(steps)
    chosen.cache.batch_select_indices(order[:2])
    torch.testing.assert_close(chosen.feed(more[order[:2]], torch.ones(2, 2)), expected[order[:2]])
    repeated = copy.deepcopy(steps)
    repeated.cache.batch_repeat_interleave(2)
    found = repeated.feed(more.repeat_interleave(2, 0), torch.ones(6, 2))
    torch.testing.assert_close(found, expected.repeat_interleave(2, 0))


def test_causal_prefix_is_cropped_with_the_cache() -> None:
    router = make(granularity="causal_prefix")
    tokens = torch.randn(2, 6, D)
    whole = run(router, tokens)
    for pieces in ([4 + 3], [4, 1, 1, 1], [2, 3, 2]):  # back into an earlier step too
        steps = Steps(router, 2)
        for piece in torch.cat([tokens[:, :4], torch.randn(2, 3, D)], 1).split(pieces, 1):
            steps.feed(piece)
        steps.cache.crop(-3)
        steps.past = 4
        torch.testing.assert_close(steps.feed(tokens[:, 4:]), whole[:, 4:])


def test_two_gates_share_a_cache_without_mixing_their_state() -> None:
    one, two = make(granularity="causal_prefix"), make(granularity="causal_prefix", seed=8)
    two.path = "other"
    tokens, cache = torch.randn(1, 4, D), DynamicCache(config=ONE_LAYER)
    for router in (one, two):
        found = run(router, tokens, cache=cache)
        torch.testing.assert_close(found, naive(router, tokens, torch.ones(1, 4)))


@pytest.mark.parametrize("granularity", ["causal_prefix", "request"])
def test_cache_that_the_gate_has_not_seen_is_refused(granularity) -> None:
    router, tokens, cache = make(granularity=granularity), torch.randn(1, 1, D), DynamicCache(config=ONE_LAYER)
    cache.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0)
    with pytest.raises(ValueError, match="holds tokens that the router at 'site' has not seen"):
        run(router, tokens, cache=cache, past=4)
    with pytest.raises(ValueError, match=r"on a sequence that a cache begins; to generate, call model\.eval"):
        run(router, tokens, cache=cache, past=4, training=True, prompt_mask=torch.ones(1, 1))


# --- hard routing ------------------------------------------------------------------------------------------------


def hard(router: LearnedRouter, tokens: Tensor, context: ForwardContext, **options: Any) -> Routing:
    options = {"numbers": range(len(router.experts)), **options}
    return route(router, tokens, context, hard_routes=HardRoutes("domain_ids", **options), replaces=router.convex)


@pytest.mark.parametrize("convex", [False, True], ids=["delta", "convex"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_domain_ids_replace_the_gate(gate, convex) -> None:
    tokens, mask = tokens_and_mask()
    routing = hard(make(gate, convex=convex), tokens, context_of(tokens, mask, domain_ids=torch.tensor([2, -1, 0])))
    assert torch.equal(routing.indices, torch.tensor([[2], [-1], [0]]).repeat_interleave(5, 0))
    assert routing.weights is None
    if convex:
        assert torch.equal(routing.base_weight, torch.tensor([0.0, 1, 0]).repeat_interleave(5))
    else:
        assert routing.base_weight is None


def test_domain_ids_may_be_those_of_tokens() -> None:
    tokens, mask = tokens_and_mask()
    ids = torch.randint(-1, 3, (3, 5))
    routing = hard(make(), tokens, context_of(tokens, mask, domain_ids=ids))
    assert torch.equal(routing.indices, ids.reshape(-1, 1))


def test_domain_without_expert_here_leaves_the_frozen_layer() -> None:
    tokens, mask = tokens_and_mask()
    context = context_of(tokens, mask, domain_ids=torch.tensor([0, 1, 2]))
    routing = hard(make(names=["b"], convex=True), tokens, context, numbers=[1], total=3)
    assert routing.indices.view(3, 5)[:, 0].tolist() == [-1, 0, -1]
    assert routing.base_weight.view(3, 5)[:, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("bad", [3, -2, 100])
def test_domain_ids_out_of_range_are_refused(bad) -> None:
    tokens, mask = tokens_and_mask()
    with pytest.raises(ValueError, match=rf"domain_ids=.*{bad}.* must lie between -1 \(none\) and 2"):
        hard(make(), tokens, context_of(tokens, mask, domain_ids=torch.tensor([0, bad, 1])))


def test_domain_ids_follow_repeated_rows_and_nothing_else() -> None:
    beams = torch.randn(6, 1, D)
    routing = hard(make(), beams, context_of(beams, copies=2, domain_ids=torch.tensor([0, 1, 2])))
    assert routing.indices.flatten().tolist() == [0, 0, 1, 1, 2, 2]
    for ids in ([0, 1, 2], [0, 1, 2, 0], [0]):
        with pytest.raises(ValueError, match=rf"`domain_ids` should be the same.*{len(ids)} and 6"):
            hard(make(), beams, context_of(beams, domain_ids=torch.tensor(ids)))


@pytest.mark.parametrize(("numbers", "total"), [([0, 0], 2), ([0, 3], 3), ([-1], 2)])
def test_numbers_of_experts_are_different_and_below_the_total(numbers, total) -> None:
    with pytest.raises(ValueError, match=rf"must be different, and between 0 and {total - 1}"):
        HardRoutes("domain_ids", numbers, total)


# --- losses and usage --------------------------------------------------------------------------------------------


def naive_losses(probs: Tensor, logits: Tensor) -> dict[str, float]:
    """Over real tokens (N, A), one by one."""
    arms = probs.shape[1]
    share = [sum(float(p.argmax() == a) for p in probs) / len(probs) for a in range(arms)]
    mean = [sum(float(p[a]) for p in probs) / len(probs) for a in range(arms)]
    return {
        "balance": arms * sum(f * p for f, p in zip(share, mean, strict=True)),
        "z": sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / len(probs),
        "entropy": sum(-sum(v * math.log(v) for v in row) for row in probs.tolist()) / len(probs),
    }


@pytest.mark.parametrize("granularity", ["token", "sequence", "causal_prefix"])
def test_losses_are_means_over_real_tokens(granularity) -> None:
    tokens, mask = tokens_and_mask()
    router = make(granularity=granularity, balance_coef=2.0, z_coef=3.0, entropy_coef=5.0).train()
    context = context_of(tokens, mask, training=True)
    probs = route(router, tokens, context).probs.detach().view(3, 5, -1)[mask.bool()]
    unscaled = naive_losses(probs, probs.log() + 0)  # the same up to a constant per row
    found = {name: float(value.detach()) for name, value in context.record.losses.items()}
    assert found["balance"] == pytest.approx(2 * unscaled["balance"], rel=1e-4)
    assert found["entropy"] == pytest.approx(5 * unscaled["entropy"], rel=1e-4)
    logits = router(tokens, context).logits.view(3, 5, -1)[mask.bool()]
    assert found["z"] == pytest.approx(3 * naive_losses(probs, logits)["z"], rel=1e-4)

    garbage = torch.where(mask.unsqueeze(-1) > 0, tokens, torch.randn_like(tokens) * 50)
    other = context_of(garbage, mask, training=True)
    route(router, garbage, other)
    for name, value in other.record.losses.items():
        torch.testing.assert_close(value, context.record.losses[name])


def test_no_losses_outside_training_or_without_coefficients() -> None:
    tokens, mask = tokens_and_mask()
    for router, training in ((make(balance_coef=1.0, z_coef=1.0, entropy_coef=1.0), False), (make(), True)):
        context = context_of(tokens, mask, training=training)
        route(router, tokens, context)
        assert not context.record.losses


def test_balance_loss_is_one_when_balanced_and_the_number_of_arms_when_collapsed() -> None:
    from mixadapters.core.losses import load_balance

    assert float(load_balance(torch.eye(4).repeat(3, 1))) == pytest.approx(1)
    assert float(load_balance(torch.eye(4)[:1].repeat(5, 1))) == pytest.approx(4)


@pytest.mark.parametrize(
    ("coef", "measure", "falls"),
    [
        ("balance_coef", lambda p: float(p.mean(0).max()), True),
        ("entropy_coef", lambda p: float(-(p * p.log()).sum(1).mean()), True),
        ("z_coef", lambda p: float(p.max(1).values.mean()), True),
    ],
)
def test_each_loss_moves_the_gate_as_it_says(coef, measure, falls) -> None:
    tokens, mask = tokens_and_mask()
    router = make(**{coef: 1.0}).train()
    if coef == "balance_coef":
        nn.init.constant_(router.output.bias[:1], 3.0)
    optimizer = torch.optim.SGD(router.parameters(), 0.1)

    def step() -> Tensor:
        context = context_of(tokens, mask, training=True)
        probs = route(router, tokens, context).probs
        optimizer.zero_grad()
        sum(context.record.losses.values()).backward()
        optimizer.step()
        return probs.detach()

    first = step()
    for _ in range(60):
        last = step()
    assert (measure(last) < measure(first) - 0.02) == falls


@pytest.mark.parametrize("training", [True, False])
def test_usage_is_the_mean_over_real_tokens(training) -> None:
    """In training it is always kept; in evaluation by who asks for it."""
    tokens, mask = tokens_and_mask()
    router, usage = make().train(training), UsageRecorder()
    seen = []
    for scale in (1.0, 2.0):
        context = context_of(tokens, mask, training=training)
        if training:
            context.usage = usage
        else:
            context.observers.append(usage)
        probs = route(router, tokens * scale + scale, context).probs
        seen.append(probs.detach().view(3, 5, -1)[mask.bool()])
    silent = context_of(tokens, mask)  # evaluation that nobody observes
    route(router, tokens, silent)
    assert silent.usage.summaries() == {}
    seen = torch.cat(seen)
    summary = usage.summaries()[KEY]
    for i, arm in enumerate([*NAMES, "frozen"]):
        assert summary[f"weight/{arm}"] == pytest.approx(float(seen[:, i].mean()), abs=1e-5)
    assert summary["entropy"] == pytest.approx(float(-(seen * seen.log()).sum(1).mean()), abs=1e-5)
    assert usage.count(KEY) == len(seen) == 2 * int(mask.sum())
    usage.reset()
    assert usage.summaries() == {}


def test_rows_of_others_in_a_mixed_batch_count_for_nothing() -> None:
    tokens, mask = tokens_and_mask()
    found = []
    for rows in (None, [2]):
        router = make(balance_coef=1.0, z_coef=1.0, entropy_coef=1.0).train()
        mine, real = (tokens, mask) if rows is None else (tokens[rows], mask[rows])
        context = context_of(mine, real, training=True)
        if rows is None:  # three rows, of which the last names this gate's adapter
            context.record.own_rows = torch.arange(15) >= 10
        route(router, mine, context)
        found.append((context.usage.summaries()[KEY], context.usage.count(KEY), context.record.losses))
    (one, count, losses), (other, alone, expected) = found
    assert one == pytest.approx(other)
    assert count == alone == 1
    torch.testing.assert_close(losses, expected)


def test_usage_names_arms_that_get_nothing() -> None:
    tokens, mask = tokens_and_mask()
    router = make().train()
    nn.init.zeros_(router.output.weight)
    router.output.bias.data.copy_(torch.tensor([20.0, 0, 0, 0]))
    context = context_of(tokens, mask, training=True)
    route(router, tokens, context)
    summary = context.usage.summaries()[KEY]
    assert summary["dead"] == 3
    assert summary["entropy"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("coefficient", ["balance_coef", "z_coef", "entropy_coef"])
def test_losses_need_what_the_router_gives(coefficient) -> None:
    class TellsNothing(Router):
        def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
            return Routing(weights=tokens.new_ones(tokens.shape[:-1].numel(), len(NAMES)))

    tokens, mask = tokens_and_mask()
    router = TellsNothing(D, NAMES, **{coefficient: 0.5}).train()
    part = "logits" if coefficient == "z_coef" else "probs"
    with pytest.raises(ValueError, match=rf"{coefficient}=0.5 needs Routing.{part}, which TellsNothing does not"):
        route(router, tokens, context_of(tokens, mask, training=True))
    route(router, tokens, context_of(tokens, mask))


# --- numerics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["token", "sequence", "causal_prefix", "request"])
def test_logits_are_float32_for_any_dtype(granularity, dtype) -> None:
    tokens, mask = tokens_and_mask()
    router = make(granularity=granularity, hidden=[4]).to(dtype)
    routing = route(router, tokens.to(dtype), context_of(tokens, mask))
    assert routing.probs.dtype == torch.float32
    assert routing.weights.dtype == dtype
    exact = copy.deepcopy(router).float()
    expected = naive(exact, tokens.to(dtype).float(), mask).flatten(0, 1)
    torch.testing.assert_close(routing.probs, expected)


def test_a_mean_of_hidden_states_in_half_precision_does_not_overflow() -> None:
    tokens = torch.full((2, 1000, D), 100.0, dtype=torch.float16)  # their sum is above the largest float16
    probs = route(make(granularity="sequence"), tokens, context_of(tokens, torch.ones(2, 1000))).probs
    torch.testing.assert_close(probs, route(make(), tokens, context_of(tokens)).probs)


def test_logits_are_float32_under_autocast() -> None:
    tokens, mask = tokens_and_mask()
    router = make(hidden=[4])
    expected = run(router, tokens, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(router, tokens, mask), expected)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [1e4, -1e4, 3e38])
def test_one_dominant_domain_stays_finite(gate, size) -> None:
    tokens, mask = tokens_and_mask()
    router = make(gate, convex=True, balance_coef=1.0, entropy_coef=1.0).train()
    router.output.bias.data[1] = size
    context = context_of(tokens, mask, training=True)
    routing = route(router, tokens, context)
    (routing.weights.sum() + sum(context.record.losses.values())).backward()
    assert routing.probs.isfinite().all()
    assert all(p.grad.isfinite().all() for p in router.parameters())
    torch.testing.assert_close(routing.weights[:, 1], torch.full((15,), float(size > 0)))


@pytest.mark.parametrize("coefs", [{}, {"z_coef": 0.1}, {"balance_coef": 0.1, "z_coef": 0.1, "entropy_coef": 0.1}])
def test_identical_domains_stay_finite_in_training(coefs) -> None:
    tokens, mask = tokens_and_mask()
    router = build_router("softmax", D, NAMES, **coefs).train()
    optimizer = torch.optim.Adam(router.parameters(), 0.1)
    for _ in range(100):
        context = context_of(tokens, mask, training=True)
        routing = route(router, tokens, context)
        loss = (routing.weights.sum(1) * tokens.flatten(0, 1)[:, 0]).mean() + sum(context.record.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probs = routing.probs
    assert probs.isfinite().all()
    if "balance_coef" not in coefs:  # nothing tells them apart
        torch.testing.assert_close(probs[:, :1].expand(-1, 3), probs[:, :3], atol=1e-3, rtol=0)


@pytest.mark.parametrize("granularity", ["token", "sequence", "causal_prefix", "request"])
def test_dropout_acts_in_training_only(granularity) -> None:
    tokens, mask = tokens_and_mask()
    router = make(granularity=granularity, dropout=0.5)
    assert torch.equal(run(router, tokens, mask), run(router, tokens, mask))
    router.train()
    about = {"training": True, "prompt_mask": mask}
    assert not torch.equal(run(router, tokens, mask, **about), run(router, tokens, mask, **about))


# --- surgery -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convex", [False, True], ids=["delta", "convex"])
@pytest.mark.parametrize("share", [0.05, 0.5, 1e-6])
def test_new_softmax_arm_takes_its_share_of_the_frozen_arm_alone(share, convex) -> None:
    tokens, mask = tokens_and_mask()
    router = make(convex=convex)
    before = run(router, tokens, mask)
    router.add_expert("d", share)
    after = run(router, tokens, mask)
    assert router.arms == [*NAMES, "d", "frozen"]
    torch.testing.assert_close(after[..., :3], before[..., :3])
    torch.testing.assert_close(after[..., 3], share * before[..., 3])
    torch.testing.assert_close(after[..., 4], (1 - share) * before[..., 3])


@pytest.mark.parametrize("convex", [False, True], ids=["delta", "convex"])
def test_new_sigmoid_arm_starts_at_its_share_everywhere(convex) -> None:
    tokens, mask = tokens_and_mask()
    router = make("sigmoid", convex=convex)
    before = run(router, tokens, mask)
    router.add_expert("d", 0.05)
    after = run(router, tokens, mask)
    torch.testing.assert_close(after[..., :3], before[..., :3])
    torch.testing.assert_close(after[..., 3], torch.full((3, 5), 0.05))
    torch.testing.assert_close(after[..., 4:], before[..., 3:])


@pytest.mark.parametrize("convex", [False, True], ids=["delta", "convex"])
@pytest.mark.parametrize("name", NAMES)
def test_removed_softmax_arm_gives_its_mass_to_the_frozen_layer(name, convex) -> None:
    tokens, mask = tokens_and_mask()
    router = make(convex=convex)
    before = run(router, tokens, mask).flatten(0, 1)
    router.remove_expert(name, renormalize=False)
    kept = [i for i, other in enumerate(NAMES) if other != name]
    routing = router(tokens, context_of(tokens, mask))
    torch.testing.assert_close(routing.weights, before[:, kept])
    assert router.arms == [NAMES[i] for i in kept] + ["null0", "frozen"]
    if convex:  # the mixture still sums to one
        torch.testing.assert_close(routing.base_weight, before[:, 3] + before[:, NAMES.index(name)])


@pytest.mark.parametrize("name", NAMES)
def test_removed_softmax_arm_is_shared_out_where_asked(name) -> None:
    tokens, mask = tokens_and_mask()
    router = make(convex=True)
    before = run(router, tokens, mask)
    router.remove_expert(name, renormalize=True)
    kept = [i for i in range(4) if i >= 3 or NAMES[i] != name]
    rest = before[..., kept]
    torch.testing.assert_close(run(router, tokens, mask), rest / rest.sum(-1, keepdim=True))
    assert router.null_arms == 0


@pytest.mark.parametrize("renormalize", [False, True])
def test_removed_sigmoid_arm_leaves_the_others(renormalize) -> None:
    tokens, mask = tokens_and_mask()
    router = make("sigmoid", convex=True)
    before = run(router, tokens, mask)
    router.remove_expert("b", renormalize)
    torch.testing.assert_close(run(router, tokens, mask), before[..., [0, 2, 3]])


def test_arms_come_and_go_in_any_order() -> None:
    tokens, mask = tokens_and_mask()
    router = make(convex=True)
    before = run(router, tokens, mask).flatten(0, 1)
    router.remove_expert("a", False)
    router.add_expert("d", 0.1)
    router.remove_expert("c", False)
    routing = router(tokens, context_of(tokens, mask))
    assert router.arms == ["b", "d", "null0", "null1", "frozen"]
    torch.testing.assert_close(routing.weights, torch.stack([before[:, 1], 0.1 * before[:, 3]], 1))
    torch.testing.assert_close(routing.base_weight, before[:, 0] + before[:, 2] + 0.9 * before[:, 3])


@pytest.mark.parametrize("trainable", [False, True])
def test_surgery_keeps_whether_the_gate_trains_and_its_dtype(trainable) -> None:
    router = make().to(torch.bfloat16).requires_grad_(trainable)
    router.add_expert("d", 0.1)
    router.remove_expert("a", False)
    assert router.output.weight.requires_grad is trainable
    assert {p.dtype for p in router.parameters()} == {torch.bfloat16}
    assert router.output.weight.shape == (5, D)


# --- names -------------------------------------------------------------------------------------------------------


def test_registry_names_the_gates_and_suggests() -> None:
    assert ROUTERS["softmax"] is SoftmaxGate
    assert ROUTERS["sigmoid"] is SigmoidGate
    with pytest.raises(ValueError, match=r"unknown router 'sofmax'; have \[.*\]. Did you mean 'softmax'"):
        build_router("sofmax", D, NAMES)
    with pytest.raises(ValueError, match=r"SoftmaxGate takes no argument 'temprature'. Did you mean 'temperature'"):
        build_router({"kind": "softmax", "temprature": 2}, D, NAMES)
    with pytest.raises(ValueError, match="needs a 'kind'"):
        build_router({"temperature": 2}, D, NAMES)
    assert build_router({"kind": "softmax", "temperature": 2}, D, NAMES, temperature=3, unknown=1).temperature == 2


# --- built by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "tokens"}, "granularity='tokens' is unknown.*Did you mean 'token'"),
        ({"pool": "mean"}, "pool='mean' is unknown"),
        ({"temperature": 0}, "temperature=0 must be a finite number, above 0"),
        ({"temperature": math.inf}, "temperature=inf must be"),
        ({"temperature": True}, "temperature=True must be"),
        (
            {"temperature": 1e-320},
            "temperature=1e-320 must be a finite number, above 0; a number is 0, or 1e-30 to 1e",
        ),
        ({"frozen_bias": 1e300}, "frozen_bias=1e\\+300 must be a finite number"),
        ({"temperature": 10**400}, r"temperature=10+\.\.\. must be a finite number"),
        ({"z_coef": 10**400}, r"z_coef=10+\.\.\. must be a finite number"),
        ({"frozen_bias": math.nan}, "frozen_bias=nan must be a finite number"),
        ({"dropout": 1.0}, "dropout=1.0 must be a finite number, at least 0, less than 1"),
        ({"hidden": [0]}, r"hidden=\[0\] must be a list of up to 64 positive widths"),
        ({"hidden": 4}, "hidden=4 must be a list of"),
        ({"hidden": [2] * 65}, "must be a list of up to 64"),
        ({"null_arms": 5000}, "null_arms=5000 must be an integer, at least 0, at most 4096"),
        ({"hidden": "33"}, "hidden='33' must be"),
        ({"normalize": "no"}, "normalize='no' must be True or False"),
        ({"convex": 1}, "convex=1 must be True or False"),
        ({"null_arms": -1}, "null_arms=-1 must be an integer, at least 0"),
        ({"balance_coef": -1.0}, "balance_coef=-1.0 must be a finite number, at least 0"),
        ({"z_coef": math.nan}, "z_coef=nan must be a finite number"),
        ({"entropy_coef": math.inf}, "entropy_coef=inf must be a finite number"),
        ({"experts": []}, r"experts=\[\] must be a list of names"),
        ({"experts": ["a", "a"]}, "names an expert twice"),
        ({"experts": "ab"}, "experts='ab' must be a list of names"),
        ({"in_features": 0}, "in_features=0 must be an integer, at least 1"),
    ],
)
def test_nonsense_is_refused_by_name(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        SoftmaxGate(**{"in_features": D, "experts": NAMES, **options})


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_arms_are_reordered_by_name(gate) -> None:
    tokens, mask = tokens_and_mask()
    router = make(gate, null_arms=1)
    before = run(router, tokens, mask)
    router.reorder(["c", "a", "b"])
    after = run(router, tokens, mask)
    assert router.arms[:3] == ["c", "a", "b"]
    torch.testing.assert_close(after[..., :3], before[..., [2, 0, 1]])
    torch.testing.assert_close(after[..., 3:], before[..., 3:])
    with pytest.raises(ValueError, match=r"names=\['c', 'a'\] must be the experts"):
        router.reorder(["c", "a"])


def test_jitter_goes_both_ways() -> None:
    router, tokens = make(jitter=0.5, normalize=False, granularity="token").train(), torch.ones(400, 1, D)
    plain = make(normalize=False, granularity="token")
    read = router(tokens, context_of(tokens, training=True)).logits - plain.output.bias
    expected = plain(tokens, context_of(tokens)).logits - plain.output.bias
    torch.testing.assert_close(read.mean(0), expected[0], rtol=0, atol=0.15)
    assert bool((read.std(0) > 0.1).all())


def test_a_temperature_is_applied_once_with_an_activation() -> None:
    router, tokens = make(activation="tanh", temperature=4.0, granularity="token"), torch.randn(3, 2, D)
    read = nn.functional.rms_norm(tokens, (D,))
    logits = (read @ router.output.weight.T).tanh() / 4.0 + router.output.bias
    torch.testing.assert_close(run(router, tokens), logits.softmax(-1))


def test_padding_inside_a_document_does_not_part_it() -> None:
    router, tokens = make(granularity="causal_prefix"), torch.randn(1, 5, D)
    holed = torch.cat([tokens[:, :3], torch.randn(1, 2, D), tokens[:, 3:]], 1)
    mask, positions = torch.tensor([[1, 1, 1, 0, 0, 1, 1]]), torch.tensor([[0, 1, 2, 0, 0, 3, 4]])
    found = run(router, holed, mask, position_ids=positions)[:, mask[0].bool()]
    torch.testing.assert_close(found, run(router, tokens, torch.ones(1, 5)))


@pytest.mark.parametrize("granularity", ["sequence", "request"])
def test_positions_of_padding_are_no_packing(granularity) -> None:
    router, tokens = make(granularity=granularity), torch.randn(1, 5, D)
    mask, positions = torch.tensor([[1, 1, 1, 0, 0]]), torch.tensor([[0, 1, 2, 0, 0]])
    found = run(router, tokens, mask, position_ids=positions)
    torch.testing.assert_close(found, run(router, tokens, mask))
