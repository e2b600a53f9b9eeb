"""Tiles of every kernel, as a pure function of what is known on the host: nothing is timed while a model runs.

`kernels/check.py` compiles what these functions return for every architecture and refuses spilled registers.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

# Blocks that run at a time; "cpu" is the interpreter.
PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx90a": 104, "gfx942": 304, "cpu": 2}
WIDEST = 256  # columns of hidden width that a program holds
FEW_ROWS = 64  # at most so many (row, slot) pairs are a decoding step


class Tiles(NamedTuple):
    """Rows, hidden columns and the third axis of a tile (BM, BR, BK or BN or BC), and how it is compiled."""

    rows: int
    hidden: int
    width: int
    warps: int
    stages: int


def bucket(width: int) -> int:
    """The power of two, 16 at least, that holds `width` columns: matrix instructions take no less."""
    return max(16, 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype, arch: str) -> str:
    """How fp32 is multiplied on NVIDIA: by tf32 if torch is set up so, else by three of them, which keep fp32."""
    if dtype != torch.float32 or not arch.startswith("sm_"):
        return "ieee"
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3"


def sorted_rows(dtype: torch.dtype, hidden: int, gated: bool) -> int:
    """Rows of a tile of sorted rows: the same for all kernels, which share the table of tiles."""
    return 16 if _load(hidden, gated) > (64 if dtype == torch.float32 else 128) else 32


def tiles(
    kernel: str, arch: str, dtype: torch.dtype, hidden: int, rows: int | None, width: int, gated: bool = False
) -> Tiles:
    """The tiles of `kernel` ("shrink", "expand", "expand_back" or "wgrad").

    Args:
        hidden: columns of the window. rows: of a run, or of the batch; None: whatever they are (batch invariance).
        width: of the third axis. gated: two products go side by side.
    """
    br, fp32 = bucket(hidden), dtype == torch.float32
    if arch == "cpu":
        return Tiles(32, min(br, 128) if kernel == "wgrad" else br, 64, 4, 1)
    if kernel == "wgrad":
        return _wgrad_tiles(arch, fp32, min(br, 128))
    load, few = _load(hidden, gated), rows is not None and rows <= 16
    t = _shrink_tiles(arch, br, load, few) if kernel == "shrink" else _expand_tiles(arch, br, load, few, width)
    if fp32:  # on NVIDIA each product is three of tf32
        t = t._replace(rows=min(t.rows, 32 if load <= 64 else 16), width=min(t.width, 32), stages=2)
    return t._replace(rows=min(t.rows, 32)) if rows is None or rows <= 32 else t


def _load(hidden: int, gated: bool) -> int:
    """Accumulator columns of a row."""
    return bucket(hidden) * (2 if gated else 1)


def _shrink_tiles(arch: str, br: int, load: int, few: bool) -> Tiles:
    if few:
        return Tiles(16, br, 128, 4, 3) if load <= 64 else Tiles(16, br, 32, 8, 3 if load <= 128 else 2)
    if load > 128:
        return Tiles(32, br, 32, 8, 2)
    if load > 64:
        return Tiles(64, br, 32, 4 if arch == "sm_100" else 8, 3)
    return Tiles(64, br, 64, 8 if arch == "sm_100" and load == 64 else 4, 3)


def _expand_tiles(arch: str, br: int, load: int, few: bool, width: int) -> Tiles:
    bm, gfx = 16 if few else 64 if load <= 64 else 32, arch.startswith("gfx")
    if load > 128:
        return Tiles(16, br, 32, 8, 1) if gfx else Tiles(bm, br, 32, 8, 2)
    if load > 64:
        return Tiles(bm, br, 32, 8, 2) if gfx else Tiles(bm, br, 64, 8, 3)
    # Masked columns cost sm_100 too many registers, and biases gfx942.
    narrow = (arch == "sm_100" and width % 64) or (gfx and load == 64)
    return Tiles(bm, br, 32 if narrow else 64, 4, 2 if gfx else 3)


def _wgrad_tiles(arch: str, fp32: bool, br: int) -> Tiles:
    warps = 4 if br <= 64 else 8
    if arch.startswith("gfx"):
        return Tiles(32, br, 64 if br <= 64 else 32, warps, 2)
    if fp32:
        return Tiles(32, br, 32, warps, 2)
    return Tiles(32, br, 128, warps, 3) if br <= 64 else Tiles(64, br, 64, warps, 2)


def parts(kernel: str, arch: str, programs: int, blocks: int, invariant: bool = False) -> int:
    """Into how many parts the third axis of `blocks` blocks goes, so that `programs` tiles fill the device.

    A power of two. Only parts of "shrink" and "wgrad" are sums, which depend on it: the former not on the rows where
    the batch must not matter ("invariant").
    """
    if kernel == "shrink" and invariant:
        wanted = 4 if blocks >= 32 else 1
    else:
        wanted = -(-2 * PROCESSORS.get(arch, 108) // max(programs, 1))
    most = {"shrink": 16, "wgrad": 8}.get(kernel, blocks)
    return 1 << (max(1, min(wanted, most, blocks)).bit_length() - 1)


def architecture(device: torch.device) -> str:
    """The name that the tables use: "sm_90", "gfx942", or "cpu" for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter; it is asked when they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
