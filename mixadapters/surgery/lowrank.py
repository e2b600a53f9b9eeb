"""LoSparse: a weight matrix as a product of low rank plus a few of its rows.

Source: Li et al. 2023, LoSparse (arXiv 2306.11222); Li et al. 2024, MC-SMoE (arXiv 2310.01334), section 3.3. There the
rows that stay are chosen during a fine-tuning, by the sensitivity |w * gradient|, from all to a few. Here they are
chosen at once: those without which the outputs of given inputs would change most.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixadapters.core.bank import Weights
from mixadapters.core.fields import check_integer, check_share
from mixadapters.surgery.function import hidden_of, read_by


class LowRankSparse(NamedTuple):
    """left @ right, plus `sparse` in some rows."""

    left: Tensor  # (M, rank)
    right: Tensor  # (rank, K)
    kept: Tensor  # (m,) int64 rows
    sparse: Tensor  # (m, K) what the product lacks there

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes + self.sparse.nbytes + 4 * len(self.kept)  # row numbers in 32 bits

    def dense(self) -> Tensor:
        """(M, K)."""
        return (self.left @ self.right).index_add(0, self.kept, self.sparse)


def content_digest(matrix: Tensor) -> str:
    """Of the shape, the dtype and the entries of a matrix."""
    plain = matrix.detach().cpu().contiguous()
    said = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return hashlib.sha256(said + plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def rank_for(rows: int, columns: int, share: float) -> int:
    """The rank at which the factors hold about `share` of the weights of the matrix."""
    return max(1, min(math.ceil(share * rows * columns / (rows + columns)), rows, columns))


def low_rank_sparse(weight: Tensor, rank: int, keep: float, inputs: Tensor | None = None) -> LowRankSparse:
    """The truncated singular value decomposition of a weight (M, K), and the rows where it errs most.

    With keep=1 it is the weight, up to rounding.

    Args:
        rank: of the product; 0: none.
        keep: share of the rows that stay beside it.
        inputs: (N, K); the error of a row is that of its outputs. None: that of its weights.

    Raises:
        ValueError: a rank or a share out of range.
    """
    rows, columns = weight.shape
    check_integer("rank", rank, least=0, most=min(rows, columns))
    check_share("keep", keep)
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    root = values[:rank].sqrt()
    left, right = (left[:, :rank] * root).to(weight.dtype), (root.unsqueeze(1) * right[:rank]).to(weight.dtype)
    rest = exact - left.to(exact.dtype) @ right.to(exact.dtype)
    errors = rest if inputs is None else inputs.to(exact.dtype) @ rest.t()
    size = errors.square().sum(1 if inputs is None else 0)
    kept = size.topk(math.ceil(keep * rows)).indices
    return LowRankSparse(left, right, kept, rest[kept].to(weight.dtype))


def low_rank_sparse_expert(
    weights: Weights, inputs: Tensor | None, activation: str, *, share: float, keep: float
) -> tuple[Weights, dict[str, LowRankSparse]]:
    """The expert with down, gate and up of this form, and the forms by name.

    Args:
        inputs: (N, K) rows that the expert gets; see `low_rank_sparse`.
        share: of the weights of each matrix that the product may have.
        keep: share of the rows that stay beside it.
    """
    check_share("share", share)
    read = None if inputs is None or not len(inputs) else read_by(weights, inputs)
    forms: dict[str, LowRankSparse] = {}

    def shrink(name: str, matrix: Tensor, reads: Tensor | None) -> Tensor:
        forms[name] = low_rank_sparse(matrix, rank_for(matrix.shape[0], matrix.shape[1], share), keep, reads)
        return forms[name].dense()

    changed: dict[str, Any] = {"down": shrink("down", weights.down, read)}
    if weights.gate is not None:
        changed["gate"] = shrink("gate", weights.gate, read)
    weights = weights._replace(**changed)
    hidden = None if read is None or inputs is None else hidden_of(weights, inputs, activation)
    return weights._replace(up=shrink("up", weights.up, hidden)), forms
