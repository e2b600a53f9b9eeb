"""Text as rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END = "<end>"
LONGEST_TOKEN = 40  # characters, on average over a document; more of it than its tokens need are not read


def new_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens, learned from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def token_rows(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], length: int, tokens: int, kind: str
) -> Tensor:
    """(n, length) token ids: the documents one after the other, up to about `tokens`; no document gives over a tenth.

    Each row begins as the tokenizer begins a text: some models know no text without such a token.

    Raises:
        ValueError: there is not one full row.
    """
    first = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    most = max(length, tokens // 10)  # of a document
    ids: list[int] = []
    for document in documents:
        read = tokenizer(document[: LONGEST_TOKEN * most], add_special_tokens=False, verbose=False)["input_ids"]
        ids += read[:most] + end
        if len(ids) >= tokens:
            break
    width = length - len(first)
    rows = min(len(ids) // width, tokens // length)
    if not rows:
        raise ValueError(
            f"{kind}: {min(len(ids), tokens)} tokens of text make no row of {length}; give more text, or a smaller "
            "--length"
        )
    return torch.tensor([first + ids[i * width : (i + 1) * width] for i in range(rows)])
