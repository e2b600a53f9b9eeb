"""The table of sites against a small random model of every architecture in it."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel

from mixadapters.core.sites import (
    ARCHITECTURES,
    ROLES,
    Architecture,
    find_architecture,
    hidden_size_of,
    is_causal,
    layer_index,
    stack_of,
)

# Small sizes under all the names that configurations give them; those that a configuration lacks are left out.
WIDTH, FFN, DECODER_FFN, LAYERS, DECODER_LAYERS = 32, 48, 40, 2, 3
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim", "encoder_ffn_dim"), FFN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("d_kv", "head_dim", "patch_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "decoder_ffn_dim": DECODER_FFN,
    "decoder_layers": DECODER_LAYERS,
    "num_decoder_layers": DECODER_LAYERS,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "projection_dim": WIDTH,
    "image_size": 16,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
STAGES = {"depths": [2, 1], "num_heads": [2, 4], "patch_size": 4, "embed_dim": WIDTH, "window_size": 2}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
CONVOLUTIONS = {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {
        "max_length": 32,
        "num_mel_bins": 16,
        "time_stride": 8,
        "frequency_stride": 8,
    },
    "codegen": {"rotary_dim": 4},
    "convnext": {"depths": [2, 1], "hidden_sizes": [16, 32], "num_stages": 2},
    "convnextv2": {"depths": [2, 1], "hidden_sizes": [16, 32], "num_stages": 2},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe": {"first_k_dense_replace": 1},
    "glm4_moe_lite": {**LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "hubert": CONVOLUTIONS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mllama": {
        "text_config": {"num_hidden_layers": 2, "cross_attention_layers": [1], "rope_parameters": ROPE},
        "vision_config": {
            "num_global_layers": 1,
            "attention_heads": 4,
            "max_num_tiles": 2,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2]],
        },
    },
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen2_vl": {"text_config": MROPE},
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_next": HYBRID,
    "swin": STAGES,
    "swinv2": STAGES,
    "wav2vec2": CONVOLUTIONS,
    "whisper": {"max_source_positions": 64, "max_target_positions": 64},
}
# Other forms of the same architectures.
VARIANTS: dict[str, dict[str, Any]] = {
    "bert decoder": {"is_decoder": True, "add_cross_attention": True},
    "dinov2 gated": {"use_swiglu_ffn": True},
    "dinov3_vit gated": {"use_gated_mlp": True},
    "falcon 40b": {"new_decoder_architecture": True},
    "falcon 1b": {"parallel_attn": False},
    "gemma3_text bidirectional": {"use_bidirectional_attention": True},
    "gpt2 decoder": {"add_cross_attention": True},
    "gpt_neox sequential": {"use_parallel_residual": False},
    "llama4_text dense": {"interleave_moe_layer_step": 2},
    "longformer short": {"attention_window": 4},
    "stablelm parallel": {"use_parallel_residual": True},
    "t5 gated": {"feed_forward_proj": "gated-gelu"},
}
CONVOLUTIONAL = {"resnet", "regnet"}  # channels come second, and there is no more than the last of a layer
CASES = [*(name for name in ARCHITECTURES if name not in CONVOLUTIONAL), *VARIANTS]
# By the module: all tests of a case run one after the other, in the one process that has made its model.
every_case = pytest.mark.parametrize("case", CASES, scope="module")
# Modules per role where they are not one per layer.
SITES = {"albert": 1, "clip": 2 * LAYERS, "siglip": 2 * LAYERS, "swin": 3, "swinv2": 3, "convnext": 3, "convnextv2": 3}
FFN_WIDTHS = {"dinov2 gated": 88}
ONE_NORM_FOR_BOTH = {"falcon", "stablelm parallel"}
GIVES_TUPLE = {"gpt_oss", "llama4_text", "llama4_text dense"}
PERMUTES_TOKENS = {"swin"}  # windows are cut between norm and attention


class Call(NamedTuple):
    input: Tensor
    output: Any


class Trial(NamedTuple):
    """A model that ran once: for every role the paths it matches, and what these modules took and gave."""

    architecture: Architecture
    model: nn.Module
    found: dict[str, list[str]]
    calls: dict[str, list[Call]]

    def pairs(self, first: str, second: str) -> list[tuple[Call, Call]]:
        """Calls of the modules of two roles, layer by layer; none where only some layers have them."""
        one, two = (self.found.get(role, []) for role in (first, second))
        if len(one) != len(two):
            return []
        return [pair for a, b in zip(one, two, strict=True) for pair in zip(self.calls[a], self.calls[b], strict=True)]


def tiny_config(model_type: str, **overrides: Any) -> Any:
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    overrides = {**OVERRIDES.get(model_type, {}), **overrides}
    named = {
        name: value
        for name, value in SIZES.items()
        if hasattr(default, name)
        and name not in default.attribute_map
        and not hasattr(kind.__dict__.get(name), "fget")
    }
    for part in ("text_config", "vision_config", "audio_config"):
        if part in kind.sub_configs:
            sizes = {name: value for name, value in SIZES.items() if hasattr(getattr(default, part), name)}
            named[part] = {**sizes, **overrides.pop(part, {})}
    return kind(**{**named, **overrides})


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    ids, main = torch.randint(3, 90, (2, 8)), model.main_input_name
    inputs = {
        "input_ids": {"input_ids": ids},
        "pixel_values": {"pixel_values": torch.randn(2, 3, 16, 16)},
        "input_features": {"input_features": torch.randn(2, 80, 128)},
        "input_values": {"input_values": torch.randn(2, 400)},
    }[main]
    if model.config.model_type == "qwen2_audio":
        return {"input_ids": ids}
    if model.config.model_type == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(2, 32, 16)}
    if model.config.model_type in ("clip", "siglip"):
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
    if model.config.model_type == "mllama":
        inputs["pixel_values"] = torch.randn(2, 1, 2, 3, 16, 16)
        inputs["aspect_ratio_ids"], inputs["aspect_ratio_mask"] = torch.full((2, 1), 2), torch.ones(2, 1, 2).long()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    if getattr(model.config, "add_cross_attention", False):
        inputs["encoder_hidden_states"] = torch.randn(2, 6, WIDTH)
    return inputs


@functools.cache
def run(case: str) -> Trial:
    torch.manual_seed(0)
    model_type = case.split()[0]
    architecture = find_architecture(model_type)
    model = AutoModel.from_config(tiny_config(model_type, **VARIANTS.get(case, {}))).eval()
    patterns = {role: getattr(architecture, role) for role in ROLES if getattr(architecture, role)}
    found = {
        role: [path for path, _ in model.named_modules() if re.fullmatch(pattern, path)]
        for role, pattern in patterns.items()
    }
    calls: dict[str, list[Call]] = {path: [] for paths in found.values() for path in paths}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            calls[path].append(Call(args[0] if args else kwargs["hidden_states"], output))

        return hook

    with torch.no_grad():
        for parameter in model.parameters():  # large enough to tell one activation from another
            if parameter.dim() == 2:
                parameter.mul_(4)
    for path in calls:
        model.get_submodule(path).register_forward_hook(keep(path), with_kwargs=True)
    with torch.no_grad():
        model(**inputs_of(model))
    return Trial(architecture, model, found, calls)


def tensor_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def same(a: Tensor, b: Tensor) -> bool:
    """Equal values, whether or not batch and tokens are one axis."""
    return a.numel() == b.numel() and torch.allclose(a.reshape(-1), b.reshape(-1), rtol=1e-4, atol=1e-5)


def expected_sites(case: str, role: str) -> int:
    config = run(case).model.config
    layers = SITES.get(case, LAYERS + DECODER_LAYERS if config.is_encoder_decoder else LAYERS)
    if role == "cross_attention_output":
        if config.is_encoder_decoder:
            return DECODER_LAYERS
        if crossing := getattr(config.get_text_config(), "cross_attention_layers", None):
            return len(crossing)
        return layers if getattr(config, "add_cross_attention", False) else 0
    crossing = getattr(config.get_text_config(), "cross_attention_layers", None)
    if role in ("attention_output", "query", "value") and crossing:
        return layers - len(crossing)
    kinds = OVERRIDES.get(case, {}).get("layer_types")
    if role in ("query", "value") and kinds:
        return kinds.count("full_attention")
    if role == "ffn_norm" and case in ONE_NORM_FOR_BOTH:
        return 0
    return layers


def test_docs_list_the_types_of_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "using-with-peft.md").read_text(encoding="utf-8")
    section = page.partition("## Which models")[2].partition("\n| ")[0]
    listed = section.partition("values of `model_type`:")[2]
    assert re.findall(r"`([^`]+)`", listed) == sorted(ARCHITECTURES)


@every_case
def test_every_layer_has_its_sites_and_runs_them(case):
    trial = run(case)
    for role, paths in trial.found.items():
        assert len(paths) == expected_sites(case, role), (role, paths)
        for path in paths:
            assert trial.calls[path], f"{path} is never called"
            assert isinstance(layer_index(path), int)
            assert (stack_of(path, trial.model) != "") == trial.model.config.is_encoder_decoder


@every_case
def test_patterns_take_full_paths_at_any_depth(case):
    trial = run(case)
    for role, paths in trial.found.items():
        pattern = getattr(trial.architecture, role)
        for path in paths:
            assert re.fullmatch(pattern, f"base_model.model.model.{path}")
            assert not re.fullmatch(pattern, f"{path}.base_layer")


@every_case
def test_ffn_block_takes_the_input_and_gives_the_output(case):
    trial = run(case)
    blocks = trial.pairs("ffn", "ffn_input")
    assert any(isinstance(block.output, tuple) for block, _ in blocks) == (case in GIVES_TUPLE)
    for block, leaf in blocks:
        assert same(block.input, leaf.input)
        assert tensor_of(block.output).numel() == block.input.numel()
    for block, leaf in trial.pairs("ffn", "ffn_output"):
        assert same(tensor_of(block.output), leaf.output)
    assert "ffn" in trial.found or "ffn_output" in trial.found
    assert trial.pairs("ffn_input", "ffn_output") or trial.pairs("ffn", "ffn_input")


@every_case
def test_ffn_output_takes_the_intermediate(case):
    trial = run(case)
    config = trial.model.config
    for path in trial.found.get("ffn_output", []):
        width = trial.calls[path][0].input.shape[-1]
        sizes = FFN_WIDTHS.get(case) or (
            DECODER_FFN if path.startswith("decoder") and hasattr(config, "decoder_ffn_dim") else FFN
        )
        assert width in (sizes, 4 * trial.calls[path][0].output.shape[-1])


@every_case
def test_norms_give_what_the_sublayers_take(case):
    trial = run(case)
    for norm, reader in (("ffn_norm", "ffn_input"), ("attention_norm", "attention")):
        assert bool(trial.pairs(norm, reader)) == bool(trial.found.get(norm) and trial.found.get(reader))
    for norm, leaf in trial.pairs("ffn_norm", "ffn_input"):
        assert same(norm.output, leaf.input)
    if case not in PERMUTES_TOKENS:
        for norm, block in trial.pairs("attention_norm", "attention"):
            assert same(norm.output, block.input)
    if trial.found.get("attention_norm") and not trial.found.get("ffn_norm"):
        shared = trial.pairs("attention_norm", "ffn_input")
        assert shared
        assert all(same(norm.output, leaf.input) for norm, leaf in shared)


@every_case
def test_attention_takes_its_input_and_gives_its_output(case):
    trial = run(case)
    for block, leaf in trial.pairs("attention", "attention_output"):
        assert same(tensor_of(block.output), leaf.output)
    for role in ("query", "value", "qkv"):
        for block, leaf in trial.pairs("attention", role):
            assert same(block.input, leaf.input)
    assert not (trial.found.get("value") and trial.found.get("qkv"))


@every_case
def test_a_site_is_causal_where_a_later_token_changes_nothing(case):
    trial = run(case)
    model, inputs = trial.model, inputs_of(trial.model)
    role = "attention_output" if "attention_output" in trial.found else "ffn_input"
    for path in {path.rpartition("layers")[0]: path for path in trial.found[role]}.values():  # last of each tower
        tokens = "decoder_input_ids" if stack_of(path, model) == "decoder" else "input_ids"
        other = dict(inputs)
        if tokens in inputs:
            other[tokens] = torch.cat([inputs[tokens][:, :-1], 92 - inputs[tokens][:, -1:]], 1)
        one, two = read_at(model, path, inputs), read_at(model, path, other)
        sees_tokens = not same(one, two)  # and no image
        if sees_tokens:
            one, two = (t.reshape(*other[tokens].shape, -1)[:, :-1] for t in (one, two))
        assert is_causal(path, model, model.config.to_dict()) == (sees_tokens and same(one, two)), path


def read_at(model: nn.Module, path: str, inputs: dict[str, Tensor]) -> Tensor:
    """What the module reads last in a forward."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    torch.manual_seed(0)  # some models draw which patches they see
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        ("bert", transformers.AutoModelForMaskedLM),
        ("deberta-v2", transformers.AutoModelForMaskedLM),
        ("distilbert", transformers.AutoModelForSequenceClassification),
        ("modernbert", transformers.AutoModelForMaskedLM),
        ("vit", transformers.AutoModelForImageClassification),
        ("vit_mae", transformers.AutoModelForPreTraining),
        ("gpt2", transformers.AutoModelForCausalLM),
        ("llama", transformers.AutoModelForSequenceClassification),
        ("mixtral", transformers.AutoModelForCausalLM),
        ("opt", transformers.AutoModelForCausalLM),
        ("gemma3", transformers.AutoModelForImageTextToText),
        ("t5", transformers.AutoModelForSeq2SeqLM),
        ("bart", transformers.AutoModelForSequenceClassification),
    ],
)
def test_heads_add_no_sites(model_type, head):
    backbone = run(model_type)
    model = head.from_config(tiny_config(model_type))
    for role, paths in backbone.found.items():
        pattern = getattr(backbone.architecture, role)
        found = [path for path, _ in model.named_modules() if re.fullmatch(pattern, path)]
        assert len(found) == len(paths)
        assert all(long.endswith(short) for long, short in zip(found, paths, strict=True))
        assert [stack_of(path, model) for path in found] == [stack_of(path, backbone.model) for path in paths]


@pytest.mark.parametrize("case", ["bert", "bert decoder"])
def test_bert_ffn_is_never_attention(case):
    paths = run(case).found["ffn_output"]
    assert paths == [f"encoder.layer.{layer}.output.dense" for layer in range(LAYERS)]


def test_t5_sites_are_in_both_stacks():
    trial = run("t5")
    assert trial.found["ffn_output"] == [
        *(f"encoder.block.{layer}.layer.1.DenseReluDense.wo" for layer in range(LAYERS)),
        *(f"decoder.block.{layer}.layer.2.DenseReluDense.wo" for layer in range(DECODER_LAYERS)),
    ]
    assert [stack_of(path, trial.model) for path in trial.found["cross_attention_output"]] == [
        "decoder"
    ] * DECODER_LAYERS


@pytest.mark.parametrize("case", ["llama", "bert", "bert decoder"])
def test_attention_says_whether_a_layer_of_an_unknown_model_is_causal(case):
    trial = run(case)
    path = trial.found["ffn_output"][-1]
    for place in (path, path.rpartition(".")[0], path.split(".")[0]):
        assert is_causal(place, trial.model, {"model_type": "own"}) == (case != "bert")


def test_unknown_architecture_names_the_nearest_and_the_remedy():
    with pytest.raises(ValueError, match=r"'robertta'.*'roberta'.*target_modules.*sites.*ffn_output"):
        find_architecture("robertta")
    with pytest.raises(ValueError, match=r"'zzz' is not in the table of architectures\."):
        find_architecture("zzz")


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("encoder.block.3.layer.1.DenseReluDense.wo", 3),
        ("bert.encoder.layer.11.output.dense", 11),
        ("encoder.layers.0.blocks.1.mlp.fc2", 0),
        ("conv1.pooler.dense", None),
    ],
)
def test_layer_index_is_the_first_number(path, layer):
    assert layer_index(path) == layer


def test_stack_is_empty_without_encoder_and_decoder():
    assert stack_of("decoder.layers.0.fc2", run("opt").model) == ""
    assert stack_of("encoder.layer.0.output.dense", run("bert").model) == ""
    assert stack_of("encoder.layer.0.output.dense", nn.Linear(2, 2)) == ""
    assert stack_of("base_model.model.model.decoder.layers.0.fc2", run("bart").model) == "decoder"
    assert stack_of("shared", run("bart").model) == ""


@pytest.mark.parametrize(
    ("model_type", "width"),
    [("bert", WIDTH), ("distilbert", WIDTH), ("gpt2", WIDTH), ("gemma3", WIDTH), ("t5", WIDTH), ("bart", WIDTH),
     ("whisper", WIDTH), ("swin", None), ("convnext", None)],
)  # fmt: skip
def test_the_width_is_read_from_the_config(model_type, width):
    assert hidden_size_of(tiny_config(model_type)) == width


def test_a_config_without_a_width_gives_none():
    assert hidden_size_of(SimpleNamespace()) is None
