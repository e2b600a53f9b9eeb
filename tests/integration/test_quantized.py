"""Adapters on a base whose linear layers torchao holds as int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig

quantize = pytest.importorskip("torchao.quantization")

KINDS = {
    "bottleneck": lambda **f: BottleneckConfig(r=4, init_weights=False, **f),
    "parallel": lambda **f: BottleneckConfig(r=4, init_weights=False, placement="parallel", **f),
    "mixda": lambda **f: MixDAConfig(domains=["a", "b"], r=4, init_weights=False, **f),
    "moa": lambda **f: MoAConfig(num_experts=3, r=4, router_scope="block", init_weights=False, **f),
}
every = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny("llama").save_pretrained(path)
    return path


@pytest.fixture
def quantized(folder: Path) -> Any:
    def make() -> nn.Module:
        config = TorchAoConfig(quantize.Int8WeightOnlyConfig())
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
        assert "Int8" in type(model.model.layers[0].mlp.down_proj.weight).__name__
        return model

    return make


@pytest.fixture
def batch(tiny_inputs: Any) -> dict[str, Tensor]:
    return tiny_inputs("llama", batch=3, labels="tokens")


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits


@every
def test_trains_saves_and_loads(kind: str, quantized: Any, batch: Any, tmp_path: Path) -> None:
    model = get_peft_model(quantized(), KINDS[kind]())
    assert not torch.allclose(logits(model, batch), logits(quantized(), batch), atol=1e-3)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(quantized(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(logits(loaded, batch), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(quantized(), batch))


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_merged_adapter_is_exact_up_to_quantization(placement: str, quantized: Any, tiny: Any, batch: Any) -> None:
    inputs = "ffn_intermediate" if placement == "parallel" else "ffn_input"
    fields = {"activation": "identity", "use_bias": False, "placement": placement, "adapter_input": inputs}
    model = get_peft_model(quantized(), KINDS["bottleneck"](**fields))
    expected = logits(model, batch)
    rounding = (logits(quantized(), batch) - logits(tiny("llama"), batch)).abs().mean()
    adapted = (expected - logits(quantized(), batch)).abs().mean()
    model.merge_adapter()
    merged = logits(model, batch)
    model.unmerge_adapter()
    assert (logits(model, batch) - expected).abs().max() < 1e-6
    unloaded = model.merge_and_unload()
    assert torch.equal(logits(unloaded, batch), merged)
    assert "Int8" in type(unloaded.model.layers[0].mlp.down_proj.weight).__name__
    assert (merged - expected).abs().mean() < 2 * rounding
    assert 10 * rounding < adapted


@pytest.mark.parametrize("kind", ["parallel", "mixda", "moa"])
def test_what_equals_no_weight_is_refused(kind: str, quantized: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot merge|cannot be merged"):
        get_peft_model(quantized(), KINDS[kind]()).merge_and_unload()


@every
def test_unload_gives_the_quantized_base_back(kind: str, quantized: Any, batch: Any) -> None:
    model = get_peft_model(quantized(), KINDS[kind]())
    assert torch.equal(logits(model.unload(), batch), logits(quantized(), batch))
