"""Adapters that an earlier version saved load, compute what they computed, and keep their keys when saved again.

`tests/assets/format_1` holds, for small models of fixed weights, one folder per kind of adapter as the first released
form of the files had it, one batch, and the logits that the adapters gave for it then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import mixadapters  # noqa: F401  (PEFT learns the types from it)

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "format_1"
CONTENTS: dict[str, Any] = json.loads((ASSETS / "cases.json").read_text())
CASES = CONTENTS["cases"]
MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "bert": (BertConfig, BertForSequenceClassification)}


def base_model(kind: str) -> nn.Module:
    config, model = MODELS[kind]
    base = model(config(**CONTENTS["sizes"][kind]))
    base.load_state_dict(load_file(ASSETS / f"{kind}.safetensors"))
    return base.eval()


@pytest.mark.parametrize("name", CASES)
def test_old_files_give_their_old_outputs_and_are_saved_under_their_old_keys(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    batch = load_file(ASSETS / "batch.safetensors")
    inputs = {field: batch[field] for field in ("input_ids", "attention_mask", *case["fields"])}
    model = PeftModel.from_pretrained(base_model(case["base"]), ASSETS / name).eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, load_file(ASSETS / "logits.safetensors")[name], atol=2e-5, rtol=2e-5)

    model.save_pretrained(tmp_path)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (ASSETS / name, tmp_path))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    again = PeftModel.from_pretrained(base_model(case["base"]), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)
