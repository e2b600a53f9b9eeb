"""Runs every cell under the engine that `accelerate launch` has set up, in each process of it."""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from cells import CELLS, LOOPS


def shard_on_cpu() -> None:
    """accelerate keeps FSDP for GPUs, and on a CPU goes on as DDP: here it runs what it has for GPUs."""
    plain = AcceleratorState.__init__

    def made(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = made


def without_compiling() -> None:
    """DeepSpeed builds an operation for collectives on a CPU, which takes minutes, and goes on without one."""
    from deepspeed.comm import torch as backend

    backend.build_shm_op = lambda: None


def begin() -> None:
    """Set up the engine; a process that waits for another in vain ends."""
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        without_compiling()
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def end() -> None:
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path, only: list[str]) -> None:
    begin()
    for name in only or CELLS:
        for loop, run in LOOPS.items():
            place = folder / f"{name}, {loop}"
            place.mkdir(parents=True, exist_ok=True)
            if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
                AcceleratorState._reset_state()  # its settings are those of one run
            try:
                found = run(CELLS[name], place, dist.get_world_size())
            except Exception as error:
                found = {"error": "".join(traceback.format_exception(error))}
            (place / f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
            if "error" in found:  # the other process may wait for this one
                print(f"{place.name}: {found['error']}", flush=True)
                os._exit(1)
    end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
