"""Bottleneck adapters and MixDA on every supported family of models, and on models that no table knows."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from adapted import logits, randomize
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig

KINDS = [
    "bert", "roberta", "distilbert", "deberta_v2", "vit", "gpt2", "opt", "llama", "mistral", "qwen2", "qwen3",
    "gemma3", "mixtral", "qwen3_moe", "t5", "t5_gated", "bart",
]  # fmt: skip
MOE = {"mixtral", "qwen3_moe"}
BOTH_STACKS = {"t5", "t5_gated", "bart"}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "pfeiffer": (BottleneckConfig, {"placement": "pfeiffer"}),
    "houlsby": (BottleneckConfig, {"placement": "houlsby"}),
    "parallel": (BottleneckConfig, {"placement": "parallel"}),
    "intermediate": (BottleneckConfig, {"placement": "parallel", "adapter_input": "ffn_intermediate"}),
    "mixda": (MixDAConfig, {}),
    "mixda ffn_input": (MixDAConfig, {"adapter_input": "ffn_input", "task_adapter": "houlsby"}),
    "mixda gate_input": (MixDAConfig, {"gate_input": "ffn_input", "task_adapter": "parallel"}),
    "mixda convex": (MixDAConfig, {"adapter_input": "ffn_input", "combine": "convex", "gate_frozen_bias": 80.0}),
    "mixda prefix": (MixDAConfig, {"adapter_input": "ffn_input", "gate_granularity": "causal_prefix"}),
    "mixda sequence": (MixDAConfig, {"gate_granularity": "sequence"}),
}
NEEDS_INTERMEDIATE = {"intermediate", "mixda", "mixda gate_input", "mixda sequence"}
# These read and change every place that a family's table names. The rest differ in what is made of them, which is
# one code for all families: a decoder, an encoder, one with both stacks and one of images show it.
IN_EVERY_FAMILY = {"houlsby", "parallel", "intermediate", "mixda", "mixda ffn_input"}
ONE_OF_EACH = {"gpt2", "bert", "t5", "vit"}


def config_of(name: str, *domain_layers: int) -> BottleneckConfig | MixDAConfig:
    cls, fields = CONFIGS[name]
    if cls is MixDAConfig:
        fields = {"domains": ["a", "b"], "domain_layers": list(domain_layers) or [1, 2], **fields}
    return cls(r=4, **fields)


def supported(kind: str, name: str) -> bool:
    if kind in MOE and name in NEEDS_INTERMEDIATE:
        return False  # no single intermediate
    if name == "mixda prefix":
        return kind != "vit"
    return name != "mixda sequence" or kind in {"bert", "roberta", "distilbert", "deberta_v2", "vit"}


CASES = [
    (kind, name)
    for kind in KINDS
    for name in CONFIGS
    if supported(kind, name) and (name in IN_EVERY_FAMILY or kind in ONE_OF_EACH)
]


def labelled(tiny_inputs: Any, kind: str) -> dict[str, Tensor]:
    return tiny_inputs(
        kind, padding=None if kind == "vit" else "right", labels="classes" if kind == "vit" else "tokens"
    )


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_architecture_starts_as_base_trains_saves_loads_and_disables(tiny, tiny_inputs, tmp_path, kind, name) -> None:
    tiny = partial(tiny, layers=2)
    inputs = tiny_inputs(kind, padding=None if kind == "vit" else "right")
    base = logits(tiny(kind), inputs)
    model = get_peft_model(tiny(kind), config_of(name, 0, 1)).eval()
    assert torch.equal(logits(model, inputs), base)

    randomize(model)
    changed = logits(model, inputs)
    assert not torch.allclose(changed, base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)

    model.train()(**labelled(tiny_inputs, kind)).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("_adapters." in parameter_name)
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all()
    moved = [p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad]
    assert sum(moved) > 0.8 * len(moved)

    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path, adapter_name="other")
    assert torch.equal(logits(loaded, inputs), changed)
    plain = model.unload()
    assert torch.equal(logits(plain, inputs), base)
    assert not plain._forward_pre_hooks
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in tiny(kind).named_modules()}


@pytest.mark.parametrize("kind", sorted(MOE))
@pytest.mark.parametrize("name", ["intermediate", "mixda", "mixda gate_input"])
def test_expert_layers_without_one_intermediate_say_so(tiny, kind, name) -> None:
    with pytest.raises(ValueError, match=rf"'{kind}' models have no module for the role 'ffn_output'.*choose another"):
        get_peft_model(tiny(kind), config_of(name))


def places(model: nn.Module) -> set[str]:
    return {host.path for host in model.base_model.hosts()}


SITES = {
    # kind: (attention output, FFN output, whole FFN or None) of layer 1
    "bert": ("bert.encoder.layer.1.attention.output.dense", "bert.encoder.layer.1.output.dense", None),
    "roberta": ("roberta.encoder.layer.1.attention.output.dense", "roberta.encoder.layer.1.output.dense", None),
    "distilbert": tuple(f"distilbert.transformer.layer.1.{n}" for n in ("attention.out_lin", "ffn.lin2", "ffn")),
    "vit": tuple(f"vit.layers.1.{n}" for n in ("attention.o_proj", "mlp.fc2", "mlp")),
    "gpt2": tuple(f"transformer.h.1.{n}" for n in ("attn.c_proj", "mlp.c_proj", "mlp")),
    "llama": tuple(f"model.layers.1.{n}" for n in ("self_attn.o_proj", "mlp.down_proj", "mlp")),
    "mistral": tuple(f"model.layers.1.{n}" for n in ("self_attn.o_proj", "mlp.down_proj", "mlp")),
    "qwen2": tuple(f"model.layers.1.{n}" for n in ("self_attn.o_proj", "mlp.down_proj", "mlp")),
    "qwen3": tuple(f"model.layers.1.{n}" for n in ("self_attn.o_proj", "mlp.down_proj", "mlp")),
    "mixtral": ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp", "model.layers.1.mlp"),
    "qwen3_moe": ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp", "model.layers.1.mlp"),
}


@pytest.mark.parametrize("kind", SITES)
def test_adapters_sit_where_the_placement_says(tiny, kind) -> None:
    attention, end, whole = SITES[kind]
    only = {"layers_to_transform": [1], "r": 2}
    assert places(get_peft_model(tiny(kind), BottleneckConfig(**only))) == {end}
    assert places(get_peft_model(tiny(kind), BottleneckConfig(placement="houlsby", **only))) == {attention, end}
    assert places(get_peft_model(tiny(kind), BottleneckConfig(placement="parallel", **only))) == {whole or end}
    mixda = MixDAConfig(domain_layers=[1], adapter_input="ffn_input", task_adapter=None, r=2)
    assert places(get_peft_model(tiny(kind), mixda)) == {whole or end}


@pytest.mark.parametrize("kind", sorted(BOTH_STACKS))
def test_both_stacks_take_adapters_of_their_own(tiny, kind) -> None:
    for name in ("pfeiffer", "parallel", "mixda"):
        found = {
            path.removeprefix("model.").split(".")[0] for path in places(get_peft_model(tiny(kind), config_of(name)))
        }
        assert found == {"encoder", "decoder"}
    cross = {
        p for p in places(get_peft_model(tiny(kind), config_of("houlsby"))) if "EncDec" in p or "encoder_attn" in p
    }
    assert len(cross) == 4


@pytest.mark.parametrize("kind", sorted(BOTH_STACKS))
def test_layers_of_both_stacks_count_from_their_own_start(tiny, kind) -> None:
    overrides = {"decoder_layers": 2} if kind == "bart" else {"num_decoder_layers": 2}
    model = get_peft_model(tiny(kind, **overrides), MixDAConfig(domain_layers=[1.0], task_adapter=None))
    found = sorted(path.removeprefix("model.") for path in places(model))
    assert [path.split(".")[0] for path in found] == ["decoder", "encoder"]
    assert [next(int(part) for part in path.split(".") if part.isdigit()) for path in found] == [1, 3]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "mixtral", "qwen3_moe", "t5"])
@pytest.mark.parametrize("granularity", ["token", "causal_prefix"])
def test_generation_with_a_cache_equals_generation_without(tiny, tiny_inputs, kind, granularity) -> None:
    config = MixDAConfig(
        domains=["a", "b"], domain_layers=[1, 2], adapter_input="ffn_input", gate_granularity=granularity, r=4
    )
    model = randomize(get_peft_model(tiny(kind), config)).eval()
    inputs = tiny_inputs(kind, padding="left")
    inputs.pop("decoder_input_ids", None)
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**inputs, **asked)
    assert torch.equal(cached, model.generate(**inputs, **asked, use_cache=False))
    assert not torch.equal(cached, tiny(kind).generate(**inputs, **asked))


# --- expert layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pfeiffer", "houlsby", "parallel", "mixda ffn_input"])
@pytest.mark.parametrize("kind", sorted(MOE))
def test_the_base_models_own_router_is_left_alone(tiny, tiny_inputs, kind, name) -> None:
    inputs = {**tiny_inputs(kind, labels="tokens"), "output_router_logits": True}
    base = tiny(kind)
    with torch.no_grad():
        expected = base(**inputs)
    model = get_peft_model(tiny(kind), config_of(name)).eval()
    with torch.no_grad():
        found = model(**inputs)
    assert float(expected.aux_loss) > 0
    assert torch.equal(found.aux_loss, expected.aux_loss)
    assert torch.equal(found.loss, expected.loss)
    assert len(found.router_logits) == len(expected.router_logits) == 4
    assert all(torch.equal(a, b) for a, b in zip(found.router_logits, expected.router_logits, strict=True))

    randomize(model)
    with torch.no_grad():
        found = model(**inputs)
    if name == "mixda ffn_input":  # nothing before the first adapted FFN has changed, and each FFN is adapted once
        assert len({p for p in places(model) if p.endswith(".mlp")}) == 4
    assert len(found.router_logits) == 4
    assert found.aux_loss.isfinite()
    model.train()(**inputs).loss.backward()
    assert all(("_adapters." in n) == (p.grad is not None) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", sorted(MOE))
def test_adapter_runs_beside_the_whole_expert_block(tiny, tiny_inputs, kind) -> None:
    """o = F(x) + A(x), with F the block and x its input, whatever the block routes inside."""
    model = randomize(get_peft_model(tiny(kind), BottleneckConfig(placement="parallel", r=4))).eval()
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for host in model.base_model.hosts():

        def keep(m: nn.Module, args: tuple, y: Any, path: str = host.path) -> None:
            inside = m.base_layer(*args)
            seen[path] = (
                args[0],
                inside[0] if isinstance(inside, tuple) else inside,
                y[0] if isinstance(y, tuple) else y,
            )

        host.register_forward_hook(keep)
    logits(model, tiny_inputs(kind))
    assert len(seen) == 4
    for host in model.base_model.hosts():
        x, ffn, y = seen[host.path]
        expert = host.bottleneck_adapters["default"].bank.experts["adapter"]
        torch.testing.assert_close(y, ffn + expert.up(nn.functional.gelu(expert.down(x))), atol=1e-5, rtol=1e-5)


def test_block_that_gives_a_tuple_keeps_it(tiny_inputs) -> None:
    config = transformers.GptOssConfig(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    inputs = {**tiny_inputs("llama"), "output_router_logits": True}
    model = get_peft_model(copy.deepcopy(base), MixDAConfig(domains=["a"], adapter_input="ffn_input", r=4)).eval()
    with torch.no_grad():
        found, expected = model(**inputs), base(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(found.router_logits, expected.router_logits, strict=True))
    assert not torch.allclose(logits(randomize(model), inputs), expected.logits, atol=1e-3)


# --- before the residual -----------------------------------------------------------------------------------------

SHAPE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
RESIDUALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt_neox": ("GPTNeoXConfig", {**SHAPE, "intermediate_size": 48, "use_parallel_residual": True}, "layers"),
    "gpt_neox sequential": (
        "GPTNeoXConfig", {**SHAPE, "intermediate_size": 48, "use_parallel_residual": False}, "layers",
    ),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "n_inner": 48, "rotary_dim": 4},
        "h",
    ),
    "falcon": ("FalconConfig", {**SHAPE, "parallel_attn": True, "ffn_hidden_size": 48}, "h"),
    "llama": ("LlamaConfig", {**SHAPE, "intermediate_size": 48}, "layers"),
}  # fmt: skip


@pytest.mark.parametrize("adapter_input", ["ffn_intermediate", "ffn_input"])
@pytest.mark.parametrize("case", RESIDUALS)
def test_mixture_is_added_before_the_residual(case, adapter_input) -> None:
    """A pre-norm layer's output moves by exactly what the mixture adds to its FFN, beside attention or after it."""
    name, fields, layers = RESIDUALS[case]
    torch.manual_seed(0)
    base = transformers.AutoModel.from_config(getattr(transformers, name)(**fields)).eval()
    config = MixDAConfig(domains=["a", "b"], domain_layers=[0], adapter_input=adapter_input, task_adapter=None, r=4)
    ids = {"input_ids": torch.randint(5, 90, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with torch.no_grad():
        expected = base(**ids, output_hidden_states=True).hidden_states[1]
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        assert torch.equal(model(**ids, output_hidden_states=True).hidden_states[1], expected)
    randomize(model)
    added: list[Tensor] = []
    (mixture,) = dict(model.base_model._mixtures("default")).values()
    mixture.register_forward_hook(lambda m, args, y: added.append(y - args[1]))
    with torch.no_grad():
        found = model(**ids, output_hidden_states=True).hidden_states[1]
    (delta,) = added
    assert delta.abs().max() > 0.01
    torch.testing.assert_close(found, expected + delta, atol=1e-5, rtol=1e-5)
    assert f"{layers}.0." in next(iter(dict(model.base_model._mixtures("default"))))


# --- models that no table knows ----------------------------------------------------------------------------------


class StrangeConfig(transformers.PreTrainedConfig):
    model_type = "strange"


class StrangeModel(transformers.PreTrainedModel):
    """Two residual blocks of linear layers with names that nobody else uses."""

    config_class = StrangeConfig
    main_input_name = "x"

    def __init__(self, config: StrangeConfig) -> None:
        super().__init__(config)
        self.stack = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(8, 8), "enter": nn.Linear(8, 12), "leave": nn.Linear(12, 8)})
            for _ in range(2)
        )
        self.post_init()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.stack:
            x = x + block["mix"](x)
            x = x + block["leave"](block["enter"](x).tanh())
        return x


def strange() -> StrangeModel:
    torch.manual_seed(0)
    return StrangeModel(StrangeConfig()).eval()


@pytest.mark.parametrize("config", [BottleneckConfig(), MixDAConfig()], ids=["bottleneck", "mixda"])
def test_unknown_architecture_is_refused_with_the_remedy(config) -> None:
    model = strange()
    with pytest.raises(ValueError, match=r"'strange' is not in the table of architectures.*`target_modules`.*`sites="):
        get_peft_model(model, config)
    assert not model._forward_pre_hooks


NO_TABLE_KNOWS: dict[str, tuple[Any, str]] = {
    "bottleneck": (BottleneckConfig(), "`target_modules`"),
    "moa": (MoAConfig(num_experts=2), "`target_modules`"),
    "moa bottleneck": (MoAConfig(num_experts=2, expert_type="bottleneck", r=4), "`target_modules`"),
    "lora domains": (MixDAConfig(domain_type="lora", r=2, task_adapter=None), "`target_modules`"),
    "lora task": (MixDAConfig(domain_type="lora", target_modules=["mix"], task_adapter="lora"), "task_target_modules"),
}


@pytest.mark.parametrize("key", NO_TABLE_KNOWS)
def test_modules_of_a_remedy_are_modules_of_the_model(key: str) -> None:
    """Also where an adapter sits already at some of them."""
    config, field = NO_TABLE_KNOWS[key]
    for model in (
        strange(),
        get_peft_model(strange(), BottleneckConfig(r=2, target_modules=["mix"])).get_base_model(),
    ):
        with pytest.raises(ValueError, match=rf"{field}, such as \['mix', 'enter'\]"):
            get_peft_model(model, config, adapter_name="second")


UNKNOWN: dict[str, tuple[type, dict[str, Any], set[str]]] = {
    "modules": (BottleneckConfig, {"target_modules": ["leave"]}, {"leave"}),
    "modules, parallel": (BottleneckConfig, {"target_modules": ["enter"], "placement": "parallel"}, {"enter"}),
    "sites": (
        BottleneckConfig,
        {"placement": "houlsby", "sites": {"attention_output": r"stack\.\d\.mix", "ffn_output": r"stack\.\d\.leave"}},
        {"mix", "leave"},
    ),
    "mixda modules": (MixDAConfig, {"target_modules": ["leave"]}, {"leave"}),
    "mixda modules, layers": (MixDAConfig, {"target_modules": ["leave"], "domain_layers": [0, 1]}, {"leave"}),
    "mixda modules, ffn_input": (
        MixDAConfig, {"target_modules": ["leave"], "adapter_input": "ffn_input", "task_adapter": None}, {"leave"},
    ),
    "mixda modules, no task": (MixDAConfig, {"target_modules": ["leave"], "task_adapter": None}, {"leave"}),
    "mixda modules, parallel task": (
        MixDAConfig, {"target_modules": ["leave"], "task_adapter": "parallel"}, {"leave"},
    ),
    "mixda sites": (
        MixDAConfig,
        {
            "sites": {"ffn_output": r"stack\.\d\.leave", "ffn_input": r"stack\.\d\.enter"},
            "adapter_input": "ffn_input", "domain_layers": [0, 1], "task_adapter": "parallel",
        },
        {"leave"},
    ),
    "mixda sites, gate": (
        MixDAConfig,
        {
            "sites": {"ffn_output": r"stack\.\d\.leave", "ffn_input": r"stack\.\d\.enter"},
            "gate_input": "ffn_input", "domain_layers": [0, 1],
        },
        {"leave"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_architecture_takes_explicit_modules_or_sites(case, tmp_path) -> None:
    cls, fields, ends = UNKNOWN[case]
    if cls is MixDAConfig:
        fields = {"domains": ["a", "b"], **fields}
    x = torch.randn(2, 5, 8)
    model = get_peft_model(strange(), cls(r=3, **fields))
    assert {path.rpartition(".")[2] for path in places(model)} == ends
    assert len(places(model)) == 2 * len(ends)
    assert torch.equal(model(x=x), strange()(x=x))
    changed = randomize(model)(x=x)
    assert not torch.allclose(changed, strange()(x=x), atol=1e-3)
    changed.sum().backward()
    assert all(("_adapters." in n) == (p.grad is not None) for n, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(strange(), tmp_path)(x=x), changed)


def test_gate_on_an_input_that_no_site_names_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gate_input='ffn_input' with target_modules.*pass sites="):
        get_peft_model(strange(), MixDAConfig(target_modules=["leave"], gate_input="ffn_input"))


def test_mixda_reads_the_tapped_input_in_an_unknown_architecture() -> None:
    config = MixDAConfig(domains=["a", "b"], r=3, **UNKNOWN["mixda sites"][1])
    model = get_peft_model(strange(), config)
    shapes = {e.down.weight.shape for _, m in model.base_model._mixtures("default") for e in m.bank.experts.values()}
    assert shapes == {(3, 8)}


def test_unmatched_sites_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"sites\['ffn_output'\].*nowhere' matches no module of the model"):
        get_peft_model(strange(), BottleneckConfig(sites={"ffn_output": r"stack\.\d\.nowhere"}))
    nowhere = {"ffn_output": r"stack\.\d\.leave", "ffn_input": r"stack\.\d\.nowhere"}
    with pytest.raises(ValueError, match=r"sites\['ffn_input'\].*nowhere' matches no module of the model"):
        get_peft_model(strange(), BottleneckConfig(placement="parallel", sites=nowhere))


def test_model_without_a_config_takes_explicit_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    x = torch.randn(2, 5, 4)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, MixDAConfig(domains=["a", "b"], target_modules=["2"], r=2))
    assert torch.equal(adapted(x), expected)
    assert not torch.allclose(randomize(adapted)(x), expected, atol=1e-3)
