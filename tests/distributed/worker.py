"""Runs every cell under the engine that `accelerate launch` has set up, in each process of it."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
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


def main(folder: Path, only: list[str]) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    for name, cell in CELLS.items():
        for loop, run in LOOPS.items():
            if only and name not in only:
                continue
            place = folder / f"{name}, {loop}"
            place.mkdir(exist_ok=True)
            try:
                found = run(cell, place, int(os.environ["WORLD_SIZE"]))
            except Exception as error:  # the other cells go on
                found = {"error": "".join(traceback.format_exception(error))}
            (place / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
            if "error" in found:
                print(name, loop, found["error"], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
