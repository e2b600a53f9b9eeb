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
with torch.no_grad():
    for folder in sys.argv[1:]:
        found = torch.export.load(f"{folder}/program.pt2").module()(*torch.load(f"{folder}/batch.pt"))
        torch.save(found, f"{folder}/logits.pt")
"""


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def exported(model: nn.Module, folder: Path) -> None:
    """Write the program of a model that is traced on two rows, and a batch of three longer ones."""
    rows, length = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    ids = torch.randint(1, 20, (2, 4))
    program = torch.export.export(
        model, (ids, torch.ones_like(ids)), dynamic_shapes=({0: rows, 1: length}, {0: rows, 1: length})
    )
    assert any("mixadapters.lowrank" in str(node.target) for node in program.graph.nodes)
    folder.mkdir()
    torch.export.save(program, folder / "program.pt2")
    ids, mask = torch.randint(1, 20, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    torch.save((ids, mask), folder / "batch.pt")


@torch.no_grad()
def test_exported_mixtures_compute_the_same_on_other_batches_in_a_fresh_process(tiny: Any, tmp_path: Path) -> None:
    models = {}
    for routed, config in ROUTED.items():
        torch.manual_seed(0)
        models[routed] = Logits(get_peft_model(tiny("llama", num_hidden_layers=1), config())).eval()
        exported(models[routed], tmp_path / routed)
    Process(RUN, [str(tmp_path / routed) for routed in ROUTED], tmp_path).finish()
    for routed, model in models.items():
        ids, mask = torch.load(tmp_path / routed / "batch.pt")
        found = torch.load(tmp_path / routed / "logits.pt")[mask.bool()]
        torch.testing.assert_close(found, model(ids, mask)[mask.bool()], msg=lambda m, name=routed: f"{name}: {m}")
        with model.model.disable_adapter():
            assert not torch.allclose(found, model(ids, mask)[mask.bool()], atol=1e-3), routed
