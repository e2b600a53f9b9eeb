"""What `shard_experts` refuses, and what it leaves behind, in a group of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

from mixadapters import MoAConfig
from mixadapters.sharding import Placement, shard_experts

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
