"""Names of adapters, domains and modalities: none is taken for another part of a key."""

from __future__ import annotations

import inspect
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from mixadapters import BottleneckConfig, MixDAConfig, PILLConfig
from mixadapters.core.names import RESERVED, UNNAMED, Unnamed, of_active
from mixadapters.tuners import AGDModel, BottleneckModel, MixDAModel, MoAModel, MoSAModel, PILLModel

LONG = "n" * 300  # no name for a folder
NEVER = [
    LONG,
    "\u00e9" * 101,
    "",
    "a.b",
    "a/b",
    "..",
    "a\\b",
    "a\nb",
    " a",
    "a ",
    "keys",
    "items",
    "pop",
    "forward",
    "training",
]
NEVER += sorted(RESERVED)


def mixture(*domains: str) -> MixDAConfig:
    return MixDAConfig(domains=list(domains), r=2, task_r=2, task_type="CAUSAL_LM", init_weights=False)


def modules(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("name", NEVER)
def test_names_with_another_meaning_are_refused_everywhere(tiny: Any, name: Any) -> None:
    base = tiny("llama")
    before = modules(base)
    with pytest.raises(ValueError, match=r"adapter_name: .* is no name for this"):
        get_peft_model(base, BottleneckConfig(r=2), adapter_name=name)
    assert modules(base) == before
    model = get_peft_model(tiny("llama"), BottleneckConfig(r=2, task_type="CAUSAL_LM"))
    before = modules(model)
    with pytest.raises(ValueError, match=r"adapter_name: .* is no name for this"):
        model.add_adapter(name, BottleneckConfig(r=2))
    assert modules(model) == before
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="is no name for this"):
        tiny("llama").add_adapter(BottleneckConfig(r=2), adapter_name=name or " ")  # "" is "default" there
    path = name in ("a/b", "a\\b")  # perhaps a folder that is meant to be read
    with pytest.raises(ValueError, match=f"domains: .* is {'a folder or a hub id' if path else 'no name for this'}"):
        MixDAConfig(domains=[name])
    with pytest.raises(ValueError, match=r"modalities: .* is no name for this"):
        PILLConfig(modalities=["text", name])


@pytest.mark.parametrize("name", [3, None, ("a",), b"a", True])
def test_names_of_another_type_are_refused_by_every_verb(tiny: Any, tmp_path: Path, name: Any) -> None:
    wrong = r"adapter_name: .* is no name for this: use a string"
    base = tiny("llama")
    before = modules(base)
    with pytest.raises(ValueError, match=wrong):
        get_peft_model(base, BottleneckConfig(r=2), adapter_name=name)
    assert modules(base) == before
    model = get_peft_model(tiny("llama"), BottleneckConfig(r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    before = modules(model)
    with pytest.raises(ValueError, match=wrong):
        model.add_adapter(name, BottleneckConfig(r=2))
    with pytest.raises(ValueError, match=wrong):
        model.load_adapter(tmp_path, name)
    assert modules(model) == before
    assert list(model.peft_config) == ["default"]


def test_names_that_begin_like_the_methods_own_parts_are_refused(tiny: Any) -> None:
    for name in ("mixda_", "mixda_adapters", "mixda_law"):
        with pytest.raises(ValueError, match="what begins with 'mixda_'"):
            mixture(name)
        with pytest.raises(ValueError, match="what begins with 'mixda_'"):
            get_peft_model(tiny("llama"), mixture("a"), adapter_name=name)
    get_peft_model(tiny("llama"), mixture("a"), adapter_name="mix")  # part of the prefix only: PEFT warns of it


@pytest.mark.parametrize("name", ["layers", "0", "mlp", "down_proj", "weight", "model", "embed_tokens"])
def test_parts_of_the_base_models_keys_name_no_adapter(tiny: Any, name: str) -> None:
    base = tiny("llama")
    before = modules(base)
    with pytest.raises(ValueError, match=f"adapter_name='{name}' is a part of the base model's keys"):
        get_peft_model(base, BottleneckConfig(r=2), adapter_name=name)
    assert modules(base) == before


def saved_and_loaded(model: Any, tiny: Any, folder: Path) -> None:
    """Every adapter of the model comes back from its folder."""
    model.save_pretrained(folder)
    ids = torch.arange(5, 13)[None]
    for name in model.peft_config:
        again = PeftModel.from_pretrained(
            tiny("llama"), folder if name == "default" else folder / name, adapter_name=name
        )
        model.set_adapter(name)
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)


def test_an_adapter_with_the_name_of_a_domain_or_part_of_another_is_refused_in_both_orders(
    tiny: Any, tmp_path: Path
) -> None:
    for first, second, added in (
        (("mixture", mixture("law", "code")), ("law", mixture("x")), "x"),
        (("law", mixture("x")), ("mixture", mixture("law", "code")), "code"),
        (("mixture", mixture("law")), ("router", mixture("x")), "x"),
        (("router", mixture("x")), ("mixture", mixture("law")), "law"),
    ):
        model = get_peft_model(tiny("llama"), first[1], adapter_name=first[0])
        before = modules(model)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        with pytest.raises(ValueError, match=r"adapter.*Choose another adapter_name"):
            model.add_adapter(*second)
        assert modules(model) == before
        assert trained == [n for n, p in model.named_parameters() if p.requires_grad]
        assert list(model.peft_config) == [first[0]]
        if "router" not in (first[0], second[0]):
            model.add_adapter("other", mixture(added))
            saved_and_loaded(model, tiny, tmp_path / first[0])


def test_a_domain_that_is_added_with_the_name_of_an_adapter_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), mixture("law"))
    model.add_adapter("code", mixture("medicine"))
    with pytest.raises(ValueError, match="domain 'code' has the name of another adapter"):
        model.base_model.add_domain("code")
    with pytest.raises(ValueError, match="domain 'default' has the name of another adapter"):
        model.base_model.add_domain("default", adapter_name="code")
    model.base_model.add_domain("news")
    saved_and_loaded(model, tiny, tmp_path)


def test_a_domain_may_have_the_name_of_its_own_adapter(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), mixture("law"), adapter_name="law")
    model.add_adapter("other", mixture("code"))
    saved_and_loaded(model, tiny, tmp_path)


def test_transformers_own_verbs_refuse_the_same_names(tiny: Any) -> None:
    model = tiny("llama")
    model.add_adapter(mixture("law"), adapter_name="mixture")
    with pytest.raises(ValueError, match="adapter_name='law' is a part of the keys of adapter 'mixture'"):
        model.add_adapter(mixture("x"), adapter_name="law")
    with pytest.raises(ValueError, match="adapter_name='mlp' is a part of the base model's keys"):
        model.add_adapter(mixture("x"), adapter_name="mlp")


MODIFIED = pytest.mark.filterwarnings("ignore:You are trying to modify")
TYPES = {
    "ours": lambda: mixture("law"),
    "another of ours": lambda: BottleneckConfig(r=2),
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
}


@MODIFIED
@pytest.mark.parametrize(("first", "second"), [pair for pair in product(TYPES, TYPES) if pair != ("lora", "lora")])
@pytest.mark.parametrize("through", ["inject", "the base again", "the PeftModel again"])
def test_a_second_adapter_does_not_take_the_name_of_the_first(
    tiny: Any, tiny_inputs: Any, tmp_path: Path, first: str, second: str, through: str
) -> None:
    """Whatever the types and the order, as long as one is ours; the first one computes and is saved as before."""
    base = tiny("llama")
    if through == "inject":
        inject_adapter_in_model(TYPES[first](), base)
        held = base
    else:
        held = get_peft_model(base, TYPES[first]())
    inputs = tiny_inputs("llama")
    before = held(**inputs).logits
    nested = through == "the PeftModel again" and second != "lora"
    says = "is a PeftModel already, .*add_adapter.*unload" if nested else "adapter_name='default' is the name of an"
    with pytest.raises(ValueError, match=says):
        get_peft_model(held if through == "the PeftModel again" else base, TYPES[second]())
    assert torch.equal(held(**inputs).logits, before)
    assert held.peft_config["default"].peft_type == TYPES[first]().peft_type
    if held is not base:
        held.save_pretrained(tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(tiny("llama"), tmp_path)(**inputs).logits, before)


@MODIFIED
@pytest.mark.filterwarnings("ignore:Already found a")
def test_what_messages_of_taken_names_advise_works(tiny: Any, tiny_inputs: Any) -> None:
    inputs = tiny_inputs("llama")
    model = get_peft_model(tiny("llama"), mixture("law"))
    model.add_adapter("second", mixture("medicine"))
    anew = get_peft_model(model.unload(), BottleneckConfig(r=2))
    torch.testing.assert_close(anew(**inputs).logits, tiny("llama")(**inputs).logits)
    other = get_peft_model(tiny("llama"), TYPES["another of ours"]()).get_base_model()
    both = get_peft_model(other, mixture("law"), adapter_name="law_adapter")
    assert {type(host).__name__ for host in both.base_model.hosts()} == {"MixtureLayer"}
    assert {name for host in both.base_model.hosts() for name in host.adapters} == {"default", "law_adapter"}


def test_a_head_keeps_its_keys_whatever_the_adapter_is_called(tiny: Any, tmp_path: Path) -> None:
    config = BottleneckConfig(r=2, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), config, adapter_name="head")
    nn.init.normal_(model.base_model.model.lm_head.modules_to_save["head"].weight)
    saved_and_loaded(model, tiny, tmp_path)


# --- which adapter a verb means -----------------------------------------------------------------------------------


class OneActive:
    """A tuner with an active adapter "law"."""

    def named(self, name: str) -> str:
        return "law" if isinstance(name, Unnamed) else name

    @of_active
    def verb(self, what: int, adapter_name: str = UNNAMED, more: int = 0) -> tuple[int, str, int]:
        return what, adapter_name, more


def test_a_verb_means_the_active_adapter_however_its_arguments_are_given() -> None:
    tuner = OneActive()
    assert tuner.verb(1) == tuner.verb(what=1) == tuner.verb(1, UNNAMED) == (1, "law", 0)
    assert tuner.verb(1, more=2) == tuner.verb(1, UNNAMED, 2) == tuner.verb(1, more=2, adapter_name=UNNAMED) == (
        1, "law", 2
    )  # fmt: skip
    assert tuner.verb(1, "default", 2) == tuner.verb(1, adapter_name="default", more=2) == (1, "default", 2)


def test_without_an_active_adapter_a_verb_means_the_first(tiny: Any) -> None:
    tuner = get_peft_model(tiny("llama"), BottleneckConfig(r=2)).base_model
    tuner.set_adapter([])
    assert tuner.named(UNNAMED) == "default"


def verbs_of(kind: type) -> dict[str, Any]:
    """The methods that take `adapter_name` and need none."""
    found = {name: verb for name in dir(kind) if inspect.isfunction(verb := inspect.getattr_static(kind, name))}
    defaults = {name: inspect.signature(verb).parameters.get("adapter_name") for name, verb in found.items()}
    return {name: found[name] for name, given in defaults.items() if given and isinstance(given.default, Unnamed)}


TUNERS = [AGDModel, BottleneckModel, MixDAModel, MoAModel, MoSAModel, PILLModel]


@pytest.mark.parametrize("kind", TUNERS, ids=lambda kind: kind.__name__)
def test_every_verb_asks_which_adapter_is_meant_before_all_else(kind: type) -> None:
    class Asked(Exception): ...

    def ask(name: str) -> str:
        raise Asked

    verbs = verbs_of(kind)
    assert {"set_stage", "set_progress"} <= set(verbs)
    for verb in verbs.values():
        needed = [p for p in list(inspect.signature(verb).parameters.values())[1:] if p.default is p.empty]
        given = {p.name: None for p in needed if p.kind is not p.VAR_KEYWORD}
        with pytest.raises(Asked):
            verb(SimpleNamespace(named=ask), **given)
