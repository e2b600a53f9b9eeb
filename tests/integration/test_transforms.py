"""Gradients of each sample alone, as differential privacy and influence functions need them, and of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_bases import tiny
from torch import Tensor
from torch.func import functional_call, grad, vmap

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig
from mixadapters.kernels import adapter_backend

CONFIGS: dict[str, Callable[[], Any]] = {
    "bottleneck": lambda: BottleneckConfig(reduction_factor=4, init_weights=False),
    "LoRA's form": lambda: BottleneckConfig(r=2, target_modules=["q_proj"], activation="identity", init_weights=False),
    "MoA": lambda: MoAConfig(num_experts=3, r=2, target_modules=["q_proj", "up_proj"], init_weights=False),
    "MixDA": lambda: MixDAConfig(domains=["a", "b"], init_weights=False),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_vmap_over_samples_gives_the_gradients_of_each(config) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama", attn_implementation="eager"), CONFIGS[config]()).eval()
    ids = torch.randint(3, 15, (3, 6))
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(given: dict[str, Tensor], row: Tensor) -> Tensor:
        row = row.unsqueeze(0)
        return functional_call(model, given, (), {"input_ids": row, "labels": row, "use_cache": False}).loss

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        model.zero_grad()
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            if name in parameters:
                expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(found[name][i], expected, msg=lambda m, n=name: f"{n}: {m}")
    assert max(t.abs().max() for t in found.values()) > 0


@pytest.mark.parametrize("config", CONFIGS)
def test_a_gradient_penalty_trains(config) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama", attn_implementation="eager"), CONFIGS[config]()).eval()
    ids = torch.randint(3, 15, (3, 6))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def slopes() -> list[Tensor]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        penalty = torch.stack([slope.square().sum() for slope in first]).sum()
        return list(torch.autograd.grad(penalty, parameters, materialize_grads=True))

    found = slopes()
    with adapter_backend("reference"):
        expected = slopes()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert max(slope.abs().max() for slope in found) > 0
