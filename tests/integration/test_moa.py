"""Mixtures of adapters from end to end: every way to generate, what no token may see, and folders of PEFT's LoRA."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from adapted import logits
from peft import ArrowConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from processes import Process
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from mixadapters import MoAConfig

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
TARGETS = ["q_proj", "v_proj", "down_proj"]
FORMS: dict[str, dict[str, Any]] = {
    f"{granularity}, {scope}": {"granularity": granularity, "router_scope": scope}
    for granularity in ("token", "causal_prefix", "request")
    for scope in ("module", "block", "model")
} | {
    "null experts and shared ones": {"num_null_experts": 2, "router": "null", "n_shared_experts": 1},
    "top_p": {"router": {"kind": "top_p", "p": 0.6}},
    "softmax, residual": {"router": "softmax", "n_shared_experts": 1, "residual": True},
    "recurrent": {"router": {"kind": "recurrent", "width": 8}, "num_experts_per_tok": 1},
    "cosine": {"router": "cosine", "router_scope": "block"},
    "arrow": {"router": "arrow"},
    "arrow so far": {"router": {"kind": "arrow", "k": None, "granularity": "causal_prefix"}},  # of LoRA folders
    "hash": {"router": "hash"},
    "pregate": {"router": "pregate", "router_scope": "model"},
}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of two layers, a first and a last one, where a test asks for no more."""
    return partial(tiny, layers=2)


def stir(model: nn.Module, seed: int = 1) -> nn.Module:
    """With weights that make a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moa_adapters" in name:
                scale = 1.0 if ".router." in name else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def build(base: nn.Module, **fields: Any) -> PeftModel:
    config = {"num_experts": 4, "r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **fields}
    model = stir(get_peft_model(base, MoAConfig(**config)))
    model.base_model.fit_router(missing_ok=True)
    return model.eval()


def of_form(tiny: Any, form: str) -> PeftModel:
    return build(tiny("llama"), **copy.deepcopy(FORMS[form]))


def prompt_of(form: str, mask: Tensor) -> dict[str, Tensor]:
    """What a router by request must know where a forward holds more than the prompt."""
    return {"prompt_mask": mask} if form.startswith("request") else {}


# --- decoding -----------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunked": {"prefill_chunk_size": 3},
}


@torch.no_grad()
@every_form
def test_every_way_to_generate_is_the_one_without_cache(form, tiny, tiny_inputs) -> None:
    model, inputs = of_form(tiny, form), tiny_inputs("llama", padding="left")
    expected = {}
    for beams in (1, 3):
        reference = {"num_beams": beams, "num_return_sequences": min(beams, 2)}
        expected[beams] = model.generate(**inputs, **SETTINGS, **reference, use_cache=False)
        with model.disable_adapter():
            assert not torch.equal(model.generate(**inputs, **SETTINGS, **reference), expected[beams])
    for way, options in WAYS.items():
        if form.startswith("request") and way == "chunked":
            with pytest.raises(ValueError, match=r"granularity='request'.*prefill_chunk_size"):
                model.generate(**inputs, **SETTINGS, **options)
            continue
        assert torch.equal(model.generate(**inputs, **SETTINGS, **options), expected[options.get("num_beams", 1)]), way
    alone = {name: value[:1] for name, value in inputs.items()}  # assisted decoding takes one row
    assert torch.equal(model.generate(**alone, **SETTINGS, assistant_model=tiny("llama")), expected[1][:1])


@torch.no_grad()
@pytest.mark.parametrize("scope", ["module", "block", "model"])
def test_what_is_generated_for_a_request_follows_from_its_prompt_alone(scope, tiny, tiny_inputs) -> None:
    model = build(tiny("llama", layers=3), **FORMS[f"request, {scope}"])
    inputs = tiny_inputs("llama", padding="left")
    tokens = model.generate(**inputs, **SETTINGS)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
    prompt = torch.nn.functional.pad(inputs["attention_mask"], (0, 6))
    output = logits(model, {"input_ids": tokens, "attention_mask": mask}, prompt_mask=prompt, use_cache=False)
    assert torch.equal(output[:, 6:-1].argmax(-1), tokens[:, 7:])


@torch.no_grad()
@every_form
def test_beams_of_padded_rows_are_those_of_each_alone(form, tiny, tiny_inputs) -> None:
    model, inputs = of_form(tiny, form), tiny_inputs("llama", batch=3, padding="left")
    settings = {**SETTINGS, "num_beams": 3}
    together = model.generate(**inputs, **settings)[:, 7:]
    for row in range(3):
        alone = inputs["input_ids"][row : row + 1, row:]
        tokens = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **settings)
        assert torch.equal(tokens[0, alone.shape[1] :], together[row])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["model", "caller", "static"])
@every_form
def test_logits_with_a_cache_equal_those_of_the_full_forward(form, cache, tiny, tiny_inputs) -> None:
    model = of_form(tiny, form)
    ids = tiny_inputs("llama", batch=2, length=9)["input_ids"]
    mask = (torch.arange(9) < 5).expand(2, -1)
    whole = logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **prompt_of(form, mask))
    made = {
        "model": lambda: None,
        "caller": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }[cache]()
    pieces = []
    for start, end in ((0, 5), (5, 6), (6, 9)):
        output = model(
            input_ids=ids[:, start:end], attention_mask=torch.ones(2, end, dtype=torch.long), past_key_values=made
        )
        made = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@every_form
def test_a_row_does_not_depend_on_padding_or_on_the_other_rows(form, side, tiny, tiny_inputs) -> None:
    model, inputs = of_form(tiny, form), tiny_inputs("llama", batch=4, padding=side)
    whole = logits(model, inputs, **prompt_of(form, inputs["attention_mask"]))
    order = torch.tensor([2, 0, 3])
    others = {name: value[order] for name, value in inputs.items()}
    again = logits(model, others, **prompt_of(form, others["attention_mask"]))
    for row in range(4):
        kept = inputs["attention_mask"][row].bool()
        alone = {name: value[row : row + 1, kept] for name, value in inputs.items()}
        expected = whole[row, kept]
        got = logits(model, alone, **prompt_of(form, alone["attention_mask"]))[0]
        torch.testing.assert_close(got, expected, **CLOSE)
        if row in order:
            torch.testing.assert_close(again[order.tolist().index(row), kept], expected, **CLOSE)


# --- the future ---------------------------------------------------------------------------------------------------


@every_form
def test_no_token_sees_a_later_one(form, tiny, tiny_inputs) -> None:
    model, inputs = of_form(tiny, form), tiny_inputs("llama", length=8)
    prompt = prompt_of(form, (torch.arange(8) < 3).expand(2, -1))
    before = logits(model, inputs, **prompt)
    for t in (3, 5, 7):
        other = {**inputs, "input_ids": inputs["input_ids"].clone()}
        other["input_ids"][:, t:] = (other["input_ids"][:, t:] + 17) % 80 + 5
        after = logits(model, other, **prompt)
        torch.testing.assert_close(after[:, :t], before[:, :t], **CLOSE)
        assert not torch.allclose(after[:, t:], before[:, t:], atol=1e-2)


@pytest.mark.parametrize("scope", ["module", "block", "model"])
@pytest.mark.parametrize("router", ["top_k", "softmax", "expert_choice"])
def test_what_sees_the_whole_sequence_is_for_encoders(router, scope, tiny, tiny_inputs) -> None:
    fields: dict[str, Any] = {"router": router, "router_scope": scope, "task_type": None}
    if router != "expert_choice":
        fields["granularity"] = "sequence"
    base = tiny("llama")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"see the future"):
        build(base, **fields)
    assert [name for name, _ in base.named_modules()] == names
    model = build(tiny("bert"), **{**fields, "target_modules": ["query", "value", "dense"]}).double()
    inputs = tiny_inputs("bert", batch=3, padding="right")
    whole = logits(model, inputs)
    for row in range(3):
        kept = inputs["attention_mask"][row].bool()
        alone = {name: value[row : row + 1, kept] for name, value in inputs.items()}
        torch.testing.assert_close(logits(model, alone)[0], whole[row, kept], **CLOSE)


# --- two forwards, copies, precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", ["token, module", "causal_prefix, block", "request, model", "recurrent"])
def test_two_forwards_before_one_backward_are_the_sum_of_two(form, checkpointing, tiny, tiny_inputs) -> None:
    batches = [tiny_inputs("llama", labels="tokens", seed=seed) for seed in (0, 1)]
    for batch in batches:
        batch["labels"][:, :3] = -100
    grads = []
    for together in (False, True):
        fields = FORMS[form] | {"router_aux_loss_coef": 1.0}
        model = build(tiny("llama"), **copy.deepcopy(fields)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        if together:
            losses = [model(**batch).loss for batch in batches]
            sum(losses).backward()
        else:
            for batch in batches:
                model(**batch).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("form", ["token, block", "recurrent", "arrow", "pregate"])
def test_copies_and_pickles_are_models_of_their_own(form, tiny, tiny_inputs) -> None:
    model, inputs = of_form(tiny, form), tiny_inputs("llama")
    expected = logits(model, inputs)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for twin in copies:
        torch.testing.assert_close(logits(twin, inputs), expected, rtol=0, atol=0)
        twin.base_model.add_expert("new")
    assert "new" not in model.peft_config["default"].all_names()
    assert not torch.allclose(logits(model, inputs), expected, atol=1e-3)


@pytest.mark.parametrize("form", ["token, module", "causal_prefix, block", "recurrent"])
def test_a_base_in_half_precision_trains_and_comes_back(form, tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    model = build(tiny("llama").bfloat16(), **copy.deepcopy(FORMS[form]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model, inputs).dtype == torch.bfloat16
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model.train()(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    expected = logits(model.eval(), inputs)
    loaded = PeftModel.from_pretrained(tiny("llama").bfloat16(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["token, block", "arrow"])
def test_a_deleted_mixture_leaves_the_base_model(form, tiny, tiny_inputs) -> None:
    model, inputs = of_form(tiny, form), tiny_inputs("llama")
    one = logits(model, inputs)
    model.add_adapter("other", MoAConfig(num_experts=2, r=2, target_modules=["v_proj"], init_weights=False))
    model.set_adapter("other")
    other = logits(model, inputs)
    assert not torch.allclose(one, other, atol=1e-3)
    with pytest.raises(ValueError, match="cannot"):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model, inputs), other, rtol=0, atol=0)
    model.delete_adapter("default")
    torch.testing.assert_close(logits(model, inputs), other, rtol=0, atol=0)
    assert not [name for name in model.state_dict() if ".default." in name]
    torch.testing.assert_close(logits(model.unload(), inputs), logits(tiny("llama"), inputs), rtol=0, atol=0)


# --- folders of PEFT's LoRA ---------------------------------------------------------------------------------------

MAKES = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
forms = {"law": (4, ["q_proj", "v_proj"]), "code": (8, ["q_proj", "up_proj", "down_proj"]), "chat": (64, ["q_proj"])}
for seed, (name, (rank, targets)) in enumerate(forms.items()):
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder + "/base"), config).save_pretrained(f"{folder}/{name}")
assert not [name for name in sys.modules if name.startswith("mixadapters")]
"""
ROUTES = """
import sys, torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from mixadapters import MoAConfig
folder, ids = sys.argv[1], torch.arange(5, 12).unsqueeze(0)
experts = {name: f"{folder}/{name}" for name in ("law", "code", "chat")}
base = AutoModelForCausalLM.from_pretrained(folder + "/base")
model = get_peft_model(base, MoAConfig(experts=experts, router="arrow", task_type="CAUSAL_LM")).eval()
tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False)
model.save_pretrained(folder + "/three")
torch.save((model(tokens).logits.detach(), tokens), folder + "/routed.pt")
"""
LOADS = """
import sys, torch
from peft import AutoPeftModelForCausalLM
import mixadapters
folder, ids = sys.argv[1], torch.arange(5, 12).unsqueeze(0)
model = AutoPeftModelForCausalLM.from_pretrained(folder + "/three").eval()
tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False)
torch.save((model(tokens).logits.detach(), tokens), folder + "/loaded.pt")
"""


@pytest.mark.slow
def test_lora_folders_are_routed_saved_and_loaded_in_processes_of_their_own(tiny, tmp_path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    Process(MAKES, [str(tmp_path)]).finish()
    Process(ROUTES, [str(tmp_path)]).finish()
    for name in ("law", "code", "chat"):  # the mixture needs its sources no more
        (tmp_path / name).rename(tmp_path / f"{name}-gone")
    Process(LOADS, [str(tmp_path)]).finish()
    (routed, tokens), (loaded, again) = (torch.load(tmp_path / f"{name}.pt") for name in ("routed", "loaded"))
    assert tokens.shape == (1, 15)
    assert torch.equal(tokens, again)
    assert torch.equal(routed, loaded)
    assert not torch.allclose(routed, logits(tiny("llama"), {"input_ids": tokens}), atol=0.1)


@pytest.mark.parametrize("k", [1, 2])
def test_arrow_equals_that_of_peft(k, tiny, tiny_inputs, tmp_path) -> None:
    """On equal ranks and targets, which are what PEFT's takes."""
    inputs, names = tiny_inputs("llama"), ("law", "code", "chat")
    for seed, name in enumerate(names):
        lora = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
        torch.manual_seed(seed)
        model = get_peft_model(tiny("llama"), lora)
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if "lora_A" in n):
                parameter[0] *= 6  # one direction stands out, to which PEFT's power iteration comes
        model.save_pretrained(tmp_path / name)
    config = ArrowConfig(top_k=k, router_temperature=0.7, rng_seed=0)
    theirs = create_arrow_model(tiny("llama"), [str(tmp_path / name) for name in names], config)
    experts = {name: tmp_path / name for name in names}
    router = {"kind": "arrow", "k": k, "temperature": 0.7}
    ours = get_peft_model(tiny("llama"), MoAConfig(experts=experts, router=router, task_type="CAUSAL_LM"))
    expected = logits(theirs.eval(), inputs)
    torch.testing.assert_close(logits(ours.eval(), inputs), expected, **CLOSE)
    assert (expected - logits(tiny("llama"), inputs)).abs().max() > 0.1
