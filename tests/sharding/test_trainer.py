"""What the callback that spreads experts under Trainer refuses before the first step. What it does takes two
processes: tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer

from mixadapters.sharding import ExpertShardingCallback, SameBatchesMixin
from mixadapters.sharding.trainer import check


class ExpertTrainer(SameBatchesMixin, Trainer):
    def __init__(self, **fields: Any) -> None:  # no engine, no data: what a check looks at
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False
        self.accelerator = SimpleNamespace(parallelism_config=None)
        self.__dict__.update(fields)


class PlainTrainer(Trainer):
    __init__ = ExpertTrainer.__init__


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
        ({"max_grad_norm": 1.0}, ExpertTrainer(), r"ExpertShardingCallback\(max_grad_norm=1.0\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], trainer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(arguments(**given), trainer)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"every": -1}, "every=-1"), ({"copies": 0.5}, "copies=0.5"), ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0")],
)
def test_numbers_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertShardingCallback(**given)
