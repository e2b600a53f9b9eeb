"""Where each architecture keeps its sublayers: one table of module paths, and what paths say of a module.

A role is a regular expression for `re.fullmatch` against a module's path in any model, with or without a head. The
rows say what the models of transformers 5.23 do; a test runs a small model of every one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from mixadapters.core.registry import nearest
from mixadapters.core.walking import outside_adapters


@dataclass(frozen=True)
class Architecture:
    """The paths of one architecture's sublayers; None where it has no such module.

    `attention` and `ffn` take the sublayer's input and give its output before the residual, or a tuple that begins
    with it. A norm is named only where the sublayer takes its output, so not in post-norm models; where
    `attention_norm` finds modules and `ffn_norm` finds none, attention and FFN run in parallel on that one norm.
    """

    attention: str | None = None
    attention_norm: str | None = None
    attention_output: str | None = None  # the linear that ends self-attention
    cross_attention_output: str | None = None
    query: str | None = None  # named like `value`, from which it is derived
    value: str | None = None
    qkv: str | None = None  # query, key and value in one linear, in place of `query` and `value`
    ffn: str | None = None
    ffn_norm: str | None = None
    ffn_input: str | None = None  # a module that takes the FFN's input
    ffn_output: str | None = None  # the down projection, whose input is the FFN's intermediate
    # Whether positions see no later ones, where attention does not say so itself; a string is the pattern of the
    # layers that a mask makes causal, whatever attention says. Of two stacks only the decoder is causal.
    causal: bool | str = False


ROLES = tuple(field.name for field in fields(Architecture) if field.name != "causal")

# fmt: off
# Families. Paths are relative to a layer; `#` is an index, `a|b` a choice of paths.
BERT = Architecture(  # post-norm, and the FFN is no module of its own
    attention_output="attention.output.dense", value="attention.self.value",
    cross_attention_output="crossattention.output.dense",
    ffn_input="intermediate.dense", ffn_output="output.dense",
)
MPNET = replace(BERT, attention_output="attention.attn.o", value="attention.attn.v", cross_attention_output=None)
ALBERT = replace(  # all layers share one set of weights, and so one site
    MPNET, attention_output="attention.dense", value="attention.value", ffn_input="ffn", ffn_output="ffn_output",
)
DISTILBERT = Architecture(  # post-norm
    attention="attention", attention_output="attention.out_lin", value="attention.v_lin",
    ffn="ffn", ffn_input="ffn.lin1", ffn_output="ffn.lin2",
)
MODERNBERT = Architecture(
    attention="attn", attention_norm="attn_norm", attention_output="attn.Wo", qkv="attn.Wqkv",
    ffn="mlp", ffn_norm="mlp_norm", ffn_input="mlp.Wi", ffn_output="mlp.Wo",
)
LLAMA = Architecture(
    attention="self_attn", attention_norm="input_layernorm", attention_output="self_attn.o_proj",
    value="self_attn.v_proj",
    ffn="mlp", ffn_norm="post_attention_layernorm", ffn_input="mlp.gate_proj", ffn_output="mlp.down_proj",
    causal=True,
)
POST_NORM_LLAMA = replace(LLAMA, attention_norm=None, ffn_norm=None)
PLAIN_LLAMA = replace(LLAMA, ffn_input="mlp.up_proj")
GEMMA2 = replace(LLAMA, ffn_norm="pre_feedforward_layernorm")
GLM = replace(LLAMA, ffn_input="mlp.gate_up_proj")
HYBRID = replace(  # linear attention, without `value`, in most layers
    LLAMA, attention="self_attn|linear_attn", attention_output="self_attn.o_proj|linear_attn.out_proj",
)
MOE = replace(LLAMA, ffn_input="mlp", ffn_output=None)  # the whole block, shared experts included; or a dense FFN
GPT2 = Architecture(
    attention="attn", attention_norm="ln_1", attention_output="attn.c_proj", qkv="attn.c_attn",
    cross_attention_output="crossattention.c_proj",
    ffn="mlp", ffn_norm="ln_2", ffn_input="mlp.c_fc", ffn_output="mlp.c_proj",
    causal=True,
)
GPT_NEO = replace(
    GPT2, attention_output="attn.attention.out_proj", value="attn.attention.v_proj", qkv=None,
    cross_attention_output=None,
)
GPTJ = replace(
    GPT_NEO, attention_output="attn.out_proj", value="attn.v_proj", ffn_norm=None, ffn_input="mlp.fc_in",
    ffn_output="mlp.fc_out",
)
GPT_NEOX = Architecture(  # in parallel by default, each sublayer with a norm of its own
    attention="attention", attention_norm="input_layernorm", attention_output="attention.dense",
    qkv="attention.query_key_value",
    ffn="mlp", ffn_norm="post_attention_layernorm", ffn_input="mlp.dense_h_to_4h", ffn_output="mlp.dense_4h_to_h",
    causal=True,
)
FALCON = replace(  # its norms differ from size to size
    GPT_NEOX, attention="self_attention", attention_norm="input_layernorm|ln_attn",
    attention_output="self_attention.dense", qkv="self_attention.query_key_value",
    ffn_norm="post_attention_layernorm|ln_mlp",
)
BLOOM = replace(  # its sublayers add the residual themselves
    FALCON, attention=None, attention_norm="input_layernorm", ffn=None, ffn_norm="post_attention_layernorm",
)
MPT = Architecture(  # its FFN adds the residual itself
    attention="attn", attention_norm="norm_1", attention_output="attn.out_proj", qkv="attn.Wqkv",
    ffn_norm="norm_2", ffn_input="ffn.up_proj", ffn_output="ffn.down_proj", causal=True,
)
LFM2 = Architecture(  # convolutions, without `value`, in most layers
    attention="self_attn|conv", attention_norm="operator_norm", attention_output="self_attn.out_proj|conv.out_proj",
    value="self_attn.v_proj",
    ffn="feed_forward", ffn_norm="ffn_norm", ffn_input="feed_forward.w1", ffn_output="feed_forward.w2", causal=True,
)
BART = Architecture(  # post-norm, and the FFN is no module of its own
    attention="self_attn", attention_output="self_attn.out_proj", cross_attention_output="encoder_attn.out_proj",
    value="self_attn.v_proj", ffn_input="fc1", ffn_output="fc2",
)
MBART = replace(BART, attention_norm="self_attn_layer_norm", ffn_norm="final_layer_norm")
OPT = replace(MBART, cross_attention_output=None, causal=True)  # opt-350m alone is post-norm
T5 = Architecture(
    attention="block.#.layer.0.SelfAttention", attention_norm="block.#.layer.0.layer_norm",
    attention_output="block.#.layer.0.SelfAttention.o", value="block.#.layer.0.SelfAttention.v",
    cross_attention_output="block.#.layer.1.EncDecAttention.o",
    ffn="block.#.layer.#.DenseReluDense", ffn_input="block.#.layer.#.DenseReluDense.(?:wi|wi_0)",
    ffn_norm="encoder.block.#.layer.1.layer_norm|decoder.block.#.layer.2.layer_norm",
    ffn_output="block.#.layer.#.DenseReluDense.wo",
)
VIT = Architecture(  # the later names are those of older releases, where the FFN is no module of its own
    attention="attention", attention_norm="layernorm_before",
    attention_output="attention.(?:o_proj|output.dense)", value="attention.(?:v_proj|attention.value|self.value)",
    ffn="mlp", ffn_norm="layernorm_after", ffn_input="mlp.fc1|intermediate.dense", ffn_output="mlp.fc2|output.dense",
)
DINOV2 = replace(
    VIT, attention_norm="norm1", ffn_norm="norm2", ffn_input="mlp.(?:fc1|gate_proj|weights_in)",
    ffn_output="mlp.(?:fc2|down_proj|weights_out)",
)
DINOV3 = replace(DINOV2, ffn_input="mlp.up_proj", ffn_output="mlp.down_proj")
CLIP = replace(
    VIT, attention="self_attn", attention_norm="layer_norm1", attention_output="self_attn.out_proj",
    value="self_attn.v_proj", ffn_norm="layer_norm2",
)
CONVNEXT = Architecture(  # (B, height, width, d), and no attention
    ffn_norm="layernorm", ffn_input="pwconv1", ffn_output="pwconv2",
)
# (B, d, height, width). The convolution of kernel 1 that ends a bottleneck layer; what comes before it has other
# widths and strides. Layers of two convolutions (ResNet-18 and -34) have none.
RESNET = Architecture(ffn_output="layer.(?:2|3).convolution")
WAV2VEC2 = Architecture(  # post-norm, but pre-norm in the large models
    attention="attention", attention_output="attention.out_proj", value="attention.v_proj",
    ffn="feed_forward", ffn_input="feed_forward.intermediate_dense", ffn_output="feed_forward.output_dense",
)

# (the layer's path, the family, values of `config.model_type`)
ROWS: tuple[tuple[str, Architecture, str], ...] = (
    ("layer.#", BERT, "bert roberta xlm-roberta camembert electra ernie rembert data2vec-text longformer big_bird"),
    ("layer.#", replace(BERT, value=None, qkv="attention.self.in_proj"), "deberta"),
    ("layer.#", replace(BERT, value="attention.self.value_proj"), "deberta-v2"),
    ("layer.#", replace(BERT, attention_norm="attention.LayerNorm", ffn_norm="intermediate.LayerNorm"),
     "roberta-prelayernorm"),
    ("layer.#", replace(BERT, attention_norm="attention.LayerNorm", ffn_norm="LayerNorm"), "esm"),
    ("layer.#", MPNET, "mpnet"),
    ("albert_layers.#", ALBERT, "albert"),
    ("transformer.layer.#", DISTILBERT, "distilbert"),
    ("layers.#", MODERNBERT, "modernbert"),
    ("layers.#", replace(LLAMA, causal=False), "eurobert"),
    ("layers.#", replace(POST_NORM_LLAMA, causal=False), "nomic_bert"),
    ("layers.#", LLAMA, "llama mistral ministral ministral3 qwen2 qwen3 gemma smollm3 granite olmo helium seed_oss "
                        "cwm ernie4_5 hunyuan_v1_dense stablelm diffllama"),
    ("language_model.layers.#", LLAMA, "llava mistral3 qwen2_vl qwen2_5_vl qwen3_vl qwen2_audio paligemma internvl"),
    ("text_model.layers.#", LLAMA, "idefics3 smolvlm"),
    ("language_model.layers.#", replace(LLAMA, attention="self_attn|cross_attn", attention_output="self_attn.o_proj",
                                        cross_attention_output="cross_attn.o_proj"), "mllama"),
    ("layers.#", POST_NORM_LLAMA, "olmo2 olmo3 exaone4"),
    ("layers.#", GEMMA2, "gemma2 gemma3_text"),
    ("language_model.layers.#", GEMMA2, "gemma3"),
    ("layers.#", GLM, "glm glm4"),
    ("layers.#", replace(GLM, value=None, qkv="self_attn.qkv_proj"), "phi3"),
    ("layers.#", HYBRID, "qwen3_5_text"),
    ("layers.#", replace(LLAMA, ffn_norm=None), "cohere cohere2"),
    ("layers.#", PLAIN_LLAMA, "nemotron arcee"),
    ("layers.#", replace(PLAIN_LLAMA, ffn_input="mlp.c_fc", ffn_output="mlp.c_proj"), "starcoder2"),
    ("layers.#", replace(PLAIN_LLAMA, attention_output="self_attn.dense", ffn_norm=None, ffn_input="mlp.fc1",
                         ffn_output="mlp.fc2"), "phi"),
    ("layers.#", MOE, "mixtral qwen2_moe qwen3_moe olmoe phimoe minimax_m2 glm4_moe ernie4_5_moe hunyuan_v1_moe"),
    ("layers.#", replace(MOE, value=None), "deepseek_v2 deepseek_v3 glm4_moe_lite"),
    ("layers.#", replace(MOE, attention_norm=None, ffn_norm=None), "flex_olmo"),
    ("layers.#", MOE, "gpt_oss"),  # its block gives a tuple
    ("layers.#", replace(MOE, ffn="feed_forward", ffn_input="feed_forward"), "llama4_text"),  # a tuple, with (N, d)
    ("layers.#", replace(MOE, ffn="block_sparse_moe", ffn_input="block_sparse_moe"), "granitemoe"),
    ("layers.#", replace(HYBRID, ffn_input="mlp", ffn_output=None), "qwen3_next qwen3_5_moe_text"),
    ("h.#", GPT2, "gpt2 gpt_bigcode"),
    ("h.#", replace(GPT2, attention=None, attention_norm=None, ffn_norm=None, cross_attention_output=None),
     "openai-gpt"),  # post-norm, and its attention gives a list
    ("h.#", GPT_NEO, "gpt_neo"),
    ("h.#", GPTJ, "gptj"),
    ("h.#", replace(GPTJ, value=None, qkv="attn.qkv_proj"), "codegen"),
    ("layers.#", GPT_NEOX, "gpt_neox"),
    ("layers.#", replace(GPT_NEOX, attention="self_attn", attention_output="self_attn.dense",
                         qkv="self_attn.query_key_value"), "persimmon"),
    ("h.#", FALCON, "falcon"),
    ("h.#", BLOOM, "bloom"),
    ("blocks.#", MPT, "mpt"),
    ("layers.#", LFM2, "lfm2"),
    ("layers.#", OPT, "opt xglm biogpt"),
    ("layers.#", BART, "bart marian plbart blenderbot-small"),
    ("layers.#", MBART, "mbart pegasus m2m_100 blenderbot whisper"),
    ("", T5, "t5 mt5 umt5"),
    ("layers?.#", VIT, "vit deit beit vit_mae vit_msn ijepa audio-spectrogram-transformer"),
    ("layers.#.blocks.#", replace(VIT, ffn=None), "swin"),  # stages differ in width, so no `ffn`
    ("layers.#.blocks.#", replace(BERT, cross_attention_output=None), "swinv2"),
    ("stages.#.layers.#", CONVNEXT, "convnext convnextv2"),
    ("stages.#.layers.#", RESNET, "resnet regnet"),
    ("layer.#", DINOV2, "dinov2 dinov2_with_registers"),
    ("layer.#", DINOV3, "dinov3_vit"),
    # Text and images differ in width, so no `ffn`.
    ("encoder.layers.#", replace(CLIP, ffn=None, causal=r"(?:.*\.)?text_model\..*"), "clip"),
    ("encoder.layers.#", replace(CLIP, ffn=None), "siglip"),
    ("encoder.layers.#", CLIP, "clip_vision_model siglip_vision_model"),
    ("encoder.layers.#", replace(CLIP, causal=".*"), "clip_text_model"),
    ("encoder.layers.#", WAV2VEC2, "wav2vec2 hubert"),
)
# fmt: on


def _anchored(layer: str, family: Architecture) -> Architecture:
    """The family's paths inside `layer`, as patterns of full paths."""

    def pattern(paths: str) -> str:
        inside = f"{layer}.(?:{paths})" if layer else f"(?:{paths})"
        return r"(?:.*\.)?" + inside.replace(".", r"\.").replace("#", r"\d+")

    if family.value is not None:
        like_value = {"value": "query", "v": "q"}
        family = replace(family, query=re.sub(r"\b(?:value|v(?=_|\b))", lambda m: like_value[m[0]], family.value))
    anchored: dict[str, Any] = {role: pattern(paths) for role in ROLES if (paths := getattr(family, role))}
    return replace(family, **anchored)


ARCHITECTURES = {name: _anchored(layer, family) for layer, family, names in ROWS for name in names.split()}


def find_architecture(model_type: str, model: nn.Module | None = None) -> Architecture:
    """The row of `config.model_type`; ValueError with the nearest name and the remedy where there is none.

    model: whose modules the remedy names.
    """
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise ValueError(
        f"model_type={model_type!r} is not in the table of architectures.{nearest(model_type, ARCHITECTURES)} Please "
        f"specify `target_modules`{such_as(model)}, or `sites={{role: regular expression}}`, the roles being "
        f"{', '.join(ROLES)}"
    )


def such_as(model: nn.Module | None) -> str:
    """ ", such as [...]": names of two linear layers of a model, for messages that ask for `target_modules`.

    Those of numbered layers, or of all where there are none; "" where a model has no linear layer.
    """
    outside = () if model is None else outside_adapters(model)
    linear = [path for path, m in outside if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    linear = [re.sub(r"(\.base_layer)+$", "", path) for path in linear]
    within = [path for path in linear if layer_index(path) is not None] or linear
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in within))[:2]
    return f", such as {names}" if names else ""


# Where hidden states are (T, B, d): paths by `config.model_type`.
TOKENS_FIRST = {
    "xlnet": r"(?:.*\.)?layer\.\d+(?:\..*)?",
    "fsmt": r"(?:.*\.)?layers\.\d+(?:\..*)?",
    "longformer": r".*\.self\.(?:query|key|value)(?:_global)?",
    "led": r".*\.longformer_self_attn\.(?:query|key|value)(?:_global)?",
}


def tokens_first(path: str, model: nn.Module) -> bool:
    """Whether the module at `path` reads (T, B, d), not (B, T, d)."""
    pattern = TOKENS_FIRST.get(getattr(getattr(model, "config", None), "model_type", ""))
    return pattern is not None and re.fullmatch(pattern, path) is not None


def layer_index(path: str) -> int | None:
    """The first number in a path: `encoder.block.3.layer.1.DenseReluDense.wo` is in layer 3."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


GROUPS = {  # words in a module's name, for modules that the table does not know
    "cross_attention": ("crossattention", "crossattn", "encoderattn", "encdecattention"),
    "attention": ("attention", "attn"),
    "ffn": ("mlp", "ffn", "feedforward", "densereludense", "fc1", "fc2", "moe", "experts", "intermediate"),
}


def sublayer_of(path: str, row: Architecture | None) -> str:
    """The sublayer that a module lies in, "attention", "cross_attention" or "ffn"; "" where its name does not tell.

    row: of the model's architecture; None where the table has none.
    """
    row = Architecture() if row is None else row
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        for role in ROLES:
            if (pattern := getattr(row, role)) and re.fullmatch(pattern, ".".join(parts[:end])):
                return group_of(role)
    words = [part.replace("_", "").lower() for part in parts]
    return next((g for g, known in GROUPS.items() if any(k in word for word in words for k in known)), "")


def group_of(role: str) -> str:
    """The sublayer that a role belongs to."""
    if role.startswith(("ffn", "cross_attention")):
        return "ffn" if role.startswith("ffn") else "cross_attention"
    return "attention"


STACKS = ("", "encoder", "decoder")  # of text; parts that read images or sounds have others (`media_part`)


def has_two_stacks(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder."""
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True


def stack_of(path: str, model: nn.Module) -> str:
    """Which stack of an encoder-decoder model holds the module: "encoder" or "decoder"; "" in other models."""
    if not has_two_stacks(model):
        return ""
    return next((part for part in path.split(".") if part in ("encoder", "decoder")), "")


def is_causal(path: str, model: nn.Module, model_config: Mapping[str, Any]) -> bool:
    """Whether positions at this module must not see later ones: what the attention next to it says, or its row."""
    if stack := stack_of(path, model):
        return stack == "decoder"
    if model_config.get("is_decoder") or "CausalLM" in type(model).__name__:
        return True
    row = ARCHITECTURES.get(model_config.get("model_type", "custom"), Architecture())
    if isinstance(row.causal, str):
        return re.fullmatch(row.causal, path) is not None
    around = [model]
    for part in path.split("."):
        around.append(unwrapped(getattr(around[-1], part)))
    for module in reversed(around):  # its layer holds the attention that is next to it; of cross-attention False
        flags = [flag for _, m in outside_adapters(module) if isinstance(flag := getattr(m, "is_causal", None), bool)]
        if flags:
            return any(flags)
    return row.causal


def unwrapped(module: Any) -> Any:
    """The base model's own module inside the layers that tuners have put around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def is_pointwise(module: nn.Module) -> bool:
    """Whether `module` is a convolution that is a linear layer at every place."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.transposed:
        return False
    padded = isinstance(module.padding, str) or any(module.padding)
    return all(size == 1 for size in module.kernel_size) and module.groups == 1 and not padded


def hidden_size_of(config: Any) -> int | None:
    """Width d of the model; None where the config does not give it, or stages differ."""
    if getattr(config, "depths", None) is not None:
        return None
    parts = (config, getattr(config, "text_config", None))
    values = (getattr(part, name, None) for part in parts for name in ("hidden_size", "d_model", "n_embd", "dim"))
    return next((value for value in values if value is not None), None)
