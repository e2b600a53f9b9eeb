"""What the callback that spreads experts under Trainer refuses before the first step. What it does takes two
processes: tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer

from mixadapters import MoAConfig
from mixadapters.sharding import ExpertShardingCallback, SameBatchesMixin
from mixadapters.sharding.bank import ShardedBank
from mixadapters.sharding.trainer import check


class ExpertTrainer(SameBatchesMixin, Trainer):
    def __init__(self, **fields: Any) -> None:  # no engine, no data: what a check looks at
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False
        self.accelerator = SimpleNamespace(parallelism_config=None)
        self.__dict__.update(fields)


class PlainTrainer(Trainer):
    __init__ = ExpertTrainer.__init__


class LateTrainer(PlainTrainer, SameBatchesMixin):
    pass


def arguments(**fields: Any) -> Any:
    return SimpleNamespace(**{"world_size": 2, "fp16": False, "torch_compile": False, "max_grad_norm": 0.0, **fields})


def test_what_can_be_is_not_refused() -> None:
    check(arguments(), ExpertTrainer())


@pytest.mark.parametrize(
    ("given", "trainer", "message"),
    [
        ({"world_size": 1}, ExpertTrainer(), "there is one: leave it out"),
        ({}, ExpertTrainer(is_fsdp_enabled=True), "cannot run under FSDP"),
        ({}, ExpertTrainer(is_deepspeed_enabled=True), "cannot run under DeepSpeed"),
        ({}, ExpertTrainer(accelerator=SimpleNamespace(parallelism_config=SimpleNamespace(total_size=2))),
         "cannot run under parallelism_config"),
        ({"fp16": True}, ExpertTrainer(), "use bf16=True"),
        ({"torch_compile": True}, ExpertTrainer(), "torch_compile=True"),
        ({}, PlainTrainer(), r"make a class ExpertTrainer\(SameBatchesMixin, Trainer\)"),
        ({}, LateTrainer(), "LateTrainer has SameBatchesMixin after Trainer among its bases"),
        ({"max_grad_norm": 1.0}, ExpertTrainer(), r"ExpertShardingCallback\(max_grad_norm=1.0\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], trainer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(arguments(**given), trainer)


def test_the_callback_is_for_what_is_active_when_the_trainer_is_made(tiny: Any, monkeypatch: Any) -> None:
    fields = {"num_experts": 2, "r": 2, "target_modules": ["q_proj"]}
    model = get_peft_model(tiny("llama", num_hidden_layers=1), MoAConfig(**fields))
    model.add_adapter("other", MoAConfig(**fields))
    model.set_adapter("other")
    monkeypatch.setattr("mixadapters.sharding.trainer.trainer_above", ExpertTrainer)
    callback = ExpertShardingCallback()
    callback.on_init_end(arguments(), None, None, model=model)
    model.set_adapter("default")
    assert callback.adapter_name == "other"


class Served:
    """What is above a mixin, in place of Trainer."""

    def get_train_dataloader(self) -> str:
        return "rows"


class Mixed(SameBatchesMixin, Served):
    def __init__(self, model: nn.Module, *callbacks: Any) -> None:
        self.args, self.model = SimpleNamespace(world_size=2, device=torch.device("cpu")), model
        self.callback_handler = SimpleNamespace(callbacks=callbacks)
        self.accelerator = SimpleNamespace(state=SimpleNamespace(device_mesh="before"))


def test_same_batches_for_experts_that_nobody_spreads_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixadapters.sharding.trainer.init_device_mesh", lambda *_, **__: "mesh")
    with pytest.warns(UserWarning, match="Mixed gives all 2 processes the same rows, and no experts are spread"):
        assert Mixed(nn.Linear(2, 2)).get_train_dataloader() == "rows"
    Mixed(nn.Linear(2, 2), ExpertShardingCallback()).get_train_dataloader()
    spread = ShardedBank.__new__(ShardedBank)  # what `shard_experts` puts into a model
    nn.Module.__init__(spread)
    Mixed(nn.Sequential(spread)).get_train_dataloader()


def test_a_run_that_fails_says_that_experts_are_still_spread() -> None:
    callback = ExpertShardingCallback()
    callback.run_ended(nn.Linear(2, 2))
    callback.sharding = SimpleNamespace(is_whole=True)  # type: ignore[assignment]
    callback.run_ended(nn.Linear(2, 2))
    callback.sharding = SimpleNamespace(is_whole=False)  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"still spread .*callback\.sharding\.close\(trainer\.optimizer\)"):
        callback.run_ended(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [({"every": -1}, "every=-1"), ({"copies": 0.5}, "copies=0.5"), ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0")],
)
def test_numbers_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertShardingCallback(**given)
