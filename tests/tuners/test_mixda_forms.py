"""Domains at fixed weights, merged, joined, exported; and one of them trained alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from mixadapters import MixDAConfig, StageCallback

LORA = {"domain_type": "lora", "target_modules": ["q_proj", "down_proj"], "lora_alpha": 8.0}
WEIGHTS = {"a": 0.5, "b": -0.25}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor], **fields: Any) -> Tensor:
    return model.eval()(**inputs, **fields).logits


def made(tiny: Any, kind: str = "llama", **fields: Any) -> Any:
    base = {"domains": ["a", "b"], "r": 3, "init_weights": False, "task_adapter": None}
    return get_peft_model(tiny(kind), MixDAConfig(**{**base, **fields}))


def by_domain(model: Any, name: str, inputs: dict[str, Tensor]) -> Tensor:
    rows = len(next(iter(inputs.values())))
    return logits(model, inputs, domain_ids=model.base_model.domain_ids([name] * rows))


# --- fixed weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [WEIGHTS, [0.5, -0.25], {"b": 1.0}, None])
def test_a_fixed_gate_saved_and_loaded_weighs_domains_by_name(weights, tiny, tiny_inputs, tmp_path) -> None:
    router = {"kind": "constant", **({} if weights is None else {"weights": weights})}
    model = made(tiny, router=router, domain_layers=[1])
    mixture = dict(model.base_model._mixtures("default"))["model.layers.1.mlp.down_proj"]
    expected = [0.5, 0.5] if weights is None else [0.0, 1.0] if weights == {"b": 1.0} else [0.5, -0.25]
    assert mixture.router.constant() == expected
    inputs = tiny_inputs("llama")
    got = logits(model, inputs)
    if weights == {"b": 1.0}:
        torch.testing.assert_close(got, by_domain(model, "b", inputs))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), inputs), got)


def test_a_layer_without_a_domain_takes_the_weights_of_those_that_lie_there(tiny, tmp_path) -> None:
    for name, layers in (("a", [0, 1]), ("b", [1])):
        made(tiny, domains=[name], domain_layers=layers).save_pretrained(tmp_path / name)
    sources = {name: str(tmp_path / name) for name in "ab"}
    model = made(tiny, domains=sources, r=None, router={"kind": "constant", "weights": [0.5, 2.0]})
    found = {path.split(".")[2]: m.router.constant() for path, m in model.base_model._mixtures("default")}
    assert found == {"0": [0.5], "1": [0.5, 2.0]}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"c": 1.0}, r"unknown domain 'c'; have \['a', 'b'\]"),
        ([1.0], "one entry for each domain"),
        ({"a": float("inf")}, r"weights\['a'\]=inf must be a finite number"),
    ],
)
def test_fixed_weights_of_no_domain_are_refused(weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        MixDAConfig(domains=["a", "b"], router={"kind": "constant", "weights": weights})


# --- merged ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "lora"])
def test_lora_domains_at_fixed_weights_merge_with_the_lora_of_the_task(task, tiny, tiny_inputs) -> None:
    model = made(tiny, **LORA, task_adapter=task, router={"kind": "constant", "weights": WEIGHTS})
    inputs = tiny_inputs("llama")
    expected, plain = logits(model, inputs), logits(tiny("llama"), inputs)
    merged = model.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "mixda" in name]
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 0.01


def test_bottlenecks_and_gates_that_read_refuse_to_merge_by_name(tiny) -> None:
    with pytest.raises(ValueError, match=r"'default' at .*down_proj' cannot be merged: a bottleneck with its own"):
        made(tiny, router="constant").merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged: its router depends on the input"):
        made(tiny, **LORA).merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged: a bottleneck with its own activation"):
        made(tiny, **LORA, router="constant", task_adapter="pfeiffer").merge_and_unload()


def test_a_request_merges_its_mix_and_leaves_everything_as_it_was(tiny, tiny_inputs) -> None:
    model = made(tiny, **LORA)
    inputs = tiny_inputs("llama")
    gated, code = logits(model, inputs), by_domain(model, "b", inputs)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    tuner = model.base_model
    with tuner.merged_domains({"b": 1.0}):
        assert all(host.merged for host in tuner.hosts())
        torch.testing.assert_close(logits(model, inputs), code, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="domain_ids chooses experts of adapter 'default', which is merged"):
            by_domain(model, "a", inputs)
        with pytest.raises(ValueError, match=r"the adapters \['default'\] are merged already"), \
                tuner.merged_domains({"a": 1.0}):  # fmt: skip
            pass
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model, inputs), gated)
    bottlenecks = made(tiny)
    before = logits(bottlenecks, inputs)
    with pytest.raises(ValueError, match="a bottleneck with its own activation"), \
            bottlenecks.base_model.merged_domains({"a": 1.0}):  # fmt: skip
        pass
    assert torch.equal(logits(bottlenecks, inputs), before)


# --- joined ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"adapter_glu": True, "adapter_layer_norm": True, "activation": "silu"},
        {**LORA, "task_adapter": "lora"},
    ],
    ids=["bottleneck", "gated with norm", "lora"],
)
def test_domains_at_fixed_weights_are_one_wider_domain(fields, tiny, tiny_inputs, tmp_path) -> None:
    model = made(tiny, **fields, router={"kind": "constant", "weights": WEIGHTS})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".domain.bank." in name and parameter.dim() == 1:  # biases and norms, which start alike
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    inputs = tiny_inputs("llama", padding="right")
    expected = logits(model, inputs)
    model.base_model.set_stage("domain")
    model.base_model.join_domains("both")
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    for _, mixture in model.base_model._mixtures("default"):
        assert {name: e.rank for name, e in mixture.bank.experts.items()} == {"both": 6}
        assert all(p.requires_grad for p in mixture.bank.parameters())
    joined = logits(model, inputs)
    assert torch.equal(by_domain(model, "both", inputs), joined)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), inputs), joined)


def test_joining_takes_the_weights_that_are_given_and_refuses_to_guess(tiny, tiny_inputs) -> None:
    model = made(tiny)
    inputs = tiny_inputs("llama")
    tuner, alone = model.base_model, by_domain(model, "b", inputs)
    before = logits(model, inputs)
    for arguments, message in (
        ({}, "weighs the domains by its input.*give weights"),
        ({"weights": {"c": 1.0}}, "unknown domain 'c'"),
        ({"weights": {"a": 0.0}}, "leave nothing of the domains"),
    ):
        with pytest.raises(ValueError, match=message):
            tuner.join_domains("one", **arguments)
    with pytest.raises(ValueError, match="combine='convex'"):
        made(tiny, combine="convex").base_model.join_domains("one", {"a": 1.0})
    assert torch.equal(logits(model, inputs), before)
    tuner.join_domains("one", {"b": 1.0})
    torch.testing.assert_close(logits(model, inputs), alone)
    assert {e.rank for _, m in tuner._mixtures("default") for e in m.bank.experts.values()} == {3}


# --- exported --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"domain_layers": [1, 3]}),
        ("llama", {"target_modules": ["down_proj"], "rank_pattern": {"layers.2.mlp.down_proj": 5}}),
        (
            "bert",
            {"adapter_input": "ffn_input", "adapter_glu": True, "adapter_layer_norm": True, "domain_layers": [2]},
        ),
        ("llama", LORA),
    ],
    ids=["by layers", "by modules", "input of the FFN", "lora"],
)
def test_an_exported_domain_is_an_adapter_of_its_own(kind, fields, tiny, tiny_inputs, tmp_path) -> None:
    model = made(tiny, kind, **fields)
    inputs = tiny_inputs(kind, padding="right")
    expected = by_domain(model, "b", inputs)
    model.base_model.export_domain("b", tmp_path / "b")
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path / "b")
    expected_type = "LORA" if "domain_type" in fields else "BOTTLENECK"
    assert loaded.peft_config["default"].peft_type.value == expected_type
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    again = {**fields, "target_modules": None} if "domain_type" in fields else fields
    back = made(tiny, kind, **{**again, "lora_alpha": None, "r": None}, domains={"b": str(tmp_path / "b")})
    torch.testing.assert_close(by_domain(back, "b", inputs), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_exported_is_refused(tiny, tmp_path) -> None:
    tuner = made(tiny).base_model
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (("c", tmp_path / "c"), "unknown domain 'c'"),
        (("a", tmp_path / "file"), "is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            tuner.export_domain(*arguments)
    with pytest.raises(ValueError, match="pad_ranks=True is for LoRA"):
        tuner.export_domain("a", tmp_path / "a", pad_ranks=True)
    with pytest.raises(ValueError, match="combine='convex'"):
        made(tiny, combine="convex").base_model.export_domain("a", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- one trained alone -----------------------------------------------------------------------------------------


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=4, report_to=[], save_strategy="no", disable_tqdm=True,
        **{"max_steps": 2, "learning_rate": 1e-2, **more},
    )  # fmt: skip


def test_one_domain_of_several_trains_past_the_gate(tiny, tiny_inputs, tmp_path) -> None:
    model = made(tiny, task_adapter="pfeiffer")
    inputs = tiny_inputs("llama", labels="tokens")
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(2)] * 2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gated = logits(model, inputs)
    stage = StageCallback("domain", domain="b", check_head=False)
    trainer = Trainer(model, arguments(tmp_path / "run"), train_dataset=rows, callbacks=[stage])
    torch.testing.assert_close(logits(model, inputs), by_domain(model, "b", inputs))  # from here on
    own = logits(model, inputs, domain_ids=torch.tensor([0, -1]))
    torch.testing.assert_close(own[:1], by_domain(model, "a", inputs)[:1])  # what a batch says goes before
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".domain.bank.experts.b." in name for name in moved)
    model.base_model.set_adapter("default")  # PEFT's verbs change nothing of it
    model.base_model.add_domain("c")
    assert {n.split(".experts.")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    torch.testing.assert_close(logits(model, inputs), by_domain(model, "b", inputs))
    model.base_model.set_stage("task")  # the gate is back
    assert not torch.allclose(logits(model, inputs), by_domain(model, "b", inputs), atol=1e-4)
    assert not torch.allclose(logits(model, inputs), gated, atol=1e-4)


def test_a_domain_that_cannot_train_alone_is_refused(tiny, tmp_path) -> None:
    from mixadapters import BottleneckConfig

    tuner = made(tiny).base_model
    with pytest.raises(ValueError, match=r"domain='c' is unknown; have \['a', 'b'\]"):
        tuner.set_stage("domain", domain="c")
    with pytest.raises(ValueError, match="in the stage 'domain', not in 'task'"):
        tuner.set_stage("task", domain="a")
    other = get_peft_model(tiny("llama"), BottleneckConfig())
    with pytest.raises(ValueError, match="is of type BOTTLENECK, which has no domains"):
        Trainer(other, arguments(tmp_path), train_dataset=[{}], callbacks=[StageCallback("domain", domain="a")])


def test_a_checkpoint_of_another_domain_is_named(tiny, tiny_inputs, tmp_path) -> None:
    model, inputs = made(tiny), tiny_inputs("llama", labels="tokens")
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(2)]
    given = arguments(tmp_path, max_steps=1)
    given.save_strategy, given.save_steps = "steps", 1
    stage = StageCallback("domain", domain="a", check_head=False)
    Trainer(model, given, train_dataset=rows, callbacks=[stage]).train()
    with pytest.warns(UserWarning, match="was made in stage='domain a'; a run of stage='domain b' cannot go on"):
        Trainer(model, given, train_dataset=rows, callbacks=[StageCallback("domain", domain="b")])
