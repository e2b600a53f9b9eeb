"""What `shard_experts` refuses, and what it leaves behind, in a group of one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

from mixadapters import MoAConfig
from mixadapters.sharding import Placement, shard_experts
from mixadapters.surgery.layers import expert_layers

pytestmark = pytest.mark.usefixtures("group")


@pytest.fixture
def model(tiny: Any) -> Any:
    torch.manual_seed(0)
    config = MoAConfig(num_experts=3, r=2, target_modules=["down_proj"], init_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(tiny("llama", num_hidden_layers=1), config)


def step(model: Any) -> None:
    ids = torch.arange(5, 13).view(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()


def test_who_wraps_a_model_afterwards_trains_its_experts_again(model: Any) -> None:
    """DistributedDataParallel leaves spread experts alone, and no others."""
    everything = {name for name, p in model.named_parameters() if p.requires_grad}
    experts = {name for name in everything if ".bank.experts." in name}
    assert experts

    def reduced() -> set[str]:
        ignored = DistributedDataParallel(model).parameters_to_ignore
        return everything - ignored

    sharding = shard_experts(model)
    assert reduced() == everything - experts
    with sharding.whole():
        assert reduced() == everything - experts  # they are spread again when the block ends
    sharding.close()
    assert reduced() == everything


def test_an_optimizer_without_an_expert_cannot_take_it_along(model: Any) -> None:
    sharding = shard_experts(model)
    step(model)
    without = [p for name, p in model.named_parameters() if p.requires_grad and ".expert1.up." not in name]
    with pytest.raises(ValueError, match=r"optimizer does not have expert 'expert1' at .*down_proj"):
        sharding.reshard(torch.optim.SGD(without))
    sharding.reshard(torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))


def test_whole_experts_are_dealt_and_gathered_once(model: Any) -> None:
    sharding = shard_experts(model)
    with sharding.whole():
        assert sharding.is_whole
        for call in (sharding.reshard, sharding.gather):
            with pytest.raises(RuntimeError, match="holds all experts"):
                call()
    assert not sharding.is_whole


CHANGES: dict[str, Any] = {
    "add": lambda tuner: tuner.add_expert("new"),
    "remove": lambda tuner: tuner.remove_expert("expert0"),
    "keep": lambda tuner: tuner.keep_experts({path: ["expert0", "expert2"] for path, _ in tuner._mixtures("default")}),
    "spawn": lambda tuner: tuner.spawn_experts("expert0", ["new"]),
    "resize": lambda tuner: tuner.resize_expert(next(iter(tuner._mixtures("default")))[0], "expert1", 5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_experts_come_and_go_where_all_of_them_are_here(model: Any, change: str) -> None:
    alone = copy.deepcopy(model)
    sharding = shard_experts(model)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"experts of this adapter are spread over processes: do that in"):
        CHANGES[change](model.base_model)
    assert [name for name, _ in model.named_parameters()] == names
    assert set(model.base_model.mixtures().values()) == set(sharding.mixtures.values())
    with sharding.whole():
        torch.manual_seed(1)
        CHANGES[change](model.base_model)
    torch.manual_seed(1)
    CHANGES[change](alone.base_model)
    (bank,) = sharding.banks.values()
    assert len(bank.placement.holders) == len(bank.used) == len(bank.shapes) == len(bank.experts)
    for each in (model, alone):
        each.zero_grad()
        step(each)
    after = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel():
            expected = torch.zeros_like(parameter) if after[name].grad is None else after[name].grad
            torch.testing.assert_close(parameter.grad, expected, msg=name)


def test_spread_experts_are_neither_copied_nor_read_by_surgery(model: Any) -> None:
    sharding = shard_experts(model)
    with pytest.raises(RuntimeError, match=r"a copy would have a part of them"):
        copy.deepcopy(model)
    (layer,) = expert_layers(model)
    with pytest.raises(ValueError, match=r"surgery: the experts of this adapter are spread over processes"):
        layer.weights(0)
    with sharding.whole():
        assert layer.weights(0).down.shape[0] == 2
        copy.deepcopy(model)


def test_an_adapter_that_is_deleted_leaves_no_watch_behind(model: Any) -> None:
    """What looks at the next forward is called in that of every module there is."""
    shard_experts(model)
    model.delete_adapter("default")
    torch.nn.Linear(2, 2)(torch.zeros(1, 2))


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_gradients_are_clipped_to_a_number_above_0(model: Any, norm: float) -> None:
    sharding = shard_experts(model)
    step(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(ValueError, match="max_norm="):
        sharding.clip_grad_norm(norm)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if name in before)


def test_gradients_are_clipped_by_the_norm_of_all(model: Any) -> None:
    sharding = shard_experts(model)
    step(model)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = float(torch.cat([grad.flatten() for grad in grads]).norm())
    assert sharding.clip_grad_norm(norm / 4) == pytest.approx(norm)
    for grad, parameter in zip(grads, (p for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(parameter.grad, grad / 4)
    assert sharding.clip_grad_norm(norm) == pytest.approx(norm / 4)  # and no more
    assert sharding.clip_grad_norm(norm) == pytest.approx(norm / 4)


@pytest.mark.parametrize(
    ("holders", "devices", "message"),
    [
        (((0,), (0,)), 1, "2 experts on 1 devices does not fit 3 experts and 1 processes"),
        (((0,), (0,), (0,)), 2, "on 2 devices does not fit"),
        (((0,), (), (0,)), 1, r"holders=\(\) of expert 'expert1'"),
        (((0,), (1,), (0,)), 1, r"holders=\(1,\) of expert 'expert1'"),
        (((0,), (0, 0), (0,)), 1, r"holders=\(0, 0\) of expert 'expert1'"),
    ],
)
def test_a_placement_must_fit_the_experts_and_the_processes(
    model: Any, holders: tuple, devices: int, message: str
) -> None:
    (bank,) = shard_experts(model).banks.values()
    before = bank.placement
    with pytest.raises(ValueError, match=message):
        bank.place(Placement(holders, devices))
    assert bank.placement == before
