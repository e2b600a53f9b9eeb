"""Batches of texts and images, or of texts and sounds, for `ImageInputs` and `AudioInputs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mixadapters.core.columns import numbered, require_padding, text_of
from mixadapters.core.fields import check_integer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MediaTextCollator:
    """Batches of prompts, answers and what an encoder reads; an item of it stands whole in a row, or not at all.

    What images and sounds have in common; the classes below say the rest.
    """

    column: ClassVar[str]
    item: ClassVar[str]  # what the column holds, in messages
    count: ClassVar[str]  # the field that says how many tokens stand for an item
    tokenizer: PreTrainedTokenizerBase
    token_id: int
    max_length: int | None
    marker: str

    def __post_init__(self) -> None:
        require_padding(self.tokenizer)
        check_integer("token_id", self.token_id, least=0)
        check_integer(self.count, getattr(self, self.count), least=1)
        if self.max_length is not None:
            check_integer("max_length", self.max_length, least=1)
        if not isinstance(self.marker, str) or not self.marker:
            raise ValueError(
                f"marker={self.marker!r} must be a text that stands for the {self.item}, as '<image>' does"
            )

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
        items = [
            (where, item) for (where, _), row in zip(named, rows, strict=True) for *_, item in row if item is not None
        ]
        if items:
            batch |= self._encoded(items)
        return batch

    def _encoded(self, items: list[tuple[str, Any]]) -> dict[str, Tensor]:
        """What the processor makes of (name of the row, item) pairs."""
        raise NotImplementedError

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        side = self.tokenizer.padding_side
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    def _units(self, where: str, row: Mapping[str, Any]) -> list[tuple[list[int], bool, Any]]:
        """What a row consists of and may be cut between: (its tokens, whether they are answer, its item)."""
        prompt, items = text_of(where, row, "prompt"), self._items(where, row)
        answer = None if row.get("answer") is None else text_of(where, row, "answer")
        parts = prompt.split(self.marker)
        if len(parts) != len(items) + 1:
            raise ValueError(
                f"{where}: prompt={prompt!r} has {len(parts) - 1} markers {self.marker!r} for {len(items)} "
                f"{self.column}; write one where each goes"
            )
        begin = self.tokenizer("")["input_ids"]
        units = [([t], False, None) for t in begin if t == self.tokenizer.bos_token_id]
        for part, item in zip(parts, [*items, None], strict=True):
            units += [([t], False, None) for t in self._tokens(part)]
            if item is not None:
                units.append(([self.token_id] * getattr(self, self.count), False, item))
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

    def _items(self, where: str, row: Mapping[str, Any]) -> list[Any]:
        items = row.get(self.column)
        if items is None:
            return []
        if not isinstance(items, (list, tuple)):
            raise ValueError(
                f"{where} has {self.column}={items!r:.80}, of type {type(items).__name__}; give a list, of one "
                f"{self.item} too: [{self.item}]"
            )
        if any(item is None for item in items):
            raise ValueError(
                f"{where} has {self.column}={items!r:.80} with None in it; give every {self.item}, or leave it out"
            )
        return list(items)

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


@dataclass
class ImageTextCollator(MediaTextCollator):
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

    column, item, count = "images", "image", "tokens_per_image"

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    token_id: int
    tokens_per_image: int
    max_length: int | None = None
    marker: str = "<image>"

    def _encoded(self, images: list[tuple[str, Any]]) -> dict[str, Tensor]:
        """pixel_values (I, 3, H, W); what the processor has to say of an image is said with its row."""
        if not callable(self.image_processor):
            raise ValueError(f"{images[0][0]} has an image, but image_processor={self.image_processor!r} takes none")
        try:
            found = self.image_processor(images=[image for _, image in images], return_tensors="pt")["pixel_values"]
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
        for (where, image), pixels in zip(images, found, strict=False):
            if not torch.as_tensor(pixels).isfinite().all():
                raise ValueError(f"{where} has an image with values that are NaN or infinite, {image!r:.80}")
        return {"pixel_values": found}


@dataclass
class AudioTextCollator(MediaTextCollator):
    """Batches of prompts, answers and sounds; as `ImageTextCollator`, with clips in a column `audio`.

    A clip is an array (S,) of samples at the feature extractor's rate, or `{"array": (S,), "sampling_rate": int}`, as
    datasets have it, whose rate must be that.

    Args:
        tokenizer, token_id, max_length, marker: as for `ImageTextCollator`.
        feature_extractor: that of the audio encoder; clips are padded to the longest of a batch, or, for Whisper, to
            the seconds that it always reads.
        tokens_per_clip: how many placeholders stand for a clip.

    Returns (when called with B rows):
        input_ids, attention_mask (B, T); labels (B, T), if there are answers; input_features (A, ...) and
        feature_attention_mask (A, time), if there are clips.

    Raises:
        ValueError: as for `ImageTextCollator`; a clip that is no (S,) array of finite numbers, is empty, has another
            rate, or is longer than Whisper reads.
    """

    column, item, count = "audio", "clip", "tokens_per_clip"

    tokenizer: PreTrainedTokenizerBase
    feature_extractor: Any
    token_id: int
    tokens_per_clip: int
    max_length: int | None = None
    marker: str = "<audio>"

    def _encoded(self, clips: list[tuple[str, Any]]) -> dict[str, Tensor]:
        rate = getattr(self.feature_extractor, "sampling_rate", None)
        if rate is None:
            raise ValueError(
                f"{clips[0][0]} has a clip, but feature_extractor={self.feature_extractor!r:.80} takes none; give "
                "that of the audio encoder: AutoFeatureExtractor.from_pretrained(...)"
            )
        most = getattr(self.feature_extractor, "n_samples", None)  # Whisper's, which would cut what is longer
        found = self.feature_extractor(
            [self._samples(where, clip, rate, most) for where, clip in clips], sampling_rate=rate, return_tensors="pt",
            padding="longest" if most is None else "max_length", return_attention_mask=True,
        )  # fmt: skip
        features = found[self.feature_extractor.model_input_names[0]]
        return {"input_features": features, "feature_attention_mask": found["attention_mask"]}

    def _samples(self, where: str, clip: Any, rate: int, most: int | None) -> np.ndarray:
        """(S,) of a clip, checked."""
        if isinstance(clip, Mapping):
            if clip.get("sampling_rate") != rate or "array" not in clip:
                raise ValueError(
                    f"{where} has a clip with sampling_rate={clip.get('sampling_rate')!r}, where the encoder reads "
                    f"{rate}; give {{'array', 'sampling_rate'}}, resampled: dataset.cast_column('audio', "
                    f"Audio(sampling_rate={rate}))"
                )
            clip = clip["array"]
        try:
            samples = np.asarray(clip)
        except ValueError as error:
            raise ValueError(f"{where} has a clip {clip!r:.80} that is no array of samples: {error}") from None
        if not np.issubdtype(samples.dtype, np.floating):
            raise ValueError(
                f"{where} has a clip {clip!r:.80} of {samples.dtype}, where floats from -1 to 1 are samples; divide "
                "integers by their largest, such as clip / 32768"
            )
        if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
            raise ValueError(
                f"{where} has a clip {samples.shape} that is no sound of one channel; give finite samples (S,), such "
                "as the mean of its channels"
            )
        if most is not None and len(samples) > most:
            raise ValueError(
                f"{where} has a clip of {len(samples) / rate:.1f} seconds, where the encoder reads {most / rate:.0f}; "
                "cut it into several, each with a marker"
            )
        return samples.astype(np.float32)
