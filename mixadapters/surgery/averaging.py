"""The mean of several experts as one expert: neuron by neuron, and of linear ones (LoRA) by their products.

A mean of LoRA's factors would depend on how each product happens to be factored, so the mean product is factored anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mixadapters.core.bank import Weights, norm_folded
from mixadapters.routers.permutation import assignment


def merge_lora(experts: Sequence[Weights], parts: Sequence[float], like: Weights) -> Weights:
    """The mean of linear experts of these parts, of the rank and the scale of `like`: the best by SVD.

    The products scale * up down are averaged, and the mean is factored anew.
    """
    plain = [folded(weights) for weights in experts]
    # All products at once: [U_1 .. U_n] [p_1 D_1; ...; p_n D_n], whose SVD needs matrices of the ranks' sum alone.
    ups = torch.cat([w.up.double() for w in plain], 1)
    downs = torch.cat([w.down.double() * part for w, part in zip(plain, parts, strict=True)])
    q_up, r_up = torch.linalg.qr(ups)
    q_down, r_down = torch.linalg.qr(downs.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    rank = like.down.shape[0]
    root = values[:rank].sqrt()
    count, scale = len(root), float(like.scale)
    up, down = q_up @ left[:, :count] * root / scale, (q_down @ right[:count].T * root).T
    if count < rank:  # a width below the rank
        up, down = F.pad(up, (0, rank - count)), F.pad(down, (0, 0, 0, rank - count))
    bias = None
    if any(w.b_up is not None or w.b_down is not None for w in plain):
        bias = torch.stack([part * _bias_of(w) for w, part in zip(plain, parts, strict=True)]).sum(0) / scale
    dtype = like.up.dtype
    return like._replace(
        down=down.to(dtype), up=up.to(dtype), b_up=None if bias is None or like.b_up is None else bias.to(dtype),
        b_down=None if like.b_down is None else torch.zeros_like(like.b_down), norm=_no_norm(like),
    )  # fmt: skip


def merge_neurons(experts: Sequence[Weights], parts: Sequence[float], like: Weights, align: bool = True) -> Weights:
    """The mean of experts of one width of these parts, neuron by neuron, of the scale of `like`.

    align: permute the neurons of each to those of `like` first, which changes none of them.
    """
    first = folded(like)
    plain = [folded(weights) for weights in experts]
    plain = [aligned(weights, first) if align else weights for weights in plain]

    def mean(name: str) -> Tensor | None:
        tensors = [getattr(weights, name) for weights in plain]
        if tensors[0] is None:
            return None
        stacked = torch.stack([part * tensor.double() for part, tensor in zip(parts, tensors, strict=True)])
        return stacked.sum(0).to(like.up.dtype)

    scale = float(like.scale)
    up, b_up, down = mean("up"), mean("b_up"), mean("down")
    assert up is not None
    assert down is not None
    return like._replace(
        down=down, up=up / scale, b_down=mean("b_down"), b_up=None if b_up is None else b_up / scale,
        gate=mean("gate"), b_gate=mean("b_gate"), norm=_no_norm(like),
    )  # fmt: skip


def aligned(weights: Weights, like: Weights) -> Weights:
    """An expert with its neurons in the order in which they are most like those of `like`; it does the same as before.

    The permutation of the largest sum of products of what neurons read and write.
    """
    found = like.down.double() @ weights.down.double().T + like.up.double().T @ weights.up.double()
    for name in ("gate", "b_down", "b_gate"):
        mine, theirs = getattr(like, name), getattr(weights, name)
        if mine is not None and theirs is not None:
            mine, theirs = (t.double().view(len(t), -1) for t in (mine, theirs))
            found = found + mine @ theirs.T
    _, places = assignment()(found.cpu().numpy(), maximize=True)
    order = torch.as_tensor(places, device=weights.down.device)

    def taken(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[order]

    return weights._replace(
        down=weights.down[order], up=weights.up[:, order], b_down=taken(weights.b_down), gate=taken(weights.gate),
        b_gate=taken(weights.b_gate),
    )  # fmt: skip


def folded(weights: Weights) -> Weights:
    """An expert without norm and scale of its own: these are in its matrices."""
    down, b_down = norm_folded(weights.down, weights.b_down, weights.norm)
    gate, b_gate = norm_folded(weights.gate, weights.b_gate, weights.norm)
    scale = weights.scale
    b_up = None if weights.b_up is None else weights.b_up * scale
    return Weights(down, weights.up * scale, b_down, b_up, gate, b_gate)


def _bias_of(weights: Weights) -> Tensor:
    """What a linear expert adds to a row of zeros."""
    bias = torch.zeros_like(weights.up[:, 0]) if weights.b_up is None else weights.b_up
    return bias if weights.b_down is None else bias + weights.up @ weights.b_down


def _no_norm(like: Weights) -> tuple[Tensor, Tensor] | None:
    return None if like.norm is None else (torch.ones_like(like.norm[0]), torch.zeros_like(like.norm[1]))


def flat(weights: Weights) -> Tensor:
    tensors = (weights.down, weights.up.T, weights.gate, weights.b_down, weights.b_gate)
    return torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])
