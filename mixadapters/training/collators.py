"""Batches for stage 1: masked objects, pairs of texts, and general text beside the domain's own.

Plain masked and causal language modelling need nothing of ours: transformers' `DataCollatorForLanguageModeling` on
truncated texts, padded per batch, with `train_sampling_strategy="group_by_length"` in `TrainingArguments`. (MixDA's
paper masks 85 / 5 / 10: `mask_replace_prob=0.85, random_replace_prob=0.05`.)

These collators read raw text, and their columns are not arguments of the base model's forward: pass
`remove_unused_columns=False` to `TrainingArguments`, or Trainer drops the columns before they get here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mixadapters.core.columns import (
    numbered,
    require_lengths,
    require_padding,
    some_text_of,
    text_of,
)
from mixadapters.core.fields import check_integer
from mixadapters.core.processes import rank, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIPLE = ("subject", "relation", "object")
NO_LIMIT = 1_000_000  # tokenizers without a length limit say 1e30


@dataclass
class ObjectMaskingCollator:
    """Masks every token of one object per text, and nothing else; the model is to name the object.

    A row of the dataset is one of
    - `{"text": str, "object": (start, end)}`: the object's characters are `text[start:end]`;
    - `{"text": str, "object": str}`: the object occurs exactly once in the text. An absent object is an error, and so
      is one that occurs again: masking one occurrence while another stays visible leaves a copying task;
    - `{"subject": str, "relation": str, "object": str}`: verbalised by `template`, so the span is known and not
      searched for. Values are inserted as they are: braces in them mean nothing.

    Other columns of a row are left out of the batch, and None counts as absent. `dataset.filter(collator.usable)`
    removes beforehand the rows that would be refused.

    The base model's own loss on this batch is the mean over all masked tokens, so long objects weigh more. For the
    mean per text first (specification of the structured loss in MixDA, section 3.2 of the paper) attach
    `MaskedObjectObjective`.

    Args:
        tokenizer: a fast tokenizer with a mask token and a padding token.
        template: how a triple reads, for example `"{subject} is located at {object}."`, or one such string per
            relation; `{{` and `}}` stand for braces. Default: `"{subject} {relation} {object}."`.
        max_length: texts are cut to so many tokens; default: the tokenizer's limit. An object that is cut off is an
            error.
        pad_to_multiple_of: passed on to the tokenizer.

    Returns (when called with B rows):
        `input_ids`, `attention_mask` (B, T), `labels` (B, T) with -100 outside the object, and what else the
        tokenizer makes for its model.

    Raises:
        ValueError: a tokenizer that cannot do this, or a row whose object cannot be located, is cut off, or ends
            inside a token.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | Mapping[str, str] | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    _templates: dict[str | None, list[tuple[str, str | None]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require_padding(self.tokenizer)
        require_lengths(self.tokenizer, self.max_length, self.pad_to_multiple_of)
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"tokenizer {type(self.tokenizer).__name__} does not know which characters a token covers; "
                "load the fast one: AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        if self.tokenizer.mask_token is None:
            raise ValueError(
                f"tokenizer {type(self.tokenizer).__name__} has no mask_token; masked objects need a masked language "
                "model and its tokenizer"
            )
        template = "{subject} {relation} {object}." if self.template is None else self.template
        given = dict(template) if isinstance(template, Mapping) and template else {None: template}
        self._templates = {relation: _parse(text) for relation, text in given.items()}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = numbered(features)
        located = [self.locate(row, where) for where, row in rows]
        texts = [text for text, _, _ in located]
        starts, ends = (torch.tensor([row[i] for row in located])[:, None] for i in (1, 2))  # (B, 1)
        batch = self.tokenizer(
            texts,
            padding=True,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_offsets_mapping=True,
            return_tensors="pt",
            **_cut(self.tokenizer, self.max_length),
        )
        first, last = batch.pop("offset_mapping").unbind(-1)  # (B, T) each; special tokens and padding cover (0, 0)
        hidden = (last > starts) & (first < ends) & (last > first)
        for i, (where, _) in enumerate(rows):
            tokens = hidden[i].nonzero().flatten().tolist()
            self._check(where, *located[i], [(int(first[i, t]), int(last[i, t])) for t in tokens])
        batch["labels"] = batch["input_ids"].masked_fill(~hidden, -100)
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden, self.tokenizer.mask_token_id)
        return dict(batch)

    def locate(self, row: Mapping[str, Any], where: str = "the row") -> tuple[str, int, int]:
        """The text of a row, called `where` in messages, and the first and one-past-last character of its object."""
        # A dataset fills up with None what a row lacks.
        if "text" not in row or (row["text"] is None and row.get("subject") is not None):
            return self._verbalise(row, where)
        text, target = text_of(where, row, "text"), row.get("object")
        if isinstance(target, str):
            start = text.find(target) if target.strip() else -1
            if start < 0:
                raise ValueError(
                    f"{where}: object={target!r} does not occur in text={_short(text)}; case and spaces count"
                )
            if text.find(target, start + 1) >= 0:
                raise ValueError(
                    f"{where}: object={target!r} occurs more than once in text={_short(text)}; say which one is meant "
                    "by a span: object=(start, end)"
                )
            return text, start, start + len(target)
        if not isinstance(target, Sequence) or len(target) != 2 or not all(_whole(place) for place in target):
            raise ValueError(
                f"{where}: object={target!r:.80} is neither a string nor (start, end), two whole numbers, of "
                f"text={_short(text)}"
            )
        start, end = int(target[0]), int(target[1])
        if not (0 <= start < end <= len(text) and text[start:end].strip()):
            raise ValueError(
                f"{where}: object=({start}, {end}) covers no character of text={_short(text)}, length {len(text)}"
            )
        return text, start, end

    def usable(self, row: Mapping[str, Any]) -> bool:
        """Whether the row can be masked; for `dataset.filter`."""
        try:
            self([row])
        except ValueError:
            return False
        return True

    def _verbalise(self, row: Mapping[str, Any], where: str) -> tuple[str, int, int]:
        missing = [name for name in TRIPLE if not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(
                f"{where} with the columns {sorted(map(str, row))} has neither 'text' nor a string in {missing}; give "
                "'text' and 'object', or 'subject', 'relation' and 'object', and pass remove_unused_columns=False to "
                "TrainingArguments"
            )
        for column in TRIPLE:
            text_of(where, row, column)
        if not row["object"].strip():
            raise ValueError(f"{where}: object={row['object']!r} of subject={row['subject']!r} has nothing to mask")
        parts = self._templates.get(row["relation"], self._templates.get(None))
        if parts is None:
            raise ValueError(
                f"{where}: relation={row['relation']!r} has no template; template has "
                f"{sorted(map(str, self._templates))}"
            )
        text, start = "", 0
        for literal, name in parts:
            text += literal
            if name is not None:
                start = len(text) if name == "object" else start
                text += row[name]
        return text, start, start + len(row["object"])

    def _check(self, where: str, text: str, start: int, end: int, tokens: list[tuple[int, int]]) -> None:
        """Refuses an object that the masked tokens, given by their characters, do not match."""
        target = text[start:end]
        low = min((first for first, _ in tokens), default=end)
        high = max((last for _, last in tokens), default=start)
        if low > start + len(target) - len(target.lstrip()) or high < start + len(target.rstrip()):
            raise ValueError(
                f"{where}: object={target!r} is not wholly among the tokens of text={_short(text)}; raise "
                f"max_length={self.max_length} or shorten the text"
            )
        beyond = text[low:start].strip() + text[end:high].strip()
        if beyond:
            raise ValueError(
                f"{where}: object={target!r} shares a token with {beyond!r} in text={_short(text)}; give a span that "
                "begins and ends between tokens"
            )


@dataclass
class PairCollator:
    """Pairs of texts for the contrastive loss, in one batch so that one forward sees both views.

    A row is `{"text": str}` (the text is paired with itself and dropout makes the two views, as in SimCSE) or
    `{"text": str, "positive": str}`. Other columns are left out of the batch, and None counts as absent.

    Partners are neighbours: rows 2i and 2i + 1. A batch that is cut in even parts, by `nn.DataParallel` or by
    accelerate's `dispatch_batches`, therefore keeps its pairs whole; with all anchors first it would tear them apart.

    Args:
        tokenizer: a tokenizer with a padding token.
        max_length: texts are cut to so many tokens; default: the tokenizer's limit.
        pad_to_multiple_of: passed on to the tokenizer.

    Returns (when called with B rows):
        `input_ids`, `attention_mask` (2B, T), padded together; `labels` (2B,): the number of the pair that a row
        belongs to, which `ContrastiveObjective` takes. Trainer computes an evaluation loss only where there are
        labels.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        require_padding(self.tokenizer)
        require_lengths(self.tokenizer, self.max_length, self.pad_to_multiple_of)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts: list[str] = []
        for where, row in numbered(features):
            partner = "text" if row.get("positive") is None else "positive"
            texts += some_text_of(where, row, "text"), some_text_of(where, row, partner)
        batch = self.tokenizer(
            texts,
            padding=True,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors="pt",
            **_cut(self.tokenizer, self.max_length),
        )
        return {**batch, "labels": torch.arange(len(features)).repeat_interleave(2)}


class WithGeneralText:
    """Adds to every batch a batch of general text, on which `PreservationObjective` measures the old-domain loss.

    The general texts are drawn in shuffled order, without replacement until all have been used, then in another
    order. The order depends on the seed alone, not on the global random state. Processes of a distributed run draw
    disjoint parts of it.

    Resuming: `state_dict` counts the batches made, so a run that loads it goes on where it stopped. Keep it beside
    the checkpoint; a Trainer that loads one batch ahead has counted that batch too, which then is skipped. With
    dataloader workers every worker counts for itself, on a copy that ends with the epoch: texts stay disjoint among
    workers and each epoch has an order of its own (it follows the dataloader's seed), but the state of the original
    does not move. Use `dataloader_num_workers=0` where a resumed run must draw the same texts.

    Args:
        collator: makes the batch of domain text; any callable that Trainer takes as `data_collator`.
        general: the general texts: strings, or rows with a "text" column; with a length and an index.
        tokenizer: the base model's tokenizer, with a padding token.
        max_length: general texts are cut to so many tokens.
        batch_size: B', general texts per batch.
        seed: of the order.

    Returns (when called):
        the collator's batch with `old_input_ids` and `old_attention_mask` (B', T'), padded by themselves with the
        tokenizer's padding token. Position ids are left to the model.
    """

    def __init__(
        self,
        collator: Callable[[Any], Mapping[str, Any]],
        general: Sequence[str] | Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if not callable(collator):
            raise TypeError(f"collator={collator!r} cannot be called; give what Trainer takes as data_collator")
        require_padding(tokenizer)
        refuses = Dataset.__getitem__  # torch's own, which streams have, also those that know their length
        indexed = hasattr(general, "__len__") and getattr(type(general), "__getitem__", refuses) is not refuses
        if not indexed or isinstance(general, (str, bytes, Mapping)):
            raise TypeError(
                f"general={type(general).__name__} has no length, or no texts by number; give a list of texts or a "
                "dataset of rows (for a streamed one: its first rows as a list)"
            )
        check_integer("batch_size", batch_size, least=1)
        if batch_size > len(general):
            raise ValueError(f"batch_size={batch_size} must be from 1 to the number of general texts, {len(general)}")
        check_integer("max_length", max_length, least=1)
        require_lengths(tokenizer, max_length)
        check_integer("seed", seed, least=0)
        self.collator, self.general, self.tokenizer = collator, general, tokenizer
        self.max_length, self.batch_size, self.seed = max_length, batch_size, seed
        self._drawn = 0
        self._order: tuple[tuple[int, ...], np.ndarray] | None = None

    def __call__(self, features: Any) -> dict[str, Any]:
        batch = self.collator(features)
        if not isinstance(batch, Mapping):
            raise TypeError(f"the collator in WithGeneralText returned a {type(batch).__name__}, not a batch by name")
        if "old_input_ids" in batch:
            raise ValueError("the batch already has 'old_input_ids'; wrap a collator in WithGeneralText once")
        rows = [(f"general[{i}]", self.general[i]) for i in self._draw()]
        old = self.tokenizer(
            [some_text_of(where, row if isinstance(row, Mapping) else {"text": row}, "text") for where, row in rows],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {**batch, "old_input_ids": old["input_ids"], "old_attention_mask": old["attention_mask"]}

    def state_dict(self) -> dict[str, int]:
        """How many batches were drawn, and from what."""
        return {"seed": self.seed, "texts": len(self.general), "batch_size": self.batch_size, "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on after the batches that `state` counts; refuses the state of another order."""
        if not isinstance(state, Mapping):
            raise ValueError(f"state={state!r:.80} is not what state_dict() gave")
        mine = self.state_dict()
        for name in ("seed", "texts", "batch_size"):
            if state.get(name) != mine[name]:
                raise ValueError(
                    f"the state was saved with {name}={state.get(name)}, this collator has {name}={mine[name]}; "
                    "the order of general texts would not go on"
                )
        check_integer("drawn", state.get("drawn"), least=0)
        self._drawn = int(state["drawn"])

    def _draw(self) -> list[int]:
        """Indices of the next B' general texts of this process and dataloader worker."""
        lane, lanes = rank(), world_size()
        key: tuple[int, ...] = (self.seed,)
        worker = get_worker_info()
        if worker is not None:
            lane, lanes = lane * worker.num_workers + worker.id, lanes * worker.num_workers
            key = (self.seed, worker.seed - worker.id)  # the dataloader's seed, another one each epoch
        first = (self._drawn * lanes + lane) * self.batch_size
        self._drawn += 1
        return [self._at(key, i) for i in range(first, first + self.batch_size)]

    def _at(self, key: tuple[int, ...], i: int) -> int:
        """Index of the i-th text of the endless shuffled stream."""
        turn, place = divmod(i, len(self.general))
        key = (*key, turn)
        if self._order is None or self._order[0] != key:
            self._order = key, np.random.default_rng(key).permutation(len(self.general))
        return int(self._order[1][place])


def _parse(template: Any) -> list[tuple[str, str | None]]:
    """A template as literals, each followed by a field's name or by None."""
    if not isinstance(template, str):
        raise ValueError(f"template={template!r} is neither a string nor a string per relation")
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template={template!r} cannot be read: {error}; write a brace as {{{{ or }}}}") from None
    names = [name for _, name, _, _ in parsed if name is not None]
    if not set(names) <= set(TRIPLE) or names.count("object") != 1 or any(s or c for _, _, s, c in parsed):
        raise ValueError(
            f"template={template!r} must have {{object}} once, and may have {{subject}} and {{relation}}, each "
            "without format or conversion; write a brace as {{ or }}"
        )
    return [(literal, name) for literal, name, _, _ in parsed]


def _cut(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> dict[str, Any]:
    """Truncation arguments: to `max_length`, else to the tokenizer's own limit where it has one."""
    if max_length is None and tokenizer.model_max_length < NO_LIMIT:
        max_length = tokenizer.model_max_length
    return {"truncation": max_length is not None, "max_length": max_length}


def _whole(place: Any) -> bool:
    return isinstance(place, Integral) and not isinstance(place, bool)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
