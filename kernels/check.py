"""Compile every launch that the Triton backend makes, for GPUs that need not be there, and read what the compiler did.

    python kernels/check.py             # all problems, all architectures
    python kernels/check.py --subset    # a representative part

The launches are recorded, not listed: representative problems run on tensors without data, under the name of each
architecture. Fails if a kernel does not compile, spills registers, needs more shared memory than a block may have, or
multiplies without matrix instructions. Triton keeps what it has compiled: after a run that was broken off, the next
one reads that and goes on.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # kernels of the interpreter cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mixadapters.kernels.problem import DIFFERENTIABLE, Problem
from mixadapters.kernels.triton import backend
from mixadapters.kernels.triton.launch import Launch, record


class Architecture(NamedTuple):
    """What triton calls it, the shared memory that a block may have (KiB), and its matrix instructions."""

    target: GPUTarget
    shared: int
    matrix: str


NVIDIA = r"\b(?:HGMMA|UTCHMMA|UTCQMMA|UTCMMA|HMMA)[\w.]*"
AMD = r"\bv_mfma_\w+"
ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163, NVIDIA),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227, NVIDIA),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 227, NVIDIA),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64, AMD),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def problem(
    rank: int, experts: int = 8, *, rows: int = 8192, wide: int = 4096, slots: int | None = 1, run: int = 1,
    dtype: torch.dtype = torch.bfloat16, weight_dtype: torch.dtype | None = None, bias: bool = False,
    glu: bool = False, weights: bool = False, base: bool = True, base_weight: bool = False, act: str = "identity",
    dropout: float = 0.0, batch_invariant: bool = False,
) -> Problem:  # fmt: skip
    """A problem on "meta": shapes and dtypes, and no data."""
    weight_dtype = weight_dtype or dtype

    def make(*shape: int, dtype: torch.dtype = weight_dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    total = rank * experts
    return Problem(
        make(rows, wide, dtype=dtype), make(total, wide), make(wide, total), (rank,) * experts,
        make(total) if bias else None, make(experts, wide) if bias else None,
        make(total, wide) if glu else None, make(total) if glu and bias else None,
        None if slots is None else make(rows, slots, dtype=torch.int64),
        make(rows, slots or experts, dtype=torch.float32) if weights else None, make(experts, dtype=torch.float32),
        make(rows, wide, dtype=dtype) if base else None,
        make(rows, dtype=torch.float32) if base_weight else None,
        act, dropout, make(dtype=torch.int64) if dropout else None, run, batch_invariant,
    )  # fmt: skip


FP32, FP16 = torch.float32, torch.float16
MIXED = {"bias": True, "weights": True, "act": "gelu"}
PROBLEMS = {
    **{f"lora r{r}, one per sequence": problem(r, run=1024) for r in (8, 16, 32, 64, 128, 256)},
    "lora r16, fp32 weights, dropout": problem(16, run=1024, weight_dtype=FP32, dropout=0.1),
    "lora r64, fp32": problem(64, run=1024, dtype=FP32),
    "lora r128, fp32": problem(128, run=1024, dtype=FP32),
    "lora r16, fp16": problem(16, run=1024, dtype=FP16),
    "lora r16, odd width": problem(16, run=1024, wide=4095),
    "lora r8 of 1024, sorted": problem(8, 1024),
    "lora r64 of 64, sorted": problem(64, 64),
    "lora r128 of 16, sorted, fp32": problem(128, 16, dtype=FP32),
    "lora r16, batch invariant": problem(16, batch_invariant=True),
    **{f"lora r{r}, decode": problem(r, 32, rows=32) for r in (8, 16, 64, 128)},
    "mixture 8 x 16, all": problem(16, slots=None, **MIXED),
    "mixture 4 x 64, all": problem(64, 4, slots=None, **MIXED),
    "mixture 4 x 64, all, fp32": problem(64, 4, slots=None, dtype=FP32, **MIXED),
    "mixture 4 x 64, convex": problem(64, 4, slots=None, base_weight=True, **MIXED),
    "mixture 8 x 16, top 2": problem(16, slots=2, **MIXED),
    "mixture 16 x 64, top 2, sorted": problem(64, 16, slots=2, **MIXED),
    "gated 2 x 64, all": problem(64, 2, slots=None, glu=True, bias=True, act="silu"),
    "gated 4 x 64, all": problem(64, 4, slots=None, glu=True, bias=True, act="silu"),
    "gated r128, one per sequence": problem(128, run=1024, glu=True, bias=True, act="silu"),
    **{f"bottleneck r64, {act}": problem(64, 1, bias=True, act=act) for act in ("relu", "gelu_tanh", "tanh")},
}  # fmt: skip
SUBSET = (
    "lora r16, one per sequence", "lora r128, one per sequence", "lora r64 of 64, sorted", "lora r16, decode",
    "mixture 4 x 64, convex", "gated 4 x 64, all",
)  # fmt: skip


class Compiled(NamedTuple):
    """What the compiler made of one launch."""

    arch: str
    problem: str
    kernel: str
    tile: str
    registers: int = 0
    shared: int = 0
    spills: int = 0
    matrix: str = ""
    seconds: float = 0.0
    error: str = ""

    @property
    def faults(self) -> list[str]:
        if self.error:
            return [self.error]
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > ARCHITECTURES[self.arch].shared * 1024:
            found.append(f"more than {ARCHITECTURES[self.arch].shared} KiB of shared memory")
        if not self.matrix:
            found.append("no matrix instruction")
        return found


def launches(p: Problem, arch: str) -> list[Launch]:
    """Those of a forward, and of a backward with every gradient unless it is a decoding step."""
    with record(arch) as made:
        decoding = p.x.shape[0] <= 64
        y, kept = backend.forward(p, not decoding)
        if not decoding:
            fields = (name for name in DIFFERENTIABLE if getattr(p, name) is not None)
            backend.backward(p, kept, torch.empty_like(y), frozenset(fields) - {"scale"})
    return made


def specialization(launch: Launch) -> tuple[Any, ...]:
    """What two launches have in common that are compiled once."""

    def kind(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype
        return (value == 1, value % 16 == 0) if isinstance(value, int) else value.__class__

    return (
        launch.kernel.__name__,
        *(kind(launch.arguments[name]) for name in sorted(launch.arguments)),
        *sorted(map(str, launch.constants.items())),
    )


class _Stub:
    """Stands in for triton's driver: there is one device, and it is the one that is compiled for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_one(task: tuple[str, str, int]) -> Compiled:
    """Compile the i-th launch of a problem."""
    arch, name, i = task
    return compile_launch(launches(PROBLEMS[name], arch)[i], arch, name)


def compile_launch(launch: Launch, arch: str, name: str) -> Compiled:
    """Compile a launch of the problem `name`. Triton keeps what it compiles, for launches on a device too."""
    tile = " ".join(f"{k}{launch.constants[k]}" for k in ("BM", "BR", "BK", "BN", "BC") if k in launch.constants)
    tile += f" w{launch.constants['num_warps']} s{launch.constants['num_stages']}"
    head = (arch, name, launch.kernel.__name__, f"{launch.constants['MODE']} {tile}")
    began = time.perf_counter()
    driver.set_active(_Stub(ARCHITECTURES[arch].target))
    launch.kernel.device_caches.clear()
    try:
        compiled = launch.kernel.warmup(**launch.arguments, grid=(1,), **launch.constants)
        if hasattr(compiled, "result"):
            compiled = compiled.result()
    except Exception as error:  # whatever a compiler raises is a finding
        lines = str(error).strip().splitlines() or [""]
        return Compiled(*head, error=f"{type(error).__name__}: {lines[-1][:200]}")
    read = _read_nvidia if "cubin" in compiled.asm else _read_amd
    registers, spills, matrix = read(compiled.asm, ARCHITECTURES[arch].matrix)
    return Compiled(*head, registers, compiled.metadata.shared, spills, matrix, time.perf_counter() - began)


def _read_nvidia(asm: dict[str, Any], matrix: str) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        # Without analysis of data flow, a third of its time: labels of jumps are not what is looked for.
        disassemble = [TOOLS / "nvdisasm", "-c", "-ndf", file.name]
        code = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    return int(registers[1]), len(re.findall(r"\b(?:STL|LDL)\b", code)), _first(matrix, code)


def _read_amd(asm: dict[str, Any], matrix: str) -> tuple[int, int, str]:
    code = asm["amdgcn"]

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    return count("vgpr_count"), count("vgpr_spill_count") + count("sgpr_spill_count"), _first(matrix, code)


def _first(pattern: str, code: str) -> str:
    found = re.search(pattern, code)
    return found[0] if found else ""


def tasks(names: tuple[str, ...], architectures: list[str]) -> Iterator[tuple[str, str, int]]:
    """One task for all launches that share a compilation."""
    for arch in architectures:
        seen = set()
        for name in names:
            for i, launch in enumerate(launches(PROBLEMS[name], arch)):
                key = specialization(launch)
                if key not in seen:
                    seen.add(key)
                    yield arch, name, i


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, metavar="NAME", help="only these problems")
    parser.add_argument("--subset", action="store_true", help=f"only {', '.join(SUBSET)}")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    arguments = parser.parse_args()
    names = arguments.problem or (SUBSET if arguments.subset else tuple(PROBLEMS))
    todo = list(tasks(names, arguments.arch))
    print(f"triton {triton.__version__}, {len(todo)} compilations on {arguments.jobs} processes", flush=True)
    began, bad = time.perf_counter(), 0
    print(f"{'arch':<7} {'kernel':<12} {'tile':<34} {'reg':>4} {'shared':>7} {'spill':>5}  {'matrix':<28} problem")
    with ProcessPoolExecutor(arguments.jobs, get_context("fork")) as pool:
        for c in pool.map(compile_one, todo):
            bad += bool(c.faults)
            print(
                f"{c.arch:<7} {c.kernel:<12} {c.tile:<34} {c.registers:>4} {c.shared:>7} {c.spills:>5}  "
                f"{c.matrix:<28} {c.problem}{' <-- ' + ', '.join(c.faults) if c.faults else ''}",
                flush=True,
            )
    print(f"{len(todo)} compiled in {time.perf_counter() - began:.0f} s, {bad} with faults")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
