"""Pregate: tokens alone decide, so that a plan is there before the model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixadapters.routers import PregateRouter, build_router

IDS = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]])


def make(**options: Any) -> PregateRouter:
    torch.manual_seed(0)
    router = build_router({"kind": "pregate", "vocab_size": 50, "init_range": 1.0, **options}, 6, list("abcd"))
    assert isinstance(router, PregateRouter)
    return router


@pytest.mark.parametrize("granularity", ["token", "causal_prefix", "request"])
def test_the_plan_is_what_the_forward_does(forward, granularity) -> None:
    router, tokens = make(granularity=granularity), torch.randn(3, 7, 6)
    plan = router.plan(IDS, MASK)
    assert router.training  # as it was
    found = router.eval()(tokens, forward(tokens, MASK, ids=IDS))
    real = MASK.flatten().bool()
    assert torch.equal(plan.indices[real], found.indices[real])
    torch.testing.assert_close(plan.weights[real], found.weights[real])
    assert not plan.weights.requires_grad


def test_hidden_states_do_not_matter_and_later_tokens_neither(forward) -> None:
    router = make().eval()
    plan = router.plan(IDS, MASK).weights.view(3, 7, 2)
    for seed in range(2):
        tokens = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(seed))
        found = router(tokens, forward(tokens, MASK, ids=IDS)).weights
        assert torch.equal(found.view(3, 7, 2), plan)
    changed = IDS.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % 50
    other = router.plan(changed, MASK).weights.view(3, 7, 2)
    torch.testing.assert_close(other[:2, :5], plan[:2, :5])
    assert not torch.equal(other[:, 5:], plan[:, 5:])


def test_embedding_and_mlp_are_its_own_and_learn(forward) -> None:
    router, tokens = make(width=5, hidden=[3]), torch.randn(3, 7, 6)
    assert router.embedding.weight.shape == (50, 5)
    assert router.hidden[1].weight.shape == (3, 5)
    assert router.in_features == 6
    router(tokens, forward(tokens, MASK, training=True, ids=IDS)).weights.sum().backward()
    seen = router.embedding.weight.grad.any(1).nonzero().flatten().tolist()
    assert set(seen) <= set(IDS[MASK.bool()].tolist())
    assert len(seen) > 3


def test_what_it_needs_is_said(forward) -> None:
    with pytest.raises(ValueError, match="vocab_size=None must be an integer, at least 1"):
        build_router("pregate", 6, ["a"])
    tokens = torch.randn(3, 7, 6)
    with pytest.raises(ValueError, match=r"router 'pregate' routes by the ids of tokens.*inputs_embeds"):
        make()(tokens, forward(tokens, MASK))


def test_ids_of_another_vocabulary_are_named() -> None:
    router = build_router({"kind": "pregate", "vocab_size": 7}, 6, ["a", "b"])
    for wrong in (7, -1):
        with pytest.raises(ValueError, match=rf"input_ids holds {wrong}, but router 'pregate' is of the ids 0 to 6"):
            router.plan(torch.tensor([[1, wrong]]))
