"""The router that gathered LoRA go by where none is named, and fields that say nothing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from typing import Any

import peft
import pytest
import torch
from adapted import logits
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from mixadapters import MoAConfig
from mixadapters.routers import ROUTERS
from mixadapters.routers.base import build_router, options_of
from mixadapters.tuners.moa.router import router_spec

TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "value"], "t5": ["q", "wo"]}
SO_FAR = {"router": {"kind": "arrow", "k": None, "granularity": "causal_prefix"}}
BY_TOKEN = {"router": {"kind": "arrow", "k": None}}


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of two layers, a first and a last one, where a test asks for no more."""
    return partial(tiny, layers=2)


@pytest.fixture
def folders(tiny, tmp_path) -> Any:
    """folders(kind, targets): three LoRA of PEFT by name."""

    def make(kind: str, targets: Any = None) -> dict[str, str]:
        found = {}
        for seed, name in enumerate(("law", "code", "chat")):
            base = tiny(kind)
            torch.manual_seed(seed)
            fields = {"r": 2, "lora_alpha": 8, "target_modules": targets or TARGETS[kind], "init_lora_weights": False}
            get_peft_model(base, LoraConfig(**fields)).save_pretrained(tmp_path / name)
            found[name] = str(tmp_path / name)
        return found

    return make


def routers(model: Any) -> list[Any]:
    return [mixture.router for _, mixture in model.base_model._mixtures("default")]


# --- which router -------------------------------------------------------------------------------------------------

DECODER = r".*decoder.*\.(q|wo)"
CHOSEN: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "a causal model": ("llama", None, SO_FAR),
    "an encoder": ("bert", None, BY_TOKEN),
    "both stacks": ("t5", None, BY_TOKEN),
    "a decoder alone": ("t5", DECODER, SO_FAR),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_gathered_lora_without_a_named_router_go_by_the_one_that_measured_best(
    case, tiny, tiny_inputs, folders, tmp_path
) -> None:
    kind, targets, named = CHOSEN[case]
    experts = folders(kind, targets)
    model = get_peft_model(tiny(kind), MoAConfig(experts=experts))
    expected = "causal_prefix" if named is SO_FAR else "token"
    assert {(type(r).__name__, r.k, r.granularity) for r in routers(model)} == {("ArrowRouter", 3, expected)}
    inputs = tiny_inputs(kind)
    output = logits(model, inputs)
    assert torch.equal(output, logits(get_peft_model(tiny(kind), MoAConfig(experts=experts, **named)), inputs))
    assert not torch.allclose(output, logits(get_peft_model(tiny(kind), MoAConfig(experts=experts, router="arrow")),
                                             inputs), atol=1e-4)  # fmt: skip

    model.save_pretrained(tmp_path / "mixture")
    written = json.loads((tmp_path / "mixture/adapter_config.json").read_text())
    assert (written["router"], written["num_experts_per_tok"]) == ({"kind": "arrow"}, None)
    assert written["granularity"] == expected
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(kind), tmp_path / "mixture"), inputs), output)


SAID: dict[str, tuple[dict[str, Any], tuple[int, str]]] = {
    "number of experts": ({"num_experts_per_tok": 1}, (1, "causal_prefix")),
    "two of them": ({"num_experts_per_tok": 2}, (2, "causal_prefix")),
    "granularity": ({"granularity": "token"}, (3, "token")),
    "both": ({"num_experts_per_tok": 2, "granularity": "token"}, (2, "token")),
    "a router by name": ({"router": "arrow"}, (2, "token")),
    "another": ({"router": "top_k"}, (2, "token")),
    "all of another": ({"router": "top_k", "num_experts_per_tok": None}, (3, "token")),
    "options of a router": ({"router": {"kind": "arrow", "k": 1}}, (1, "token")),
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_said_goes_before_the_default_and_comes_back_from_the_file(case, tiny, folders, tmp_path) -> None:
    said, expected = SAID[case]
    model = get_peft_model(tiny("llama"), MoAConfig(experts=folders("llama"), **said))
    assert {(r.k, r.granularity) for r in routers(model)} == {expected}
    model.save_pretrained(tmp_path / "mixture")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "mixture")
    assert {(r.k, r.granularity) for r in routers(again)} == {expected}


def test_one_config_for_two_models_is_filled_in_for_each(tiny, folders) -> None:
    config = MoAConfig(experts=folders("llama", ["q_proj"]), target_modules=["q_proj"])
    assert (config.router, config.num_experts_per_tok, config.granularity) == (None, "auto", None)
    model = get_peft_model(tiny("llama"), config)
    other = get_peft_model(tiny("llama"), config, "other")
    assert routers(model)[0].granularity == other.peft_config["other"].granularity == "causal_prefix"


# --- fields that say nothing --------------------------------------------------------------------------------------


def test_a_file_is_that_of_a_config_that_says_so_and_of_one_that_says_nothing(tiny, tmp_path) -> None:
    """Earlier files say two experts and 'token' for either."""
    fields: dict[str, Any] = {"num_experts": 3, "r": 2, "target_modules": ["q_proj"], "init_weights": False}
    silent, said = MoAConfig(**fields), MoAConfig(**fields, num_experts_per_tok=2, granularity="token")
    model = get_peft_model(tiny("llama"), silent)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["num_experts_per_tok"], written["granularity"]) == (2, "token")
    for config in (MoAConfig(**fields), said):
        get_peft_model(tiny("llama"), config).load_adapter(tmp_path, "default")
    other = get_peft_model(tiny("llama"), MoAConfig(**fields, granularity="causal_prefix"))
    with pytest.raises(ValueError, match="granularity='token' in the file, 'causal_prefix' here"):
        other.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("kind", ["pregate", "counts"])
def test_token_is_kept_where_the_router_would_take_another(kind, tiny, tmp_path) -> None:
    """A file says 'token' for nothing, and these go by the text so far then."""
    fields = {"num_experts": 2, "r": 2, "target_modules": ["q_proj"], "router": kind, "router_scope": "model"}
    for granularity, expected in ((None, "causal_prefix"), ("token", "token")):
        model = get_peft_model(tiny("llama"), MoAConfig(**fields, granularity=granularity))
        assert routers(model)[0].granularity == expected
        model.save_pretrained(tmp_path / expected)
        assert routers(PeftModel.from_pretrained(tiny("llama"), tmp_path / expected))[0].granularity == expected
        get_peft_model(tiny("llama"), MoAConfig(**fields, granularity=granularity)).load_adapter(
            tmp_path / expected, "default"
        )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two for one that does not choose": ({"router": "softmax", "num_experts_per_tok": 2}, "no option 'k'"),
    "token for one that has no granularity": ({"router": "hash", "granularity": "token"}, "no option 'granularity'"),
    "two beside another number": ({"router": {"kind": "top_k", "k": 1}, "num_experts_per_tok": 2}, "say it once"),
    "token beside another": (
        {"router": {"kind": "top_k", "granularity": "causal_prefix"}, "granularity": "token"}, "say it once",
    ),
    "no number": ({"num_experts_per_tok": "all"}, "num_experts_per_tok='all'"),
    "none": ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
    "no granularity": ({"granularity": "auto"}, "granularity='auto'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_said_is_never_passed_over(case) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        MoAConfig(**fields)


@pytest.mark.parametrize("granularity", [None, "token"])
@pytest.mark.parametrize("kind", ["constant", "hash", "softmax", "top_k", "counts"])
def test_a_config_comes_back_from_its_dict_and_as_a_copy(kind, granularity) -> None:
    """PEFT hands weights in memory on with such a dict, in which the type is no string as in a file."""
    given = {"granularity": granularity} if "granularity" in options_of(ROUTERS[kind], {}) else {}
    config = MoAConfig(num_experts=2, target_modules=["q_proj"], router=kind, router_scope="model", **given)
    said = {name: value for name, value in config.to_dict().items() if name != "auto_mapping"}
    for again in (PeftConfig.from_peft_type(**said), replace(config), copy.deepcopy(config)):
        assert again.to_dict() == config.to_dict()
        made, expected = (
            build_router({"kind": kind, **router_spec(c)[1]}, 4, ["a", "b"], vocab_size=9) for c in (again, config)
        )
        assert getattr(made, "granularity", None) == getattr(expected, "granularity", None)
        assert getattr(made, "k", None) == getattr(expected, "k", None)


@pytest.mark.parametrize("kind", ["constant", "top_k"])
def test_weights_in_memory_come_back_under_a_router_that_chooses_or_not(kind, tiny) -> None:
    config = MoAConfig(num_experts=2, target_modules=["q_proj"], router=kind, init_weights=False)
    model, other = (get_peft_model(tiny("llama"), copy.deepcopy(config)) for _ in range(2))
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_more_than_there_are_is_refused_where_it_is_said(tiny) -> None:
    fields: dict[str, Any] = {"num_experts": 1, "target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match="num_experts_per_tok=2: there are 1"):
        get_peft_model(tiny("llama"), MoAConfig(**fields, num_experts_per_tok=2))
    assert {r.k for r in routers(get_peft_model(tiny("llama"), MoAConfig(**fields)))} == {1}


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("said", [{"num_experts_per_tok": 3}, {"router": {"kind": "top_k", "k": 3}}])
def test_a_mixture_that_has_lost_experts_loads_with_those_it_has(
    said, renormalize, tiny, tiny_inputs, tmp_path
) -> None:
    """The config still asks for three."""
    config = MoAConfig(experts=["a", "b", "c"], r=2, target_modules=["q_proj"], init_weights=False, **said)
    model = get_peft_model(tiny("llama"), config)
    model.base_model.remove_expert("a", renormalize=renormalize)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(logits(again, tiny_inputs("llama")), logits(model, tiny_inputs("llama")))


def test_a_default_mixture_takes_experts_and_loses_them(tiny, tiny_inputs, folders, tmp_path) -> None:
    experts, inputs = folders("llama"), tiny_inputs("llama")
    both = MoAConfig(experts={name: experts[name] for name in ("law", "code")})
    model = get_peft_model(tiny("llama"), both)
    before = logits(model, inputs)
    model.base_model.add_expert("chat", experts["chat"])
    whole = get_peft_model(tiny("llama"), MoAConfig(experts=experts))
    torch.testing.assert_close(logits(model, inputs), logits(whole, inputs))
    model.base_model.remove_expert("chat", renormalize=True)
    torch.testing.assert_close(logits(model, inputs), before)
    model.save_pretrained(tmp_path / "mixture")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path / "mixture"), inputs),
                       logits(model, inputs))  # fmt: skip
