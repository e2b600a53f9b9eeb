"""What collators ask of a tokenizer and of the rows of a dataset, before they make a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the tokenizer cannot pad."""
    if tokenizer.pad_token is None:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} has no pad_token; set one, for example "
            "tokenizer.pad_token = tokenizer.eos_token"
        )
