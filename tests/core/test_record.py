from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mixadapters.core.record import Pins, Record, Records


def block(pins: Pins, **values: Any) -> Iterator[None]:
    """A block in a generator, which ends when it is closed."""
    with pins.hold(values):
        yield


def test_blocks_that_overlap_take_along_what_they_brought() -> None:
    pins = Pins()
    first, second, third = block(pins, a=1, b=1), block(pins, b=2), block(pins, a=3, c=3)
    for one in (first, second, third):
        next(one)
    assert pins.values == {"a": 3, "b": 2, "c": 3}  # the last one to begin decides
    first.close()
    assert pins.values == {"a": 3, "b": 2, "c": 3}
    third.close()
    assert pins.values == {"b": 2}
    second.close()
    assert pins.values == {}


def test_equal_blocks_are_not_taken_for_each_other() -> None:
    pins = Pins()
    outer, other, inner = block(pins, a=1), block(pins, a=2), block(pins, a=1)
    for one in (outer, other, inner):
        next(one)
    inner.close()
    assert pins.values == {"a": 2}
    other.close()
    assert pins.values == {"a": 1}
    outer.close()
    assert pins.values == {}


def test_error_inside_a_block_ends_it() -> None:
    pins = Pins()
    with pytest.raises(KeyError), pins.hold({"a": 1}):
        raise KeyError
    assert pins.values == {}


def run_in_thread(job: Any) -> None:
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()


def test_block_of_a_thread_may_end_in_another() -> None:
    records = Records()
    mine = block(records.thread.pins, a=1)
    next(mine)
    seen: list[Any] = []

    def elsewhere() -> None:
        with records.thread.pins.hold({"b": 2}):
            seen.append(dict(records.held))
            mine.close()
        seen.append(dict(records.held))

    run_in_thread(elsewhere)
    assert seen == [{"b": 2}, {}]
    assert records.held == {}


def test_blocks_of_threads_that_overlap_leave_nothing_behind() -> None:
    records, began, end = Records(), threading.Event(), threading.Event()

    def other() -> None:
        with records.pins.hold({"a": 2}):
            began.set()
            assert end.wait(60)

    thread = threading.Thread(target=other)
    with records.pins.hold({"a": 1, "b": 1}):
        thread.start()
        assert began.wait(60)
    assert records.held == {"a": 2}
    end.set()
    thread.join()
    assert records.held == {}


def test_other_threads_see_the_latest_record_until_they_have_their_own() -> None:
    records, mine, theirs = Records(), Record(open=True), Record(open=True)
    records.enter(mine)
    seen: list[Any] = []

    def elsewhere() -> None:
        seen.extend([records.current, records.running])
        records.enter(theirs)
        seen.extend([records.current, records.running])

    run_in_thread(elsewhere)
    assert seen == [mine, None, theirs, theirs]
    assert records.running is records.current is mine


def test_record_of_a_first_run_is_used_and_put_back() -> None:
    records, first, second = Records(), Record(closed=True), Record(open=True)
    records.enter(second)
    with records.using(first):
        assert records.current is first
        assert records.again
    assert records.current is second
    assert not records.again


def test_generation_inside_a_generation_has_its_own_copies() -> None:
    records = Records()
    with records.generating():
        records.thread.copies = 3
        with records.generating():
            assert records.thread.copies == 1
        assert (records.thread.generates, records.thread.copies) == (True, 3)
    assert (records.thread.generates, records.thread.copies) == (False, 1)
