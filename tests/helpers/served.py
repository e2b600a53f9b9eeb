"""What servers serve in tests, and what each request gets alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mixadapters import BottleneckConfig, ForwardContext, MixDAConfig, MoAConfig
from mixadapters.serving import AdapterServer

CAUSAL = {"task_type": "CAUSAL_LM"}
KINDS: dict[str, Callable[..., Any]] = {
    "bottleneck": lambda **f: BottleneckConfig(**{"r": 3, **CAUSAL, **f}),
    "moa": lambda **f: MoAConfig(**{"num_experts": 3, "r": 3, "target_modules": ["down_proj"], **CAUSAL, **f}),
    "mixda": lambda **f: MixDAConfig(**{"domains": ["a", "b"], "r": 3, **CAUSAL, **f}),
    "lora": lambda **f: LoraConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], **CAUSAL, **f}),
}


def tried(server: AdapterServer, folders: Mapping[str, Path]) -> AdapterServer:
    """The server with these adapters, each of which lies in the model, as if none of its form had been tried."""
    for name, folder in folders.items():
        server.adapters._forms.clear()
        server.load(name, folder)
    return server


def generated(model: nn.Module, prompt: list[int], adapter: str, tokens: int) -> list[int]:
    """What `generate` makes of a prompt alone."""
    settings = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    ids = torch.tensor([prompt])
    with torch.no_grad(), ForwardContext.of(model).pin_in_thread(adapter_names=[adapter]):
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return output[0, len(prompt) :].tolist()


CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def word_tokenizer(size: int = 96) -> PreTrainedTokenizerFast:
    """Words "w5" to "w95", and the roles of a chat; everything else is unknown."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "system", *(f"w{i}" for i in range(7, size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT
    return made
