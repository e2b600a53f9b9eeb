"""What training did to the old domain: how far general text moved, and what the model can still do with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from mixadapters.tasks.metrics import SCORES
from mixadapters.tasks.sources import Example
from mixadapters.training.objectives import pool

BATCH = 64


class Inside(nn.Module):
    """The encoder in a model with a head, called by way of the model: adapters read what that is given.

    model: gives its `encoder` the inputs that it takes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        outputs: list[Any] = []
        hook = self.model.encoder.register_forward_hook(lambda *call: outputs.append(call[-1]))
        try:
            self.model(**inputs)
        finally:
            hook.remove()
        return outputs[-1]


@torch.no_grad()
def embed(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> Tensor:
    """(N, d) masked means of the last hidden states, on the CPU; the model is left in evaluation mode."""
    encoder.eval()
    rows = []
    for batch in batches(encoder, tokenizer, texts, max_length):
        hidden = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        rows.append(pool(hidden, batch["attention_mask"], "mean").cpu())
    return torch.cat(rows)


def drift(before: Tensor, after: Tensor) -> float:
    """1 - the mean cosine between embeddings (N, d) of the same texts."""
    return 1 - F.cosine_similarity(before, after).mean().item()


def similarity(encoder: nn.Module, tokenizer: Any, pairs: Sequence[Example], max_length: int) -> float:
    """Spearman correlation of cosine and score over pairs of texts, such as those of STS-B; 0 where all cosines, or
    all scores, are the same."""
    first, second = (embed(encoder, tokenizer, [pair.texts[i] for pair in pairs], max_length) for i in (0, 1))
    return SCORES["spearman"](F.cosine_similarity(first, second).tolist(), [pair.target for pair in pairs])


@torch.no_grad()
def token_loss(lm: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> float:
    """Mean negative log-likelihood per token of texts under a causal model."""
    lm.eval()
    total, count = 0.0, 0
    for batch in batches(lm, tokenizer, texts, max_length):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = lm(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        total += float((losses * mask[:, 1:]).sum())
        count += int(mask[:, 1:].sum())
    return total / max(count, 1)


def batches(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> Any:
    """Yield padded batches of texts on the model's device."""
    device = next(model.parameters()).device
    for start in range(0, len(texts), BATCH):
        part = list(texts[start : start + BATCH])
        yield tokenizer(
            part, truncation=True, max_length=max_length, padding=True, padding_side="right", return_tensors="pt"
        ).to(device)
