"""`fit_gate`: gates of counted tokens and by regression, in whole models, saved and with domains that come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted import logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from mixadapters import ROUTERS, MixDAConfig, MoAConfig
from mixadapters.routers import CountsRouter, SoftmaxGate

FIELDS: dict[str, Any] = {"domains": ["a", "b"], "r": 3, "domain_layers": [0, 2], "init_weights": False}


def ids(low: int, high: int, rows: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(low, high, (rows, 20), generator=torch.Generator().manual_seed(seed))


TEXTS = {"a": ids(5, 40), "b": ids(30, 70)}
GENERAL = ids(60, 96)


def mixture(tiny: Any, kind: str = "llama", fit: bool = True, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(tiny(kind), MixDAConfig(**{**FIELDS, "router": "counts", **fields})).eval()
    if fit:
        model.base_model.fit_gate(TEXTS, GENERAL)
    return model


def shares(model: nn.Module, text: Tensor) -> dict[str, float]:
    with model.base_model.record_usage() as usage, torch.no_grad():
        model(input_ids=text, attention_mask=torch.ones_like(text))
    mark = "gate/mean/weight/"
    return {name.removeprefix(mark): value for name, value in usage.report().items() if name.startswith(mark)}


def tables(model: nn.Module) -> list[str]:
    return [key for key in model.state_dict() if key.endswith(".counts")]


# --- counted tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_each_text_goes_to_its_domain(tiny, tiny_inputs, kind) -> None:
    model = mixture(tiny, kind)
    assert len(tables(model)) == 1
    if kind == "t5":
        assert torch.isfinite(logits(model, tiny_inputs(kind, padding="right"))).all()
        routers = [m.router for m in model.base_model.mixtures().values() if m.router.arms[0] == "a"]
        assert {(r.stack, r.granularity) for r in routers} == {("encoder", "sequence"), ("decoder", "causal_prefix")}
        return
    assert shares(model, ids(5, 30, seed=1))["a"] > 0.8
    assert shares(model, ids(40, 60, seed=1))["b"] > 0.8
    assert shares(model, ids(70, 96, seed=1))["frozen"] > 0.8


def test_saved_gate_is_the_same_elsewhere(tiny, tiny_inputs, tmp_path) -> None:
    model, inputs = mixture(tiny), tiny_inputs("llama", padding="left")
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        other = PeftModel.from_pretrained(tiny("llama"), tmp_path, **options).eval()
        assert torch.equal(logits(other, inputs), logits(model, inputs))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len([key for key in weights if ".table." in key]) == 3


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_continues_the_evidence(tiny, tiny_inputs, options) -> None:
    model, inputs = mixture(tiny), tiny_inputs("llama", batch=3, padding="left")
    made = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    without = {**options, "use_cache": False} if "cache_implementation" not in options else {"use_cache": False}
    slow = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **without)
    assert torch.equal(made, slow)


def test_cached_logits_equal_those_of_the_full_forward(tiny, tiny_inputs) -> None:
    model, inputs = mixture(tiny), tiny_inputs("llama", length=9, padding="left")
    full, mask = logits(model, inputs), inputs["attention_mask"]
    first = model(input_ids=inputs["input_ids"][:, :4], attention_mask=mask[:, :4], use_cache=True)
    rest = model(input_ids=inputs["input_ids"][:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, full[:, 4:])


def test_checkpointing_runs_layers_again_with_the_same_routing(tiny, tiny_inputs) -> None:
    inputs, found = tiny_inputs("llama", labels="tokens"), []
    for checkpointing in (False, True):
        model = mixture(tiny).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**inputs).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert len(found[0]) > 0
    torch.testing.assert_close(found[0], found[1])


def test_one_decision_serves_all_layers(tiny, tiny_inputs, monkeypatch) -> None:
    model, calls = mixture(tiny), []
    evidence = CountsRouter._ids
    monkeypatch.setattr(CountsRouter, "_ids", lambda *args: calls.append(1) or evidence(*args))
    logits(model, tiny_inputs("llama"))
    assert len(calls) == 1
    routings = model.base_model.context.record.routings
    probs = [routing.probs for routing in routings.values() if routing.probs is not None]
    assert len(probs) == 2
    assert torch.equal(*probs)


def test_a_domain_comes_with_its_own_text_alone(tiny) -> None:
    model = mixture(tiny)
    before, tuner = shares(model, ids(5, 30, seed=1)), model.base_model
    tuner.add_domain("c")
    with pytest.raises(ValueError, match=r"has not counted any text of \['c'\]"):
        shares(model, ids(5, 30))
    read = tuner.fit_gate({"c": ids(80, 96)})
    assert read == {"c": 240}
    assert shares(model, ids(80, 96, seed=1))["c"] > 0.6
    assert shares(model, ids(5, 30, seed=1))["a"] == pytest.approx(before["a"], abs=0.02)


def test_a_domain_goes_and_its_text_is_left_to_the_base(tiny, tiny_inputs, tmp_path) -> None:
    model, inputs = mixture(tiny), tiny_inputs("llama")
    before = shares(model, TEXTS["a"])
    model.base_model.remove_domain("b")
    after = shares(model, TEXTS["a"])
    assert after["a"] == pytest.approx(before["a"])
    assert after["null0"] == pytest.approx(before["b"])
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert torch.equal(logits(other, inputs), logits(model, inputs))
    assert shares(other, TEXTS["a"]).keys() == after.keys()


def test_the_table_moves_when_the_first_layer_loses_its_experts(tiny, tiny_inputs, tmp_path) -> None:
    """b sits in a later layer than a: without a, that layer holds the counts; a new domain takes them back."""
    save = {}
    for name, layer in (("a", 0), ("b", 2)):
        one = get_peft_model(tiny("llama"), MixDAConfig(**{**FIELDS, "domains": [name], "domain_layers": [layer]}))
        one.save_pretrained(tmp_path / name)
        save[name] = str(tmp_path / name)
    model = mixture(tiny, domains=save, task_adapter=None, r=None)
    tuner, inputs = model.base_model, tiny_inputs("llama")
    assert ".layers.0." in tables(model)[0]
    before = shares(model, TEXTS["b"])
    tuner.remove_domain("a")
    assert [".layers.2." in key for key in tables(model)] == [True]
    assert shares(model, TEXTS["b"])["b"] == pytest.approx(before["b"])
    model.save_pretrained(tmp_path / "two")
    other = PeftModel.from_pretrained(tiny("llama"), tmp_path / "two").eval()
    assert torch.equal(logits(other, inputs), logits(model, inputs))
    tuner.add_domain("a", save["a"])
    assert [".layers.0." in key for key in tables(model)] == [True]
    tuner.fit_gate({"a": TEXTS["a"]})
    assert shares(model, TEXTS["a"])["a"] > 0.8  # not shared with the null arm that it left
    assert tuner.peft_config["default"].null_arms == {}
    model.save_pretrained(tmp_path / "again")
    other = PeftModel.from_pretrained(tiny("llama"), tmp_path / "again").eval()
    assert torch.equal(logits(other, inputs), logits(model, inputs))


def test_convex_mixture_counts_too(tiny, tiny_inputs) -> None:
    model = mixture(tiny, combine="convex")
    assert torch.isfinite(logits(model, tiny_inputs("llama"))).all()


def test_said_temperature_is_taken_though_it_is_the_default_of_others(tiny) -> None:
    model = mixture(tiny, router=None, gate="counts", temperature=1.0)
    assert {m.router.temperature for k, m in model.base_model.mixtures().items() if k.step == "domain"} == {1.0}


# --- regression ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("granularity", ["token", "causal_prefix", "request"])
def test_regression_teaches_learned_gates_where_text_belongs(tiny, gate, granularity) -> None:
    router = {"kind": gate, "granularity": granularity, "temperature": 2.0}
    model = mixture(tiny, router=router, fit=False)
    weights = {k: v.clone() for k, v in model.state_dict().items() if ".router." not in k}
    many = {"a": ids(5, 40, 100), "b": ids(30, 70, 100)}
    read = model.base_model.fit_gate(many, ids(60, 96, 100), max_length=16, batch_size=30)
    assert read == {"a": 2000, "b": 2000, "frozen": 2000}
    found = {arm: shares(model, ids(*span, seed=1)) for arm, span in {"a": (5, 30), "b": (40, 60)}.items()}
    least = {"token": 0.45, "causal_prefix": 0.6, "request": 0.7}[granularity]
    assert all(share[arm] > least for arm, share in found.items()), found
    assert all(share[arm] == max(share.values()) for arm, share in found.items()), found
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items() if k in weights)


def test_regression_pools_as_encoders_gates_do(tiny) -> None:
    model = mixture(tiny, "bert", router={"kind": "softmax", "granularity": "sequence"}, fit=False)
    model.train()
    model.base_model.fit_gate({"a": ids(5, 40, 100), "b": ids(30, 70, 100)}, ids(60, 96, 100))
    assert model.training
    assert shares(model.eval(), ids(5, 30, seed=1))["a"] > 0.75


# --- text in any form, or refused ------------------------------------------------------------------------------------


class Letters:
    """Every letter is a token; a special one before each text unless told otherwise."""

    def __call__(self, texts: list[str], add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        start = [1] if add_special_tokens else []
        return {"input_ids": [[*start, *(ord(c) - 90 for c in text)] for text in texts]}


def test_forms_of_text_are_counted_alike(tiny) -> None:
    import datasets

    strings = ["abc", "", "aab"]
    rows = [[7, 8, 9], [7, 7, 8]]
    padded = [{"input_ids": [*row, 0], "attention_mask": [1, 1, 1, 0]} for row in rows]
    forms = [strings, rows, torch.tensor(rows), padded, [{"text": s} for s in strings], iter(rows)]
    forms += [datasets.Dataset.from_dict({"text": strings}), datasets.Dataset.from_dict({"input_ids": rows})]
    found = []
    for form in forms:
        model = mixture(tiny, fit=False)
        model.base_model.fit_gate({"a": form, "b": rows}, rows, tokenizer=Letters())
        found.append(model.state_dict()[tables(model)[0]][:, 0])
    assert found[0].sum() == 6
    assert found[0][7] == 3
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(
    ("texts", "general", "options", "message"),
    [
        ({"tax": [[5]]}, None, {}, r"unknown domain 'tax'; have \['a', 'b'\]"),
        (["a text"], None, {}, "must map domains to their text"),
        ({}, None, {}, "must map domains to their text"),
        ({"a": "a text"}, None, {}, r"texts\['a'\] is 'a text', a str; give a list of texts or a dataset"),
        ({"a": ["a text"]}, None, {}, r"texts\['a'\] holds strings: pass tokenizer"),
        ({"a": [[5]], "b": [[6]]}, None, {}, r"nothing has been counted of \['frozen'\]"),
        ({"a": [[5]], "b": [[]]}, [[7]], {}, r"texts\['b'\] has no tokens"),
        ({"a": [[5]], "b": [[96]]}, [[7]], {}, r"texts\['b'\] holds the token id 96; the model's are 0 to 95"),
        ({"a": [[5]], "b": ["x", [6]]}, [[7]], {}, r"texts\['b'\] holds strings and token ids"),
        ({"a": [[5]], "b": [[0.5]]}, [[7]], {}, r"texts\['b'\] holds \[0.5\]; a text is"),
        ({"a": [[5]], "b": [{"words": 3}]}, [[7]], {}, r"texts\['b'\] has rows with the columns \['words'\]"),
        ({"a": [[5]], "b": [[6]]}, [[7]], {"method": "count"}, "method='count' is unknown.*Did you mean 'counts'"),
        ({"a": [[5]], "b": [[6]]}, [[7]], {"method": "features"}, r"no router that it fits, but \['CountsRouter'"),
        ({"a": [[5]], "b": [[6]]}, [[7]], {"adapter_name": "x"}, "adapter_name='x' is unknown"),
    ],
)
def test_what_cannot_be_fitted_is_refused_and_nothing_changed(tiny, texts, general, options, message) -> None:
    model = mixture(tiny, fit=False)
    with pytest.raises(ValueError, match=message):
        model.base_model.fit_gate(texts, general, **options)
    assert not model.state_dict()[tables(model)[0]].any()


@pytest.mark.parametrize("router", ["counts", "softmax"])
def test_text_is_not_for_models_that_read_none(tiny, router) -> None:
    config = MoAConfig(experts=["a", "b"], r=2, target_modules=["fc1"], router=router,
                       router_scope="model" if router == "counts" else "module")  # fmt: skip
    model = get_peft_model(tiny("vit"), config)
    with pytest.raises(ValueError, match=r"texts: ViT\w* reads 'pixel_values' and no text: train its router"):
        model.base_model.fit_gate({"a": [[5]], "b": [[6]]}, [[7]])


def test_regression_refuses_what_it_cannot_fit(tiny) -> None:
    model = mixture(tiny, router="softmax", fit=False)
    with pytest.raises(ValueError, match=r"give the text of \['b', 'frozen'\] too"):
        model.base_model.fit_gate({"a": TEXTS["a"]})
    model = mixture(tiny, router={"kind": "softmax", "hidden": [4]}, fit=False)
    with pytest.raises(ValueError, match=r"fits linear routers; that at '.*' has hidden layers"):
        model.base_model.fit_gate(TEXTS, GENERAL)
    model = mixture(tiny, "t5", router="softmax", fit=False)
    with pytest.raises(ValueError, match="this model has an encoder and a decoder"):
        model.base_model.fit_gate(TEXTS, GENERAL)
    model = mixture(tiny, router="softmax", fit=False)
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"did not run; set_adapter to theirs first"):
        model.base_model.fit_gate(TEXTS, GENERAL)


# --- MoA ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def loras(tiny, tmp_path) -> dict[str, str]:
    """Trained LoRA folders of different ranks and targets."""
    targets = {"a": ["q_proj", "down_proj"], "b": ["q_proj", "v_proj", "up_proj"], "c": ["down_proj"]}
    for rank, (name, modules) in enumerate(targets.items(), 2):
        torch.manual_seed(rank)
        lora = LoraConfig(r=rank, init_lora_weights=False, target_modules=modules)
        get_peft_model(tiny("llama"), lora).save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in targets}


def test_lora_experts_under_counted_tokens(tiny, tiny_inputs, tmp_path, loras) -> None:
    two = {name: loras[name] for name in "ab"}
    model = get_peft_model(tiny("llama"), MoAConfig(experts=two, router="counts", router_scope="model")).eval()
    tuner, inputs = model.base_model, tiny_inputs("llama", padding="left")
    tuner.fit_gate(TEXTS, GENERAL)
    assert len(tables(model)) == 1
    before = shares(model, ids(5, 30, seed=1))
    assert before["a"] > 0.8
    tuner.add_expert("c", loras["c"])
    tuner.fit_gate({"c": ids(80, 96)})
    assert shares(model, ids(5, 30, seed=1))["a"] == pytest.approx(before["a"], abs=0.02)
    tuner.remove_expert("b")
    assert shares(model, ids(40, 60, seed=1))["null0"] > 0.8
    model.save_pretrained(tmp_path / "moa")
    other = PeftModel.from_pretrained(tiny("llama"), tmp_path / "moa").eval()
    assert torch.equal(logits(other, inputs), logits(model, inputs))
    made = [m.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False, use_cache=c) for m in (model, other)
            for c in (True, False)]  # fmt: skip
    assert all(torch.equal(one, made[0]) for one in made)
    tuner.add_expert("b", loras["b"])
    tuner.fit_gate({"b": TEXTS["b"]})
    assert tuner.peft_config["default"].null_arms == {}


def test_a_counts_router_of_each_module_is_refused(loras) -> None:
    with pytest.raises(ValueError, match="use router_scope='model'"):
        MoAConfig(experts=loras, router="counts")


def test_general_text_needs_an_arm_that_takes_it(tiny) -> None:
    with ROUTERS.temporarily():

        @ROUTERS.register("toy_all_in")
        class AllIn(SoftmaxGate):
            """Domains alone."""

            frozen_arm = False

        model = mixture(tiny, router="toy_all_in", fit=False)
        with pytest.raises(ValueError, match="no arm that leaves text to the frozen model"):
            model.base_model.fit_gate(TEXTS, GENERAL)
        model.base_model.fit_gate(TEXTS)
        assert shares(model, ids(5, 30, seed=1))["a"] > 0.5


def test_a_router_that_is_made_of_the_experts_is_not_fitted(tiny) -> None:
    config = MoAConfig(experts=["a", "b"], router="arrow", target_modules=["down_proj"], init_weights=False)
    model = get_peft_model(tiny("llama"), config)
    with pytest.raises(ValueError, match=r"no router that it fits, but \['ArrowRouter'\].*router='counts'"):
        model.base_model.fit_gate({"a": [[5]], "b": [[6]]})


@pytest.mark.parametrize(
    ("router", "remedy"), [("counts", r"fit_gate\(texts, general"), ("arrow", "experts' weights.*fit_router")]
)
def test_a_stage_of_a_gate_that_does_not_train_says_how_it_is_made(router, remedy, tiny) -> None:
    scope = "model" if router == "counts" else "module"
    config = MoAConfig(experts=["a", "b"], router=router, router_scope=scope, target_modules=["down_proj"])
    model = get_peft_model(tiny("llama"), config)
    with pytest.raises(ValueError, match=f"stage='router' trains nothing.*{remedy}"):
        model.base_model.set_stage("router")
