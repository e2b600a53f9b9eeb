"""Batches of texts and images, for `ImageInputs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixadapters.core.columns import require_padding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class ImageTextCollator:
    """Batches of prompts, answers and images; an image stands whole in a row, or not at all.

    A row is `{"prompt": str, "answer": str, "images": [...]}`, with the marker in the prompt where an image goes. An
    image is what the processor takes, such as a PIL image. Rows without `answer` are for generation, rows without
    `images` have none. Prompt and answer are tokenized apart, so that the answer begins at a token.

    Args:
        tokenizer: with a padding token; pads at its `padding_side`.
        image_processor: that of the vision encoder: size and normalisation are its own.
        token_id: the placeholder.
        tokens_per_image: how many of them stand for an image.
        max_length: rows are cut to so many tokens at the tokenizer's `truncation_side`; an image that would be cut in
            two is left out with all its placeholders and its pixels. None: rows are not cut.
        marker: stands for an image in the prompt.

    Returns (when called with B rows):
        input_ids, attention_mask (B, T); labels (B, T) with -100 outside the answers, if there are any; pixel_values
        (I, 3, H, W), if there are images.

    Raises:
        ValueError: a row whose markers are not as many as its images, or with no token of its answer left.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    token_id: int
    tokens_per_image: int
    max_length: int | None = None
    marker: str = "<image>"

    def __post_init__(self) -> None:
        require_padding(self.tokenizer)
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be 1 or more")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [self._units(row) for row in features]
        images = [unit[2] for row in rows for unit in row if unit[2] is not None]
        ids = [torch.tensor([t for tokens, _, _ in row for t in tokens]) for row in rows]
        labels = [torch.tensor([t if own else -100 for tokens, own, _ in row for t in tokens]) for row in rows]
        batch = {
            "input_ids": self._padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": self._padded([torch.ones_like(i) for i in ids], 0),
        }
        if any("answer" in row for row in features):
            batch["labels"] = self._padded(labels, -100)
        if images:
            batch["pixel_values"] = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return batch

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        side = self.tokenizer.padding_side
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    def _units(self, row: Mapping[str, Any]) -> list[tuple[list[int], bool, Any]]:
        """What a row consists of and may be cut between: (its tokens, whether they are answer, its image)."""
        parts, images = row["prompt"].split(self.marker), list(row.get("images") or ())
        if len(parts) != len(images) + 1:
            raise ValueError(
                f"prompt={row['prompt']!r} has {len(parts) - 1} markers {self.marker!r} for {len(images)} images"
            )
        begin = self.tokenizer("")["input_ids"]
        units = [([t], False, None) for t in begin if t == self.tokenizer.bos_token_id]
        for part, image in zip(parts, [*images, None], strict=True):
            units += [([t], False, None) for t in self._tokens(part)]
            if image is not None:
                units.append(([self.token_id] * self.tokens_per_image, False, image))
        if "answer" in row:
            end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
            units += [([t], True, None) for t in [*self._tokens(row["answer"]), *end]]
        units = self._cut(units)
        if "answer" in row and not any(own for _, own, _ in units):
            raise ValueError(
                f"no token of answer={row['answer']!r} is left within max_length={self.max_length}; raise it, or set "
                "the tokenizer's truncation_side to 'left'"
            )
        return units

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _cut(self, units: list[tuple[list[int], bool, Any]]) -> list[tuple[list[int], bool, Any]]:
        if self.max_length is None:
            return units
        ordered = units[::-1] if self.tokenizer.truncation_side == "left" else units
        kept, length = [], 0
        for unit in ordered:
            length += len(unit[0])
            if length > self.max_length:
                break
            kept.append(unit)
        return kept[::-1] if self.tokenizer.truncation_side == "left" else kept
