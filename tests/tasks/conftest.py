"""A folder of made-up data, and tiny models with a tokenizer, as `from_pretrained` takes them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [a + b for a in "bdfgkm" for b in ("ad", "el", "im", "on", "ur", "ak", "ep", "it", "og", "us")]
SAID = ["true", "false", "positive", "negative", "Claim", "Review", "Sentiment", "Question", "Answer", ":", "?", "or"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def sentence(i: int, n: int = 8) -> str:
    return " ".join(random.Random(i).choices(WORDS, k=n))


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def tokenizer(template: str = "[CLS] $A [SEP]", **options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *SAID])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = template.replace("[SEP]", "[SEP] $B [SEP]")
    special = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", **options)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    tokenizer(cls_token="[CLS]", sep_token="[SEP]").save_pretrained(path)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS + SAID), hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder")
    tokenizer(bos_token="[CLS]", eos_token="[SEP]").save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS + SAID), hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=2, eos_token_id=3,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5")
    tokenizer("$A [SEP]", eos_token="[SEP]").save_pretrained(path)
    config = T5Config(
        vocab_size=len(SPECIAL + WORDS + SAID), d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, pad_token_id=0,
        eos_token_id=3, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bart")
    tokenizer(bos_token="[CLS]", eos_token="[SEP]").save_pretrained(path)
    config = BartConfig(
        vocab_size=len(SPECIAL + WORDS + SAID), d_model=16, encoder_layers=3, decoder_layers=3,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3,
        forced_eos_token_id=None, init_std=0.1,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = 2  # as in BART's own
    model.save_pretrained(path)
    return path


@pytest.fixture
def write() -> Callable[[Path, str, list[dict[str, Any]]], Path]:
    """(folder, name, rows) -> the file folder/name.jsonl."""
    return write_rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """IMDB whose label is the first word's first letter, FEVER, T-REx, STS-B, CommonsenseQA and unlabelled text."""
    folder = tmp_path / "data"
    for split, start, count in (("train", 0, 60), ("dev", 1000, 12), ("test", 2000, 16)):
        texts = [sentence(i) for i in range(start, start + count)]
        write_rows(folder, f"reviews/imdb/{split}", [{"text": t, "label": int(t[0] in "bdf")} for t in texts])
        claims = [
            {"id": str(i), "input": t, "output": [{"answer": ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")[i % 3]}]}
            for i, t in enumerate(texts)
        ]
        write_rows(folder, f"kilt/fever/{split}", claims)
        facts = [{"input": t, "output": [{"answer": t.split()[0]}, {"answer": t.split()[1]}]} for t in texts]
        write_rows(folder, f"kilt/trex_slotfilling/{split}", facts)
        pairs = [{"sentence1": t, "sentence2": t[::-1], "score": i % 6} for i, t in enumerate(texts)]
        write_rows(folder, f"glue/stsb/{split}", pairs)
        asked = [{"question": t, "choices": t.split()[: 2 + i % 3], "answer": i % 2} for i, t in enumerate(texts)]
        write_rows(folder, f"commonsenseqa/{split}", asked)
    write_rows(folder, "unlabelled/biomed_sentences", [{"text": sentence(i, 12)} for i in range(3000, 3030)])
    write_rows(folder, "unlabelled/imdb_unsup", [{"text": sentence(i, 12)} for i in range(3100, 3130)])
    write_rows(folder, "unlabelled/amazon_reviews", [{"text": sentence(i, 12)} for i in range(3200, 3210)])
    write_rows(folder, "glue/mnli/train", [{"premise": sentence(i, 6)} for i in range(4000, 4140)])
    write_rows(folder, "glue/qnli/train", [{"sentence": sentence(i, 7)} for i in range(5000, 5120)])
    return folder
