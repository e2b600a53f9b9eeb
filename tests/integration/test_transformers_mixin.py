"""transformers' own adapter verbs, without a PeftModel: model.add_adapter, load_adapter, set_adapter ..."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from mixadapters import BottleneckConfig, ForwardContext, MixDAConfig, MoAConfig

KINDS = {
    "bottleneck": (BottleneckConfig, {"r": 4}),
    "parallel": (BottleneckConfig, {"r": 4, "placement": "parallel"}),
    "mixda": (MixDAConfig, {"domains": ["a", "b"], "r": 4, "task_r": 3}),
    "moa": (MoAConfig, {"num_experts": 3, "r": 4, "router_scope": "block"}),
}
every = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of three layers where a test asks for no more: MixDA adapts two of them by default."""
    return partial(tiny, layers=3)


def config(kind: str, **fields: Any) -> Any:
    cls, base = KINDS[kind]
    return cls(**{**copy.deepcopy(base), "init_weights": False, **fields})


@pytest.fixture
def ids(tiny_inputs: Any) -> dict[str, Tensor]:
    return tiny_inputs("llama", batch=4)


@pytest.fixture
def base(tiny: Any, tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fresh(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model.eval()(**inputs).logits


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b)


@every
def test_add_disable_enable_and_delete(kind: str, base: Path, ids: Any) -> None:
    model = fresh(base)
    plain = logits(model, ids)
    keys = set(model.state_dict())
    model.add_adapter(config(kind), adapter_name="one")
    assert model.active_adapters() == ["one"]
    adapted = logits(model, ids)
    assert not torch.allclose(adapted, plain, atol=1e-4)
    model.disable_adapters()
    assert torch.equal(logits(model, ids), plain)
    model.enable_adapters()
    assert torch.equal(logits(model, ids), adapted)
    model.delete_adapter("one")
    assert not [name for name, _ in model.named_parameters() if "_adapters." in name]
    assert torch.equal(logits(model, ids), plain)
    model.add_adapter(config(kind), adapter_name="one")  # the name is free again
    assert not torch.allclose(logits(model, ids), plain, atol=1e-4)
    assert keys <= {key.replace(".base_layer", "") for key in model.state_dict()}


@every
def test_only_the_adapter_trains(kind: str, base: Path, ids: Any) -> None:
    model = fresh(base)
    model.add_adapter(config(kind))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("_adapters.default." in name for name in trainable)
    model.train()(**ids, labels=ids["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@every
def test_adapters_are_switched_and_combined(kind: str, base: Path, ids: Any) -> None:
    model = fresh(base)
    model.add_adapter(config(kind), adapter_name="one")
    one = logits(model, ids)
    model.add_adapter(config(kind), adapter_name="two")
    assert model.active_adapters() == ["two"]
    two = logits(model, ids)
    model.set_adapter(["one", "two"])
    both = logits(model, ids)
    assert not torch.allclose(both, one, atol=1e-4)
    assert not torch.allclose(both, two, atol=1e-4)
    model.set_adapter("one")
    assert torch.equal(logits(model, ids), one)
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits(model, ids), two)


@every
def test_saved_and_loaded_every_way(kind: str, base: Path, ids: Any, tmp_path: Path) -> None:
    model = fresh(base)
    model.add_adapter(config(kind), adapter_name="one")
    expected = logits(model, ids)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    assert not [key for key in load_file(folder / "adapter_model.safetensors") if ".one." in key]

    other = fresh(base)
    for name, options in (("two", {}), ("three", {"is_trainable": True})):
        info = other.load_adapter(str(folder), adapter_name=name, **options)
        other.set_adapter(name)
        # transformers counts the weights of other adapters of the type as missing, for LoRA too, and keeps them.
        assert not [key for key in info.missing_keys if f".{name}." in key]
        assert not info.unexpected_keys
        equal(logits(other, ids), expected)
    other.set_adapter("two")
    equal(logits(other, ids), expected)
    other.set_adapter("three")
    assert any(p.requires_grad for name, p in other.named_parameters() if ".three." in name)

    equal(logits(AutoModelForCausalLM.from_pretrained(folder), ids), expected)
    wrapped = PeftModel.from_pretrained(fresh(base), folder)  # transformers -> PEFT
    equal(logits(wrapped, ids), expected)
    wrapped.save_pretrained(tmp_path / "again")
    back = fresh(base)  # PEFT -> transformers
    back.load_adapter(str(tmp_path / "again"))
    equal(logits(back, ids), expected)


@every
def test_head_is_saved_and_loaded(kind: str, tiny: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    inputs = tiny_inputs("bert", batch=3)
    tiny("bert", "sequence_classification").save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model.add_adapter(config("bottleneck" if kind == "parallel" else kind, modules_to_save=["classifier"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save.default" in name:
                p.add_(1.0)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    other.load_adapter(str(tmp_path / "adapter"))
    equal(logits(other, inputs), expected)


@every
def test_missing_and_unexpected_weights_are_errors(kind: str, base: Path, tmp_path: Path) -> None:
    model = fresh(base)
    model.add_adapter(config(kind))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    gone = sorted(state)[0]
    prefix = "base_model.model."
    cases = {
        "is missing": {key: value for key, value in state.items() if key != gone},
        "has no place for": {**state, f"{prefix}nothing.at.all": torch.zeros(1)},
        "does not begin with": {key.removeprefix(prefix) if key == gone else key: t for key, t in state.items()},
        "of another save": {**state, gone: state[gone] + 1},
        "in the file and": {**state, gone: torch.zeros(1)},
        "frozen": {**state, f"{prefix}model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)},
    }
    for message, changed in cases.items():
        save_file(changed, path)
        plain = fresh(base)
        before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
        with pytest.raises(ValueError, match="has no place for" if message == "frozen" else message):
            plain.load_adapter(str(tmp_path / "adapter"))
        assert before.keys() == plain.state_dict().keys()
        assert all(torch.equal(before[key], tensor) for key, tensor in plain.state_dict().items())
        with pytest.raises(ValueError, match="has no place for" if message == "frozen" else message):
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


@every
def test_generate_and_training_know_the_batch(kind: str, base: Path, ids: Any) -> None:
    model = fresh(base)
    model.add_adapter(config(kind))
    model.eval()
    cached = model.generate(**ids, max_new_tokens=3, num_beams=2)
    assert torch.equal(cached, model.generate(**ids, max_new_tokens=3, num_beams=2, use_cache=False))
    assert ForwardContext.find(model) is not None


def test_auxiliary_losses_join_the_loss(base: Path, ids: Any) -> None:
    model = fresh(base)
    model.add_adapter(config("mixda", balance_coef=10.0))
    batch = {**ids, "labels": ids["input_ids"]}
    with_loss = model.train()(**batch).loss
    assert with_loss.item() > model.eval()(**batch).loss.item() + 1.0


def test_gradient_checkpointing_gives_the_same_gradients(base: Path, ids: Any) -> None:
    model = fresh(base)
    model.add_adapter(config("mixda", balance_coef=1.0))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model.train()(**ids, labels=ids["input_ids"]).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_one_config_object_describes_adapters_of_several_models(tiny: Any, ids: Any, tmp_path: Path) -> None:
    given, at, models = config("mixda"), {}, {}
    for depth in (2, 6):
        tiny("llama", num_hidden_layers=depth).save_pretrained(tmp_path / f"base{depth}")
        models[depth] = fresh(tmp_path / f"base{depth}")
        models[depth].add_adapter(given)
        names = [n for n, _ in models[depth].named_parameters() if ".domain." in n]
        at[depth] = {n.split("layers.")[1][0] for n in names}
    assert at == {2: {"0"}, 6: {"1", "2"}}  # a third and a half of each depth
    for depth, model in models.items():
        model.save_pretrained(tmp_path / str(depth))
        other = fresh(tmp_path / f"base{depth}")
        assert not other.load_adapter(str(tmp_path / str(depth))).missing_keys
        equal(logits(other, ids), logits(model, ids))


def test_hotswap_is_refused_by_transformers(base: Path, tmp_path: Path) -> None:
    model = fresh(base)
    model.add_adapter(config("bottleneck"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        model.load_adapter(str(tmp_path / "adapter"), adapter_name="default", hotswap=True)


def test_get_peft_model_and_the_mixin_make_the_same_layers(base: Path) -> None:
    model = fresh(base)
    model.add_adapter(config("mixda"))
    wrapped = get_peft_model(fresh(base), config("mixda"))
    mine = {name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert mine == {n for n, m in wrapped.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}


@every
def test_a_failed_add_adapter_leaves_the_model_as_it_was(kind: str, base: Path, ids: Any) -> None:
    model = fresh(base)
    keys, plain = set(model.state_dict()), logits(model, ids)
    bad = {"target_modules": ["nothing"]}
    for given, name, error in ((3, None, TypeError), (config(kind, **bad), None, ValueError)):
        with pytest.raises(error):
            model.add_adapter(given, name)
        assert not model._hf_peft_config_loaded
        assert not hasattr(model, "peft_config")
        assert set(model.state_dict()) == keys
    model.add_adapter(config(kind), "one")  # transformers looks for its name among configs, if it believes in any
    assert not torch.equal(logits(model, ids), plain)
    adapted = logits(model, ids)
    for given, name, error in ((3, "two", TypeError), (config(kind, **bad), "two", ValueError)):
        with pytest.raises(error):
            model.add_adapter(given, name)
        assert model._hf_peft_config_loaded
        assert list(model.peft_config) == ["one"]
    with pytest.raises(ValueError, match=r"adapter_name: 'base_layer' is no name"):
        model.add_adapter(config(kind), "base_layer")
    assert list(model.peft_config) == ["one"]
    assert torch.equal(logits(model, ids), adapted)
    model.add_adapter(config(kind), "two")
