from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixadapters.core.adapter import Adapter
from mixadapters.core.context import ForwardContext
from mixadapters.core.layer import AdapterHost, HookedLayer, MixtureLayer
from mixadapters.core.record import Record
from mixadapters.core.streams import Stream

WIDTH = 4


class Affine(Adapter):
    """y -> y + shift * x: exact to merge into a square layer."""

    observes = True

    def __init__(self, shift: float, bias: float = 0.0) -> None:
        super().__init__()
        self.shift, self.bias = nn.Parameter(torch.tensor(shift)), bias
        self.prepared = 0

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        return y + self.shift * x + self.bias

    def prepare(self, context: ForwardContext) -> None:
        self.prepared += 1

    def observe(self, x: Tensor, y: Tensor, context: ForwardContext) -> list[Tensor]:
        return [self.shift * x + self.bias]

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        old = torch.zeros(len(weight)) if bias is None else bias
        new = None if bias is None and not self.bias else old + self.bias
        return weight + self.shift * torch.eye(len(weight)), new


class Squaring(Adapter):
    """Not linear, and not the same before as after another adapter."""

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        return y.square()


class Block(nn.Module):
    """A sublayer with an attribute that its caller reads, and an output that is a tuple or a tensor."""

    def __init__(self, output: str = "tuple") -> None:
        super().__init__()
        self.linear, self.output, self.layer_idx = nn.Linear(WIDTH, WIDTH), output, 7

    def forward(self, mask: Tensor | None = None, hidden_states: Tensor | None = None) -> Any:
        y = self.linear(hidden_states)
        return (y, "weights") if self.output == "tuple" else y


def layer(base: nn.Module, kind: type = MixtureLayer, **adapters: Adapter) -> Any:
    made = kind(base, ForwardContext(), "test_", "some.path", WIDTH, WIDTH)
    for name, adapter in adapters.items():
        made.add(name, adapter)
    made.set_adapter(list(adapters))
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, WIDTH)


def test_active_adapters_act_in_order_and_none_when_disabled(x) -> None:
    base = nn.Linear(WIDTH, WIDTH)
    mine = layer(base, first=Affine(0.5), second=Squaring())
    y = base(x)
    torch.testing.assert_close(mine(x), (y + 0.5 * x).square())
    mine.set_adapter(["second", "first"])
    torch.testing.assert_close(mine(x), y.square() + 0.5 * x)
    mine.set_adapter("first")
    torch.testing.assert_close(mine(x), y + 0.5 * x)
    mine.enable_adapters(False)
    assert torch.equal(mine(x), y)
    mine.enable_adapters(True)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        mine.delete_adapter("first")
    assert list(mine.adapters) == ["second"]
    assert isinstance(mine, BaseTunerLayer)


def test_keys_hold_the_name_after_the_prefix() -> None:
    mine = layer(nn.Linear(WIDTH, WIDTH), first=Affine(0.5))
    assert set(mine.state_dict()) == {"base_layer.weight", "base_layer.bias", "test_adapters.first.shift"}


@pytest.mark.parametrize("output", ["tuple", "tensor"])
@pytest.mark.parametrize("kind", [MixtureLayer, HookedLayer])
def test_block_is_adapted_on_its_first_output_by_its_hidden_states(x, output, kind) -> None:
    block = Block(output)
    y = block.linear(x)
    made = layer(block, kind, first=Affine(0.5))
    call = made if kind is MixtureLayer else block
    out = call(hidden_states=x)
    if output == "tuple":
        assert out[1] == "weights"
        out = out[0]
    torch.testing.assert_close(out, y + 0.5 * x)


def test_wrapped_block_shows_its_attributes_and_not_those_of_hooks() -> None:
    block = Block()
    mine = layer(block, first=Affine(0.5))
    assert mine.layer_idx == 7
    assert mine.linear is block.linear
    block._hf_hook = "accelerate's"
    assert not hasattr(mine, "_hf_hook")
    with pytest.raises(AttributeError, match="missing"):
        _ = mine.missing
    copy.deepcopy(mine)  # asks for attributes before there are any


def test_adapters_of_a_block_follow_its_dtype() -> None:
    mine = layer(Block().to(torch.bfloat16), first=Affine(0.5))
    assert next(mine.adapters["first"].parameters()).dtype == torch.bfloat16


def test_hooked_layer_leaves_its_target_as_it_was(x) -> None:
    block = Block("tensor")
    keys, y = list(block.state_dict()), block(hidden_states=x)
    mine = layer(block, HookedLayer, first=Affine(0.5))
    assert mine.get_base_layer() is block
    assert [k for k in block.state_dict() if k not in keys] == ["mixadapters.test_adapters.first.shift"]
    assert (block(hidden_states=x) - y).abs().max() > 1e-3
    mine.enable_adapters(False)
    assert torch.equal(block(hidden_states=x), y)
    mine.remove()
    assert list(block.state_dict()) == keys
    assert not block._forward_hooks
    assert not block._forward_hooks_with_kwargs
    assert not hasattr(block, HookedLayer.attribute)


def test_hooked_layer_obeys_only_for_names_of_its_own_model(x) -> None:
    block = Block("tensor")
    mine = layer(block, HookedLayer, first=Affine(0.5), second=Squaring())
    mine.set_adapter("first")
    mine.set_adapter("style")
    mine.set_adapter(["style", "other"])
    assert mine.active_adapters == ["first"]
    mine.context.hosted.add("third")  # an adapter of this model that has nothing here
    mine.set_adapter("third")
    assert mine.active_adapters == ["third"]
    assert torch.equal(block(hidden_states=x), block.linear(x))
    mine.set_adapter([])
    assert mine.active_adapters == []


# --- before and around forwards ----------------------------------------------------------------------------------


def test_active_adapters_are_prepared_once_per_forward() -> None:
    first, second = Affine(0.5), Affine(0.1)
    mine = layer(nn.Linear(WIDTH, WIDTH), first=first, second=second, third=Squaring())
    assert mine.context.preparing == [mine]
    mine.set_adapter("second")
    mine.context.prepare()
    assert (first.prepared, second.prepared) == (0, 1)
    mine.enable_adapters(False)
    mine.context.prepare()
    assert second.prepared == 1
    assert layer(nn.Linear(WIDTH, WIDTH), plain=Squaring()).context.preparing == []


def test_observing_reports_and_changes_nothing(x) -> None:
    base = nn.Linear(WIDTH, WIDTH)
    mine = layer(base, first=Affine(0.5), second=Squaring())
    mine.context.enter(Record(open=True, observed=[]))
    assert torch.equal(mine(x), base(x))
    assert len(mine.context.record.observed) == 1
    torch.testing.assert_close(mine.context.record.observed[0], 0.5 * x)
    mine.context.record.open = False  # a layer that is run again has been heard
    mine(x)
    assert len(mine.context.record.observed) == 1
    assert mine.observes
    mine.requires_grad_(False)
    assert not mine.observes


def test_rows_name_adapters_and_others_pass(x) -> None:
    base = nn.Linear(WIDTH, WIDTH)
    mine = layer(base, first=Affine(0.5), second=Squaring())
    y = base(x)
    names = ["second", "elsewhere", "first"]
    mine.context.enter(Record(streams={"": Stream(3, 2)}, values={"adapter_names": names}))
    out = mine(x)
    torch.testing.assert_close(out[0], y[0].square())
    assert torch.equal(out[1], y[1])
    torch.testing.assert_close(out[2], y[2] + 0.5 * x[2])
    mine.context.record.values["adapter_names"] = ["__base__"] * 3
    assert torch.equal(mine(x), y)


# --- merging -----------------------------------------------------------------------------------------------------


def linears() -> dict[str, nn.Module]:
    return {"linear": nn.Linear(WIDTH, WIDTH), "conv1d": Conv1D(WIDTH, WIDTH), "plain": nn.Linear(WIDTH, WIDTH, False)}


@pytest.mark.parametrize("kind", linears())
def test_merged_layer_computes_the_same_and_comes_back_bit_for_bit(x, kind) -> None:
    base = linears()[kind]
    bias = 0.0 if kind == "plain" else 0.25
    mine = layer(base, first=Affine(0.5, bias), second=Affine(-0.2, bias))
    before, frozen = {k: v.clone() for k, v in base.state_dict().items()}, base(x)
    expected = mine(x)
    mine.merge(safe_merge=True)
    assert mine.merged_adapters == ["first", "second"]
    torch.testing.assert_close(mine(x), expected)
    torch.testing.assert_close(base(x), expected)
    mine.unmerge()
    assert not mine.merged
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert torch.equal(mine(x), expected)
    mine.merge()
    mine.enable_adapters(False)
    assert torch.equal(mine(x), frozen)  # disabling unmerges


def test_merging_one_of_two_leaves_the_other_at_work(x) -> None:
    mine = layer(nn.Linear(WIDTH, WIDTH), first=Affine(0.5), second=Affine(-0.2))
    expected = mine(x)
    mine.merge(adapter_names=["first"])
    assert mine.merged_adapters == ["first"]
    torch.testing.assert_close(mine(x), expected)
    with pytest.warns(UserWarning, match="additionally merging second"):
        mine.merge()
    assert mine.merged_adapters == ["first", "second"]
    torch.testing.assert_close(mine(x), expected)
    mine.unmerge()
    assert torch.equal(mine(x), expected)


def test_merge_that_is_not_exact_is_refused_before_any_change(x) -> None:
    base = nn.Linear(WIDTH, WIDTH)
    mine = layer(base, first=Affine(0.5), second=Squaring())
    before = base.weight.clone()
    with pytest.raises(ValueError, match=r"'second' at 'some\.path' cannot be merged: Squaring is not a linear"):
        mine.merge()
    assert torch.equal(base.weight, before)
    assert not mine.merged
    with pytest.raises(ValueError, match=r"cannot merge at 'some\.path': Block is not a linear layer"):
        layer(Block(), first=Affine(0.5)).merge()
    with pytest.raises(ValueError, match=r"'first' at .* has a bias and the layer has none.*use_bias=False"):
        layer(nn.Linear(WIDTH, WIDTH, bias=False), first=Affine(0.5, 1.0)).merge()
    broken = layer(base, first=Affine(float("nan")))
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter first"):
        broken.merge(safe_merge=True)
    assert torch.equal(base.weight, before)


def test_mixed_batch_over_merged_weights_is_refused(x) -> None:
    mine = layer(nn.Linear(WIDTH, WIDTH), first=Affine(0.5))
    mine.merge()
    mine.context.enter(Record(streams={"": Stream(3, 2)}, values={"adapter_names": ["first"] * 3}))
    with pytest.raises(ValueError, match="call `unmerge_adapter` first"):
        mine(x)


@pytest.mark.parametrize("processes", [1, 2])
def test_adapters_of_a_mixed_batch_stand_as_its_rows_name_them_and_alike_in_all_processes(
    x, processes, monkeypatch
) -> None:
    mine = layer(nn.Linear(WIDTH, WIDTH), first=Affine(0.5), second=Affine(0.2), third=Affine(0.1))
    place, made = {adapter: name for name, adapter in mine.adapters.items()}, []

    def batch(adapters: list[Adapter], owner: list[int], stack: str) -> Any:
        made.append(([place[adapter] for adapter in adapters], owner))
        return lambda x, y, context: y

    monkeypatch.setattr("mixadapters.core.layer.MixedBatch", batch)
    monkeypatch.setattr("mixadapters.core.layer.several", lambda: processes > 1)
    names = ["third", "__base__", "first"]
    mine.context.enter(Record(streams={"": Stream(3, 2)}, values={"adapter_names": names}))
    mine(x)
    assert made == [(["third", "first"], [0, -1, 1]) if processes == 1 else (["first", "third"], [1, -1, 0])]


def test_hosts_share_one_parent() -> None:
    assert issubclass(MixtureLayer, AdapterHost)
    assert issubclass(HookedLayer, AdapterHost)
