"""What collators ask of a tokenizer and of the rows of a dataset, before they make a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the tokenizer cannot pad."""
    if tokenizer.pad_token is None:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} has no pad_token; set one, for example "
            "tokenizer.pad_token = tokenizer.eos_token"
        )


def numbered(features: Sequence[Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(where, row) for each row of a batch, `where` being its name in messages.

    Raises:
        ValueError: there are no rows, or one has no columns.
    """
    if len(features) == 0:
        raise ValueError("the batch has no rows; a collator needs one or more")
    rows = [(f"row {number} of the batch", row) for number, row in enumerate(features)]
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} is {row!r:.80}, a {type(row).__name__}; a row maps columns to values")
    return rows


def text_of(where: str, row: Mapping[str, Any], column: str) -> str:
    """The text in a column of a row that messages call `where`; ValueError where there is none."""
    text = row.get(column)
    if not isinstance(text, str):
        raise ValueError(
            f"{where} with the columns {sorted(map(str, row))} has {column}={text!r:.80}, not a string; rename the "
            "column, and pass remove_unused_columns=False to TrainingArguments"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has {column}={text!r:.80} with half of a surrogate pair at character {error.start}, which no "
            "tokenizer takes; read the text anew, as UTF-8"
        ) from None
    return text
