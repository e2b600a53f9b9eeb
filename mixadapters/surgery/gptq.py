"""GPTQ: round a weight matrix column by column, each time correcting what is left for the error made.

Source: Frantar et al. 2022 (arXiv 2210.17323), algorithm 1. It makes || (W - Q) X || small for given inputs X, where
rounding to nearest makes || W - Q || small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixadapters.core.fields import check_number

Quantizer = Callable[[Tensor, int], Tensor]  # a column (M,) and its number -> the column in quantized values


def nearest_rounding(weight: Tensor, quantize: Quantizer) -> Tensor:
    """weight (M, K) with each column quantized as it is."""
    return torch.stack([quantize(column, j) for j, column in enumerate(weight.unbind(1))], 1)


def second_moments(inputs: Tensor) -> Tensor:
    """inputs (N, K) -> (K, K), the sum of x x^T, in float32 at least: half the Hessian of the squared error."""
    rows = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    return rows.t() @ rows


def gptq(weight: Tensor, moments: Tensor, quantize: Quantizer, damping: float = 0.1, block: int = 128) -> Tensor:
    """weight (M, K) in quantized values, in its own dtype.

    Args:
        moments: (K, K), see `second_moments`. Where they cannot be factored, the identity takes their place, which is
            rounding to nearest.
        quantize: what a column becomes; it is asked in order, for columns that have been corrected.
        damping: added to the diagonal of `moments`, as a factor on its mean.
        block: columns that are corrected at once; the result does not depend on it.

    Raises:
        ValueError: shapes that do not fit, or a damping that is not positive.
    """
    rows, columns = weight.shape
    if moments.shape != (columns, columns):
        raise ValueError(
            f"moments {tuple(moments.shape)} must be ({columns}, {columns}) for a weight {(rows, columns)}"
        )
    check_number("damping", damping, above=0)  # inputs rarely fill all directions
    left = weight.to(moments.dtype, copy=True)
    factor = _inverse_factor(moments, damping)
    quantized = torch.empty_like(left)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = left.new_zeros(rows, last - first)
        for j in range(first, last):
            quantized[:, j] = quantize(left[:, j], j)
            errors[:, j - first] = (left[:, j] - quantized[:, j]) / factor[j, j]
            left[:, j:last] -= errors[:, j - first, None] * factor[j, j:last]
        left[:, last:] -= errors @ factor[first:last, last:]
    return quantized.to(weight.dtype)


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped moments' inverse; the identity where there is none."""
    identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    shift = damping * moments.diagonal().mean()
    lower, failed = torch.linalg.cholesky_ex(moments + shift * identity)
    if int(failed) or not bool(shift > 0):
        return identity
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return identity if int(failed) or not bool(upper.isfinite().all()) else upper
