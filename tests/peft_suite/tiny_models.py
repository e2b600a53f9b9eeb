"""Random tiny models, saved under the hub ids that PEFT's tests use, as relative folders.

    python tiny_models.py FOLDER

With FOLDER as the working directory, `from_pretrained("peft-internal-testing/...")` is local. The names stay the
same, so that what the tests do by name still applies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

TOKENS = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
WIDE = {**TOKENS, **DECODER, "hidden_size": 32, "num_key_value_heads": 2, "intermediate_size": 48}
GPT = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ENCODER = {**DECODER, "vocab_size": 128, "hidden_size": 32, "intermediate_size": 37}
BART = {
    **TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "tie_word_embeddings": False,  # tied, it repeats one token whatever the adapter does
}
T5 = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": lambda: OPTForCausalLM(
        OPTConfig(**TOKENS, **DECODER, ffn_dim=16, word_embed_proj_dim=16)
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: GPTJForCausalLM(
        GPTJConfig(**GPT, rotary_dim=4, tie_word_embeddings=False)
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: LlamaForCausalLM(
        LlamaConfig(**TOKENS, **DECODER, intermediate_size=32)
    ),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**WIDE)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**WIDE, head_dim=8)
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": lambda: T5ForConditionalGeneration(
        T5Config(**T5)
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": lambda: BartForConditionalGeneration(
        BartConfig(**BART)
    ),
    "peft-internal-testing/tiny-random-BertModel": lambda: BertModel(BertConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: RobertaModel(RobertaConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: DebertaModel(
        DebertaConfig(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: DebertaV2Model(DebertaV2Config(**ENCODER)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: BertForSequenceClassification(
        BertConfig(**ENCODER, num_labels=2)
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: RobertaForSequenceClassification(
        RobertaConfig(**ENCODER, num_labels=2)
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: LlamaForSequenceClassification(
        LlamaConfig(**TOKENS, **DECODER, intermediate_size=32, num_labels=1)
    ),
}
# An adapter that PEFT's config tests load by name.
ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"


def main(folder: Path) -> None:
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    # Norms and biases as after training: behind a fresh norm, sum(output ** 2) has no gradient.
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                elif id(parameter) not in embeddings:
                    # At the usual standard deviation of 0.02 an adapter's effect hides below the tests' tolerances.
                    # Larger embeddings would hide it again: the residual stream would carry little else.
                    parameter.mul_(5.0)
        model.save_pretrained(folder / name)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        base_model_name_or_path="peft-internal-testing/tiny-random-OPTForCausalLM",
    )
    lora.save_pretrained(folder / ADAPTER)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
