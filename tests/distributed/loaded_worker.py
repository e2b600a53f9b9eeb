"""Trains cells under ZeRO-3 on bases that `from_pretrained` shares out while it loads them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import cells
import deepspeed
import torch.distributed as dist
from accelerate.state import AcceleratorState
from resume_worker import ENGINES
from transformers import LlamaForCausalLM, TrainingArguments
from worker import begin, end


def main(folder: Path, names: list[str]) -> None:
    begin("zero3")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    if dist.get_rank() == 0:
        cells.llama().save_pretrained(folder / "base")
    dist.barrier()
    cells.llama = lambda: LlamaForCausalLM.from_pretrained(folder / "base")
    for name in names:
        cell = cells.CELLS[name]
        size, accumulated = cells.batches(cell, 2)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "use_cpu": True}
        keeps = TrainingArguments(str(folder), **settings, **ENGINES["zero3"])  # while it lives, loading shares out
        model = cell.model()
        assert all(p.numel() == 0 for p in model.get_base_model().get_input_embeddings().parameters())
        cell.model = lambda model=model: model
        AcceleratorState._reset_state()
        cells.by_trainer(cell, folder / f"{name}, Trainer", 2, **ENGINES["zero3"])
        del keeps
    end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
