"""How far general text has moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixadapters.tasks.retention import token_loss

TEXTS = ["bad bel bim bon bur bak", "dad", "fad fel fim"]


def test_loss_of_texts_is_that_of_their_tokens_whatever_is_padded(decoder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(decoder), AutoTokenizer.from_pretrained(decoder)
    torch.nn.init.normal_(model.lm_head.weight)
    losses = []
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            said = model(ids).logits[0, :-1].log_softmax(-1)
            losses += (-said.gather(1, ids[0, 1:, None])).flatten().tolist()
    assert token_loss(model.train(), tokenizer, TEXTS, 16) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert not model.training


def test_no_texts_have_no_loss(decoder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(decoder), AutoTokenizer.from_pretrained(decoder)
    assert token_loss(model, tokenizer, [], 16) == 0
