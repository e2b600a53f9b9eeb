"""Task: the batch decides, alone."""

from __future__ import annotations

import pytest
import torch

from mixadapters.routers import TaskRouter, build_router

TOKENS = torch.randn(3, 4, 6)


def chosen(router, context) -> list[int]:
    return router(TOKENS, context).indices.view(3, 4)[:, 0].tolist()


def test_rows_and_tokens_go_where_the_batch_says(forward) -> None:
    router = build_router("task", 6, ["a", "b", "c"])
    assert chosen(router, forward(TOKENS, expert_ids=torch.tensor([2, -1, 0]))) == [2, -1, 0]
    ids = torch.randint(-1, 3, (3, 4))
    context = forward(TOKENS, expert_ids=ids)
    context.argument_names = ()
    assert torch.equal(router(TOKENS, context).indices.view(3, 4), ids)
    assert TaskRouter.fields == ("expert_ids",)


def test_a_batch_that_says_nothing_is_refused(forward) -> None:
    with pytest.raises(ValueError, match=r"router 'task' goes by the batch alone.*expert_ids.*\['a', 'b'\]"):
        build_router("task", 6, ["a", "b"])(TOKENS, forward(TOKENS))


@pytest.mark.parametrize("wrong", [[0, 2, 1], [0, 1], [0.5, 1.0, 0.0]])
def test_numbers_are_those_of_experts(forward, wrong) -> None:
    with pytest.raises(ValueError, match="expert_ids"):
        build_router("task", 6, ["a", "b"])(TOKENS, forward(TOKENS, expert_ids=torch.tensor(wrong)))


def test_numbers_are_places_in_the_list_of_experts(forward) -> None:
    router = build_router("task", 6, ["a", "b"])
    router.add_expert("c", 0.1)
    router.remove_expert("a", False)
    assert router.experts == ["b", "c"]
    assert chosen(router, forward(TOKENS, expert_ids=torch.tensor([0, 1, -1]))) == [0, 1, -1]
    with pytest.raises(ValueError, match="expert_ids"):
        chosen(router, forward(TOKENS, expert_ids=torch.tensor([0, 2, -1])))
    with pytest.raises(ValueError, match="expert 'b' exists already"):
        router.add_expert("b", 0.1)
