"""Pretrained models in the form a task needs, and the batches that they take.

An encoder gets a head on its pooled states; a decoder, with an encoder or without, ranks labels or choices by their
likelihood after a prompt, or generates. Head and ranker have one interface: candidates in, scores (B, C) out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from mixadapters.tasks.registry import Task
from mixadapters.tasks.sources import Example
from mixadapters.training.objectives import pool

FORMS = ("head", "likelihood", "generate")


class PooledHead(nn.Module):
    """A linear head, `classifier`, on the pooled last states of an `encoder`.

    Args:
        encoder: gives `last_hidden_state`.
        outputs: classes; 1 for a score, or for a score per choice.
        pooling: "mean" of the valid tokens, or the "first" one.
    """

    def __init__(self, encoder: nn.Module, outputs: int, pooling: str = "mean") -> None:
        super().__init__()
        self.encoder, self.pooling, self.config = encoder, pooling, encoder.config
        self.classifier = nn.Linear(encoder.config.hidden_size, outputs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None,
        choice_mask: Tensor | None = None, **more: Tensor,
    ) -> SequenceClassifierOutput:  # fmt: skip
        """input_ids, attention_mask (R, T), labels (B,), choice_mask (B, C) with R True -> loss, logits (B, C)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        scores = self.classifier(pool(hidden, attention_mask, self.pooling).to(self.classifier.weight.dtype))
        return judged(scores if choice_mask is None else spread(scores.squeeze(-1), choice_mask), labels)


class LikelihoodRanker(nn.Module):
    """Scores completions of a prompt by their log-likelihood under `lm`, a causal or an encoder-decoder model.

    A causal model has prompt and completion in `input_ids`, and `completion_mask` on the latter. An encoder-decoder
    model reads the prompt in `input_ids` and writes `completion`, padded with -100.
    """

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm, self.config = lm, lm.config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, choice_mask: Tensor, completion_mask: Tensor | None = None,
        completion: Tensor | None = None, labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:  # fmt: skip
        """input_ids and its masks (R, T), completion (R, S), choice_mask (B, C) with R True -> loss, logits (B, C)."""
        if completion is not None:  # as labels: the model makes its decoder's inputs of them
            logits = self.lm(input_ids=input_ids, attention_mask=attention_mask, labels=completion).logits
        else:
            logits = self.lm(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
            assert completion_mask is not None
            completion = input_ids[:, 1:].masked_fill(completion_mask[:, 1:] == 0, -100)
        said = F.cross_entropy(logits.float().transpose(1, 2), completion, reduction="none")  # (R, S); 0 for -100
        return judged(spread(-said.sum(1), choice_mask), labels)


def spread(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores (R,) of all candidates in the rows (B, C) that they belong to; -inf where a row has fewer."""
    empty = torch.full(mask.shape, torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    return empty.masked_scatter(mask, scores)


def judged(scores: Tensor, labels: Tensor | None) -> SequenceClassifierOutput:
    """Scores with their loss: cross-entropy for labels that are numbers of classes, squared error for others."""
    if labels is None:
        return SequenceClassifierOutput(logits=scores)
    if labels.is_floating_point():
        return SequenceClassifierOutput(loss=F.mse_loss(scores.squeeze(-1).float(), labels), logits=scores)
    return SequenceClassifierOutput(loss=F.cross_entropy(scores.float(), labels), logits=scores)


def form_of(task: Task, config: PretrainedConfig) -> str:
    """How a model of this configuration does the task: one of FORMS. Raises ValueError where it cannot."""
    kind = config.model_type
    writes = config.is_encoder_decoder or (
        kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    if task.kind == "generation":
        if not writes:
            raise ValueError(f"task {task.name!r} wants text, which model_type={kind!r} cannot write; take a decoder")
        return "generate"
    if writes and task.kind == "regression":
        raise ValueError(f"task {task.name!r} wants a score: take an encoder, not model_type={kind!r}")
    return "likelihood" if writes else "head"


@dataclass
class Base:
    """A pretrained model by name, and what a task makes of it."""

    path: str
    task: Task
    pooling: str = "mean"
    max_length: int = 128

    def __post_init__(self) -> None:
        try:
            self.config = AutoConfig.from_pretrained(self.path)
        except OSError as error:
            raise ValueError(f"model={self.path!r} cannot be loaded: {error}") from error
        self.form = form_of(self.task, self.config)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.config.is_encoder_decoder:
            self.tokenizer.truncation_side = "left"  # prompts end with what is asked

    def check_length(self, new_tokens: int) -> None:
        """Raises ValueError: the model has fewer positions than its longest inputs need."""
        positions = self.positions()
        start = int(self.tokenizer.bos_token_id is not None)
        needed = {"--max-length": self.max_length}
        if self.form != "head" and not self.config.is_encoder_decoder:
            needed["a token to begin with"] = start
        if self.form == "generate" and not self.config.is_encoder_decoder:
            needed["--max-new-tokens"] = new_tokens
        if positions is not None and sum(needed.values()) > positions:
            parts = " + ".join(f"{count} of {name}" for name, count in needed.items() if count)
            raise ValueError(f"model {self.path!r} has {positions} positions, too few for {parts}; pass less of them")

    def positions(self) -> int | None:
        """How many tokens the model has positions for; None: it sets no number."""
        count = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(count, int) or count < 1:
            return None
        # RoBERTa and its kin number positions from behind that of padding.
        paddings = [
            module.padding_idx + 1
            for name, module in self.load(empty=True).named_modules()
            if isinstance(module, nn.Embedding)
            and name.endswith("position_embeddings")
            and module.padding_idx is not None
        ]
        return count - max(paddings, default=0)

    @property
    def outputs(self) -> int:
        return len(self.task.labels) or 1

    def load(self, empty: bool = False) -> nn.Module:
        """The pretrained part, with a head where the form has one; `empty`: on the meta device, to count weights."""
        auto = AutoModel if self.form == "head" else AutoModelForCausalLM
        if self.config.is_encoder_decoder:
            auto = AutoModelForSeq2SeqLM
        if empty:
            with torch.device("meta"):
                return self.headed(auto.from_config(self.config))
        return self.headed(auto.from_pretrained(self.path, dtype=torch.float32))

    def headed(self, model: nn.Module) -> nn.Module:
        return PooledHead(model, self.outputs, self.pooling) if self.form == "head" else model

    def features(self, examples: Sequence[Example], training: bool) -> list[dict[str, Any]]:
        """Rows of token ids for the collator of the task's form."""
        make: Callable[[Example], dict[str, Any]] = {
            "head": self._for_head, "likelihood": self._for_ranker,
            "generate": self._for_training if training else self._for_generation,
        }[self.form]  # fmt: skip
        return [make(example) for example in examples]

    def _target(self, example: Example) -> int | float:
        if self.task.kind != "regression":
            return example.target
        low, high = self.task.bounds
        return (example.target - low) / (high - low)

    def _for_head(self, example: Example) -> dict[str, Any]:
        first, rest = example.texts[0], " ".join(t for t in example.texts[1:] if t)
        pairs: list[tuple[str, str | None]] = [(f"{first} {rest}".strip(), c) for c in example.choices]
        pairs = pairs or [(first, rest or None)]
        encoded = [self.tokenizer(a, b, truncation=True, max_length=self.max_length) for a, b in pairs]
        names = [n for n in ("input_ids", "token_type_ids") if n in encoded[0]]
        return {"candidates": [{n: e[n] for n in names} for e in encoded], "labels": self._target(example)}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prompt(self, example: Example, room: int) -> list[int]:
        """Ids of the prompt, cut on the left to the length that leaves `room`."""
        text = self.task.prompt(example.texts)
        if self.config.is_encoder_decoder:
            return self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        ids = self._ids(text)[-max(1, self.max_length - room) :]
        start = self.tokenizer.bos_token_id
        return ids if start is None else [start, *ids]

    def _written(self, text: str) -> list[int]:
        """Ids of what an encoder-decoder model is to write, with special tokens as in its pretraining, and an end."""
        ids, end = self.tokenizer(text_target=text)["input_ids"], self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        return ids if len(ids) <= self.max_length else [*ids[: self.max_length - 1], ids[-1]]

    def _for_ranker(self, example: Example) -> dict[str, Any]:
        said = example.choices or self.task.said
        if self.config.is_encoder_decoder:
            prompt = self._prompt(example, 0)
            rows = [{"input_ids": prompt, "completion": self._written(a)} for a in said]
            return {"candidates": rows, "labels": example.target}
        answers = [self._ids(f" {a}") for a in said]
        if (longest := max(map(len, answers))) >= self.max_length:
            raise ValueError(
                f"an answer of {longest} tokens leaves no room in --max-length {self.max_length}; pass more"
            )
        prompt = self._prompt(example, longest)
        rows = [{"input_ids": prompt + a, "completion_mask": [0] * len(prompt) + [1] * len(a)} for a in answers]
        return {"candidates": rows, "labels": example.target}

    def _for_training(self, example: Example) -> dict[str, Any]:
        if self.config.is_encoder_decoder:
            return {"input_ids": self._prompt(example, 0), "labels": self._written(example.target[0])}
        answer = [*self._ids(f" {example.target[0]}")[: self.max_length // 2], self.tokenizer.eos_token_id]
        prompt = self._prompt(example, len(answer))
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def _for_generation(self, example: Example) -> dict[str, Any]:
        return {"input_ids": self._prompt(example, 0)}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows of `features` as one batch: see PooledHead, LikelihoodRanker; prompts to generate from on the left."""
        if "candidates" not in rows[0]:
            return self._pad(rows, left="labels" not in rows[0] and not self.config.is_encoder_decoder)
        batch = self._pad([c for row in rows for c in row["candidates"]], left=False)
        if self.task.kind == "choice" or self.form == "likelihood":
            counts = torch.tensor([len(row["candidates"]) for row in rows])
            batch["choice_mask"] = torch.arange(int(counts.max())) < counts[:, None]
        # Trainer takes the batch size from what comes first.
        return {"labels": torch.tensor([row["labels"] for row in rows]), **batch}

    def _pad(self, rows: Sequence[Mapping[str, Any]], left: bool) -> dict[str, Tensor]:
        """Every column padded to its longest row, and the mask of `input_ids`."""
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
        fill = {"input_ids": self.tokenizer.pad_token_id, "labels": -100, "completion": -100}
        return {name: torch.tensor(padded(values, fill.get(name, 0), left)) for name, values in columns.items()}


def padded(rows: Sequence[list[int]], fill: int, left: bool) -> list[list[int]]:
    """Rows filled up to the longest of them."""
    longest = max(map(len, rows))
    gaps = [[fill] * (longest - len(row)) for row in rows]
    return [gap + row if left else row + gap for gap, row in zip(gaps, rows, strict=True)]
