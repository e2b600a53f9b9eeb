"""Batches of texts and images, for `ImageInputs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixadapters.core.columns import numbered, require_padding, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class ImageTextCollator:
    """Batches of prompts, answers and images; an image stands whole in a row, or not at all.

    A row is `{"prompt": str, "answer": str, "images": [...]}`, with the marker in the prompt where an image goes. An
    image is what the processor takes, such as a PIL image. Rows without `answer` are for generation, rows without
    `images` have none; None counts as absent, since datasets fill up with it. Prompt and answer are tokenized apart,
    so that the answer begins at a token.

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
        ValueError: a row that lacks a column or has a value of another type, whose markers are not as many as its
            images, or with no token of its answer left; images that the processor refuses.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    token_id: int
    tokens_per_image: int
    max_length: int | None = None
    marker: str = "<image>"

    def __post_init__(self) -> None:
        require_padding(self.tokenizer)
        for name, least in (("token_id", 0), ("tokens_per_image", 1), ("max_length", 1)):
            value = getattr(self, name)
            if value is None and name == "max_length":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer, {least} or more")
        if not isinstance(self.marker, str) or not self.marker:
            raise ValueError(f"marker={self.marker!r} must be a text that stands for an image, such as '<image>'")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        named = numbered(features)
        rows = [self._units(where, row) for where, row in named]
        ids = [torch.tensor([t for tokens, _, _ in row for t in tokens]) for row in rows]
        labels = [torch.tensor([t if own else -100 for tokens, own, _ in row for t in tokens]) for row in rows]
        batch = {
            "input_ids": self._padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": self._padded([torch.ones_like(i) for i in ids], 0),
        }
        if any(row.get("answer") is not None for _, row in named):
            batch["labels"] = self._padded(labels, -100)
        images = [
            (where, image)
            for (where, _), row in zip(named, rows, strict=True)
            for *_, image in row
            if image is not None
        ]
        if images:
            batch["pixel_values"] = self._pixels(images)
        return batch

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        side = self.tokenizer.padding_side
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    def _pixels(self, images: list[tuple[str, Any]]) -> Tensor:
        """(I, 3, H, W); what the processor has to say of an image is said with its row."""
        if not callable(self.image_processor):
            raise ValueError(f"{images[0][0]} has an image, but image_processor={self.image_processor!r} takes none")
        try:
            return self.image_processor(images=[image for _, image in images], return_tensors="pt")["pixel_values"]
        except Exception as error:
            for where, image in images:
                try:
                    self.image_processor(images=[image], return_tensors="pt")
                except Exception as reason:
                    raise ValueError(
                        f"{where} has an image that {type(self.image_processor).__name__} does not take, "
                        f"{image!r:.80}: {reason}; give RGB images, such as PIL's image.convert('RGB')"
                    ) from error
            raise

    def _units(self, where: str, row: Mapping[str, Any]) -> list[tuple[list[int], bool, Any]]:
        """What a row consists of and may be cut between: (its tokens, whether they are answer, its image)."""
        prompt, images = text_of(where, row, "prompt"), self._images(where, row)
        answer = None if row.get("answer") is None else text_of(where, row, "answer")
        parts = prompt.split(self.marker)
        if len(parts) != len(images) + 1:
            raise ValueError(
                f"{where}: prompt={prompt!r} has {len(parts) - 1} markers {self.marker!r} for {len(images)} images; "
                "write one where each image goes"
            )
        begin = self.tokenizer("")["input_ids"]
        units = [([t], False, None) for t in begin if t == self.tokenizer.bos_token_id]
        for part, image in zip(parts, [*images, None], strict=True):
            units += [([t], False, None) for t in self._tokens(part)]
            if image is not None:
                units.append(([self.token_id] * self.tokens_per_image, False, image))
        if answer is not None:
            end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
            units += [([t], True, None) for t in [*self._tokens(answer), *end]]
        units = self._cut(units)
        if answer is not None and not any(own for _, own, _ in units):
            raise ValueError(
                f"{where}: no token of answer={answer!r} is left within max_length={self.max_length}; raise it, or "
                "set the tokenizer's truncation_side to 'left'"
            )
        if not units:
            raise ValueError(
                f"{where}: no token of prompt={prompt!r:.80} is left within max_length={self.max_length}; "
                "leave the row out, or raise max_length"
            )
        return units

    def _images(self, where: str, row: Mapping[str, Any]) -> list[Any]:
        images = row.get("images")
        if images is None:
            return []
        if not isinstance(images, (list, tuple)):
            raise ValueError(
                f"{where} has images={images!r:.80}, of type {type(images).__name__}; give a list, of one image too: "
                "[image]"
            )
        if any(image is None for image in images):
            raise ValueError(f"{where} has images={images!r:.80} with None in it; give every image, or leave it out")
        return list(images)

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
