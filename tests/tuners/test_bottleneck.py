"""Bottleneck adapters against a naive reference: placements, kinds, merging, and what a config refuses."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import adapted
import pytest
import torch
from adapted import logits
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters import BottleneckConfig

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x}


randomize = partial(adapted.randomize, trained=True)


def expert_weights(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """{path of the adapted module: {parameter of the expert: a leaf with the same values}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        path, mark, rest = name.partition(".bottleneck_adapters.default.bank.experts.adapter.")
        if mark:
            found.setdefault(path.removeprefix("base_model.model."), {})[rest] = parameter.detach().clone()
    return found


def reference(w: dict[str, Tensor], x: Tensor, config: BottleneckConfig) -> Tensor:
    """scale * up(act(down(norm(x)))) for the weights `w` of one adapter, written out."""
    if "norm.weight" in w:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * w["norm.weight"] + w["norm.bias"]
    act = ACTIVATIONS[config.activation]
    h = x @ w["down.weight"].T + w.get("down.bias", 0)
    h = act(x @ w["gate.weight"].T + w.get("gate.bias", 0)) * h if config.glu else act(h)
    return (h @ w["up.weight"].T + w.get("up.bias", 0)) * w.get("scale.weight", config.scale)


def with_reference(base: nn.Module, weights: dict[str, dict[str, Tensor]], config: BottleneckConfig) -> nn.Module:
    """`base` with the reference hooked onto it: on the output of a module, or from its input (BERT's FFN: a tap)."""
    seen: dict[str, Tensor] = {}
    for path, w in weights.items():

        def keep(module: nn.Module, args: tuple, path: str = path) -> None:
            seen[path] = args[0]

        def add(module: nn.Module, args: tuple, y: Tensor, path: str = path, w: dict[str, Tensor] = w) -> Tensor:
            source = y if config.placement != "parallel" else seen.get(path, args[0])
            return y + reference(w, source, config)

        if config.placement == "parallel" and config.adapter_input == "ffn_input" and path.endswith("output.dense"):
            ffn = base.get_submodule(path.replace("output.dense", "intermediate.dense"))
            ffn.register_forward_pre_hook(keep)
        base.get_submodule(path).register_forward_hook(add)
    return base


# --- forward and gradients ---------------------------------------------------------------------------------------

PLACEMENTS = [
    ("pfeiffer", "ffn_input"),
    ("houlsby", "ffn_input"),
    ("parallel", "ffn_input"),
    ("parallel", "ffn_intermediate"),
]


@pytest.mark.parametrize("layer_norm", [False, True], ids=["", "layer_norm"])
@pytest.mark.parametrize("glu", [False, True], ids=["plain", "glu"])
@pytest.mark.parametrize(("placement", "adapter_input"), PLACEMENTS)
@pytest.mark.parametrize(("kind", "scale"), [("bert", 0.5), ("llama", "learnable")])
def test_adapter_equals_the_naive_reference(
    tiny, tiny_inputs, kind, placement, adapter_input, glu, layer_norm, scale
) -> None:
    config = BottleneckConfig(
        r=5, placement=placement, adapter_input=adapter_input, glu=glu, layer_norm=layer_norm, scale=scale
    )
    inputs = tiny_inputs(kind, padding="right")
    # In double precision: a scale's gradient is one sum, which may nearly cancel.
    model = randomize(get_peft_model(tiny(kind).double(), config)).double().eval()
    weights = expert_weights(model)
    assert len(weights) == (8 if placement == "houlsby" else 4)
    for tensors in weights.values():
        for tensor in tensors.values():
            tensor.requires_grad_()
    output = model(**inputs).logits
    expected = with_reference(tiny(kind).double(), weights, config)(**inputs).logits
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(output, tiny(kind).double()(**inputs).logits, atol=1e-2)

    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        path, mark, rest = name.partition(".bottleneck_adapters.default.bank.experts.adapter.")
        if mark:
            wanted = weights[path.removeprefix("base_model.model.")][rest].grad
            difference = (parameter.grad - wanted).norm() / wanted.norm()
            assert difference < 1e-4, (name, difference)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation_equals_the_naive_reference(tiny, tiny_inputs, activation) -> None:
    config = BottleneckConfig(r=5, activation=activation)
    model = randomize(get_peft_model(tiny("gpt2"), config)).eval()
    inputs = tiny_inputs("gpt2")
    expected = with_reference(tiny("gpt2"), expert_weights(model), config)(**inputs).logits
    torch.testing.assert_close(logits(model, inputs), expected.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer_norm", [False, True], ids=["", "layer_norm"])
@pytest.mark.parametrize("glu", [False, True], ids=["plain", "glu"])
@pytest.mark.parametrize(("placement", "adapter_input"), PLACEMENTS)
def test_output_is_base_at_init_bit_for_bit(tiny, tiny_inputs, placement, adapter_input, glu, layer_norm) -> None:
    config = BottleneckConfig(
        placement=placement, adapter_input=adapter_input, glu=glu, layer_norm=layer_norm, scale="learnable"
    )
    inputs = tiny_inputs("bert", padding="right")
    assert torch.equal(logits(get_peft_model(tiny("bert"), config), inputs), logits(tiny("bert"), inputs))


def test_init_weights_false_starts_away_from_base(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("bert")
    model = get_peft_model(tiny("bert"), BottleneckConfig(init_weights=False))
    assert not torch.allclose(logits(model, inputs), logits(tiny("bert"), inputs), atol=1e-4)


def test_adapter_has_the_published_size() -> None:
    """In RoBERTa-large: 1024 -> 64 -> 1024 with biases is 132,160; beside its FFN 4096 -> 256 -> 1024 is 1,312,000."""
    from transformers import RobertaConfig, RobertaModel

    large = RobertaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16)
    with torch.device("meta"):
        model = get_peft_model(RobertaModel(large), BottleneckConfig())
        houlsby = get_peft_model(RobertaModel(large), BottleneckConfig(placement="houlsby"))
        parallel = get_peft_model(
            RobertaModel(large), BottleneckConfig(placement="parallel", adapter_input="ffn_intermediate")
        )
    assert model.get_nb_trainable_parameters()[0] == 2 * 132_160
    assert houlsby.get_nb_trainable_parameters()[0] == 4 * 132_160
    assert parallel.get_nb_trainable_parameters()[0] == 2 * 1_312_000


def test_dropout_acts_on_the_adapter_in_training_only(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    model = randomize(get_peft_model(tiny("llama"), BottleneckConfig(dropout=0.5))).eval()
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(model, inputs))


def test_disabled_adapters_leave_base_bit_for_bit(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("bert", padding="right")
    model = randomize(get_peft_model(tiny("bert"), BottleneckConfig(placement="houlsby")))
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(tiny("bert"), inputs))
    assert torch.equal(logits(model.unload(), inputs), logits(tiny("bert"), inputs))


@pytest.mark.parametrize(("placement", "adapter_input"), PLACEMENTS)
def test_saved_adapter_loads_bit_for_bit(tiny, tiny_inputs, tmp_path, placement, adapter_input) -> None:
    config = BottleneckConfig(
        r=3, placement=placement, adapter_input=adapter_input, glu=True, layer_norm=True, scale="learnable"
    )
    inputs = tiny_inputs("bert")
    model = randomize(get_peft_model(tiny("bert"), config)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path, adapter_name="other")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_bfloat16_base_takes_bfloat16_or_float32_adapters(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    for autocast in (True, False):
        base = tiny("llama").to(torch.bfloat16)
        model = randomize(get_peft_model(base, BottleneckConfig(), autocast_adapter_dtype=autocast))
        dtypes = {p.dtype for n, p in model.named_parameters() if "bottleneck_" in n}
        assert dtypes == {torch.float32 if autocast else torch.bfloat16}
        output = model(**inputs, labels=inputs["input_ids"])
        assert output.logits.dtype == torch.bfloat16
        assert output.logits.isfinite().all()
        output.loss.backward()


# --- which modules, how wide -------------------------------------------------------------------------------------


def sites(model: nn.Module) -> list[str]:
    return sorted(expert_weights(model))


def ranks(model: nn.Module) -> dict[str, int]:
    return {path: w["down.weight"].shape[0] for path, w in expert_weights(model).items()}


def test_bert_sites_are_the_ffn_outputs_and_not_those_of_attention(tiny) -> None:
    model = get_peft_model(tiny("bert"), BottleneckConfig())
    assert sites(model) == [f"bert.encoder.layer.{i}.output.dense" for i in range(4)]


def test_reduction_factor_divides_the_width_that_the_adapter_reads(tiny) -> None:
    assert set(ranks(get_peft_model(tiny("llama"), BottleneckConfig(reduction_factor=4))).values()) == {8}
    wide = BottleneckConfig(reduction_factor=4, placement="parallel", adapter_input="ffn_intermediate")
    assert set(ranks(get_peft_model(tiny("llama"), wide)).values()) == {12}
    assert set(ranks(get_peft_model(tiny("llama"), BottleneckConfig(reduction_factor=1000))).values()) == {1}


def test_rank_pattern_takes_names_and_expressions_before_r(tiny) -> None:
    config = BottleneckConfig(r=4, rank_pattern={"layers.2.mlp.down_proj": 7, r".*\.0\..*": 2})
    found = ranks(get_peft_model(tiny("llama"), config))
    assert [found[f"model.layers.{i}.mlp.down_proj"] for i in range(4)] == [2, 4, 7, 4]


def test_rank_pattern_survives_saving(tiny, tiny_inputs, tmp_path) -> None:
    config = BottleneckConfig(r=4, rank_pattern={"layers.2.mlp.down_proj": 7})
    model = randomize(get_peft_model(tiny("llama"), config)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    inputs = tiny_inputs("llama")
    assert ranks(loaded) == ranks(model)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("chosen", [[1, 3], 2])
def test_layers_to_transform_limits_the_layers(tiny, chosen) -> None:
    model = get_peft_model(tiny("bert"), BottleneckConfig(layers_to_transform=chosen, placement="houlsby"))
    wanted = [chosen] if isinstance(chosen, int) else chosen
    assert {int(path.split(".")[3]) for path in sites(model)} == set(wanted)
    assert len(sites(model)) == 2 * len(wanted)


def test_layers_to_transform_limits_named_targets_too(tiny) -> None:
    config = BottleneckConfig(target_modules=["down_proj"], layers_to_transform=[0, 2], layers_pattern="layers")
    assert sites(get_peft_model(tiny("llama"), config)) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 2)]


def test_exclude_modules_leaves_modules_out(tiny) -> None:
    model = get_peft_model(tiny("bert"), BottleneckConfig(exclude_modules=r".*layer\.[02]\..*"))
    assert sites(model) == [f"bert.encoder.layer.{i}.output.dense" for i in (1, 3)]


def test_target_modules_takes_exactly_those(tiny) -> None:
    named = get_peft_model(tiny("llama"), BottleneckConfig(target_modules=["q_proj", "layers.1.mlp"]))
    assert sites(named) == sorted([*(f"model.layers.{i}.self_attn.q_proj" for i in range(4)), "model.layers.1.mlp"])
    pattern = get_peft_model(tiny("llama"), BottleneckConfig(target_modules=r".*\.3\.self_attn\.[kv]_proj"))
    assert sites(pattern) == [f"model.layers.3.self_attn.{n}_proj" for n in "kv"]


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
@pytest.mark.parametrize("target", ["up_proj", "mlp", "self_attn", "input_layernorm"])
def test_any_linear_block_or_norm_takes_an_adapter(tiny, tiny_inputs, target, placement) -> None:
    """Linear layers that change the width, blocks that give tuples and norms, by the rule of the placement."""
    inputs = tiny_inputs("llama")
    config = BottleneckConfig(r=4, target_modules=[target], placement=placement)
    model = get_peft_model(tiny("llama"), config)
    assert len(sites(model)) == 4
    assert torch.equal(logits(model, inputs), logits(tiny("llama"), inputs))
    randomize(model)
    assert not torch.allclose(logits(model, inputs), logits(tiny("llama"), inputs), atol=1e-3)
    width = 48 if target == "up_proj" and placement == "pfeiffer" else 32
    assert next(iter(expert_weights(model).values()))["down.weight"].shape == (4, width)


class Custom(nn.Module):
    """An architecture that no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


def test_model_that_is_no_transformer_takes_explicit_modules() -> None:
    base, x = Custom(), torch.randn(3, 6)
    model = get_peft_model(copy.deepcopy(base), BottleneckConfig(r=2, target_modules=["first", "last"]))
    assert sites(model) == ["first", "last"]
    assert torch.equal(model(x), base(x))


def test_block_of_unknown_width_asks_for_hidden_size() -> None:
    with pytest.raises(ValueError, match=r"cannot tell the width of 'block'.*pass hidden_size"):
        get_peft_model(Custom(), BottleneckConfig(r=2, target_modules=["block"]))
    model = get_peft_model(Custom(), BottleneckConfig(r=2, target_modules=["block"], hidden_size=8))
    assert sites(model) == ["block"]
    assert randomize(model)(torch.randn(3, 6)).shape == (3, 2)


def test_sites_name_the_modules_of_roles(tiny, tiny_inputs) -> None:
    config = BottleneckConfig(r=2, sites={"ffn_output": r"model\.layers\.[01]\.mlp\.down_proj"})
    model = randomize(get_peft_model(tiny("llama"), config))
    assert sites(model) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    tapped = BottleneckConfig(
        r=2, placement="parallel",
        sites={"ffn_output": r"model\.layers\.\d\.mlp\.down_proj", "ffn_input": r"model\.layers\.\d\.mlp\.up_proj"},
    )  # fmt: skip
    whole = BottleneckConfig(r=2, placement="parallel")
    inputs = tiny_inputs("llama")
    one = randomize(get_peft_model(tiny("llama"), tapped))
    other = randomize(get_peft_model(tiny("llama"), whole))
    assert {w["down.weight"].shape for w in expert_weights(one).values()} == {(2, 32)}
    torch.testing.assert_close(logits(one, inputs), logits(other, inputs))


def test_unmatched_targets_are_an_error(tiny) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(tiny("llama"), BottleneckConfig(target_modules=["nowhere"]))
    with pytest.raises(ValueError, match=r"no module of the model is called 'down_prj'. Did you mean 'down_proj'"):
        get_peft_model(tiny("llama"), BottleneckConfig(target_modules=["up_proj", "down_prj"]))
    with pytest.raises(ValueError, match=r"layers_to_transform=\[17\]: the model has no layers \[17\]"):
        get_peft_model(tiny("llama"), BottleneckConfig(layers_to_transform=[17]))
    with pytest.raises(ValueError, match=r"exclude|excluded"):
        get_peft_model(tiny("llama"), BottleneckConfig(exclude_modules=".*"))


def test_refused_injection_leaves_the_model_as_it_was(tiny, tiny_inputs) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(model, BottleneckConfig(target_modules=["nowhere"]))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert torch.equal(logits(model, tiny_inputs("llama")), logits(tiny("llama"), tiny_inputs("llama")))


def test_adapters_read_at_the_block_of_their_own_layer(tiny) -> None:
    model = get_peft_model(tiny("llama"), BottleneckConfig(r=2, placement="parallel", adapter_input="residual"))
    taps = {host.path: host.adapters["default"].tap for host in model.base_model.hosts()}
    assert len(taps) > 1
    assert all(tap.startswith(path.rpartition(".")[0] + ".") for path, tap in taps.items())


def test_nested_targets_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.down_proj' lies inside 'model.layers.0.mlp'"):
        get_peft_model(tiny("llama"), BottleneckConfig(target_modules=["mlp", "down_proj"]))
    for first, second in (("mlp", "down_proj"), ("down_proj", "mlp")):
        model = get_peft_model(tiny("llama"), BottleneckConfig(target_modules=[first]))
        with pytest.raises(ValueError, match="lies inside"):
            model.add_adapter("second", BottleneckConfig(target_modules=[second]))


def test_all_linear_leaves_out_the_head_also_where_it_has_an_adapter(tiny) -> None:
    model = get_peft_model(tiny("llama"), BottleneckConfig(r=2, target_modules=["lm_head", "q_proj"]))
    model.add_adapter("second", BottleneckConfig(r=2, target_modules="all-linear"))
    hosts = {host.path: set(host.adapters) for host in model.base_model.hosts()}
    assert hosts["lm_head"] == {"default"}
    assert hosts["model.layers.0.self_attn.q_proj"] == {"default", "second"}
    assert hosts["model.layers.0.self_attn.k_proj"] == {"second"}


def test_modules_that_take_no_adapter_are_refused(tiny) -> None:
    with pytest.raises(
        ValueError, match=r"embed_tokens is not supported: Embedding; target linear layers, convolutions"
    ):
        get_peft_model(tiny("llama"), BottleneckConfig(target_modules=["embed_tokens"]))


def test_unknown_architecture_without_targets_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"not in the table of architectures.*target_modules.*sites"):
        get_peft_model(Custom(), BottleneckConfig())


def test_role_that_the_architecture_lacks_is_refused_with_the_remedy(tiny) -> None:
    config = BottleneckConfig(placement="parallel", adapter_input="ffn_intermediate")
    with pytest.raises(ValueError, match=r"'mixtral' models have no module for the role 'ffn_output'.*sites="):
        get_peft_model(tiny("mixtral"), config)


def test_sites_must_hold_the_roles_that_are_needed(tiny) -> None:
    with pytest.raises(ValueError, match=r"lacks the roles \['attention_output'\]"):
        get_peft_model(tiny("llama"), BottleneckConfig(placement="houlsby", sites={"ffn_output": ".*down_proj"}))
    with pytest.raises(ValueError, match="either `sites` or `target_modules`"):
        get_peft_model(tiny("llama"), BottleneckConfig(target_modules=["mlp"], sites={"ffn_output": ".*down_proj"}))


# --- configs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "pfeifer"}, "placement='pfeifer' is unknown.*Did you mean 'pfeiffer'"),
        ({"adapter_input": "ffn_inputs"}, "adapter_input='ffn_inputs' is unknown"),
        ({"adapter_input": "ffn_intermediate"}, "needs placement='parallel', not 'pfeiffer'"),
        ({"activation": "gellu"}, "activation='gellu' is unknown.*Did you mean 'gelu'"),
        ({"r": 0}, "`r` should be a positive integer value but the value passed is 0"),
        ({"r": -3}, "`r` should be a positive integer"),
        ({"reduction_factor": 0}, "reduction_factor=0 must be a finite number, at least 0.001"),
        ({"dropout": 1.0}, "dropout=1.0 must be a finite number, at least 0, less than 1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"scale": "learned"}, "scale='learned' must be a finite number or 'learnable'"),
        ({"target_parameters": ["a"]}, "target_parameters=.* is not supported"),
        ({"target_modules": "mlp", "layers_to_transform": [1]}, "layers_to_transform=.* has no effect"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers' needs layers_to_transform"),
        ({"format_version": 99}, "format_version=99 is newer than this mixadapters reads"),
    ],
)
def test_config_refuses_wrong_fields(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**fields)


def test_config_refuses_unknown_arguments() -> None:
    with pytest.raises(ValueError, match=r"has no field 'reduction'. Did you mean 'reduction_factor'"):
        BottleneckConfig(r=4, reduction=4)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'reduction'. Did you mean 'reduction_factor'"):
        BottleneckConfig(reduction=4)


def rewrite(folder: Any, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("read", [PeftConfig, BottleneckConfig])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction_facto": 4}, "BottleneckConfig has no field 'reduction_facto'. Did you mean 'reduction_factor'"),
        ({"format_version": 2}, "format_version=2 is newer.*upgrade mixadapters"),
    ],
)
def test_saved_config_of_another_format_is_refused(tiny, tmp_path, read, changes, message) -> None:
    get_peft_model(tiny("bert"), BottleneckConfig()).save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny("bert"), tmp_path)


def test_config_survives_json(tmp_path) -> None:
    config = BottleneckConfig(
        r=3, placement="parallel", adapter_input="ffn_intermediate", activation="silu", glu=True, layer_norm=True,
        scale="learnable", dropout=0.1, target_modules=["b", "a"], exclude_modules=["c"], rank_pattern={"a": 2},
        modules_to_save=["classifier"], task_type=TaskType.SEQ_CLS,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 5}, r"is \(4, 32\) in the file and \(5, 32\) in this model"),
        ({"layer_norm": True}, "holds 16 of 24 weights.*is missing"),
        ({"use_bias": False}, "holds 8 weights that adapter 'default' has no place for"),
        ({"layers_to_transform": [0, 1]}, "no place for"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_an_error(tiny, tmp_path, changes, message) -> None:
    get_peft_model(tiny("bert"), BottleneckConfig(r=4)).save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises((ValueError, RuntimeError), match=message):
        PeftModel.from_pretrained(tiny("bert"), tmp_path)


def test_weights_of_another_base_model_are_an_error(tiny, tmp_path) -> None:
    get_peft_model(tiny("bert"), BottleneckConfig(r=4)).save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"is \(4, 32\) in the file and \(4, 16\) in this"):
        PeftModel.from_pretrained(tiny("bert", hidden_size=16), tmp_path)
    with pytest.raises(ValueError, match=r"Was it saved from another base model|not found|missing"):
        PeftModel.from_pretrained(tiny("bert", num_hidden_layers=2), tmp_path)


# --- merging -----------------------------------------------------------------------------------------------------

MERGEABLE = [
    ("bert", {"placement": "pfeiffer"}),
    ("bert", {"placement": "houlsby"}),
    ("bert", {"placement": "parallel", "adapter_input": "ffn_intermediate"}),
    ("gpt2", {"placement": "pfeiffer"}),  # Conv1D
    ("gpt2", {"placement": "houlsby"}),
    ("gpt2", {"placement": "parallel", "adapter_input": "ffn_intermediate"}),
    ("llama", {"placement": "pfeiffer", "use_bias": False}),
    ("llama", {"placement": "parallel", "adapter_input": "ffn_intermediate", "use_bias": False}),
]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("scale", [0.5, "learnable"])
@pytest.mark.parametrize(("kind", "fields"), MERGEABLE)
def test_merging_linear_adapters_is_exact(tiny, tiny_inputs, kind, fields, scale) -> None:
    inputs = tiny_inputs(kind, padding="right")
    config = BottleneckConfig(r=3, activation="identity", scale=scale, **fields)
    model = randomize(get_peft_model(tiny(kind).double(), config, autocast_adapter_dtype=False).double()).eval()
    expected, before = logits(model, inputs), state(model)
    assert not torch.allclose(expected, logits(tiny(kind).double(), inputs), atol=1e-2)

    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-9, rtol=1e-9)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(tiny(kind).double(), inputs))
    model.merge_adapter()
    model.unmerge_adapter()
    after = state(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(model, inputs), expected)

    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, inputs), expected, atol=1e-9, rtol=1e-9)
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in tiny(kind).named_modules()}
    assert not merged._forward_pre_hooks


def test_merging_several_adapters_in_order_is_exact(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("bert")
    model = get_peft_model(tiny("bert").double(), BottleneckConfig(r=3, activation="identity"))
    model.add_adapter("second", BottleneckConfig(r=2, activation="identity", placement="houlsby"))
    model.base_model.set_adapter(["default", "second"])
    randomize(model.double())
    expected = logits(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-9, rtol=1e-9)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), expected)


def test_merging_out_of_order_is_refused(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("bert")
    model = get_peft_model(tiny("bert").double(), BottleneckConfig(r=3, activation="identity"))
    model.add_adapter("second", BottleneckConfig(r=2, activation="identity"))
    model.base_model.set_adapter(["default", "second"])
    randomize(model.double())
    expected = logits(model, inputs)
    for names in (["second"], ["second", "default"]):
        with pytest.raises(ValueError, match=r"one after the other, \['default', 'second'\]"):
            model.merge_adapter(names)
    model.merge_adapter(["default"])
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-9, rtol=1e-9)
    model.merge_adapter(["second"])
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-9, rtol=1e-9)


REFUSALS = [
    ("bert", {"activation": "gelu"}, "its own activation is not linear"),
    ("bert", {"activation": "identity", "layer_norm": True}, "its own LayerNorm is not linear"),
    ("bert", {"activation": "identity", "glu": True}, "not linear"),
    ("bert", {"activation": "identity", "placement": "parallel"}, "its input is not the input of the layer"),
    ("llama", {"activation": "identity", "placement": "parallel"}, "LlamaMLP is not a linear layer"),
    ("llama", {"activation": "identity"}, "it has a bias and the layer has none; train with use_bias=False"),
]


@pytest.mark.parametrize(("kind", "fields", "reason"), REFUSALS)
def test_merging_is_refused_with_the_reason_and_changes_nothing(tiny, tiny_inputs, kind, fields, reason) -> None:
    inputs = tiny_inputs(kind)
    model = randomize(get_peft_model(tiny(kind), BottleneckConfig(r=3, **fields))).eval()
    expected, before = logits(model, inputs), state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=rf"cannot.* merge.*{reason}"):
            merge()
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(model, inputs), expected)


def test_safe_merge_refuses_weights_that_are_not_finite(tiny) -> None:
    model = randomize(get_peft_model(tiny("bert"), BottleneckConfig(r=3, activation="identity")))
    for name, parameter in model.named_parameters():
        if "experts.adapter.up.weight" in name and ".3." in name:
            parameter.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("factor", [4.5, 1.5])
def test_a_fraction_of_the_width_is_refused_and_read_in_files(factor: float, tiny: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=rf"reduction_factor={factor} must be a whole number, or below 1.*\(r\)"):
        get_peft_model(tiny("llama"), BottleneckConfig(reduction_factor=factor))
    get_peft_model(tiny("llama"), BottleneckConfig(r=int(32 // factor))).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": None, "reduction_factor": factor}))
    PeftModel.from_pretrained(tiny("llama"), tmp_path)
