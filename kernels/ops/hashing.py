"""Dropout without a stored mask: an element is kept or not by a hash of (seed, row, column).

The same 32-bit integer arithmetic in torch (here) and in Triton, so every backend drops the same elements:

    mix(h)  = h ^= h >> 16;  h *= 0x7FEB352D;  h ^= h >> 15;  h *= 0x846CA68B;  h ^= h >> 16      (all modulo 2^32)
    key     = mix(row ^ mix(low 32 bits of seed ^ mix(high 32 bits of seed)))
    kept    = mix(key ^ (column * 0x9E3779B1 mod 2^32)) >= threshold(dropout)                     (unsigned)

`mix` is the "lowbias32" finalizer (C. Wellons, Prospecting for Hash Functions, 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
FIRST, SECOND, COLUMN = 0x7FEB352D, 0x846CA68B, 0x9E3779B1


def threshold(dropout: float) -> int:
    """Hashes below it are dropped: dropout in units of 2^-32."""
    return min(round(dropout * 2**32), MASK)


def kept(seed: Tensor, rows: Tensor, columns: int, dropout: float) -> Tensor:
    """(n, columns) bool for the rows (n,) of x, numbered as in x; seed is an int64 scalar on their device."""
    key = _mix((seed & MASK) ^ _mix((seed >> 32) & MASK))
    key = _mix((rows & MASK) ^ key)
    column = _times(torch.arange(columns, device=rows.device), COLUMN)
    return _mix(key.unsqueeze(1) ^ column) >= threshold(dropout)


def _mix(h: Tensor) -> Tensor:
    """int64 tensors that hold unsigned 32-bit values."""
    h = h ^ (h >> 16)
    h = _times(h, FIRST)
    h.bitwise_xor_(h >> 15)
    h = _times(h, SECOND)
    return h.bitwise_xor_(h >> 16)


def _times(h: Tensor, factor: int) -> Tensor:
    # The factor as a signed number: |h * factor| < 2^63 then, and its low 32 bits are the same.
    signed = factor - 2**32 if factor >= 2**31 else factor
    return (h * signed).bitwise_and_(MASK)
