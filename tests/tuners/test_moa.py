"""Mixtures of adapters: what the config says is what is built, trained, saved and loaded."""

from __future__ import annotations

import copy
import itertools
import json
import re
import warnings
from functools import partial
from typing import Any

import adapted
import pytest
import torch
from adapted import logits
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from mixadapters import BalanceBiasCallback, MixDAConfig, MoAConfig, RouterScheduleCallback, StageCallback
from mixadapters.core.names import UNNAMED
from mixadapters.core.routing import RoutingKey
from mixadapters.serving import distill_pregate
from mixadapters.surgery import prune_experts
from mixadapters.tuners.moa.router import router_spec

SCOPES = ("module", "block", "model")


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of two layers, a first and a last one, where a test asks for no more."""
    return partial(tiny, layers=2)


def build(base: nn.Module, **fields: Any) -> nn.Module:
    return get_peft_model(base, MoAConfig(**{"num_experts": 4, "r": 3, **fields}))


randomize = partial(adapted.randomize, trained=True, evaluation=True)


def mixtures(model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    return dict(model.base_model._mixtures(adapter_name))


def saved(model: nn.Module, folder: Any) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama", {"target_modules": ["q_proj", "o_proj"]}),
    "default targets": ("llama", {}),
    "all linears": ("qwen3", {"target_modules": "all-linear"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "both stacks": ("t5", {"target_modules": ["q", "k", "v", "wo"]}),
    "BART": ("bart", {"target_modules": ["q_proj", "v_proj", "fc1"]}),
    "encoder": ("bert", {"target_modules": ["query", "value"]}),
    "images": ("vit", {"target_modules": "all-linear"}),
    "FFN": ("llama", {"expert_type": "bottleneck"}),
    "FFN, gated": ("bert", {"expert_type": "glu", "activation": "silu"}),
    "whole MoE block": ("mixtral", {"expert_type": "bottleneck"}),
    "whole MoE block, LoRA": ("qwen3_moe", {"target_modules": ["mlp"]}),
    "after the FFN": ("llama", {"expert_type": "bottleneck", "placement": "pfeiffer"}),
    "shared and null": ("llama", {"n_shared_experts": 2, "num_null_experts": 3}),
    "residual": ("llama", {"n_shared_experts": 1, "residual": True}),
    "pyramid": ("llama", {"num_experts": {"0": 2, "1": 5}}),
    "segments": ("llama", {"r": 4, "segments": 2}),
    "dense": ("llama", {"num_experts_per_tok": None, "router": "top_k"}),
}


# Modules share a router where a layer has several of them; the forms with one to a layer show nothing more.
SHARED = ["all linears", "Conv1D", "both stacks", "images", "shared and null", "pyramid"]


@pytest.mark.parametrize(
    ("form", "scope"), [*((form, "module") for form in FORMS), *itertools.product(SHARED, ("block", "model"))]
)
def test_new_experts_start_as_the_base_model_and_come_back_from_a_file(
    form, scope, tiny, tiny_inputs, tmp_path
) -> None:
    kind, fields = FORMS[form]
    inputs = tiny_inputs(kind)
    model = build(tiny(kind), router_scope=scope, **fields).eval()
    plain = logits(tiny(kind), inputs)
    torch.testing.assert_close(logits(model, inputs), plain, rtol=0, atol=1e-6)
    randomize(model)
    changed = logits(model, inputs)
    assert (changed - plain).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    torch.testing.assert_close(logits(again, inputs), changed, rtol=0, atol=0)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), plain, rtol=0, atol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_has_one_router_and_one_routing(scope, tiny, tiny_inputs, tmp_path) -> None:
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    model = randomize(build(tiny("llama"), router_scope=scope, target_modules=targets))
    routers = {key.partition(".router.")[0] for key in saved(model, tmp_path) if ".router." in key}
    assert len(routers) == {"module": 10, "block": 4, "model": 1}[scope]
    seen: dict[RoutingKey, Tensor] = {}
    model.base_model.context.observers.append(lambda key, routing, mask: seen.update({key: routing.indices}))
    logits(model, tiny_inputs("llama"))
    by_scope: dict[Any, list[Tensor]] = {}
    for key, indices in seen.items():
        by_scope.setdefault({"module": key, "block": (key.layer, key.group), "model": ""}[scope], []).append(indices)
    assert len(seen) == 10
    assert len(by_scope) == len(routers)
    for same in by_scope.values():
        assert all(torch.equal(one, same[0]) for one in same)
    assert len({tuple(indices.flatten().tolist()) for indices in seen.values()}) == len(routers)


def test_memory_of_cross_attention_is_routed_by_itself(tiny, tiny_inputs) -> None:
    """Its keys and values are those of the encoder's tokens, of which there may be others."""
    model = randomize(build(tiny("t5"), router_scope="block", target_modules=["q", "k", "v", "o"]))
    inputs = tiny_inputs("t5")
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :3]
    assert logits(model, inputs).shape[1] == 3
    leaders = {path for path, m in mixtures(model).items() if not getattr(m.router, "follows", False)}
    assert sum("EncDecAttention" in path for path in leaders) == 2 * 2


def test_a_layer_that_reads_other_tokens_than_its_router_is_named(tiny, tiny_inputs) -> None:
    model = build(tiny("llama"), router_scope="model", target_modules=["q_proj"])
    inputs = tiny_inputs("llama")
    model(**inputs)
    follower = list(mixtures(model).values())[-1]
    with pytest.raises(RuntimeError, match=r"layers\.1.*reads 5 tokens.*reads 14.*router_scope='module'"):
        follower.router(torch.randn(5, 32), model.base_model.context)


def test_followers_learn_and_teach_the_router_they_share(tiny, tiny_inputs) -> None:
    """The gradient of one router is the sum over its layers, with recomputation too."""
    inputs, grads = tiny_inputs("llama", labels="tokens"), []
    for checkpointing in (False, True):
        targets = ["q_proj", "down_proj"]  # all experts, so that the loss is smooth
        model = build(tiny("llama"), router_scope="model", target_modules=targets, num_experts_per_tok=None)
        randomize(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**inputs).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6)
    taught = {name: grad for name, grad in grads[0].items() if "router" in name and grad.any()}
    assert taught
    for name, grad in taught.items():
        step = 1e-3 * grad / grad.norm()
        slope = (loss_beside(model, name, step, inputs) - loss_beside(model, name, -step, inputs)) / 2e-3
        assert slope == pytest.approx(float(grad.norm()), rel=0.02)


@torch.no_grad()
def loss_beside(model: nn.Module, name: str, step: Tensor, inputs: Any) -> float:
    parameter = model.get_parameter(name)
    before = parameter.clone()
    parameter.add_(step)
    loss = float(model(**inputs).loss)
    parameter.copy_(before)
    return loss


def test_reentrant_recomputation_with_a_router_for_all_layers_is_refused(tiny, tiny_inputs) -> None:
    model = randomize(build(tiny("llama"), router_scope="model", router_aux_loss_coef=0.0)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    loss = model(**tiny_inputs("llama", labels="tokens")).logits.square().mean()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        loss.backward()


def test_shared_experts_are_always_on_and_never_routed(tiny, tiny_inputs) -> None:
    """With the routed experts at zero, what is left is each token's sum over the shared ones."""
    inputs = tiny_inputs("llama")
    model = randomize(build(tiny("llama"), n_shared_experts=1, target_modules=["up_proj"]))
    lone = build(tiny("llama"), num_experts=1, target_modules=["up_proj"], router="single")
    with torch.no_grad():
        for (_, mixture), (_, one) in zip(mixtures(model).items(), mixtures(lone).items(), strict=True):
            for name in mixture.expert_names:
                mixture.bank.experts[name].up.weight.zero_()
            one.bank.experts["expert0"].load_state_dict(mixture.bank.experts["shared0"].state_dict())
    torch.testing.assert_close(logits(model, inputs), logits(lone.eval(), inputs), rtol=1e-5, atol=1e-5)
    with model.base_model.record_usage() as usage:
        logits(model, inputs)
    assert not any("shared" in name for name in usage.report())


def test_a_token_on_null_experts_is_the_base_model_bit_for_bit(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    model = randomize(build(tiny("llama"), num_null_experts=2, router="null"))
    with torch.no_grad():
        for mixture in mixtures(model).values():
            mixture.router.output.weight.zero_()
            mixture.router.output.bias.copy_(torch.tensor([0.0] * 4 + [50.0, 50.0]))
    torch.testing.assert_close(logits(model, inputs), logits(tiny("llama"), inputs), rtol=0, atol=0)


def test_rows_do_not_depend_on_padding_batch_or_cache(tiny, tiny_inputs) -> None:
    model = randomize(build(tiny("llama"), router_scope="block", n_shared_experts=1))
    inputs = tiny_inputs("llama", batch=3, padding="left")
    whole = logits(model, inputs)
    for row in range(3):
        kept = inputs["attention_mask"][row].bool()
        alone = logits(model, {name: value[row : row + 1, kept] for name, value in inputs.items()})
        torch.testing.assert_close(alone[0], whole[row, kept], rtol=1e-4, atol=1e-4)
    one = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=True)
    other = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(one, other)


def test_rows_of_a_batch_name_adapters_of_all_kinds(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", batch=4)
    fields = {"target_modules": ["down_proj"], "init_weights": False}
    configs = {
        "a": MoAConfig(num_experts=3, r=2, router_scope="block", n_shared_experts=1, **fields),
        "b": MoAConfig(num_experts=5, r=4, router="softmax", **fields),
        "c": MixDAConfig(domains=["x", "y"], r=3, task_adapter=None, **fields),
    }
    base = tiny("llama")
    inject_adapter_in_model(configs["c"], base, "c")
    model = get_peft_model(base, configs["a"], adapter_name="a")
    model.add_adapter("b", configs["b"])
    model.eval()
    names = ["b", "__base__", "a", "c"]
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if ".router." in n):
            parameter.normal_()
        mixed = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            expected = logits(tiny("llama"), inputs)
        else:
            expected = logits(model, inputs, adapter_names=[name] * 4)
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_a_plain_loop(tiny, tiny_inputs) -> None:
    """In float64, against experts run one by one on all tokens."""
    model = randomize(build(tiny("llama"), target_modules=["up_proj"], n_shared_experts=1)).double()
    mixture = next(iter(mixtures(model).values()))
    x = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 48, dtype=torch.float64, requires_grad=True)
    wanted = [x, y, *mixture.parameters()]
    routing = mixture.router(x, model.base_model.context)
    got = torch.autograd.grad(mixture(x, y, model.base_model.context).square().sum(), wanted, allow_unused=True)
    total = y
    for i, name in enumerate([*mixture.expert_names, "shared0"]):
        expert = mixture.bank.experts[name]
        if name == "shared0":
            weight = torch.ones(6, 1, dtype=torch.float64)
        else:
            weight = (routing.weights.double() * (routing.indices == i)).sum(1, keepdim=True)
        total = total + weight * mixture.bank.scales[name] * (x @ expert.down.weight.T @ expert.up.weight.T)
    expected = torch.autograd.grad(total.square().sum(), wanted, allow_unused=True)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_stages_train_what_they_say_and_gathered_experts_stay(tiny, tmp_path) -> None:
    build(tiny("llama"), num_experts=1, target_modules=["q_proj"]).base_model.export_expert("expert0", tmp_path)
    model = build(tiny("llama"), num_experts=8, experts={"old": str(tmp_path), "new": None}, router="top_k")

    def trained() -> set[str]:
        names = (n for n, p in model.named_parameters() if p.requires_grad)
        return {"router" if ".router." in n else n.split(".experts.")[1].split(".")[0] for n in names}

    assert trained() == {"router", "new"}
    model.set_adapter("default")
    assert trained() == {"router", "new"}
    for stage, parts in {"router": {"router"}, "experts": {"old", "new"}, "all": {"router", "new"}}.items():
        model.base_model.set_stage(stage)
        assert trained() == parts, stage


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such router": ({"router": "topk"}, "top_k"),
    "no such option": ({"router": {"kind": "top_k", "kk": 2}}, "kk"),
    "twice": ({"router": {"kind": "top_k", "k": 1}, "num_experts_per_tok": 3}, "say it once"),
    "not taken": ({"router": "softmax", "num_experts_per_tok": 3}, "no option 'k'"),
    "scope": ({"router_scope": "layer"}, "block"),
    "two counts": ({"experts": ["a"], "num_experts": 4}, "one of the two"),
    "name twice": ({"experts": ["a", "a"]}, "twice"),
    "name of an arm": ({"experts": ["null0"]}, "arm"),
    "dots": ({"experts": ["a.b"]}, "a.b"),
    "one string": ({"experts": "a"}, "['a']"),
    "none": ({"experts": []}, "at least one"),
    "entry": ({"experts": {"a": {"sauce": "x"}}}, "source"),
    "check alone": ({"experts": {"a": {"revision": "x"}}}, "no source"),
    "layers": ({"num_experts": {"3-1": 4}}, "3-1"),
    "activation of LoRA": ({"activation": "relu"}, "activation"),
    "alpha of bottlenecks": ({"expert_type": "glu", "lora_alpha": 3}, "lora_alpha"),
    "residual alone": ({"residual": True}, "n_shared_experts"),
    "zero experts": ({"num_experts": 0}, "num_experts"),
    "bool": ({"norm_topk_prob": 1}, "norm_topk_prob"),
    "two numbers for a layer": ({"num_experts": {"0-2": 4, "2": 3}}, "[2]"),
    "more than a process holds": ({"num_experts": 10**9}, "at most 4096"),
    "more segments than a process holds": ({"segments": 10**9}, "at most 4096"),
    "null experts": ({"num_null_experts": 10**9}, "at most 4096"),
    "null arms of a file": ({"null_arms": {"q_proj": 10**9}}, "at most 4096"),
    "layers beyond any model": ({"num_experts": {"0-999999": 4}}, "0-999999"),
    "order of nothing": ({"expert_order": ["a"]}, "expert_order"),
    "pattern": ({"experts": ["*"]}, "'*'"),
    "biases": ({"experts": {"a": {"ranks": {"q": 1}, "scales": {"q": 1.0}, "biases": ["v"]}}}, "biases=['v']"),
    "null arms of counts": ({"router": "counts", "router_scope": "model", "num_null_experts": 2}, "num_null_experts"),
    "null arms as an option": ({"router": {"kind": "counts", "null_arms": 2}, "router_scope": "model"}, "'counts'"),
    "coefficient": ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef"),
    "option that is no switch": ({"router": {"kind": "top_k", "norm_topk_prob": "yes"}}, "norm_topk_prob='yes'"),
    "loss of a hash": ({"router": "hash", "router_aux_loss_coef": 0.1}, "no option 'balance_coef'"),
    "loss of a constant": ({"router": {"kind": "constant", "z_coef": 0.1}}, "no argument 'z_coef'"),
    "loss of counts": ({"router": {"kind": "counts", "entropy_coef": 0.1}, "router_scope": "model"}, "entropy_coef"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_bad_values_are_refused_by_name(form) -> None:
    fields, message = REFUSED[form]
    with pytest.raises(ValueError, match=re.escape(message)):
        MoAConfig(**fields)


@pytest.mark.parametrize("k", ["auto", None])
def test_a_wrapped_router_takes_the_fields_of_its_base(k) -> None:
    """The usual base chooses k experts, and k was given to those that choose none."""
    config = MoAConfig(num_experts_per_tok=k, router={"kind": "recurrent", "base": "softmax"})
    assert "k" not in router_spec(config)[1]
    assert router_spec(MoAConfig(num_experts_per_tok=3, router="recurrent"))[1]["k"] == 3
    with pytest.raises(ValueError, match=r"num_experts_per_tok=3: router 'recurrent' has no option 'k'"):
        MoAConfig(num_experts_per_tok=3, router={"kind": "recurrent", "base": "softmax"})


def test_too_many_experts_per_token_is_an_error_of_the_model(tiny) -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok=9"):
        build(tiny("llama"), num_experts=4, num_experts_per_tok=9)


ABSENT: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_experts": {"0-3": 2, "4": 3}}, "'4'"),
    "layers that are left out": ({"num_experts": {"0": 2, "1-3": 3}, "layers_to_transform": [1]}, "'0'"),
    "alpha_pattern": ({"alpha_pattern": {"w_proj": 3}}, "w_proj"),
    "null_arms": ({"null_arms": {"w_proj": 3}}, "w_proj"),
    "priority without a capacity": ({"batch_prioritized": True}, "capacity_factor=0"),
    "a granularity that sees the future": ({"granularity": "sequence"}, "granularity='sequence' at"),
    "k of the router": ({"num_experts": 1, "router": {"kind": "top_k", "k": 2}}, "num_experts_per_tok=2"),
}


@pytest.mark.parametrize("form", ABSENT)
def test_what_the_model_does_not_have_is_refused_before_it_changes(form, tiny) -> None:
    fields, message = ABSENT[form]
    base = tiny("llama")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=re.escape(message)):
        build(base, **fields)
    assert [name for name, _ in base.named_modules()] == names


def test_numbers_of_another_kind_of_adapter_are_refused(tiny, tiny_inputs) -> None:
    """They chose nothing, without a word."""
    inputs = tiny_inputs("llama")
    model = build(tiny("llama"), num_experts=2)
    for name in ("domain_ids", "modality_ids"):
        with pytest.raises(ValueError, match=rf"{name} is read by no adapter of this model.*'expert_ids'"):
            model(**inputs, **{name: torch.tensor([0, 1])})
    domains = get_peft_model(tiny("llama"), MixDAConfig(domains=["a"], task_adapter=None))
    with pytest.raises(ValueError, match=r"expert_ids is read by no adapter.*'domain_ids'"):
        domains(**inputs, expert_ids=torch.tensor([0, 0]))


def test_a_source_in_a_file_is_not_followed(tiny, tmp_path) -> None:
    build(tiny("llama"), num_experts=8, experts=["a", "b"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["experts"]["a"]["source"] = "somewhere/else"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not followed"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_order_of_experts_survives_json(tiny, tmp_path) -> None:
    model = randomize(build(tiny("llama"), num_experts=8, experts=["zebra", "ape", "cat"]))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert list(again.peft_config["default"].experts) == ["zebra", "ape", "cat"]
    assert next(iter(mixtures(again).values())).expert_names == ["zebra", "ape", "cat"]


# --- experts that come and go ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "top_k"])
def test_added_expert_leaves_the_others_logits_and_survives_a_file(router, scope, tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama")
    model = randomize(build(tiny("llama"), num_experts=3, router=router, router_scope=scope))
    before = copy.deepcopy({k: v.clone() for k, v in model.state_dict().items() if ".bank." in k})
    by_name = {
        n: logits(model, inputs, expert_ids=model.base_model.expert_ids([n] * 2)) for n in ("expert0", "expert2")
    }
    model.base_model.add_expert("new", r=5)
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)
    for name, expected in by_name.items():
        again = logits(model, inputs, expert_ids=model.base_model.expert_ids([name] * 2))
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    randomize(model, seed=5)
    for m in mixtures(model).values():
        assert m.expert_names == ["expert0", "expert1", "expert2", "new"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("router", ["softmax", "top_k"])
def test_removed_expert_leaves_the_weights_of_the_others(router, scope, tiny, tiny_inputs, tmp_path) -> None:
    """As if it added nothing."""
    inputs = tiny_inputs("llama")
    model = randomize(build(tiny("llama"), num_experts=4, router=router, router_scope=scope, n_shared_experts=1))
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for mixture in mixtures(silent).values():
            mixture.bank.experts["expert1"].up.weight.zero_()
    model.base_model.remove_expert("expert1")
    torch.testing.assert_close(logits(model, inputs), logits(silent, inputs), rtol=1e-5, atol=1e-5)
    assert not any("expert1" in key for key in model.state_dict())
    assert model.base_model.expert_ids(["expert2", "__base__"]).tolist() == [1, -1]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=0)


def test_expert_gathered_later_is_the_adapter_that_it_was(tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama")
    other = randomize(build(tiny("llama"), num_experts=1, r=6, target_modules=["q_proj", "down_proj"]))
    other.base_model.export_expert("expert0", tmp_path / "one")
    expected = logits(PeftModel.from_pretrained(tiny("llama"), tmp_path / "one").eval(), inputs)
    model = randomize(build(tiny("llama"), target_modules=["q_proj", "v_proj"], router="softmax"))
    model.base_model.add_expert("one", str(tmp_path / "one"))
    got = logits(model, inputs, expert_ids=model.base_model.expert_ids(["one"] * 2))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "all")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "all").eval()
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs), rtol=0, atol=0)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".experts.one." in n)


def test_verbs_refuse_what_they_cannot_do_and_change_nothing(tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama")
    model = randomize(build(tiny("llama"), num_experts=2))
    before, config = logits(model, inputs), copy.deepcopy(model.peft_config["default"].to_dict())
    tuner = model.base_model
    for act, message in (
        (lambda: tuner.add_expert("expert1"), "exists already"),
        (lambda: tuner.add_expert("a.b"), "a.b"),
        (lambda: tuner.add_expert("new", share=1.5), "share"),
        (lambda: tuner.add_expert("new", share="much"), "share='much'"),
        (lambda: tuner.add_expert("new", r=0), "positive integer value but the value passed is 0"),
        (lambda: tuner.add_expert("new", r="4"), "positive integer value but the value passed is '4'"),
        (lambda: tuner.add_expert("new", "/nowhere", r=4), "leave r out"),
        (lambda: tuner.export_expert("expert0", None), "folder=None"),
        (lambda: tuner.add_expert("new", "/nowhere"), "cannot be read"),
        (lambda: tuner.remove_expert("expert7"), "unknown expert"),
        (lambda: tuner.expert_ids("expert0"), "list"),
        (lambda: tuner.expert_ids(["expert9"]), "Did you mean"),
        (lambda: tuner.export_expert("expert9", tmp_path / "never"), "unknown expert"),
        (lambda: tuner.fit_router(), "nothing to fit"),
    ):
        with pytest.raises(ValueError, match=message):
            act()
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=0)
    assert model.peft_config["default"].to_dict() == config
    other = randomize(build(tiny("llama"), num_experts=1, target_modules=["q_proj"]))
    other.base_model.export_expert("expert0", tmp_path)
    late = build(tiny("llama"), num_experts=2, target_modules=["v_proj"], router_scope="block")
    config = copy.deepcopy(late.peft_config["default"].to_dict())
    with pytest.raises(ValueError, match="runs before"):
        late.base_model.add_expert("new", str(tmp_path))
    assert late.peft_config["default"].to_dict() == config
    tuner.remove_expert("expert0", renormalize=True)
    with pytest.raises(ValueError, match="only one"):
        tuner.remove_expert("expert1")


def test_experts_are_packed_once_for_the_steps_of_a_generate(tiny, tiny_inputs, monkeypatch) -> None:
    from mixadapters.core import bank as module

    packed = []
    real = module.packed
    monkeypatch.setattr(module, "packed", lambda kind, weights: packed.append(kind) or real(kind, weights))
    model = randomize(build(tiny("llama"), target_modules=["q_proj"]))
    inputs = tiny_inputs("llama")
    first = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert len(packed) == 2  # layers
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    again = model.generate(**inputs, max_new_tokens=6, do_sample=False)  # with the weights of now
    assert len(packed) == 4
    assert torch.equal(again, model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False))
    assert not torch.equal(first, again)


def test_null_arms_count_among_those_that_a_token_may_choose(tiny) -> None:
    model = build(tiny("llama"), num_experts=2, router={"kind": "null", "k": 4, "null_arms": 3})
    assert {m.router.k for m in mixtures(model).values()} == {4}
    assert {m.router.k for m in mixtures(build(tiny("llama"), router="null", num_experts_per_tok=6)).values()} == {6}


@pytest.mark.parametrize("segments", [1, 2])
def test_an_expert_like_another_begins_as_that_and_survives_a_file(segments, tiny, tiny_inputs, tmp_path) -> None:
    config = MoAConfig(num_experts=2, r=4, lora_alpha=8, segments=segments, target_modules=["q_proj", "down_proj"])
    model = randomize(get_peft_model(tiny("llama"), config))
    tuner = model.base_model
    tuner.add_expert("copy", like="expert1")
    mixtures = [mixture for _, mixture in tuner._mixtures("default")]
    pieces = zip(tuner.config_of("default").pieces("copy"), tuner.config_of("default").pieces("expert1"), strict=True)
    for new, old in list(pieces):
        for mixture in mixtures:
            one, other = (mixture.bank.experts[name].state_dict() for name in (new, old))
            assert all(torch.equal(one[key], other[key]) and one[key] is not other[key] for key in other)
            assert mixture.bank.scales.get(new, mixture.bank.scale) == mixture.bank.scales.get(old, mixture.bank.scale)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    inputs = tiny_inputs("llama")
    torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)
    for given, match in (
        ({"like": "none"}, "unknown expert"),
        ({"like": "expert0", "r": 2}, "like='expert0' and r=2"),
    ):
        with pytest.raises(ValueError, match=match):
            tuner.add_expert("other", **given)


@pytest.mark.parametrize(("config", "field"), [(MoAConfig, "experts"), (MixDAConfig, "domains")])
def test_a_list_of_names_that_are_saved_adapters_is_warned_of(config: Any, field: str, tmp_path, monkeypatch) -> None:
    """A list names new experts; who writes the names of trained ones may mean these."""
    monkeypatch.chdir(tmp_path)
    for name, kind in (("law", "LORA"), ("mine", config.__name__.removesuffix("Config").upper())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    (tmp_path / "code").mkdir()
    with pytest.warns(UserWarning, match=rf"{field}: .*'law' here is not read: write {{'law': 'law'}} to read it, or"):
        config(**{field: ["code", "law"]})
    with pytest.raises(
        ValueError, match=rf"{field}: 'user/law' is a folder or a hub id.* write {{'law': 'user/law'}}"
    ):
        config(**{field: ["user/law"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = config(**{field: ["code", "mine"]})  # no adapter; and what an earlier run has saved
        assert getattr(config(**{field: {"law": None}}), field)["law"] == getattr(made, field)["code"]


def test_an_export_writes_over_nothing(tiny, tmp_path) -> None:
    """Not even over the folder that an expert was gathered from."""
    tuner = build(tiny("llama"), num_experts=2, target_modules=["q_proj"]).base_model
    tuner.export_expert("expert0", tmp_path / "one")
    before = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    with pytest.raises(ValueError, match=r"export_expert: folder=.*one' holds something already; name a new"):
        tuner.export_expert("expert1", tmp_path / "one")
    assert {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def with_another(base: nn.Module) -> Any:
    """A model with the adapters "default" and "other", of which the second is active."""
    model = build(base, num_experts=2, target_modules=["q_proj"])
    fields = {"r": 2, "target_modules": ["q_proj"], "router_bias_update_rate": 0.1}
    model.add_adapter("other", MoAConfig(num_experts=2, schedules={"temperature": [[0, 1.0], [1, 3.0]]}, **fields))
    model.set_adapter("other")
    return model


def test_verbs_mean_the_active_adapter_and_ask_which_where_several_are(tiny, tmp_path) -> None:
    tuner = with_another(tiny("llama")).base_model
    verbs = (
        lambda **which: tuner.add_expert("new", **which),
        lambda **which: tuner.remove_expert("expert1", **which),
        lambda **which: tuner.set_stage("router", **which),
        lambda **which: tuner.export_expert("expert0", tmp_path / f"one{len(which)}", **which),
        lambda **which: tuner.set_progress(0.5, **which),
        lambda **which: tuner.override_experts(off=["new"], **which),
        lambda **which: tuner.expert_ids(["new"], **which),
    )
    tuner.set_adapter(["default", "other"])
    for verb in verbs:
        with pytest.raises(ValueError, match=r"adapters \['default', 'other'\] are active.*pass adapter_name='other'"):
            verb()
    tuner.set_adapter("other")
    for verb in verbs:
        verb()
    assert tuner.peft_config["default"].all_names() == ["expert0", "expert1"]
    assert tuner.peft_config["other"].all_names() == ["expert0", "new"]
    assert tuner.stage == {"other": "router"}
    assert {m.router.temperature for _, m in tuner._mixtures("other")} == {2.0}
    assert {m.router.temperature for _, m in tuner._mixtures("default")} == {1.0}
    assert tuner.peft_config["other"].expert_overrides
    tuner.add_expert("new", adapter_name="default")  # the named one, whatever is active
    assert tuner.peft_config["default"].all_names() == ["expert0", "expert1", "new"]
    tuner.set_stage("experts", "default")
    assert tuner.stage == {"other": "router", "default": "experts"}


def test_callbacks_and_surgery_mean_the_active_adapter(tiny, tiny_inputs, tmp_path) -> None:
    model, inputs = with_another(tiny("llama")), tiny_inputs("llama", labels="tokens")
    callbacks = [StageCallback("all"), RouterScheduleCallback(), BalanceBiasCallback()]
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(2)]
    Trainer(model, args, train_dataset=rows, callbacks=callbacks)
    assert [callback.adapter_name for callback in callbacks] == ["other"] * 3
    tuner = model.base_model
    assert set(tuner.mixtures(UNNAMED)) == set(tuner.mixtures("other")) != set(tuner.mixtures("default"))
    distill_pregate(model, [inputs])
    prune_experts(model, None, 1, criterion="random")
    assert {len(m.bank.names) for _, m in tuner._mixtures("other")} == {1}
    assert {len(m.bank.names) for _, m in tuner._mixtures("default")} == {2}
    tuner.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"experts of the adapters \['default', 'other'\]: say which"):
        prune_experts(model, None, 1, criterion="random")


@pytest.mark.parametrize(
    "router",
    [{"kind": "top_k", "noise": 3.0}, {"kind": "top_k", "jitter": 0.5}, {"kind": "dense_to_sparse"}],
    ids=["noise", "jitter", "gumbel"],
)
def test_what_a_mixed_batch_draws_does_not_follow_the_order_in_which_adapters_were_added(
    tiny, tiny_inputs, router
) -> None:
    config = {"num_experts": 4, "r": 3, "target_modules": ["q_proj"], "router": router, "lora_dropout": 0.2}
    names = ["law", "code", "tax"]
    inputs = tiny_inputs("llama", batch=4)

    def seen(order: list[str], weights: dict[str, Tensor], rows: list[str]) -> Tensor:
        model = get_peft_model(tiny("llama"), MoAConfig(**config), order[0])
        for name in order[1:]:
            model.add_adapter(name, MoAConfig(**config))
        adapters = {name: p for name, p in model.named_parameters() if ".moa_adapters." in name}
        with torch.no_grad():
            for name, parameter in adapters.items():
                parameter.copy_(weights.setdefault(name, 0.5 * torch.randn(parameter.shape)))
        torch.manual_seed(3)
        return model.train()(**inputs, adapter_names=rows).logits

    weights: dict[str, Tensor] = {}
    rows = ["code", "law", "__base__", "tax"]
    wanted = seen(names, weights, rows)
    assert torch.equal(seen(names[::-1], weights, rows), wanted)
    assert torch.equal(seen(["tax", "law", "code"], weights, rows), wanted)
    assert not torch.equal(seen(names, weights, rows[::-1]).flip(0), wanted)
