from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixadapters.core.taps import Tap


class Context:
    def __init__(self) -> None:
        self.record = SimpleNamespace(taps={})

    def record_at(self, part: Any, training: bool) -> SimpleNamespace:
        return self.record


class Block(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 1


class Holder(nn.Module):
    """A model that owns its context, as roots do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.context = Context()
        self.tap = Tap.attach(self.block, "block", self.context)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x * 2)


@pytest.mark.parametrize("by_name", [False, True])
def test_tap_keeps_the_input(by_name):
    holder, x = Holder(), torch.ones(2, 3)
    holder.block(hidden_states=x) if by_name else holder.block(x)
    assert holder.context.record.taps["block"] is x


def test_tap_writes_to_the_record_of_the_running_forward():
    holder = Holder()
    holder(torch.zeros(1))
    first, holder.context.record = holder.context.record, SimpleNamespace(taps={})
    holder(torch.ones(1))
    assert first.taps["block"].item() == 0
    assert holder.context.record.taps["block"].item() == 2


def test_tap_attaches_once_per_context_and_path():
    holder = Holder()
    assert Tap.attach(holder.block, "block", holder.context) is holder.tap
    assert len(holder.block._forward_pre_hooks) == 1
    assert Tap.attach(holder.block, "block", Context()) is not holder.tap
    assert Tap.attach(holder.block, "model.block", holder.context) is not holder.tap


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_taps_of_their_own(duplicate):
    holder = Holder()
    twin = duplicate(holder)
    twin(torch.ones(1))
    assert twin.context.record.taps["block"].item() == 2
    assert not holder.context.record.taps
    assert Tap.attach(twin.block, "block", twin.context) is twin.tap
    assert twin.tap is not holder.tap


def test_tap_works_under_compile():
    holder = Holder()
    compiled = torch.compile(holder, fullgraph=True, backend="eager")
    for value in (1.0, 5.0):
        holder.context.record = SimpleNamespace(taps={})
        compiled(torch.full((1,), value))
        assert holder.context.record.taps["block"].item() == 2 * value
