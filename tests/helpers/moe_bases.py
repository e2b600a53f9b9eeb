"""Tiny MoE base models, one for each row of the table."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from originals import Original
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForTokenClassification

EXPERTS, WIDTH, RANK, VOCAB = 6, 32, 24, 96
# Small sizes under all the names that configurations give them; those that a configuration lacks are left out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "mamba_n_heads", "mamba_d_state", "mamba_dt_rank"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "num_hidden_layers"), 2),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), RANK),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_head", "sliding_window"), 16),
    **dict.fromkeys(("first_k_dense_replace", "n_shared_experts", "n_group", "topk_group", "num_expert_group"), 1),
    "hidden_size": WIDTH, "vocab_size": VOCAB, "max_position_embeddings": 64, "shared_expert_intermediate_size": 20,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_mamba_kernels": False, "mamba_expand": 2,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "jamba": {"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "bailing_hybrid": {"layer_group_size": 2},
    "kimi_linear": {"layer_types": ["full_attention", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["attention", "moe"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
}
OTHER_HEADS = {"openai_privacy_filter": AutoModelForTokenClassification}


@functools.cache
def _made(kind: str, options: tuple[tuple[str, Any], ...]) -> Original:
    config = CONFIG_MAPPING[kind]
    known = config().to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    torch.manual_seed(0)
    head = OTHER_HEADS.get(kind, AutoModelForCausalLM)
    model = head.from_config(config(**{**sizes, **OVERRIDES.get(kind, {}), **dict(options)})).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("correction_bias", "expert_bias", "router.bias")):
                tensor.normal_(std=0.01)
            elif tensor.dim() >= 2:
                tensor.normal_(std=0.3)
    return Original(model)


def moe(kind: str, **options: Any) -> nn.Module:
    """A copy of a tiny model of a type: two layers, six experts of which a token uses two."""
    return _made(kind, tuple(options.items())).copy()


def batch() -> dict[str, Tensor]:
    """Two rows of nine tokens, the first of which begins with four of padding."""
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, T, V) with 0 at padding, whose values mean nothing."""
    return model(**batch).logits * batch["attention_mask"].unsqueeze(-1)


@contextmanager
def forced_off(rows: list[Tensor], experts: list[int]) -> Iterator[None]:
    """Whatever multiplies by one of these routers' weights gives its experts' logits of -10000."""
    where = {row.data_ptr() for row in rows}
    plain = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = plain(x, weight, bias)
        if weight.data_ptr() in where:
            y = y.index_fill(-1, torch.tensor(experts), -1e4)
        return y

    torch.nn.functional.linear = linear  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.linear = plain
