"""One expert becomes several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from mixadapters import MoAConfig

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "one of all": ("llama", {"num_experts": 1, "num_experts_per_tok": None}),
    "top-2": ("llama", {"num_experts": 1, "norm_topk_prob": True}),
    "one router for all": ("llama", {"num_experts": 1, "norm_topk_prob": True, "router_scope": "model"}),
    "named, in FFNs": (
        "bert",
        {"experts": ["law"], "expert_type": "glu", "target_modules": None, "num_experts_per_tok": None},
    ),
}


def build(base: nn.Module, **fields: Any) -> nn.Module:
    config = {"r": 3, "target_modules": ["q_proj", "down_proj"], "init_weights": False, **fields}
    return get_peft_model(base, MoAConfig(**config)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_without_mask_and_noise_the_output_is_unchanged(kind: str, tiny: Any, tiny_inputs: Any, tmp_path: Any) -> None:
    name, fields = KINDS[kind]
    model, inputs = build(tiny(name), **fields), tiny_inputs(name)
    first = model.peft_config["default"].all_names()[0]
    with torch.no_grad():
        before = model(**inputs).logits
        model.base_model.spawn_experts(first, ["b", "c", "d"], mask_fraction=0.0)
        torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny(name), tmp_path).eval()
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert model.peft_config["default"].all_names() == [first, "b", "c", "d"]


def test_segments_are_copied_one_by_one(tiny: Any) -> None:
    model = build(tiny("llama"), experts=["law"], segments=2, r=4)
    model.base_model.spawn_experts("law", ["b", "c"], mask_fraction=0.0)
    for _, mixture in model.base_model._mixtures("default"):
        assert mixture.bank.names == ["law_0", "law_1", "b_0", "b_1", "c_0", "c_1"]
        for name in ("b", "c"):
            for i in range(2):
                copy, first = (mixture.bank.experts[f"{n}_{i}"].state_dict() for n in (name, "law"))
                assert all(torch.equal(copy[key], value) for key, value in first.items())


def test_each_expert_loses_other_weights_at_random(tiny: Any) -> None:
    model = build(tiny("llama"), num_experts=1, r=16)
    banks = [mixture.bank for _, mixture in model.base_model._mixtures("default")]
    old = [{n: p.clone() for n, p in bank.experts["expert0"].named_parameters()} for bank in banks]
    model.base_model.spawn_experts("expert0", ["b", "c"], mask_fraction=0.25)
    for bank, before in zip(banks, old, strict=True):
        masks = []
        for expert in bank.experts.values():
            for name, parameter in expert.named_parameters():
                kept = parameter != 0
                assert torch.equal(parameter[kept], before[name][kept])
                assert kept.float().mean() == pytest.approx(0.75, abs=0.1)
            masks.append((expert.down.weight == 0).flatten())
        assert not any(torch.equal(masks[0], mask) for mask in masks[1:])


def test_noise_is_relative_to_the_weights(tiny: Any) -> None:
    model = build(tiny("llama"), num_experts=1, r=16)
    banks = [mixture.bank for _, mixture in model.base_model._mixtures("default")]
    old = [bank.experts["expert0"].up.weight.clone() for bank in banks]
    model.base_model.spawn_experts("expert0", ["b"], mask_fraction=0.0, noise=0.5)
    for bank, before in zip(banks, old, strict=True):
        for expert in bank.experts.values():
            changed = (expert.up.weight - before).std() / before.std()
            assert float(changed) == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("expert9", ["b"]), {}, r"unknown expert 'expert9'; have \['expert0'\]"),
        (("expert0", "bc"), {}, "names='bc' must be a list of different names"),
        (("expert0", ["b", "b"]), {}, "must be a list of different names"),
        (("expert0", []), {}, "must be a list of different names"),
        (("expert0", ["b", "expert0"]), {}, "expert 'expert0' exists already"),
        (
            ("expert0", ["b"]),
            {"mask_fraction": 1.0},
            r"mask_fraction=1.0 must be a finite number, at least 0, less than 1",
        ),
        (("expert0", ["b"]), {"noise": -1}, "noise=-1 must be a finite number"),
        (("expert0", ["b", "c.d"]), {}, "experts: 'c.d' is no name"),
        (("expert0", ["null0"]), {}, "'null0' is the name of an arm"),
    ],
)
def test_what_cannot_be_spawned_changes_nothing(arguments: Any, options: Any, message: str, tiny: Any) -> None:
    model = build(tiny("llama"), num_experts=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        model.base_model.spawn_experts(*arguments, **options)
    now = dict(model.named_parameters())
    assert before.keys() == now.keys()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert model.peft_config["default"].all_names() == ["expert0"]


def test_a_router_that_cannot_gain_arms_is_named(tiny: Any) -> None:
    model = build(tiny("llama"), num_experts=2, router={"kind": "tree"}, num_experts_per_tok=2)
    before = sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match=r"TreeRouter.*none can come or go"):
        model.base_model.spawn_experts("expert0", ["b"])
    assert sum(p.numel() for p in model.parameters()) == before
    assert model.peft_config["default"].all_names() == ["expert0", "expert1"]
