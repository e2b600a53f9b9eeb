"""Tiny random models and their inputs, without a network."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from originals import Original
from torch import Tensor, nn

# One letter per axis: d = WIDTH, the FFN intermediate is FFN wide; four layers: a first, a last and two between.
VOCAB, WIDTH, FFN, LAYERS, HEADS, POSITIONS, LABELS = 96, 32, 48, 4, 4, 64, 3
IMAGE, PATCH = 16, 8
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "num_labels": LABELS,
    "pad_token_id": 0,
}
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "max_position_embeddings": POSITIONS,
    "num_labels": LABELS,
    **TOKENS,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_inner": FFN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": POSITIONS,
    "num_labels": LABELS,
    **TOKENS,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_ff": FFN,
    "d_kv": WIDTH // HEADS,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "num_labels": LABELS,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VIT = {
    "image_size": IMAGE,
    "patch_size": PATCH,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_labels": LABELS,
}
_DISTILBERT = {
    "vocab_size": VOCAB,
    "dim": WIDTH,
    "hidden_dim": FFN,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "num_labels": LABELS,
    "pad_token_id": 0,
}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "ffn_dim": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "word_embed_proj_dim": WIDTH,
    "num_labels": LABELS,
    **TOKENS,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "num_labels": LABELS,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **TOKENS,
}
_MOE = {"moe_intermediate_size": FFN // 2, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}

# kind -> (configuration class, its arguments, what the model reads)
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertConfig", _ENCODER, "text"),
    "roberta": (
        "RobertaConfig",
        {**_ENCODER, "pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": POSITIONS + 2},
        "text",
    ),
    "distilbert": ("DistilBertConfig", _DISTILBERT, "text"),
    "deberta_v2": ("DebertaV2Config", _ENCODER, "text"),
    "vit": ("ViTConfig", _VIT, "image"),
    "gpt2": ("GPT2Config", _GPT2, "text"),
    "opt": ("OPTConfig", _OPT, "text"),
    "llama": ("LlamaConfig", _DECODER, "text"),
    "mistral": ("MistralConfig", {**_DECODER, "sliding_window": None}, "text"),
    "qwen2": ("Qwen2Config", _DECODER, "text"),
    "qwen3": ("Qwen3Config", {**_DECODER, "head_dim": WIDTH // HEADS}, "text"),
    "gemma3": ("Gemma3TextConfig", {**_DECODER, "head_dim": WIDTH // HEADS}, "text"),
    "mixtral": ("MixtralConfig", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, "text"),
    "qwen3_moe": ("Qwen3MoeConfig", {**_DECODER, **_MOE, "head_dim": WIDTH // HEADS}, "text"),
    "t5": ("T5Config", _T5, "encoder-decoder"),
    "t5_gated": ("T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}, "encoder-decoder"),
    "bart": ("BartConfig", _BART, "encoder-decoder"),
}

# What the configurations call the number of layers, of either stack.
_DEPTH = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers"}
_DEPTH |= {"decoder_layers"}

# head -> Auto class; None, the default, is the head that a checkpoint of the kind usually has
HEADS_OF_MODELS = {
    "base": transformers.AutoModel,
    "causal_lm": transformers.AutoModelForCausalLM,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "seq2seq_lm": transformers.AutoModelForSeq2SeqLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "token_classification": transformers.AutoModelForTokenClassification,
    "image_classification": transformers.AutoModelForImageClassification,
}
_ENCODERS = ("bert", "roberta", "distilbert", "deberta_v2")


def _usual_head(kind: str) -> str:
    if kind in _ENCODERS:
        return "masked_lm"
    return {"image": "image_classification", "encoder-decoder": "seq2seq_lm"}.get(KINDS[kind][2], "causal_lm")


def _enlarge(model: nn.Module) -> None:
    """Draw weights that keep activations near one: with the usual 0.02 an adapter's effect drowns in rounding."""
    generator = torch.Generator().manual_seed(0)
    padding = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # biases, and the scales of norms, which are ones
                parameter.add_(noise, alpha=0.1)
            elif id(parameter) in padding:
                parameter.copy_(noise).mul_(0.5)
                if padding[id(parameter)] is not None:
                    parameter[padding[id(parameter)]] = 0
            elif name.endswith(("cls_token", "position_embeddings", "mask_token")):
                parameter.copy_(noise).mul_(0.5)
            else:
                # GPT-2 keeps (in, out), all others (..., out, in), convolutions (out, in, h, w).
                fan_in = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
                parameter.copy_(noise).mul_(fan_in**-0.5)


_made: dict[str, Original] = {}


def tiny(kind: str, head: str | None = None, layers: int = LAYERS, **overrides: Any) -> nn.Module:
    """A tiny random model in eval mode, a fresh copy with the same weights at every call.

    `kind` is a key of ``KINDS``; `head` one of "base", "causal_lm", "masked_lm", "seq2seq_lm",
    "sequence_classification", "token_classification", "image_classification", by default the one whose output has
    ``logits`` over the vocabulary (or labels, for images); `layers` the number of layers of each stack; `overrides`
    are fields of the configuration.
    Width 32, FFN 48 (per expert 24 in Qwen3-MoE), 4 heads, 96 tokens, 3 labels.
    """
    head = head or _usual_head(kind)
    key = repr((kind, head, layers, sorted(overrides.items(), key=str)))
    if key not in _made:
        config_class, arguments, _ = KINDS[kind]
        depth = dict.fromkeys(_DEPTH & arguments.keys(), layers)
        config = getattr(transformers, config_class)(**{**arguments, **depth, **overrides})
        state = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = HEADS_OF_MODELS[head].from_config(config)
        torch.set_rng_state(state)
        _enlarge(model)
        _made[key] = Original(model.eval())
    return _made[key].copy()


def tiny_inputs(
    kind: str,
    batch: int = 2,
    length: int = 7,
    padding: str | None = None,
    labels: str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs for the models of `tiny`; equal arguments give equal tensors.

    `padding` "left" or "right" makes row b shorter by b tokens (at least one remains); `labels` is None, "tokens" (the
    input itself, -100 at padding) or "classes" (B,). Returns input_ids (B, T) and attention_mask (B, T), for T5 and
    BART decoder_input_ids (B, T) too unless there are labels; for images pixel_values (B, 3, 16, 16).
    """
    generator = torch.Generator().manual_seed(seed)
    reads, pad = KINDS[kind][2], KINDS[kind][1].get("pad_token_id")
    inputs: dict[str, Tensor] = {}
    if reads == "image":
        inputs["pixel_values"] = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    else:
        # Identifiers below 5 may be special tokens.
        ids = torch.randint(5, VOCAB, (batch, length), generator=generator)
        mask = torch.ones(batch, length, dtype=torch.long)
        if padding is not None:
            missing = torch.arange(batch).clamp(max=length - 1)
            position = torch.arange(length)
            kept = {
                "right": position < length - missing[:, None],
                "left": position >= missing[:, None],
            }[padding]
            mask = kept.long()
            ids = ids.masked_fill(~kept, pad)
        inputs["input_ids"], inputs["attention_mask"] = ids, mask
        if labels == "tokens":
            inputs["labels"] = ids.masked_fill(mask == 0, -100)
        elif reads == "encoder-decoder" and labels == "classes":
            # These heads read the state at the end-of-sequence token, and make the decoder's input themselves.
            inputs["input_ids"] = ids.scatter(1, mask.cumsum(1).argmax(1, keepdim=True), 2)
        elif reads == "encoder-decoder":
            inputs["decoder_input_ids"] = torch.randint(5, VOCAB, (batch, length), generator=generator)
    if labels == "classes":
        inputs["labels"] = torch.arange(batch) % LABELS
    return inputs
