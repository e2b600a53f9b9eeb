"""MixDA with LoRA: domains that were stock LoRA folders, and a LoRA of the task, in one adapter and one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from mixadapters import MixDAConfig

ATTENTION = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}
FFN = {"r": 2, "use_rslora": True, "target_modules": ["down_proj", "q_proj"], "layers_to_transform": [1, 3]}


def draw(model: nn.Module, seed: int) -> None:
    """Every trainable parameter anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor], **fields: Any) -> Tensor:
    return model.eval()(**inputs, **fields).logits


def by_domain(model: Any, name: str, inputs: dict[str, Tensor]) -> Tensor:
    rows = len(next(iter(inputs.values())))
    return logits(model, inputs, domain_ids=model.base_model.domain_ids([name] * rows))


@pytest.fixture
def stock(tiny: Any, tmp_path: Path) -> dict[str, Path]:
    """Folders of PEFT's LoRA, of other modules, layers, ranks and factors."""
    folders = {}
    for seed, (name, fields) in enumerate({"law": ATTENTION, "code": FFN}.items()):
        model = get_peft_model(tiny("llama"), LoraConfig(**fields))
        draw(model, seed)
        model.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    return folders


def gather(tiny: Any, domains: Any, **fields: Any) -> Any:
    return get_peft_model(tiny("llama"), MixDAConfig(domains=domains, domain_type="lora", **fields))


@pytest.mark.parametrize("task", [None, "pfeiffer", "parallel", "houlsby", "lora"])
def test_a_row_of_one_domain_is_pefts_lora_and_what_is_saved_is_one_folder(
    task, tiny, tiny_inputs, stock, tmp_path
) -> None:
    inputs = tiny_inputs("llama", padding="right")
    model = gather(tiny, stock, task_adapter=task)
    for name, folder in stock.items():
        expected = logits(PeftModel.from_pretrained(tiny("llama"), folder), inputs)
        torch.testing.assert_close(by_domain(model, name, inputs), expected, rtol=1e-5, atol=2e-5)
    plain = logits(tiny("llama"), inputs)
    torch.testing.assert_close(by_domain(model, "__base__", inputs), plain, rtol=0, atol=0)
    assert (expected - plain).abs().max() > 0.05
    draw(model, 7)
    mixed = logits(model, inputs)
    assert not torch.allclose(mixed, by_domain(model, "law", inputs), atol=1e-3)
    model.save_pretrained(tmp_path / "both")
    assert not [path for path in (tmp_path / "both").iterdir() if path.is_dir()]
    saved = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert not any("source" in spec for spec in saved["domains"].values())
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "both")
    assert torch.equal(logits(loaded, inputs), mixed)
    assert torch.equal(by_domain(loaded, "code", inputs), by_domain(model, "code", inputs))


def test_lora_of_the_task_beside_bottleneck_domains_trains_in_its_stage(tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("bert", labels="classes")
    config = MixDAConfig(domains=["a", "b"], task_adapter="lora", task_r=2, task_lora_alpha=6, task_type="SEQ_CLS")
    model = get_peft_model(tiny("bert", "sequence_classification"), config)
    model.base_model.set_stage("task")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    places = {name.split(".mixda_adapters.")[0] for name in trained if ".task." in name}
    assert {place.rpartition(".")[2] for place in places} == {"query", "value"}
    assert len(places) == 8
    assert not any(".domain.bank." in name for name in trained)
    before = logits(model, {k: v for k, v in inputs.items() if k != "labels"})
    draw(model, 3)
    model.save_pretrained(tmp_path)
    mine = logits(model, inputs)
    assert not torch.allclose(mine, before, atol=1e-3)
    loaded = PeftModel.from_pretrained(tiny("bert", "sequence_classification"), tmp_path)
    assert torch.equal(logits(loaded, inputs), mine)
    mixture = next(m for n, m in model.named_modules() if n.endswith(".task"))
    assert mixture.bank.scale == 3.0


def test_new_lora_domains_start_as_the_base_and_train(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    model = gather(tiny, ["a", "b"], r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"], task_adapter=None)
    assert torch.equal(logits(model, inputs), logits(tiny("llama"), inputs))
    places = dict(model.base_model._mixtures("default"))
    assert {path.rpartition(".")[2] for path in places} == {"q_proj", "o_proj"}
    assert len(places) == 8
    assert {expert.rank for m in places.values() for expert in m.bank.experts.values()} == {3}
    assert all(set(m.bank.scales.values()) == {2.0} for m in places.values())
    model.base_model.set_stage("domain")
    model.train()(**inputs, domain_ids=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_domains_come_and_go_with_modules_of_their_own(tiny, tiny_inputs, stock, tmp_path) -> None:
    inputs = tiny_inputs("llama")
    model = gather(tiny, {"law": stock["law"]}, task_adapter="pfeiffer")
    law = by_domain(model, "law", inputs)
    model.base_model.add_domain("code", str(stock["code"]))
    expected = logits(PeftModel.from_pretrained(tiny("llama"), stock["code"]), inputs)
    torch.testing.assert_close(by_domain(model, "code", inputs), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(by_domain(model, "law", inputs), law)
    model.base_model.add_domain("tax", like="code")
    torch.testing.assert_close(by_domain(model, "tax", inputs), expected, rtol=1e-5, atol=2e-5)
    model.base_model.add_domain("new", r=2)
    torch.testing.assert_close(by_domain(model, "new", inputs), logits(tiny("llama"), inputs))
    model.base_model.remove_domain("code")
    model.save_pretrained(tmp_path / "all")
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "all")
    for name in ("law", "tax", "new"):
        assert torch.equal(by_domain(loaded, name, inputs), by_domain(model, name, inputs))
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"domain_type": "lora", "activation": "relu"}, "activation='relu' means nothing with domain_type='lora'"),
        ({"domain_type": "lora", "combine": "convex"}, "combine='convex' needs domains that stand for"),
        ({"domain_type": "lora", "router": {"kind": "softmax", "input": "ffn_input"}}, "gate_input='ffn_input' means"),
        ({"lora_alpha": 4.0}, "lora_alpha=4.0 means nothing with domain_type='bottleneck'"),
        (
            {"task_target_modules": ["query"]},
            "means nothing with task_adapter='pfeiffer'",
        ),
        ({"task_adapter": "lora", "task_activation": "gelu"}, "task_activation='gelu' means nothing"),
        ({"task_adapter": "lora", "target_modules": ["down_proj"]}, "no telling which of them are the domains'"),
        ({"domains": {"a": {"source": "x", "scale": 2.0}}}, r"domains\['a'\]: scale=2.0 is for domain_type='lora'"),
        (
            {"domain_type": "lora", "domains": {"a": {"origin": "x", "ranks": {"m": 2}}}},
            "`scales` must name the modules of `ranks`",
        ),
    ],
)
def test_fields_that_a_type_would_pass_over_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        MixDAConfig(**fields)


def test_folders_of_the_other_type_are_refused_with_the_remedy(tiny, stock, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"is a LORA adapter; .*say domain_type='lora'"):
        get_peft_model(tiny("llama"), MixDAConfig(domains={"law": stock["law"]}))
    get_peft_model(tiny("llama"), MixDAConfig(domains=["x"])).save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="is a MIXDA adapter; domain_type='lora' gathers LORA adapters; write the"):
        gather(tiny, {"x": tmp_path / "x"})
    model = gather(tiny, {"law": stock["law"]}, layers_to_transform=[0, 1, 2, 3], task_adapter=None)
    model.base_model.peft_config["default"].layers_to_transform = [0]
    sites = dict(model.base_model.peft_config["default"].sites)
    with pytest.raises(ValueError, match=r"domain 'code' adapts .* leave out"):
        model.base_model.add_domain("code", str(stock["code"]))
    assert model.base_model.peft_config["default"].sites == sites
    assert list(model.base_model.peft_config["default"].domains) == ["law"]
