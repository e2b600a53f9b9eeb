"""What a model card says that the saved adapter computes. How its code loads: integration/test_fresh_process.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig, PILLConfig
from mixadapters.core.config import MixtureConfig


def card_of(model: nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.search(r"<!-- mixadapters .*?-->(.*?)<!-- /mixadapters", text, re.DOTALL).group(1)


@pytest.fixture
def loras(tiny: Any, tmp_path: Path) -> dict[str, str]:
    """Folders of two trained LoRA, by the name of an expert."""
    folders = {"law": tmp_path / "law-lora", "code": tmp_path / "code-lora"}
    for folder in folders.values():
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(tiny("llama"), config).save_pretrained(folder)
    return {name: str(folder) for name, folder in folders.items()}


def test_a_mixture_names_its_experts_and_where_they_came_from_and_no_path(
    loras: dict[str, str], tiny: Any, tmp_path: Path
) -> None:
    scaled = {"source": loras["code"], "scale": 0.5}
    model = get_peft_model(tiny("llama"), MoAConfig(experts={"law": loras["law"], "code": scaled}, router="softmax"))
    card = card_of(model, tmp_path / "mixture")
    assert "- Experts: `law from law-lora`, `code from code-lora, scale 0.5`\n" in card
    assert "- Router: `softmax`, `balance_coef=0.001`, `router_scope='module'`\n" in card
    assert str(tmp_path) not in card.replace(str(tmp_path / "mixture"), "")
    model.base_model.add_expert("new", r=2)
    model.base_model.remove_expert("code")
    assert "- Experts: `law from law-lora`, `new`\n" in card_of(model, tmp_path / "mixture")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts_per_tok": 3}, "`top_k`, `k=3`"),
        ({"num_experts_per_tok": None}, "`top_k`, `all experts`"),
        (
            {"router": {"kind": "constant", "weights": {f"expert{i}": 0.25 for i in range(3)}}},
            "`constant`, `weights={'expert0': 0.25, ",
        ),
        ({"router": "top_p", "router_scope": "block"}, "`top_p`"),
    ],
)
def test_a_mixture_names_its_router_and_how_many_experts_a_token_takes(
    fields: dict[str, Any], said: str, tiny: Any, tmp_path: Path
) -> None:
    card = card_of(get_peft_model(tiny("llama"), MoAConfig(num_experts=3, r=2, **fields)), tmp_path)
    router = next(line for line in card.splitlines() if line.startswith("- Router: "))
    assert said in router
    assert f"`router_scope={fields.get('router_scope', 'module')!r}`" in router
    assert "- Experts: `expert0`, `expert1`, `expert2`\n" in card


def test_many_experts_are_counted(tiny: Any, tmp_path: Path) -> None:
    config = MoAConfig(num_experts=40, r=1, target_modules=["q_proj"])
    assert "`expert31` and 8 more\n" in card_of(get_peft_model(tiny("llama"), config), tmp_path)


def test_domains_and_their_router_are_named_once(tiny: Any, tmp_path: Path) -> None:
    config = MixDAConfig(domains=["law", "code"], r=2, gate="sigmoid", gate_input="ffn_input", task_adapter=None)
    card = card_of(get_peft_model(tiny("llama"), config), tmp_path)
    assert "- Domains: `law`, `code`\n" in card
    assert "- Router: `sigmoid`, `input='ffn_input'`, `granularity='token'`" in card
    assert "gate" not in card
    assert "domain_order" not in card


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("llama", MixDAConfig(r=2, task_adapter=None), "task_adapter=None"),
        ("llama", PILLConfig(r=2, token_ids={"image": [5, 6]}), "token_ids={'image': [5, 6]}"),
        ("bert", BottleneckConfig(r=4, rank_pattern={"output.dense": 2}), "rank_pattern={'output.dense': 2}"),
    ],
)
def test_settings_of_every_form_are_said(
    kind: str, config: MixtureConfig, said: str, tiny: Any, tmp_path: Path
) -> None:
    settings = re.search(
        r"Settings other than the defaults: (.*)", card_of(get_peft_model(tiny(kind), config), tmp_path)
    )
    assert f"`{said}`" in settings.group(1)
    assert "digest" not in settings.group(1)


def test_settings_that_are_too_long_are_named(tiny: Any, tmp_path: Path) -> None:
    pattern = {f"layers.{i}.mlp.{name}": 2 for i in range(2) for name in ("gate_proj", "up_proj", "down_proj")}
    config = MoAConfig(num_experts=2, r=1, target_modules=["gate_proj", "up_proj", "down_proj"], rank_pattern=pattern)
    assert "- Longer ones, in `adapter_config.json`: `rank_pattern`" in card_of(
        get_peft_model(tiny("llama"), config), tmp_path
    )
