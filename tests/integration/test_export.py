"""A model with a mixture goes through `torch.export`; what comes out runs in another process, on other batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from processes import Process
from torch import Tensor, nn

from mixadapters import MoAConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
COMMON = {"r": 3, "task_type": "CAUSAL_LM", "init_weights": False, "target_modules": ["q_proj"]}
ROUTED = {
    "top_k": lambda: MoAConfig(num_experts=3, **COMMON),
    "one decision for a request": lambda: MoAConfig(num_experts=3, granularity="request", router="softmax", **COMMON),
}
RUN = """
import sys
import torch
import mixadapters
program, batch, out = sys.argv[1:]
with torch.no_grad():
    torch.save(torch.export.load(program).module()(*torch.load(batch)), out)
"""


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize("routed", ROUTED)
def test_an_exported_mixture_computes_the_same_on_other_batches_in_a_fresh_process(
    routed: str, tiny: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Logits(get_peft_model(tiny("llama", num_hidden_layers=1), ROUTED[routed]())).eval()
    rows, length = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    ids = torch.randint(1, 20, (2, 4))
    with torch.no_grad():
        program = torch.export.export(
            model, (ids, torch.ones_like(ids)), dynamic_shapes=({0: rows, 1: length}, {0: rows, 1: length})
        )
        files = [str(tmp_path / name) for name in ("program.pt2", "batch.pt", "logits.pt")]
        torch.export.save(program, files[0])
        ids, mask = torch.randint(1, 20, (3, 7)), torch.ones(3, 7, dtype=torch.long)
        mask[0, :3] = 0
        torch.save((ids, mask), files[1])
        Process(RUN, files, tmp_path).finish()
        found = torch.load(files[2])
        torch.testing.assert_close(found[mask.bool()], model(ids, mask)[mask.bool()])
        with model.model.disable_adapter():
            assert not torch.allclose(found[mask.bool()], model(ids, mask)[mask.bool()], atol=1e-3)
    assert any("mixadapters.lowrank" in str(node.target) for node in program.graph.nodes)
