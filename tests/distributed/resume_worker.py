"""Goes on with cells from checkpoints under an engine, and may be killed on the way."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from cells import CELLS, STEPS, by_trainer
from transformers import TrainerCallback
from worker import begin, end

from mixadapters.core.layer import AdapterHost

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    "gradient_clipping": "auto", "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
    "zero3": {"deepspeed": ZERO3},
}


class Killed(TrainerCallback):
    """kill -9 of the last process at an event of the step after `step`."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self.kill)

    def kill(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def strange(model: Any) -> Any:
    """The model of a script that makes other weights: the checkpoint has to bring all those of the adapters."""
    with torch.no_grad():
        for host in model.modules():
            if isinstance(host, AdapterHost):
                for parameter in host.adapters.parameters():
                    parameter.add_(1.0)
    return model


def main(engine: str, folder: Path, event: str, step: int, names: list[str]) -> None:
    """event: of a callback, at which it is killed; "" to go on from the checkpoint of `step` to the end."""
    begin(engine)
    if engine == "zero3":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    for name in names:
        cell, place = CELLS[name], folder / f"{name}, Trainer"
        if engine == "zero3":
            AcceleratorState._reset_state()
        options: dict[str, Any] = dict(ENGINES[engine])
        if event:
            options["callbacks"] = [Killed(event, step)]
        else:
            plain = cell.model
            cell.model = lambda plain=plain: strange(plain())
            options["resume"] = str(place / f"checkpoint-{step}")
        by_trainer(cell, place, dist.get_world_size(), max_steps=STEPS, **options)
    end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5:])
