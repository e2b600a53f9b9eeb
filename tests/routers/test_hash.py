"""Hash: by ids alone, the same in any process, spread evenly."""

from __future__ import annotations

import pytest
import torch

from mixadapters.routers import build_router

IDS = torch.arange(4096).view(4, 1024)
TOKENS = torch.randn(4, 1024, 6)
EXPECTED = [1, 4, 3, 4, 3, 6, 5, 4]  # of the ids 0 to 7


def chosen(forward, ids=IDS, experts=8, **options):
    router = build_router({"kind": "hash", **options}, 6, [f"e{i}" for i in range(experts)])
    tokens = torch.randn(*ids.shape, 6)
    return router(tokens, forward(tokens, ids=ids)).indices.view(ids.shape)


def test_numbers_do_not_change_with_the_version(forward) -> None:
    assert chosen(forward, torch.arange(8).view(1, 8)).tolist() == [EXPECTED]
    assert chosen(forward, torch.arange(8).view(1, 8), seed=1).tolist() != [EXPECTED]


@pytest.mark.parametrize("experts", [2, 3, 7, 8])
@pytest.mark.parametrize("seed", [0, 1, 12345, -1, 2**40])
def test_tokens_are_spread_evenly(forward, experts, seed) -> None:
    counts = torch.bincount(chosen(forward, experts=experts, seed=seed).flatten(), minlength=experts)
    assert counts.max() < 1.15 * 4096 / experts
    assert counts.min() > 0.85 * 4096 / experts


def test_a_token_has_its_expert_wherever_it_stands(forward) -> None:
    found = chosen(forward)
    assert torch.equal(chosen(forward, IDS.flip(1)), found.flip(1))
    big = torch.tensor([[0, 2**31 - 1, 262143]])
    assert torch.equal(chosen(forward, big.int()), chosen(forward, big))


def test_ids_are_needed_and_must_be_those_of_the_layer(forward) -> None:
    router = build_router("hash", 6, ["a", "b"])
    with pytest.raises(ValueError, match=r"router 'hash' routes by the ids of tokens.*has none.*pass input_ids"):
        router(TOKENS, forward(TOKENS))
    with pytest.raises(ValueError, match="this layer reads 4096 rows, but the forward has 4 ids"):
        router(TOKENS, forward(TOKENS, ids=IDS[:, :1]))


def test_other_experts_need_another_router() -> None:
    router = build_router("hash", 6, ["a", "b"])
    for verb in (lambda: router.add_expert("c", 0.1), lambda: router.remove_expert("a", False)):
        with pytest.raises(ValueError, match="HashRouter: with other experts every token would have another one"):
            verb()
    with pytest.raises(ValueError, match=r"seed=1.5 must be an integer"):
        build_router({"kind": "hash", "seed": 1.5}, 6, ["a"])
