"""Where each type of MoE base model keeps its experts: one table.

In transformers 5 all of these hold them in fused tensors, `gate_up_proj` (E, 2 r, K) and `down_proj` (E, M, r), or
their transposes, in a module that is called with hidden states, indices and weights. Beside it is a router whose first
output are the logits. A test runs a small model of every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Base:
    """What differs between the types of base models. Names are those inside the block that holds the experts."""

    router: str = "gate"  # the module whose first output are the logits
    rows: tuple[str, ...] = ("gate.weight",)  # tensors with one entry for each expert, the router's weight first
    # Whether what a row gives to experts that it does not use lowers its weights: a softmax over all experts, of which
    # the chosen are not made to sum to 1 again. A string: unless this attribute of the router says that they are.
    competes: bool | str = False
    groups: str | None = None  # the router's attribute of the number of groups among which a row chooses first
    scores: Literal["softmax", "sigmoid"] = "softmax"  # from logits to the router's distribution
    activation: str | None = None  # of its own, that the config does not name


# fmt: off
# Families, and the values of `config.model_type`.
CORRECTED = Base(rows=("gate.weight", "gate.e_score_correction_bias"), groups="num_group", scores="sigmoid")
ROWS: tuple[tuple[Base, str], ...] = (
    (Base(), "mixtral minimax cohere2_moe qwen3_5_moe_text"),
    (Base(competes="norm_topk_prob"), "qwen2_moe qwen3_moe qwen3_next olmoe flex_olmo mellum"),
    (Base(rows=("gate.wg.weight",)), "hunyuan_v1_moe"),
    (Base(rows=("gate.weight", "gate.moe_statics.e_score_correction_bias")), "ernie4_5_moe"),
    (Base(competes=True, groups="num_group"), "deepseek_v2"),
    (CORRECTED, "deepseek_v3 deepseek_v32 axk1 axk2 dots1 exaone_moe glm4_moe glm4_moe_lite glm_moe_dsa kimi_linear "
                "bailing_hybrid mimo_v2_flash nemotron_h solar_open"),
    (Base(rows=("gate.weight", "gate.e_score_correction_bias"), scores="sigmoid"), "laguna"),
    (Base(rows=("gate.weight", "e_score_correction_bias"), scores="sigmoid"), "hy_v3 minimax_m2"),
    (Base(rows=("gate.weight", "expert_bias"), scores="sigmoid", activation="silu"), "lfm2_moe"),
    (Base("router", ("router.gate.weight", "expert_bias"), scores="sigmoid"), "afmoe"),
    (Base("router", ("router.weight", "router.bias"), activation="gpt_oss"), "gpt_oss openai_privacy_filter"),
    (Base("router", ("router.weight",)), "granitemoe granitemoehybrid granitemoeshared granitemoe_swa aria_text"),
    (Base("router", ("router.weight",), competes=True), "jamba phimoe"),
)
# fmt: on
BASES = {name: base for base, names in ROWS for name in names.split()}
