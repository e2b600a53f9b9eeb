"""A request by itself."""

from __future__ import annotations

import pytest

from mixadapters.serving.requests import Request


@pytest.fixture
def request_() -> Request:
    return Request("r", [5], "a", max_new_tokens=2, deadline=None, stops=(), give_up=lambda _: None)


def test_time_to_the_first_token_is_that_of_the_first(request_: Request) -> None:
    request_.advance([7])
    first = request_.first_token
    request_.advance([7, 8])
    assert request_.first_token == first is not None


def test_a_stop_after_the_end_changes_no_reason(request_: Request) -> None:
    request_.advance([7, 8])
    request_.finish()
    request_.stop()
    assert request_.result() == ([7, 8], "length")


def test_a_stop_before_the_end_is_the_reason(request_: Request) -> None:
    request_.advance([7])
    request_.stop()
    assert request_.result() == ([7], "stop")
