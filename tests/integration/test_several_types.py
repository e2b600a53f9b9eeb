"""Adapters of several of our types at one module, through transformers' verbs: one layer inside another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.ia3 import IA3Layer
from torch import Tensor

from mixadapters import BottleneckConfig, ForwardContext, MixDAConfig, MoAConfig
from mixadapters.core.layer import AdapterHost

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
CAUSAL = {"task_type": "CAUSAL_LM", "init_weights": False}
PLACE = "model.layers.1.mlp.down_proj"


MAKERS: dict[str, Any] = {
    "moa": lambda: MoAConfig(num_experts=2, r=3, target_modules=["down_proj"], **CAUSAL),
    "mixda": lambda: MixDAConfig(domains=["a", "b"], r=3, **CAUSAL),
    "bottleneck": lambda: BottleneckConfig(r=3, **CAUSAL),
}


def adapted(tiny: Any, kinds: list[str]) -> Any:
    model = tiny("llama")
    for number, kind in enumerate(kinds):
        model.add_adapter(MAKERS[kind](), adapter_name=f"{kind}{number}")
    return model.eval()


def hosts_at(model: Any, path: str) -> list[AdapterHost]:
    return [m for m in model.modules() if isinstance(m, AdapterHost) and m.path == path]


@torch.no_grad()
def rows(model: Any, inputs: dict[str, Tensor], names: list[str]) -> Tensor:
    return model(**inputs, adapter_names=names).logits


def test_layer_of_a_type_is_found_inside_those_of_others(tiny, tiny_inputs) -> None:
    kinds = ["moa", "mixda", "bottleneck", "moa", "mixda"]
    model = adapted(tiny, kinds)
    names = [f"{kind}{number}" for number, kind in enumerate(kinds)]
    assert sorted(len(host.adapters) for host in hosts_at(model, PLACE)) == [1, 2, 2]
    inputs = tiny_inputs("llama", batch=len(names) + 1)
    together = rows(model, inputs, [*names, "__base__"])
    for row, name in enumerate([*names, "__base__"]):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        torch.testing.assert_close(together[row : row + 1], rows(model, own, [name]))
    torch.testing.assert_close(together[-1:], tiny("llama")(**own).logits)
    assert len({together[row].norm().item() for row in range(len(names) + 1)}) == len(names) + 1


@pytest.mark.filterwarnings("ignore:You are trying to modify")
def test_rows_of_one_peft_model_name_adapters_of_three_types_and_loras(tiny, tiny_inputs) -> None:
    """A PeftModel has one type; the others are injected below it, LoRA of PEFT among them. Rows name any."""
    below = {
        "lora": LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        "bottleneck": MAKERS["bottleneck"](), "moa": MAKERS["moa"](),
    }  # fmt: skip
    base = tiny("llama")
    for name, config in below.items():
        inject_adapter_in_model(config, base, adapter_name=name)
    model = get_peft_model(base, MAKERS["mixda"](), adapter_name="mixda").eval()
    names = [*below, "mixda", "__base__"]
    inputs = tiny_inputs("llama", batch=len(names), padding="right")
    together = rows(model, inputs, names)
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        torch.testing.assert_close(together[row : row + 1], rows(model, own, [name]))
    torch.testing.assert_close(together[-1:], tiny("llama")(**own).logits)  # no adapter, of no type
    assert len({together[row].norm().item() for row in range(len(names))}) == len(names)
    prompt = {key: value[:, :5] for key, value in tiny_inputs("llama", batch=len(names)).items()}
    beams = {"max_new_tokens": 2, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    made = model.generate(**prompt, adapter_names=names, **beams)
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in prompt.items()}
        assert torch.equal(made[2 * row : 2 * row + 2], model.generate(**own, adapter_names=[name], **beams))


def test_adapter_names_reach_lora_in_a_model_of_transformers_verbs(tiny, tiny_inputs) -> None:
    model = adapted(tiny, ["mixda"])
    model.add_adapter(LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False), adapter_name="lora")
    model.eval()
    inputs = tiny_inputs("llama", batch=3)
    together = rows(model, inputs, ["lora", "mixda0", "__base__"])
    torch.testing.assert_close(together[2:], tiny("llama")(**{k: v[2:] for k, v in inputs.items()}).logits)
    for row, name in enumerate(["lora", "mixda0"]):
        model.set_adapter(name)
        with torch.no_grad():
            alone = model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits
        torch.testing.assert_close(together[row : row + 1], alone)
    with pytest.raises(ValueError, match=r"non-existing adapter.*: unknown"):
        rows(model, inputs, ["lora", "unknown", "__base__"])


@pytest.mark.filterwarnings("ignore:You are trying to modify")
def test_types_that_know_no_rows_refuse_adapter_names(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", batch=2)
    model = adapted(tiny, ["bottleneck"])
    model.add_adapter(IA3Config(target_modules=["k_proj"], feedforward_modules=[]), adapter_name="ia3")
    with pytest.raises(ValueError, match=r"does not reach Linear at .*k_proj', with the adapters .'ia3'"):
        rows(model, inputs, ["bottleneck0", "__base__"])
    for layer in (m for m in model.modules() if isinstance(m, IA3Layer)):
        layer.enable_adapters(False)
    together = rows(model, inputs, ["bottleneck0", "__base__"])  # where they are disabled, nothing has to reach them
    torch.testing.assert_close(together[1:], tiny("llama")(**{k: v[1:] for k, v in inputs.items()}).logits)
    base = tiny("llama")
    inject_adapter_in_model(MAKERS["mixda"](), base, adapter_name="ours")
    outer = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"]), adapter_name="lora")
    with pytest.raises(ValueError, match=r"of a LoRA model does not reach the adapters \['ours'\] of other types"):
        rows(outer, inputs, ["lora", "__base__"])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_injection_that_fails_leaves_the_layers_of_other_types(tiny, tiny_inputs, place, monkeypatch) -> None:
    kinds = ["moa", "mixda", "bottleneck"]
    kind = kinds.pop(place)
    model = adapted(tiny, kinds)
    names = [f"{other}{number}" for number, other in enumerate(kinds)]
    inputs = tiny_inputs("llama", batch=2)
    before = rows(model, inputs, names)
    monkeypatch.setattr("mixadapters.core.injection.Injection.after_injection", lambda *_: 1 / 0)
    for method in ("MoAModel", "MixDAModel"):
        monkeypatch.setattr(f"mixadapters.tuners.{method}.after_injection", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.add_adapter(MAKERS[kind](), adapter_name="broken")
    assert len(hosts_at(model, PLACE)) == 2
    assert torch.equal(rows(model, inputs, names), before)
    assert "broken" not in ForwardContext.of(model).hosted


@pytest.mark.parametrize("first", ["bottleneck", "moa"])
@pytest.mark.parametrize("second", ["bottleneck", "moa"])
def test_all_linear_means_the_same_modules_for_a_second_adapter(tiny, first, second) -> None:
    makers = {"bottleneck": BottleneckConfig, "moa": MoAConfig}
    model = tiny("llama")
    model.add_adapter(makers[first](r=2, target_modules="all-linear"), adapter_name="x")
    model.add_adapter(makers[second](r=2, target_modules="all-linear"), adapter_name="y")
    places = {
        name: {m.path for m in model.modules() if isinstance(m, AdapterHost) and name in m.adapters} for name in "xy"
    }
    assert places["x"] == places["y"]
    assert len(places["x"]) == 28
