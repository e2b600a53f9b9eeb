"""Adapters of several of our types at one module, through transformers' verbs: one layer inside another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
