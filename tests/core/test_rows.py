from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import GenerationConfig

from mixadapters import BottleneckConfig, ForwardContext, MixDAConfig
from mixadapters.core.rows import RowNames

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
IDS = torch.tensor([[8, 6, 9, 6], [10, 14, 7, 11], [12, 7, 13, 8]])


def adapt(base: nn.Module, task_type: str | None = None, **configs: Any) -> PeftModel:
    """A model with an adapter of each name; `None` is one without saved modules."""
    model: PeftModel | None = None
    for name, fields in configs.items():
        config = BottleneckConfig(r=3, init_weights=False, task_type=task_type, **(fields or {}))
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save." in name or "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@torch.no_grad()
def alone(model: PeftModel, name: str, row: int) -> Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(input_ids=IDS[row : row + 1]).logits
    model.set_adapter(name)
    return model(input_ids=IDS[row : row + 1]).logits


@torch.no_grad()
def assert_rows_are_their_own(model: PeftModel, *names: str) -> None:
    """Whichever adapter is active, and through PEFT or the base model alike."""
    expected = torch.cat([alone(model, name, row) for row, name in enumerate(names)])
    for active in ("first", "second"):
        model.set_adapter(active)
        for call in (model, model.get_base_model()):
            mixed = call(input_ids=IDS[: len(names)], adapter_names=list(names)).logits
            torch.testing.assert_close(mixed, expected, **CLOSE)


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["peft", "base", "pin", "generate"])
@pytest.mark.parametrize("form", [list, tuple, np.array])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_names_may_be_any_sequence(tiny, through, form, task_type) -> None:
    model = adapt(tiny("llama", num_hidden_layers=1), task_type, first=None, second=None)
    names, base = form(["second", "__base__", "first"]), model.get_base_model()
    greedy = {"input_ids": IDS, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    if through == "generate":
        expected = model.generate(**greedy, adapter_names=["second", "__base__", "first"])
        for call in (model.generate, model.base_model.generate):
            assert torch.equal(call(**greedy, adapter_names=names), expected)
        return
    expected = model(input_ids=IDS, adapter_names=["second", "__base__", "first"]).logits
    if through == "pin":
        with ForwardContext.of(model).pin(adapter_names=names):
            assert torch.equal(base(input_ids=IDS).logits, expected)
    else:
        call = model if through == "peft" else base
        assert torch.equal(call(input_ids=IDS, adapter_names=names).logits, expected)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("first", r"adapter_names='first' is one name; give one for each row"),
        (["first", None, "second"], r"adapter_names\[1\]=None is no name.*'__base__'"),
        (["first", 3, "second"], r"adapter_names\[1\]=3 is no name"),
        (np.array([["first"], ["first"], ["first"]]), r"adapter_names\[0\]=\['first'\] is no name"),
        ([["first"], ["first"], ["second"]], r"adapter_names\[0\]=\['first'\] is no name"),
        (torch.tensor([0, 1, 0]), r"adapter_names\[0\]=0 is no name"),
        (b"first", r"adapter_names=b'first' is one name"),
        (3, r"adapter_names=3 must be a list of names"),
        ({"first", "second"}, r"must be a list of names"),
        (["first", "thrid", "second"], r"non-existing adapter\(s\): thrid"),
        (["first", "second"], r"same as the number of inputs, but got 2 and 3"),
        ([], r"same as the number of inputs, but got 0 and 3"),
        (["first"] * 6, r"same as the number of inputs, but got 6 and 3"),
    ],
)
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_names_that_are_none_are_refused_and_leave_nothing_behind(tiny, names, message, task_type) -> None:
    """PEFT's model of a causal task looks for adapters of its own kinds among them before its tuner sees them."""
    model = adapt(tiny("llama", num_hidden_layers=1), task_type, first=None, second=None)
    expected = model(input_ids=IDS).logits
    for call in (model, model.get_base_model(), model.generate, model.base_model.generate):
        with pytest.raises(ValueError, match=message):
            call(input_ids=IDS, adapter_names=names)
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_domain_in_place_of_an_adapter_is_told_how_it_is_chosen(tiny) -> None:
    config = MixDAConfig(domains=["law", "code"], r=3, init_weights=False)
    model = get_peft_model(tiny("llama"), config, adapter_name="mixture").eval()
    message = r"non-existing adapter\(s\): law. 'law' is an expert of adapter 'mixture': name that.*by domain_ids"
    for call in (model, model.get_base_model(), model.generate):
        with pytest.raises(ValueError, match=message):
            call(input_ids=IDS, adapter_names=["mixture", "law", "mixture"])


def test_names_that_were_read_are_not_read_again() -> None:
    names = RowNames.read(np.array(["a", "b"]))
    assert names == ["a", "b"]
    assert all(type(name) is str for name in names)


# --- saved modules -----------------------------------------------------------------------------------------------

HEAD = {"modules_to_save": ["lm_head"]}
TOKENS = {"trainable_token_indices": [6, 7]}


@pytest.mark.parametrize("saved", [HEAD, TOKENS, {**HEAD, **TOKENS}])
@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_rows_use_their_own_saved_modules_or_those_of_the_base(tiny, saved, which) -> None:
    configs = {name: saved if which in (name, "both") else None for name in ("first", "second")}
    model = adapt(tiny("llama"), **configs)
    assert_rows_are_their_own(model, "first", "second", "__base__")
    assert_rows_are_their_own(model, "second", "second", "first")
    assert_rows_are_their_own(model, "first")


def test_saved_modules_follow_the_beams(tiny) -> None:
    model = adapt(tiny("llama"), first=None, second=HEAD)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    names = ["second", "first", "__base__"]
    together = model.generate(input_ids=IDS, adapter_names=names, **settings)
    for row, name in enumerate(names):
        generated = model.generate(input_ids=IDS[row : row + 1], adapter_names=[name], **settings)
        assert torch.equal(generated[0], together[row])


def test_saved_modules_that_cannot_be_mixed_are_refused_by_name(tiny) -> None:
    model = adapt(tiny("llama"), first={"modules_to_save": ["norm"]}, second=None)
    with pytest.raises(TypeError, match=r"'model\..*norm' cannot serve rows of several.*'__base__', 'first'"):
        model(input_ids=IDS, adapter_names=["first", "second", "first"])
    for name in ("first", "second"):  # one alone is no mixture
        model.set_adapter(name)
        expected = model(input_ids=IDS).logits
        model.set_adapter("second" if name == "first" else "first")
        torch.testing.assert_close(model(input_ids=IDS, adapter_names=[name] * 3).logits, expected, **CLOSE)


def test_module_that_is_called_after_a_mixed_batch_is_not_mixed(tiny) -> None:
    model = adapt(tiny("llama"), first=None, second=HEAD)
    model(input_ids=IDS, adapter_names=["first", "second", "__base__"])
    model.set_adapter("second")
    head = model.get_base_model().lm_head
    hidden = torch.randn(2, 1, 32)
    assert torch.equal(head(hidden), head.modules_to_save["second"](hidden))


@pytest.mark.parametrize(
    ("fields", "path"),
    [({"modules_to_save": ["lm_head"]}, "lm_head"), ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens")],
)
@pytest.mark.parametrize("before", [2, 3])
def test_a_saved_module_by_itself_knows_the_pinned_names(tiny, fields, path, before) -> None:
    model = adapt(tiny("llama"), first=None, second=fields)
    model(input_ids=IDS[:before], adapter_names=["first", "second", "first"][:before])
    module = model.get_base_model().get_submodule(path)
    rows = IDS if path.endswith("embed_tokens") else torch.randn(3, 4, 32)
    with model.base_model.context.pin(adapter_names=["first", "second", "first"]):
        mixed = module(rows)
    base, second = module.original_module, module.modules_to_save["second"]
    torch.testing.assert_close(mixed, torch.stack([base(rows[0]), second(rows[1]), base(rows[2])]), **CLOSE)


def test_lora_beside_ours_by_itself_knows_the_pinned_names(tiny) -> None:
    base = tiny("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), base, "lora")
    inject_adapter_in_model(BottleneckConfig(r=3, init_weights=False), base, "ours")
    names, rows = ["lora", "__base__", "lora"], torch.randn(3, 4, 32)
    base(input_ids=IDS[:2], adapter_names=["lora", "ours"])
    layer = base.model.layers[0].self_attn.q_proj
    with ForwardContext.of(base).pin(adapter_names=names):
        mixed = layer(rows)
    plain = layer.base_layer(rows)
    adapted = plain + layer.get_delta_weight("lora").matmul(rows.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(mixed, torch.stack([adapted[0], plain[1], adapted[2]]), **CLOSE)


# --- one value for each row of the caller's batch ----------------------------------------------------------------


def gated(base: nn.Module) -> PeftModel:
    config = MixDAConfig(domains=["a", "b"], r=3, task_type="CAUSAL_LM", init_weights=False)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("ids", [[0], [0, 1], [0, 1, 0, 1, 0, 1], 0])
def test_field_of_another_length_is_refused(tiny, ids) -> None:
    model, ids = gated(tiny("llama")), torch.tensor(ids)
    got = len(ids) if ids.dim() else "a single value"
    batch = IDS[[0, 1, 2, 0]]
    with pytest.raises(ValueError, match=rf"`domain_ids` should be.*got {got} and 4"):
        model(input_ids=batch, domain_ids=ids)
    with (
        pytest.raises(ValueError, match=rf"`domain_ids` should be.*got {got} and 4"),
        ForwardContext.of(model).pin(domain_ids=ids),
    ):
        model(input_ids=batch)
    for beams in (1, 2):
        with pytest.raises(ValueError, match=rf"`domain_ids` should be.*got {got} and 4"):
            model.generate(input_ids=batch, domain_ids=ids, num_beams=beams, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("ids", [[0.0, 1.0, 0.7], [True, False, True], ["a", "b", "a"]])
def test_numbers_of_another_kind_are_refused(tiny, ids) -> None:
    with pytest.raises(ValueError, match="domain_ids"):
        gated(tiny("llama"))(input_ids=IDS, domain_ids=ids)


def settings_of(form: str, **said: Any) -> tuple[tuple, dict[str, Any]]:
    """Arguments of `generate` that say `said` in the form named."""
    said |= {"max_new_tokens": 4, "min_new_tokens": 4}
    config = GenerationConfig(**said, pad_token_id=0)
    match form:
        case "keywords":
            return (IDS,), said
        case "config":
            return (), {"input_ids": IDS, "generation_config": config}
        case "config by position":
            return (IDS, config), {}
        case _:
            return (IDS,), {}


@torch.no_grad()
@pytest.mark.parametrize("form", ["keywords", "config", "config by position", "model's config"])
@pytest.mark.parametrize("said", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_rows_follow_beams_however_they_are_asked_for(tiny, form, said) -> None:
    model = adapt(tiny("llama"), first=None, second=HEAD)
    said = {**said, "do_sample": False}
    if form == "model's config":
        model.get_base_model().generation_config.update(**said, max_new_tokens=4, min_new_tokens=4)
    args, kwargs = settings_of(form, **said)
    names = ["second", "first", "__base__"]
    together = model.generate(*args, **kwargs, adapter_names=names).unflatten(0, (3, -1))
    for row, name in enumerate(names):
        one = {"max_new_tokens": 4, "min_new_tokens": 4, **said}
        generated = model.generate(input_ids=IDS[row : row + 1], adapter_names=[name], **one)
        assert torch.equal(generated, together[row])


def test_plain_forward_has_no_beams(tiny) -> None:
    model = adapt(tiny("llama"), first=HEAD, second=None)
    names = ["first", "second", "first"]
    expected = model(input_ids=IDS, adapter_names=names).logits
    model.get_base_model().generation_config.num_beams = 4
    assert torch.equal(model(input_ids=IDS, adapter_names=names).logits, expected)
