from __future__ import annotations

import copy
from math import log

import pytest
import torch

from mixadapters.core.usage import GateUsage


def test_usage_is_the_mean_over_all_rows_since_the_last_reset() -> None:
    usage = GateUsage(["a", "b"])
    usage.add(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), None)
    usage.add(torch.tensor([[0.0, 1.0], [0.9, 0.1]]), torch.tensor([True, False]))
    report = usage.summary()
    assert report["weight/a"] == pytest.approx(1.5 / 3)
    assert report["weight/b"] == pytest.approx(1.5 / 3)
    assert report["entropy"] == pytest.approx(log(2) / 3, rel=1e-4)
    assert report["dead"] == 0
    usage.reset()
    assert float(usage.count) == 0
    assert usage.summary() == {"weight/a": 0, "weight/b": 0, "entropy": 0, "dead": 2}


def test_arms_below_the_share_are_dead() -> None:
    usage = GateUsage(["a", "b", "c"])
    usage.add(torch.tensor([[0.985, 0.009, 0.006]]), None)
    assert usage.summary()["dead"] == 2
    assert usage.summary(dead_below=0.007)["dead"] == 1


def test_usage_is_not_saved_has_no_history_and_stays_in_full_precision() -> None:
    usage = GateUsage(["a", "b"])
    assert usage.state_dict() == {}
    usage.add(torch.rand(3, 2, requires_grad=True), None)
    assert not any(buffer.requires_grad for buffer in usage.buffers())
    copy.deepcopy(usage)
    usage.to(torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for buffer in usage.buffers())
    for _ in range(300):  # a count in half precision would stop at 256
        usage.add(torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16), None)
    assert float(usage.count) == 303
