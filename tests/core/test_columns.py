"""Rows of a dataset as collators find them."""

from __future__ import annotations

import pytest

from mixadapters.core.columns import numbered, text_of


def test_rows_are_named_by_their_place_in_the_batch() -> None:
    assert numbered([{"a": 1}, {"b": 2}]) == [("row 0 of the batch", {"a": 1}), ("row 1 of the batch", {"b": 2})]


@pytest.mark.parametrize(
    ("batch", "message"),
    [([], "has no rows"), ([{}, "what"], "row 1 of the batch is 'what', a str; a row maps columns")],
)
def test_a_batch_that_is_no_batch_of_rows_is_refused(batch, message) -> None:
    with pytest.raises(ValueError, match=message):
        numbered(batch)


def test_text_comes_from_its_column() -> None:
    assert text_of("row 0", {"text": "caf\u00e9 \U0001f600"}, "text") == "caf\u00e9 \U0001f600"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 1, 3: "x"}, r"general\[7\] with the columns \['3', 'label'\] has text=None.*remove_unused_columns"),
        ({"text": ["a"]}, r"general\[7\].*text=\['a'\], not a string"),
        ({"text": "ab\udc00"}, r"general\[7\] has text='ab\\udc00' with half of a surrogate pair at character 2"),
    ],
)
def test_a_column_without_text_is_refused_with_where_it_is(row, message) -> None:
    with pytest.raises(ValueError, match=message):
        text_of("general[7]", row, "text")
