"""A base whose linear layers are shared out by tensor parallelism: adapters at whole blocks, and at nothing less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_together
from transformers import LlamaConfig, LlamaForCausalLM

WORKER = """
import os, sys
import torch, torch.distributed
from peft import get_peft_model
from transformers import LlamaForCausalLM
from mixadapters import BottleneckConfig, MoAConfig

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
folder, rank = sys.argv[1], int(os.environ["RANK"])
ids = torch.randint(5, 64, (2, 6), generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "bottleneck": BottleneckConfig(r=4, init_weights=False, target_modules=["mlp"]),
    "moa": MoAConfig(num_experts=3, r=4, init_weights=False, target_modules=["mlp"]),
}
found = {}
for name, config in CONFIGS.items():
    for plan in (None, "auto"):
        base = LlamaForCausalLM.from_pretrained(folder, tp_plan=plan)
        torch.manual_seed(1)
        model = get_peft_model(base, config)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[name, plan] = (loss.detach(), grads)
refused = {}
for target in ("down_proj", "q_proj"):
    try:
        get_peft_model(LlamaForCausalLM.from_pretrained(folder, tp_plan="auto"), MoAConfig(target_modules=[target]))
    except ValueError as error:
        refused[target] = str(error)
torch.save((found, refused), f"{folder}/{rank}.pt")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list:
    folder: Path = tmp_path_factory.mktemp("tensor_parallel")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)).save_pretrained(folder)
    run_together(WORKER, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["bottleneck", "moa"])
def test_adapters_at_whole_blocks_are_those_of_one_process(runs, kind) -> None:
    for found, _ in runs:
        (alone, expected), (shared, got) = found[kind, None], found[kind, "auto"]
        torch.testing.assert_close(shared, alone)
        assert expected
        assert got.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(got[name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_parts_of_layers_are_refused_by_name(runs) -> None:
    for _, refused in runs:
        for target in ("down_proj", "q_proj"):
            assert f"{target}' is shared out by tensor parallelism" in refused[target]
