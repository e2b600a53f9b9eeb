"""Products of matrices: large ones of float32 on a CPU by oneDNN where torch's own are slower, all others by torch.

`torch.mm` in float32 calls MKL. On the one kind of processor that was measured, an AMD EPYC with AVX-512, oneDNN took
about half its time; the products go to it on AMD's processors with AVX-512 and nowhere else. Torch reaches it in full
precision by one operator alone, which its compiler uses and which is private to torch.
Where that operator is missing, or oneDNN is absent or switched off, all of this is `torch.mm` and `torch.addmm`.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

# oneDNN compiles a product of a new shape for about 1 ms, more than it saves. The number of rows changes from batch to
# batch, so that they are taken in blocks of these sizes, and those left over go to torch.
SIZES = (1024, 256, 128)
# A call costs 20 us more, and its result is copied into place: what outweighs that is this many multiplications by
# each thread, and in each number of the result.
LEAST, LEAST_INNER = 3e6, 48


def _torch_is_slower() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            maker = info.read(1000)  # of the first core
    except OSError:
        maker = platform.processor()
    return "AuthenticAMD" in maker


_OPERATOR: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
_PAYS = _OPERATOR is not None and torch.backends.mkldnn.is_available() and _torch_is_slower()


def pays() -> bool:
    """Whether large products go to oneDNN on this machine."""
    return _PAYS


def mm(a: Tensor, b: Tensor, base: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """base + a @ b of a (N, K) and b (K, M); base is (N, M), perhaps `out` itself, or (M,)."""
    blocks = _blocks(a, b, LEAST_INNER)
    if not blocks:
        return torch.mm(a, b, out=out) if base is None else torch.addmm(base, a, b, out=out)
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    if base is not None:
        base = base.expand(out.shape)
    if len(blocks) == 1 and blocks[0].stop == a.shape[0]:
        return _multiply_into(out, a, b, base)
    for rows in blocks:
        _multiply_into(out[rows], a[rows], b, None if base is None else base[rows])
    rest = slice(blocks[-1].stop, None)
    if rest.start < a.shape[0]:  # an empty product would be a call like any other
        if base is None:
            torch.mm(a[rest], b, out=out[rest])
        else:
            torch.addmm(base[rest], a[rest], b, out=out[rest])
    return out


def _multiply_into(out: Tensor, a: Tensor, b: Tensor, base: Tensor | None) -> Tensor:
    part = _multiply(a, b)
    return out.copy_(part) if base is None else torch.add(base, part, out=out)


def outer(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """a^T @ b of a (N, R) and b (N, M), which is added to `total`, in place, if there is one."""
    blocks = _blocks(a, b)
    if not blocks:
        return torch.mm(a.t(), b) if total is None else total.addmm_(a.t(), b)
    for rows in blocks:
        part = _multiply(a[rows].t(), b[rows])
        total = part if total is None else total.add_(part)
    assert total is not None
    rest = slice(blocks[-1].stop, None)
    return total if rest.start == a.shape[0] else total.addmm_(a[rest].t(), b[rest])


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return _OPERATOR(a, b.t(), None, "none", [], "")


def _blocks(a: Tensor, b: Tensor, least_width: int = 0) -> list[slice]:
    """The first rows of a, as far as oneDNN takes them."""
    rows, width = a.shape
    work = width * b.shape[1]
    if not _PAYS or rows * work < LEAST or rows < SIZES[-1] or width < least_width:
        return []
    if a.dtype != torch.float32 or not a.is_cpu or not torch.backends.mkldnn.enabled:
        return []
    blocks, start = [], 0
    least = LEAST * torch.get_num_threads() * (2 if rows % SIZES[-1] else 1)  # rows left over are a call more
    for size in SIZES:
        while size * work >= least and start + size <= rows:
            blocks.append(slice(start, start + size))
            start += size
    return blocks
