"""JSON of strangers."""

from __future__ import annotations

import pytest

from mixadapters.core.json_text import parse_json


def test_values_are_those_of_the_text() -> None:
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 2, "a": 1}', r"a field is named twice: \['a'\]"),
        ('[{"c": {"a": 1, "a": 2}}]', r"a field is named twice: \['a'\]"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_what_is_none_or_says_two_things_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)
