"""Walks past adapters: what a verb costs does not grow with the adapters that are there, as far as it is ours."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

import mixadapters
from mixadapters import AGDConfig, BottleneckConfig, MixDAConfig, MoAConfig, MoSAConfig
from mixadapters.core import finding
from mixadapters.core.adapter import Adapter
from mixadapters.core.layer import AdapterHost
from mixadapters.core.walking import adapters_named, outside_adapters

OURS = str(Path(mixadapters.__file__).parent)
TYPES: dict[str, Callable[[], Any]] = {
    "BOTTLENECK": lambda: BottleneckConfig(r=2),
    "MIXDA": lambda: MixDAConfig(domains=["news"]),
    "MOA": lambda: MoAConfig(num_experts=2, r=2, target_modules=["down_proj"]),
    "hooked": lambda: AGDConfig(target_modules=["self_attn"], hidden_size=32),
}


@pytest.mark.parametrize("kind", TYPES)
def test_adapters_by_name_are_those_of_this_library_alone(kind: str, tiny: Any) -> None:
    base = tiny("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), base, "lora")
    model = get_peft_model(base, TYPES[kind](), "first")
    model.add_adapter("second", TYPES[kind]())
    layers = [layer for layer in model.modules() if isinstance(layer, AdapterHost)]
    every = {name: [layer.adapters[name] for layer in layers] for name in ("first", "second")}
    assert every["first"]
    for names, wanted in ((None, ["first"]), (["second", "__base__", "lora", "second"], ["second"]), ([], [])):
        found = list(adapters_named(model, names))
        assert all(isinstance(adapter, Adapter) for adapter in found)
        assert found == [adapter for name in wanted for adapter in every[name]]


def test_all_but_the_insides_of_adapters_in_the_order_of_named_modules(tiny: Any) -> None:
    base = tiny("llama")
    plain = [name for name, _ in base.named_modules()]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), base, "lora")
    model = get_peft_model(base, BottleneckConfig(r=2, modules_to_save=["lm_head"]), "law").base_model.model
    found = dict(outside_adapters(model))
    every = dict(model.named_modules())
    assert list(found) == [name for name in every if name in found]
    assert all(found[name] is every[name] for name in found)
    assert set(plain) <= set(found)
    left_out = every.keys() - found.keys()
    assert left_out == {name for name in every if "_adapters" in name or "lora_" in name}
    assert any("lora_A.lora" in name for name in left_out)
    assert any(".bottleneck_adapters.law." in name for name in left_out)
    more = {name.rpartition(".")[2] for name in found.keys() - set(plain)}
    assert more == {"base_layer", "original_module", "modules_to_save", "law"}  # of layers and heads that are wrapped


def test_a_module_in_two_places_is_met_once() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU()), "c": nn.Identity()})
    model["c"].register_module("none", None)
    assert [name for name, _ in outside_adapters(model)] == [name for name, _ in model.named_modules()]


@contextmanager
def our_visits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts the modules that torch's walks come by inside the block, by the function of ours that walks."""
    visits: Counter[str] = Counter()

    def counted(name: str) -> None:
        walk = getattr(nn.Module, name)

        def visited(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            while caller.f_code.co_filename.endswith(("torch/nn/modules/module.py", __file__)):
                assert caller.f_back is not None
                caller = caller.f_back
            # AGD's digest of the frozen model reads weights, those of other libraries' adapters too.
            if caller.f_code.co_filename.startswith(OURS) and not caller.f_code.co_filename.endswith(
                "agd/guidance.py"
            ):
                visits[f"{caller.f_code.co_filename}:{caller.f_code.co_name}"] += 1
            return walk(self, *args, **kwargs)

        patch.setattr(nn.Module, name, visited)

    with monkeypatch.context() as patch:
        for name in ("named_modules", "state_dict", "named_children"):
            counted(name)
        yield visits


@pytest.mark.parametrize("kind", TYPES)
def test_what_our_verbs_visit_does_not_grow_with_the_adapters(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    base = tiny("bert" if kind == "BOTTLENECK" else "llama", num_hidden_layers=1)
    model = get_peft_model(base, TYPES[kind](), "n0")
    model.save_pretrained(tmp_path)
    verbs = {
        "add": lambda: model.add_adapter("x", TYPES[kind]()),
        "set": lambda: model.set_adapter("x"),
        "delete": lambda: model.delete_adapter("x"),
        "load": lambda: model.load_adapter(tmp_path / "n0", "x"),
        "away": lambda: model.delete_adapter("x"),
    }
    seen: dict[int, dict[str, Counter[str]]] = {}
    for count in (2, 4):
        for i in range(len(model.peft_config), count):
            model.add_adapter(f"n{i}", TYPES[kind]())
        for verb, call in verbs.items():
            with our_visits(monkeypatch) as visits:
                call()
            seen.setdefault(count, {})[verb] = visits
    for verb, visits in seen[2].items():
        assert seen[4][verb] - visits == Counter(), verb
    assert seen[2]["add"].total() > 0


@pytest.mark.parametrize("config", [*TYPES.values(), lambda: MoSAConfig(r=2)], ids=[*TYPES, "MOSA"])
def test_what_an_injection_asks_of_a_whole_model_it_asks_as_often_whatever_the_layers(
    config: Callable[[], Any], tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would take longer with the square of them. The same for what routers take, which is slow to find."""
    asked: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (asked.update([name]), plain(*a, **k))[1])

    count(transformers.PreTrainedConfig, "to_dict")
    count(finding, "module_names")
    count(inspect, "signature")
    found = []
    get_peft_model(tiny("llama"), config()).save_pretrained(tmp_path / "first")
    for layers in (4, 8):
        get_peft_model(tiny("llama", num_hidden_layers=layers), config()).save_pretrained(tmp_path / f"{layers}")
        base = tiny("llama", num_hidden_layers=layers)
        asked.clear()
        PeftModel.from_pretrained(base, tmp_path / f"{layers}")
        found.append(dict(asked))
    assert found[0] == found[1]


def test_what_an_injection_has_asked_of_a_model_holds_for_it_alone(tiny: Any) -> None:
    """The model may change before the next verb looks."""
    model = get_peft_model(tiny("llama"), BottleneckConfig(r=2))
    tuner, places = model.base_model, set(model.base_model.places())
    with pytest.raises(ValueError, match="nowhere"):
        model.add_adapter("other", BottleneckConfig(r=2, target_modules=["nowhere"]))
    model.get_base_model().later = nn.Linear(2, 2)
    assert set(tuner.places()) == places | {"later"}
    model.config.hidden_size = 7
    assert tuner._model_config()["hidden_size"] == 7
