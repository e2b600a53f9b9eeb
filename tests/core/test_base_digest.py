"""A base model of other weights than an adapter was trained on is told, whatever its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig
from mixadapters.core.base_digest import base_digest

OTHER = "was trained on a base model of other weights"


def merged(base: nn.Module) -> nn.Module:
    """With a LoRA merged into it that hardly changes it."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.003)
    return model.merge_and_unload()


def loaded(base: nn.Module, folder: Path, log: pytest.LogCaptureFixture) -> list[str]:
    """What is warned of."""
    log.clear()
    PeftModel.from_pretrained(base, folder)
    return [message for message in log.messages if OTHER in message]


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["mlp"]}])
def test_a_merged_base_is_told_and_another_type_of_the_same_weights_not(
    fields, tiny: Any, tmp_path: Path, caplog
) -> None:
    config = BottleneckConfig(r=2, target_modules=["q_proj"], **fields)
    get_peft_model(merged(tiny("llama")), config).save_pretrained(tmp_path)
    assert loaded(merged(tiny("llama")), tmp_path, caplog) == []
    assert loaded(merged(tiny("llama")).bfloat16(), tmp_path, caplog) == []
    assert loaded(tiny("llama").half(), tmp_path, caplog) == []  # whose rounding says nothing
    assert len(loaded(tiny("llama"), tmp_path, caplog)) == 1
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_digest": None}))  # as earlier versions saved it
    assert loaded(tiny("llama"), tmp_path, caplog) == []


class Around(nn.Module):
    """A module of the user's own around a pretrained one."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(2, 2)


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
def test_layers_are_the_same_below_a_head_and_in_a_module_around_them(kind, tiny: Any) -> None:
    model = tiny(kind)
    inside = getattr(model, model.base_model_prefix, model)
    assert base_digest(model) == base_digest(inside) == base_digest(Around(model)) is not None
    if kind != "t5":  # which has its layers at the top
        assert base_digest(model, whole=True) != base_digest(inside, whole=True)


def test_a_digest_with_the_place_of_the_layers_is_read_as_before(tiny: Any, tmp_path: Path, caplog) -> None:
    get_peft_model(tiny("llama"), BottleneckConfig(r=2)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    before = base_digest(tiny("llama"), whole=True)
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_digest": before}))
    assert loaded(tiny("llama"), tmp_path, caplog) == []
    assert len(loaded(merged(tiny("llama")), tmp_path, caplog)) == 1


def test_how_weights_lie_in_memory_changes_no_digest(tiny: Any) -> None:
    model, apart = tiny("llama"), tiny("llama")
    with torch.no_grad():
        for parameter in apart.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.T.contiguous().T
    assert not all(parameter.is_contiguous() for parameter in apart.parameters())
    assert base_digest(apart) == base_digest(model)


def test_a_source_that_was_trained_on_other_weights_is_told(tiny: Any, tmp_path: Path, caplog) -> None:
    config = BottleneckConfig(r=2, placement="parallel")
    get_peft_model(merged(tiny("llama")), config).save_pretrained(tmp_path / "bottleneck")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(merged(tiny("llama")), lora).save_pretrained(tmp_path / "lora")  # PEFT's own, which say nothing

    def gathered(base: nn.Module, kind: str, **spec: Any) -> list[str]:
        caplog.clear()
        experts = {"one": {"source": str(tmp_path / kind), **spec}}
        get_peft_model(base, MoAConfig(experts=experts, expert_type=kind, router="softmax"))
        return [message for message in caplog.messages if OTHER in message]

    (said,) = gathered(tiny("llama"), "bottleneck")
    assert said.startswith("experts['one']: ")
    assert gathered(merged(tiny("llama")), "bottleneck") == []
    assert gathered(tiny("llama"), "bottleneck", check_base_model=False) == []
    assert gathered(tiny("llama"), "lora") == []


def test_adapters_change_nothing_of_it_and_merged_ones_have_none(tiny: Any) -> None:
    base = tiny("llama")
    before = base_digest(base)
    model = get_peft_model(base, MixDAConfig(domains=["a"], r=2, domain_layers=[1], modules_to_save=["lm_head"]))
    assert base_digest(model.get_base_model()) == before
    lora = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["v_proj"]))
    assert base_digest(lora.get_base_model()) == before
    lora.merge_adapter()
    assert base_digest(lora.get_base_model()) is None


def test_what_has_no_numbered_layers_or_no_weights_here_has_none() -> None:
    assert base_digest(nn.Linear(2, 2)) is None
    with torch.device("meta"):
        assert base_digest(nn.Sequential(nn.Linear(2, 2))) is None
