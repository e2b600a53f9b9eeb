"""What collators ask of a tokenizer and of the rows of a dataset, before they make a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixadapters.core.fields import check_integer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the tokenizer cannot pad, or is none."""
    if not hasattr(tokenizer, "pad_token"):
        raise ValueError(f"tokenizer={tokenizer!r:.80} is no tokenizer; load one: AutoTokenizer.from_pretrained(...)")
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


def require_lengths(
    tokenizer: PreTrainedTokenizerBase, max_length: int | None, pad_to_multiple_of: int | None = None
) -> None:
    """Raises ValueError where texts cannot be cut or padded so: below a special tokens' number nothing is cut."""
    if max_length is not None:
        check_integer("max_length", max_length, least=tokenizer.num_special_tokens_to_add() + 1)
    if pad_to_multiple_of is not None:
        check_integer("pad_to_multiple_of", pad_to_multiple_of, least=1)


def some_text_of(where: str, row: Mapping[str, Any], column: str) -> str:
    """As `text_of`, of a text that is not blank."""
    text = text_of(where, row, column)
    if not text.strip():
        raise ValueError(
            f"{where} has {column}={text!r:.80}, which is blank; take such rows out: "
            f'dataset.filter(lambda row: row["{column}"].strip())'
        )
    return text


def text_of(where: str, row: Mapping[str, Any], column: str) -> str:
    """The text in a column of a row that messages call `where`; ValueError where there is none."""
    text = row.get(column)
    if not isinstance(text, str):
        raise ValueError(
            f"{where} with the columns {sorted(map(str, row))} has {column}={text!r:.80}, not a string; rename the "
            "column, and pass remove_unused_columns=False to TrainingArguments"
        )
    check_characters(where, column, text)
    return text


def check_characters(where: str, column: str, text: str) -> None:
    """Raises ValueError where a text cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has {column}={text!r:.80} with half of a surrogate pair at character {error.start}, which no "
            "tokenizer takes; read the text anew, as UTF-8"
        ) from None
