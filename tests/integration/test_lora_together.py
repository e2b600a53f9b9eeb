"""PEFT's own LoRA and a type of ours in one model, through transformers' verbs: each trained, saved, loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig

KINDS = {
    "bottleneck": lambda **f: BottleneckConfig(r=4, init_weights=False, **f),
    "mixda": lambda **f: MixDAConfig(domains=["a", "b"], r=4, init_weights=False, **f),
    "moa": lambda **f: MoAConfig(num_experts=3, r=4, target_modules=["down_proj"], init_weights=False, **f),
}
every = pytest.mark.parametrize("kind", KINDS)
either_first = pytest.mark.parametrize("lora_first", [False, True])


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of three layers where a test asks for no more: MixDA adapts two of them by default."""
    return partial(tiny, layers=3)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **fields})


@pytest.fixture
def ids(tiny_inputs: Any) -> dict[str, Tensor]:
    return tiny_inputs("llama", batch=3)


@pytest.fixture
def base(tiny: Any, tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fresh(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def both(model: Any, kind: str, lora_first: bool, **fields: Any) -> Any:
    added = [("ours", KINDS[kind]()), ("lo", lora(**fields))]
    for name, config in reversed(added) if lora_first else added:
        model.add_adapter(config, adapter_name=name)
    model.set_adapter(["ours", "lo"])
    return model


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model.eval()(**inputs).logits


@every
@either_first
def test_both_are_active_and_train(kind: str, lora_first: bool, base: Path, ids: Any) -> None:
    model = both(fresh(base), kind, lora_first)
    together = logits(model, ids)
    model.set_adapter("ours")
    ours = logits(model, ids)
    model.set_adapter("lo")
    alone = logits(model, ids)
    plain = logits(fresh(base), ids)
    for a, b in ((together, ours), (together, alone), (ours, alone), (ours, plain), (alone, plain)):
        assert not torch.allclose(a, b, atol=1e-4)
    model.set_adapter(["ours", "lo"])
    model.train()(**ids, labels=ids["input_ids"]).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(".lora_A.lo." in name for name in trained)
    assert any("_adapters.ours." in name for name in trained)
    assert all(".lo." in name or ".ours." in name for name in trained)


@every
@either_first
def test_each_is_saved_and_loaded_by_itself(kind: str, lora_first: bool, base: Path, ids: Any, tmp_path: Path) -> None:
    model = both(fresh(base), kind, lora_first)
    together = logits(model, ids)
    expected = {}
    for name in ("ours", "lo"):
        model.set_adapter(name)
        expected[name] = logits(model, ids)
        model.save_pretrained(tmp_path / name)
        other = fresh(base)
        info = other.load_adapter(str(tmp_path / name), adapter_name=name)
        assert not info.missing_keys
        assert not info.unexpected_keys
        torch.testing.assert_close(logits(other, ids), expected[name])
    other = fresh(base)
    for name in ("lo", "ours"):
        other.load_adapter(str(tmp_path / name), adapter_name=name)
    other.set_adapter(["ours", "lo"])
    torch.testing.assert_close(logits(other, ids), together)


@every
@either_first
def test_deleting_one_leaves_the_other(kind: str, lora_first: bool, base: Path, ids: Any) -> None:
    for gone, stays in (("lo", "ours"), ("ours", "lo")):
        model = both(fresh(base), kind, lora_first)
        model.set_adapter(stays)
        expected = logits(model, ids)
        model.delete_adapter(gone)
        assert not [name for name, _ in model.named_parameters() if f".{gone}." in name]
        assert torch.equal(logits(model, ids), expected)


@every
@either_first
def test_both_on_the_same_linear_layer_compute_and_train(kind: str, lora_first: bool, base: Path, ids: Any) -> None:
    model = both(fresh(base), kind, lora_first, target_modules=["down_proj"])
    together = logits(model, ids)
    for name in ("ours", "lo"):
        model.set_adapter(name)
        assert not torch.allclose(logits(model, ids), together, atol=1e-4)
    model.set_adapter(["ours", "lo"])
    model.train()(**ids, labels=ids["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.disable_adapters()
    torch.testing.assert_close(logits(model, ids), logits(fresh(base), ids))


@pytest.mark.filterwarnings("ignore:You are trying to modify")
@pytest.mark.parametrize("outside", ["ours", "lora"])
def test_a_peft_model_saves_both_types_and_loads_none_of_them_silently_alone(
    outside: str, tiny: Any, ids: Any, tmp_path: Path
) -> None:
    """LoRA of PEFT injected below, or around: two folders, of which the other is asked for, or warned of."""
    configs = {"ours": KINDS["mixda"](), "lora": lora()}
    inside = "lora" if outside == "ours" else "ours"

    def below(config: Any) -> nn.Module:
        model = tiny("llama")
        inject_adapter_in_model(config, model, adapter_name="below")
        return model

    model = get_peft_model(below(configs[inside]), configs[outside])
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert {path.parent.name for path in tmp_path.glob("*/adapter_model.safetensors")} == {"below"}
    if outside == "ours":
        with pytest.raises(ValueError, match=r"was trained beside .*'LORA'.*, and the model has no LORA adapter"):
            PeftModel.from_pretrained(tiny("llama"), tmp_path)
    else:
        with pytest.warns(UserWarning, match="holds the MIXDA adapter 'below', which acted beside"):
            PeftModel.from_pretrained(tiny("llama"), tmp_path)
    base = below(PeftConfig.from_pretrained(tmp_path / "below"))
    set_peft_model_state_dict(base, load_peft_weights(str(tmp_path / "below"), device="cpu"), adapter_name="below")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path), ids), expected)


def activate(model: nn.Module, *names: str) -> None:
    """At the layers only: PEFT's saved heads know the adapter that they belong to, and one at a time."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(list(names))


def test_mixda_with_lora_as_its_task_adapter_takes_a_step(tiny: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    """Domain adapters and gate of ours, task adapter of PEFT: trained together, saved apart, predictions kept."""
    inputs = tiny_inputs("bert", batch=4, labels="classes")
    tiny("bert", "sequence_classification").save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = MixDAConfig(domains=["a", "b"], r=4, init_weights=False, task_adapter=None)
    model.add_adapter(config, adapter_name="domains")
    task = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    model.add_adapter(task, adapter_name="task")
    activate(model, "domains", "task")
    for name, p in model.named_parameters():  # stage 2: the experts stay as they are
        if ".domain.bank." in name:
            p.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = model.eval()(**inputs).loss.item()
    for _ in range(10):
        model.train()(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.eval()(**inputs).loss.item() < first
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(".domain.router." in name for name in moved)
    assert any("lora_B.task" in name for name in moved)
    assert any("modules_to_save.task" in name for name in moved)
    assert not any(".domain.bank." in name or "original_module" in name for name in moved)
    expected = logits(model, inputs)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    for name in ("domains", "task"):
        activate(model, name)
        model.save_pretrained(tmp_path / name)
        other.load_adapter(str(tmp_path / name), adapter_name=name)
    activate(other, "domains", "task")
    torch.testing.assert_close(logits(other, inputs), expected)
    assert any(isinstance(m, LoraLayer) for m in other.modules())
