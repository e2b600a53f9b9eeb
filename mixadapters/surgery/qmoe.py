"""Experts in ternary weights: each row holds two values of its own beside 0, and goes through QMoE's codec.

Source: Frantar and Alistarh 2023, QMoE (arXiv 2310.16795). Theirs are experts of 2048 x 8192; narrow rows compress
badly, since each costs 64 bits for its two values and its place, so `up` goes by columns where these are longer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixadapters.core.bank import Weights
from mixadapters.core.fields import one_of
from mixadapters.surgery.choices import CODECS, ROUNDINGS, SCALES
from mixadapters.surgery.codec import EncodedRows, PackedRows, decode, encode, pack, unpack
from mixadapters.surgery.function import hidden_of, read_by
from mixadapters.surgery.gptq import gptq, nearest_rounding, second_moments

LARGE = 0.75  # of the mean magnitude of a row: weights above it make up the values of scale "mean"
MATRICES = ("down", "gate", "up")  # of an expert


class TernaryMatrix(NamedTuple):
    """A matrix, or a stack of them, whose rows, or columns, hold two values beside 0."""

    rows: EncodedRows | PackedRows
    levels: Tensor  # (R, 2) bfloat16, what -1 and 1 stand for in each row
    shape: tuple[int, ...]  # (..., M, K)
    by_columns: bool  # whether `rows` are columns of the matrix

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.levels.nbytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(..., M, K). Raises ValueError where the parts do not belong together."""
        trits = decode(self.rows) if isinstance(self.rows, EncodedRows) else unpack(self.rows)
        if self.levels.shape != (len(trits), 2) or self.levels.dtype != torch.bfloat16:
            raise ValueError(f"levels {tuple(self.levels.shape)} must be two numbers of bfloat16 for each row")
        if len(self.shape) < 2 or math.prod(self.shape) != trits.numel():
            raise ValueError(f"{trits.numel()} ternary weights do not make up the shape {tuple(self.shape)}")
        *stack, rows, columns = self.shape
        if trits.shape[1] != (rows if self.by_columns else columns):
            raise ValueError(f"rows of {trits.shape[1]} ternary weights do not make up the shape {tuple(self.shape)}")
        values = _values(trits, self.levels.to(dtype))
        if self.by_columns:
            return values.view(*stack, columns, rows).transpose(-1, -2).contiguous()
        return values.view(self.shape)


def _values(trits: Tensor, levels: Tensor) -> Tensor:
    """trits (R, W), levels (R, 2) -> what they stand for, in the levels' dtype."""
    low, high = levels.split(1, 1)
    return torch.where(trits == 0, 0.0, torch.where(trits < 0, low, high)).to(levels.dtype)


def levels_of(rows: Tensor, scale: str = "minmax") -> Tensor:
    """rows (R, W) -> (R, 2), the values of each row below and above 0, as bfloat16 holds them, in the rows' dtype.

    scale: "minmax": the smallest and the largest weight, which leaves most weights 0 (the paper's). "mean": the means
        of the large weights of each sign (ternary weight networks, Li et al. 2016), which errs less and compresses
        less.
    """
    one_of("scale", scale, SCALES)
    if scale == "minmax":
        low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
    else:
        large = rows.abs() > LARGE * rows.abs().mean(1, keepdim=True)
        below, above = large & (rows < 0), large & (rows > 0)
        low = (rows * below).sum(1) / below.sum(1).clamp_min(1)
        high = (rows * above).sum(1) / above.sum(1).clamp_min(1)
    return torch.stack([low, high], 1).to(torch.bfloat16).to(rows.dtype)


def to_levels(values: Tensor, levels: Tensor) -> Tensor:
    """values (R, ...) -> the nearest of a row's two levels (R, 2) and 0."""
    low, high = (level.reshape(-1, *[1] * (values.dim() - 1)) for level in levels.unbind(1))
    return torch.where(values > high / 2, high, torch.where(values < low / 2, low, 0.0))


def ternarize(
    weight: Tensor, inputs: Tensor | None, *, scale: str = "minmax", rounding: str = "gptq", damping: float = 0.1
) -> Tensor:
    """weight (M, K) in ternary values, by rows; by columns where these are longer.

    Rows take their values from the weight as it is; columns, under "gptq", from what corrections have made of them.

    Args:
        inputs: (N, K) that the weight reads, for "gptq". None, or no row: rounded to nearest.
    """
    one_of("rounding", rounding, ROUNDINGS)
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    by_columns = weight.shape[0] > weight.shape[1]
    levels = None if by_columns else levels_of(exact, scale)

    def quantize(column: Tensor, j: int) -> Tensor:
        if levels is not None:
            return to_levels(column, levels.to(column))
        own = levels_of(column.unsqueeze(0), scale)
        return to_levels(column.unsqueeze(0), own)[0]

    if rounding == "nearest" or inputs is None or not len(inputs):
        return nearest_rounding(exact, quantize).to(weight.dtype)
    return gptq(exact, second_moments(inputs), quantize, damping).to(weight.dtype)


def ternary_expert(weights: Weights, inputs: Tensor | None, activation: str, **options: Any) -> Weights:
    """The expert with ternary down, gate and up. `up` is rounded for what the ternary down and gate make.

    Args:
        inputs: (N, K) rows that the expert gets; see `ternarize`, which also takes the options.
    """
    read = None if inputs is None else read_by(weights, inputs)
    weights = weights._replace(down=ternarize(weights.down, read, **options))
    if weights.gate is not None:
        weights = weights._replace(gate=ternarize(weights.gate, read, **options))
    hidden = None if inputs is None or not len(inputs) else hidden_of(weights, inputs, activation)
    return weights._replace(up=ternarize(weights.up, hidden, **options))


def encode_matrix(matrix: Tensor, codec: str = "qmoe") -> TernaryMatrix | None:
    """A matrix (..., M, K) as codes, exactly; None where neither its rows nor its columns are ternary.

    Of the two the shorter form. What bfloat16 does not hold, and zeros with a sign, are not ternary.
    """
    one_of("codec", codec, CODECS)
    if matrix.dim() < 2 or not matrix.is_floating_point() or not matrix.numel():
        return None
    found = []
    for by_columns in (False, True):
        rows = (matrix.transpose(-1, -2) if by_columns else matrix).flatten(0, -2)
        levels = torch.stack([rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)], 1).to(torch.bfloat16)
        trits = rows.sign().to(torch.int8)
        same = torch.equal(_values(trits, levels.to(rows.dtype)), rows)
        if same and not bool((rows.signbit() & (trits == 0)).any()):
            coded = (encode if codec == "qmoe" else pack)(trits)
            found.append(TernaryMatrix(coded, levels, tuple(matrix.shape), by_columns))
    return min(found, key=lambda form: form.nbytes, default=None)
