"""Experts of a few layers at a time: outputs are equal, and no more are ever resident."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig
from mixadapters.core.bank import AdapterBank
from mixadapters.core.context import ForwardContext
from mixadapters.core.layer import MixtureLayer
from mixadapters.serving import ExpertRing

LAYERS = 4
CONFIGS = {
    "moa": lambda: MoAConfig(num_experts=4, r=3, init_weights=False, target_modules=["q_proj", "down_proj"]),
    "mixda": lambda: MixDAConfig(domains=["a", "b"], r=3, init_weights=False),
    "bottleneck": lambda: BottleneckConfig(r=4, init_weights=False),
}


@pytest.fixture
def model_of(tiny):
    def make(kind: str) -> nn.Module:
        model = get_peft_model(tiny("llama"), CONFIGS[kind]()) if kind in CONFIGS else tiny(kind)
        return model.eval()

    return make


def holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold experts, by layer: banks of adapters, or the base's own."""
    found: dict[int, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterBank) or type(module).__name__ in ("MixtralExperts", "Qwen3MoeExperts"):
            layer = next(int(part) for part in path.split(".") if part.isdigit())
            found.setdefault(layer, []).append(module)
    return found


class Census:
    """Which layers have experts of any size, looked at whenever experts are about to run."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.by_layer, self.seen = model, holders(model), []
        held = [module for modules in self.by_layer.values() for module in modules]
        for module in model.modules():
            if isinstance(module, MixtureLayer) or module in held:
                module.register_forward_pre_hook(lambda module, args: self.seen.append(self.count()))

    def count(self) -> set[int]:
        """The numbers of layers that have their experts."""
        context = ForwardContext.find(self.model)
        assert context is None or not context.records.thread.packed, "a generate holds copies of experts"
        found = set()
        for layer, modules in self.by_layer.items():
            filled = {p.numel() > 0 for module in modules for p in module.parameters()}
            assert len(filled) == 1, "a layer is there as a whole, or not at all"
            found |= {layer} if True in filled else set()
        return found


@pytest.mark.parametrize("kind", [*CONFIGS, "mixtral", "qwen3_moe"])
def test_outputs_are_equal_and_few_layers_are_resident(kind, model_of, tiny_inputs) -> None:
    model, inputs = model_of(kind), tiny_inputs("llama", padding="left")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        expected, written = model(**inputs).logits, model.generate(**inputs, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ExpertRing(model, resident_layers=2) as ring:
        census = Census(model)
        assert census.by_layer.keys() == set(range(LAYERS))
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model.generate(**inputs, **options), written)
        with torch.inference_mode():
            assert torch.equal(model(**inputs).logits, expected)
        assert census.seen
        assert max(len(resident) for resident in census.seen) == ring.peak == 2
        assert set().union(*census.seen) == set(range(LAYERS))
        assert {frozenset(resident) for resident in census.seen} == {
            frozenset({i, (i + 1) % LAYERS}) for i in range(LAYERS)
        }
        assert ring.loads == 6 * LAYERS - 1  # each layer once in each of six forwards; the first was there
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("resident", [1, 3, 4, 9])
def test_as_many_layers_are_resident_as_asked(resident, model_of, tiny_inputs) -> None:
    model, inputs = model_of("moa"), tiny_inputs("llama")
    with torch.no_grad():
        expected = model(**inputs).logits
    whole = sum(p.numel() * 4 for modules in holders(model).values() for m in modules for p in m.parameters())
    ring, census = ExpertRing(model, resident), Census(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    kept = min(resident, LAYERS)
    assert {len(seen) for seen in census.seen} == {kept}
    assert ring.resident_bytes == kept * whole // LAYERS
    assert ring.loads == (LAYERS - 1 if kept < LAYERS else 0)
    ring.close()
    ring.close()
    assert census.count() == set(range(LAYERS))


def test_rows_of_several_adapters_run_in_a_ring(tiny, tiny_inputs) -> None:
    model = get_peft_model(tiny("llama"), config := MoAConfig(num_experts=2, r=3, init_weights=False), "a")
    model.add_adapter("b", config)
    model.eval()
    inputs, names = tiny_inputs("llama", batch=3), ["b", "__base__", "a"]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = model.generate(**inputs, adapter_names=names, **options)
    with ExpertRing(model, 1) as ring:
        census = Census(model)
        assert torch.equal(model.generate(**inputs, adapter_names=names, **options), expected)
        assert max(len(seen) for seen in census.seen) == ring.peak == 1


def test_what_a_ring_cannot_do_is_refused(model_of, tiny, tiny_inputs, tmp_path) -> None:
    model, inputs = model_of("moa"), tiny_inputs("llama")
    with pytest.raises(ValueError, match="resident_layers=0 must be"):
        ExpertRing(model, 0)
    with pytest.raises(ValueError, match="no layer of this model has experts"):
        ExpertRing(tiny("llama"), 1)
    with ExpertRing(model, 2):
        with pytest.raises(RuntimeError, match=r"use torch.no_grad\(\)"):
            model(**inputs)
        with pytest.raises(RuntimeError, match="close it before"):
            model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="in an ExpertRing already"):
            ExpertRing(model, 2)
        with pytest.raises(RuntimeError, match="close it before"):
            model.add_adapter("other", CONFIGS["moa"]())
        assert list(model.peft_config) == ["default"]
        model.base_model.remove_expert("expert1")
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"'model.layers.0' have come or gone"):
            model(**inputs)
    with torch.no_grad():
        model(**inputs)
    model.save_pretrained(tmp_path)
    model.add_adapter("other", CONFIGS["moa"]())
