"""Expert choice: each expert takes its share of each sequence."""

from __future__ import annotations

import math

import pytest
import torch

from mixadapters.core.adapter import Site
from mixadapters.core.streams import Stream
from mixadapters.routers import build_router


def make(**options):
    torch.manual_seed(0)
    return build_router({"kind": "expert_choice", "init_range": 1.0, **options}, 6, list("abcd")).eval()


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 3.3])
def test_each_expert_takes_its_best_tokens_of_each_sequence(forward, factor) -> None:
    tokens, router = torch.randn(3, 9, 6), make(capacity_factor=factor)
    mask = torch.ones(3, 9)
    mask[1, 6:], mask[2, :5] = 0, 0
    routing = router(tokens, forward(tokens, mask))
    taken = routing.selected.view(3, 9, 4)
    scores = routing.probs.view(3, 9, 4)
    for row in range(3):
        real = [t for t in range(9) if mask[row, t]]
        share = min(math.ceil(factor * len(real) / 4), len(real))
        for e in range(4):
            best = sorted(real, key=lambda t, e=e, row=row: -float(scores[row, t, e].detach()))[:share]
            assert taken[row, :, e].nonzero().flatten().tolist() == sorted(best)
    chosen = routing.indices >= 0
    assert torch.equal(chosen.sum(1), routing.selected.sum(1))
    expected = routing.probs.gather(1, routing.indices.clamp_min(0))
    torch.testing.assert_close(routing.weights[chosen], expected[chosen])


def test_it_is_refused_where_a_model_is_causal_or_the_padding_is_unknown(forward) -> None:
    router, tokens = make(), torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"'expert_choice' at 'site'.*must not see the future.*'top_k'"):
        router.bind(Site("ffn_output", "site", 6, 6, causal=True))
    router.bind(Site("ffn_output", "site", 6, 6))
    with pytest.raises(ValueError, match="needs to know the padding of a batch"):
        router(tokens, forward(tokens))
    context = forward(tokens[:1])
    context.record.streams[""] = Stream(1, 5, None, torch.tensor([[0, 1, 0, 1, 2]]))
    with pytest.raises(ValueError, match="several documents are packed"):
        router(tokens[:1], context)


def test_it_has_no_granularity_and_must_take_something() -> None:
    with pytest.raises(ValueError, match="takes no argument 'granularity'"):
        make(granularity="token")
    with pytest.raises(ValueError, match="capacity_factor=0: no expert would take a token"):
        make(capacity_factor=0)
