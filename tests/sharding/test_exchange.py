"""What one process of an expert group sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mixadapters.sharding.exchange import enter


def test_gradients_are_summed_by_dtype_and_those_of_what_is_elsewhere_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[torch.dtype, int]] = []

    def summed(t: Tensor, group: Any) -> None:
        sent.append((t.dtype, t.numel()))

    monkeypatch.setattr(dist, "all_reduce", summed)
    here, there = torch.ones(2, 3, requires_grad=True), torch.ones(0, dtype=torch.bfloat16, requires_grad=True)
    entered = enter(None, [here, there], [here.shape, torch.Size([2, 2])])
    sum(t.sum() for t in entered).backward()
    assert sent == [(torch.float32, 6), (torch.bfloat16, 4)]
    assert torch.equal(here.grad, torch.ones(2, 3))
    assert there.grad is None
