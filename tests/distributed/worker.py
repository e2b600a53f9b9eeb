"""Runs every cell under the engine that `accelerate launch` has set up, in each process of it."""

from __future__ import annotations

import importlib
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
from accelerate.utils import DeepSpeedPlugin, DistributedType
from cells import CELLS, LOOPS


def shard_on_cpu() -> None:
    """accelerate keeps FSDP for GPUs, and on a CPU goes on as DDP: here it runs what it has for GPUs."""
    plain = AcceleratorState.__init__

    def made(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = made


def share_out_all() -> None:
    """DeepSpeed builds an operation for collectives on a CPU, which takes minutes, and goes on without one. Small
    parameters, and here all are, it would keep whole."""
    backend = importlib.import_module("deepspeed.comm.torch")  # `from deepspeed.comm import torch` is torch itself
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    plain = DeepSpeedPlugin.__post_init__

    def made(self: DeepSpeedPlugin) -> None:
        plain(self)
        self.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = made


def begin(engine: str) -> None:
    """Set up the engine; a process that waits for another in vain ends."""
    torch.set_num_threads(1)
    if engine.startswith("zero"):
        share_out_all()
    elif engine == "fsdp2":
        shard_on_cpu()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def end() -> None:
    dist.barrier()
    dist.destroy_process_group()


def main(engine: str, folder: Path, only: list[str]) -> None:
    begin(engine)
    for name in only or CELLS:
        for loop, run in LOOPS.items():
            place = folder / f"{name}, {loop}"
            place.mkdir(parents=True, exist_ok=True)
            if engine.startswith("zero"):
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
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
