"""What shards a model by its parameters takes ours as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig, MoSAConfig

IDS = torch.arange(16).view(2, 8)
CONFIGS = {
    "bottleneck": lambda: BottleneckConfig(r=8, task_type="CAUSAL_LM", init_weights=False),
    "gated, with a norm and a scale": lambda: BottleneckConfig(
        r=8, task_type="CAUSAL_LM", glu=True, layer_norm=True, scale="learnable", init_weights=False
    ),
    "mixda": lambda: MixDAConfig(domains={"a": None, "b": None}, task_type="CAUSAL_LM", init_weights=False),
    "moa": lambda: MoAConfig(num_experts=3, task_type="CAUSAL_LM", n_shared_experts=1, init_weights=False),
    "moa by block": lambda: MoAConfig(
        num_experts=3, task_type="CAUSAL_LM", router_scope="block", target_modules="all-linear", init_weights=False
    ),
    "moa by model": lambda: MoAConfig(num_experts=3, task_type="CAUSAL_LM", router_scope="model", init_weights=False),
    "mosa": lambda: MoSAConfig(num_experts=2, task_type="CAUSAL_LM", init_weights=False),
}


def adapted(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config), CONFIGS[kind]()).eval()
    model.requires_grad_(True)
    return model


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of one process: the checks are those of many, and gradients can be compared."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_is_contiguous_and_saved_as_it_is(kind, tmp_path) -> None:
    model = adapted(kind)
    assert [name for name, p in model.named_parameters() if not p.is_contiguous()] == []
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_fully_sharded_gradients_are_those_of_the_whole_model(kind, mesh) -> None:
    model = adapted(kind)
    whole = copy.deepcopy(model)
    loss = whole(input_ids=IDS, labels=IDS).loss
    loss.backward()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(sharded, loss)
    sharded.backward()
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(p, DTensor)
        if q.grad is not None:
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_adapters_of_a_mixed_batch_may_be_sharded(mesh) -> None:
    model = adapted("bottleneck")
    model.add_adapter("other", CONFIGS["bottleneck"]())
    model.requires_grad_(True)
    names = ["default", "other"]
    whole = copy.deepcopy(model)
    logits = whole(input_ids=IDS, adapter_names=names).logits
    logits.square().mean().backward()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        found = model(input_ids=IDS, adapter_names=names).logits
        torch.testing.assert_close(found, logits)
    found.square().mean().backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)
