"""Which requests a step takes: a short prompt behind long ones, and a long one behind any number of short ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mixadapters.serving import AdapterServer
from mixadapters.serving.scheduler import TURNS, FairScheduler

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
TOKENS = 32  # of a step
LONG = [[5 + (i + 7 * j) % 90 for j in range(160)] for i in range(4)]
SHORT = [8, 6, 9]


def run(model: Any, prompts: list[list[int]], new: int = 3, **options: Any) -> tuple[Any, list[dict[int, int]]]:
    """The tokens of each prompt, all of which are there before the first step; and {prompt: tokens} of each step."""
    sizes: dict[str, Any] = {"page_size": 8, "cache_tokens": 2048, "max_batch_tokens": TOKENS, "share_prefixes": False}
    server = AdapterServer(model, **sizes | options)
    steps: list[dict[int, int]] = []
    number: dict[str, int] = {}
    packed = server._book.packed

    def noted(ids: Any, lengths: Any, past: Any) -> Any:
        steps.append({number[one]: length for one, length in zip(ids, lengths, strict=True)})
        return packed(ids, lengths, past)

    server._book.packed = noted  # type: ignore[method-assign]
    with server:
        with server._changing():
            requests = [server.submit(prompt, max_new_tokens=new) for prompt in prompts]
            number.update({request.request_id: i for i, request in enumerate(requests)})
        return [request.result(60).tokens for request in requests], steps


def read_at(steps: list[dict[int, int]], prompt: int, length: int) -> int:
    """The step in which the last token of a prompt is read."""
    for i, step in enumerate(steps):
        length -= step.get(prompt, 0)
        if length <= 0:
            return i
    raise AssertionError(f"prompt {prompt} is not read")


def test_short_prompt_is_read_at_once_behind_long_ones(causal) -> None:
    model = causal()
    prompts = [*LONG, SHORT]
    found, steps = run(model, prompts)
    again, in_order = run(model, prompts, scheduler="fifo")
    assert read_at(steps, 4, 3) < 2
    assert read_at(in_order, 4, 3) >= 4 * 160 // TOKENS
    assert found == again
    assert len(steps) <= len(in_order)


def test_steps_are_full_while_prompts_are_there(causal) -> None:
    """So that the order costs no steps."""
    _, steps = run(causal(), [*LONG, SHORT])
    whole = (4 * 160 + 3) // TOKENS
    assert [sum(step.values()) for step in steps[:whole]] == [TOKENS] * whole


def test_longest_prompt_is_read_beside_shorter_ones_that_came_later(causal) -> None:
    """Every fourth step begins with it, as long as there are others."""
    prompts = [[7] * 200, *([9 + i % 60] * 24 for i in range(40))]
    _, steps = run(causal(), prompts, new=1)
    assert read_at(steps, 1, 24) == 0
    assert all(step.get(0) == TOKENS for step in steps[TURNS - 1 : read_at(steps, 0, 200) : TURNS])
    assert read_at(steps, 0, 200) < TURNS * 200 / TOKENS


def test_requests_that_are_put_back_for_want_of_room_keep_their_turn_and_tokens(causal) -> None:
    model, prompts = causal(), [*LONG, SHORT]
    whole, _ = run(model, prompts, new=60)
    tight, steps = run(model, prompts, new=60, cache_tokens=304)
    read = sum(sum(step.values()) for step in steps)
    assert read > sum(map(len, prompts)) + 5 * 60  # some was read again
    assert tight == whole


def test_request_that_is_put_back_is_older_than_those_that_came_after_it() -> None:
    scheduler = FairScheduler(None, 0.1, 8)
    first, second = (SimpleNamespace(request_id=name, remaining_prefill_tokens=SHORT) for name in ("first", "second"))
    for state in (first, second, first):
        scheduler.add_waiting_request(state)
    assert scheduler._in_order([second, first]) == [first, second]


def test_unknown_scheduler_is_refused(causal) -> None:
    with pytest.raises(ValueError, match=r"scheduler='fast' is unknown; choose one of \['fair', 'fifo'\]"):
        AdapterServer(causal(), scheduler="fast")
