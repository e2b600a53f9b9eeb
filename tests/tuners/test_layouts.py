"""Models that lay out states, caches and layers as most do not: one small representative of each kind."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import adapted
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mixadapters import BottleneckConfig, MoAConfig, MoSAConfig
from mixadapters.core.finding import is_base_router
from mixadapters.core.streams import Stream
from mixadapters.routers.pooling import PrefixPooling
from mixadapters.tuners.moa.model import _in_running_order

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 2}
ATTENTION = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    "ConvBertModel": {**ATTENTION, "head_ratio": 2, "embedding_size": 32},
    "DeepseekV3ForCausalLM": {**ATTENTION, **LATENT},
    "FalconForCausalLM": {"num_attention_heads": 4, "ffn_hidden_size": 48},
    "Lfm2ForCausalLM": {
        **ATTENTION, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "LongformerModel": {**ATTENTION, "attention_window": 4},
    "MambaForCausalLM": {"state_size": 4, "time_step_rank": 4, "intermediate_size": 64},
    "OpenAIGPTLMHeadModel": {"n_head": 4, "n_positions": 64},
    "PhimoeForCausalLM": {**ATTENTION, "num_key_value_heads": 2, "num_local_experts": 4},
    "XLNetLMHeadModel": {
        "vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0,
    },
}  # fmt: skip
ALL: dict[str, Any] = {"num_experts": 2, "r": 2, "target_modules": "all-linear"}
PREFIX = {"kind": "softmax", "granularity": "causal_prefix"}


def tiny_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    fields = FIELDS[name]
    return cls(cls.config_class(**({} if "d_model" in fields else SMALL), **fields)).eval()


randomize = partial(adapted.randomize, evaluation=True)


def tokens(length: int = 8) -> Tensor:
    return torch.randint(5, 90, (2, length), generator=torch.Generator().manual_seed(2))


# --- caches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beams"), [("MambaForCausalLM", 2), ("Lfm2ForCausalLM", 1), ("OpenAIGPTLMHeadModel", 1)]
)
def test_gate_that_remembers_decodes_where_layers_sum_tokens_up_or_fill_no_cache(name, beams) -> None:
    config = MoAConfig(**ALL, router=PREFIX, exclude_modules=["dt_proj"] if "Mamba" in name else None)
    model = randomize(get_peft_model(tiny_of(name), config))
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "num_beams": beams}
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    cached = model.generate(**inputs, **asked)
    assert torch.equal(cached, model.generate(**inputs, **asked, use_cache=False))


def test_state_of_routers_counts_by_the_first_layer_that_counts() -> None:
    model = randomize(get_peft_model(tiny_of("Lfm2ForCausalLM"), MoAConfig(**ALL, router=PREFIX)))
    with torch.no_grad():
        cache = model(tokens()).past_key_values
    assert not hasattr(cache.layers[0], "get_seq_length")
    assert cache.layers[-1].get_seq_length() == 8


def test_cache_that_was_filled_without_adapters_is_refused_where_nobody_counted() -> None:
    base = tiny_of("MambaForCausalLM")
    with torch.no_grad():
        cache = base(tokens(), use_cache=True).cache_params
    model = get_peft_model(base, MoAConfig(**ALL, router="softmax", exclude_modules=["dt_proj"])).eval()
    with pytest.raises(ValueError, match=r"filled before the model had adapters; begin with a new one"):
        model(tokens(1), cache_params=cache)


def test_gate_that_remembers_refuses_states_to_which_it_can_add_nothing() -> None:
    model = get_peft_model(tiny_of("XLNetLMHeadModel"), MoAConfig(**ALL, router=PREFIX)).eval()
    with torch.no_grad():
        mems = model(tokens(), use_mems=True).mems
        with pytest.raises(ValueError, match=r"keeps them in 'mems'.*use_cache=False, or take granularity='token'"):
            model(tokens(1), mems=mems, use_mems=True)


def test_gate_that_remembers_refuses_a_layer_that_reads_the_cache_again() -> None:
    pooling = PrefixPooling()
    with pytest.raises(ValueError, match=r"in a step of 1 tokens this layer reads 4.*exclude_modules"):
        pooling.refuse_reread(torch.zeros(2, 4, 8), Stream(2, 1, past=3))
    pooling.refuse_reread(torch.zeros(2, 4, 8), Stream(2, 4))


@pytest.mark.parametrize("fields", [{"router_scope": "block"}, {"router": PREFIX}], ids=str)
def test_latent_attention_takes_no_router_that_has_seen_new_tokens_alone(fields) -> None:
    base = tiny_of("DeepseekV3ForCausalLM")
    with pytest.raises(ValueError, match=r"kv_b_proj' reads.*exclude_modules=\['kv_b_proj'\]"):
        get_peft_model(base, MoAConfig(**{**ALL, "router": "softmax", **fields}))
    assert not base._forward_pre_hooks
    model = randomize(get_peft_model(base, MoAConfig(**ALL, router="softmax")))
    asked = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(tokens(), **asked), model.generate(tokens(), **asked, use_cache=False))


def test_lora_folders_on_latent_attention_are_routed_by_token(tmp_path) -> None:
    """What gathered LoRA go by elsewhere, the text so far, would be refused there."""
    lora = LoraConfig(r=2, target_modules=["q_b_proj", "kv_b_proj"], init_lora_weights=False)
    get_peft_model(tiny_of("DeepseekV3ForCausalLM"), lora).save_pretrained(tmp_path)
    config = MoAConfig(experts={"a": str(tmp_path), "b": str(tmp_path)})
    model = get_peft_model(tiny_of("DeepseekV3ForCausalLM"), config).eval()
    assert (config.router, config.num_experts_per_tok, config.granularity) == ({"kind": "arrow"}, None, None)
    asked = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(tokens(), **asked), model.generate(tokens(), **asked, use_cache=False))


# --- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target"), [("LongformerModel", "attention.self.query"), ("XLNetLMHeadModel", "ff.layer_2")]
)
def test_rows_find_their_adapters_where_tokens_come_before_rows(name, target) -> None:
    config = BottleneckConfig(r=2, target_modules=[target])
    model = get_peft_model(tiny_of(name), config)
    model.add_adapter("other", config)
    randomize(model)
    mask = torch.ones(2, 8, dtype=torch.long)
    with torch.no_grad():
        both = model(tokens(), attention_mask=mask, adapter_names=["default", "other"])[0]
        for row, adapter in enumerate(("default", "other")):
            model.set_adapter(adapter)
            alone = model(tokens()[row : row + 1], attention_mask=mask[:1])[0]
            torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_counting_gate_decides_at_whichever_layer_runs_first() -> None:
    config = MoAConfig(**ALL, router="counts", router_scope="model")
    model = get_peft_model(tiny_of("ConvBertModel"), config)  # its keys run before its queries
    texts = {"expert0": [list(range(5, 40))], "expert1": [list(range(30, 80))]}
    model.base_model.fit_gate(texts, [list(range(60, 90))])
    randomize(model)
    mask = torch.ones(2, 8, dtype=torch.long)
    with torch.no_grad():
        both = model(tokens(), attention_mask=mask)[0]
        for row in (0, 1):
            alone = model(tokens()[row : row + 1], attention_mask=mask[:1])[0]
            torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_mosa_reads_the_ffns_input_where_the_norm_of_the_table_is_not_there() -> None:
    model = get_peft_model(tiny_of("FalconForCausalLM"), MoSAConfig(r=2))
    assert model.peft_config["default"].adapter_input == "ffn_input"


@pytest.mark.parametrize(
    ("defined", "run"),
    [
        (["h.0.attn.o_proj", "h.0.attn.qkv_proj"], ["h.0.attn.qkv_proj", "h.0.attn.o_proj"]),
        (["h.0.mlp.up", "h.0.mamba.in_proj", "h.1.mlp.up"], ["h.0.mamba.in_proj", "h.0.mlp.up", "h.1.mlp.up"]),
        (["h.0.ffn1.up", "h.0.conv.proj", "h.0.ffn2.up"], ["h.0.ffn1.up", "h.0.conv.proj", "h.0.ffn2.up"]),
        (["h.0.self_attn.q_proj", "h.0.mlp.up", "head"], ["h.0.self_attn.q_proj", "h.0.mlp.up", "head"]),
    ],
    ids=["fused query", "ffn defined first", "ffn on both sides", "as most"],
)
def test_leader_of_a_block_is_the_module_that_runs_first(defined, run) -> None:
    assert _in_running_order(defined) == run


def test_counting_gate_knows_the_vocabulary_of_a_model_of_images_and_text() -> None:
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**SMALL, **ATTENTION)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    base = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    ).eval()
    config = MoAConfig(
        num_experts=2, r=2, router="counts", router_scope="model", target_modules=r".*language_model.*q_proj"
    )
    model = get_peft_model(base, config)
    texts = {"expert0": [list(range(5, 40))], "expert1": [list(range(30, 80))]}
    model.base_model.fit_gate(texts, [list(range(60, 90))])
    ids = tokens()
    with torch.no_grad():
        start = model(input_ids=ids).logits
        assert not torch.allclose(randomize(model)(input_ids=ids).logits, start, atol=1e-3)


# --- layers that are not called, or give more than one tensor ----------------------------------------------------


def test_layer_of_which_the_weight_alone_is_read_is_named_once() -> None:
    model = randomize(get_peft_model(tiny_of("MambaForCausalLM"), MoAConfig(**ALL, router="softmax")))
    without = get_peft_model(
        tiny_of("MambaForCausalLM"), MoAConfig(**ALL, router="softmax", exclude_modules=["dt_proj"])
    )
    said = r"layers\.0\.mixer\.dt_proj.*\(2 such layers\).*do nothing there.*exclude_modules=\['dt_proj'\]"
    with pytest.warns(UserWarning, match=said):
        model(tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens())
        without(tokens())


def test_routers_of_the_base_that_give_several_tensors_take_no_adapter() -> None:
    model = get_peft_model(tiny_of("PhimoeForCausalLM"), MoAConfig(**ALL, router="softmax"))
    hosts = list(model.base_model.hosts())
    assert len(hosts) == 8
    assert not any(is_base_router(host.get_base_layer()) for host in hosts)
    base = tiny_of("PhimoeForCausalLM")
    with pytest.raises(ValueError, match=r"mlp\.router' \(PhimoeTopKRouter\) chooses experts.*exclude_modules"):
        get_peft_model(base, BottleneckConfig(r=2, target_modules=["mlp.router"]))
    assert not base._forward_pre_hooks


@pytest.fixture
def slow_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)).eval()


def test_torchs_encoder_is_refused_while_its_fast_path_would_pass_the_adapters() -> None:
    with pytest.raises(ValueError, match=r"linear2' lies in TransformerEncoderLayer.*set_fastpath_enabled\(False\)"):
        get_peft_model(encoder(), BottleneckConfig(r=2, target_modules=["linear2"]))


@pytest.mark.parametrize(
    "config",
    [
        BottleneckConfig(r=2, target_modules=["linear2"]),
        MoAConfig(num_experts=2, r=2, router="softmax", target_modules=["linear1", "linear2"]),
        BottleneckConfig(r=2, target_modules=["self_attn"], hidden_size=16),
    ],
    ids=["linear", "moa", "attention"],
)
def test_torchs_encoder_takes_adapters_without_its_fast_path(config, slow_path) -> None:
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        base = encoder()(x)
        model = get_peft_model(encoder(), config).eval()
        torch.testing.assert_close(model(x), base)
        changed = randomize(model)(x)
    assert not torch.allclose(changed, base, atol=1e-3)
    torch.testing.assert_close(model(x), changed)


def test_all_linear_leaves_out_what_no_adapter_can_follow(slow_path) -> None:
    model = get_peft_model(encoder(), BottleneckConfig(r=2, target_modules="all-linear"))
    assert {host.path.rpartition(".")[2] for host in model.base_model.hosts()} == {"linear1", "linear2"}


def test_no_adapter_sits_inside_torchs_attention(slow_path) -> None:
    with pytest.raises(ValueError, match=r"out_proj' lies in nn\.MultiheadAttention.*target the attention as a whole"):
        get_peft_model(encoder(), MoAConfig(num_experts=2, r=2, router="softmax", target_modules=["out_proj"]))
