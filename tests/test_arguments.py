"""Public functions say which argument is of another kind than theirs, its value, and what it should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from mixadapters import ForwardContext, GateUsageCallback, MixDAConfig, MixtureDistiller, MixtureTeacher, StageCallback
from mixadapters.core.names import check_free
from mixadapters.core.routes import row_numbers, spread_pins
from mixadapters.serving import (
    AdapterServer,
    CompositionRouter,
    ConfidenceCascade,
    ExpertCache,
    ExpertRing,
    GlobalLocalMixture,
    PooledStates,
    confidence,
    distill_layer_pregates,
    distill_pregate,
    expert_aware_batches,
    mask_gate,
    token_experts,
)
from mixadapters.sharding import deal_tasks


def of_kinds() -> list[tuple[Callable[[], Any], str]]:
    """Calls with something of another kind -> what the message says of it."""
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    features = lambda **_: torch.zeros(1, 2)  # noqa: E731
    return [
        (lambda: ForwardContext.of("model"), "model='model' must be a model"),
        (lambda: AdapterServer(None), "model=None must be a model"),
        (lambda: ExpertRing(["model"], 1), r"model=\['model'\] must be a model"),
        (lambda: PooledStates(3), "model=3 must be a model"),
        (lambda: StageCallback("task", objectives=None), "objectives=None must be a list"),
        (lambda: GateUsageCallback(None), "trainer=None must be the Trainer"),
        (lambda: MixtureTeacher("model"), "model='model' must be a PeftModel"),
        (lambda: MixtureDistiller("teacher", nn.Linear(2, 2)), "teacher=str says nothing of experts"),
        (lambda: distill_pregate(None, [batch]), "model=None must be a PeftModel"),
        (lambda: distill_layer_pregates(nn.Linear(2, 2), [batch], adapter=None), "adapter=None must be the name"),
        (lambda: confidence([0.5, 0.5]), r"logits=\[0.5, 0.5\] must be a tensor"),
        (lambda: ConfidenceCascade("weak", print), "weak='weak' must be a model, or a function"),
        (lambda: ConfidenceCascade.of_adapters(nn.Linear(2, 2), "__base__", "law"), "Linear has no adapters"),
        (lambda: CompositionRouter("states"), "embed='states' must make features"),
        (lambda: CompositionRouter.load(None, features), "folder=None must be the path of a folder"),
        (lambda: GlobalLocalMixture(nn.Linear(2, 2), features), "model=Linear must be a PeftModel"),
        (lambda: ExpertCache(2, "load"), "load='load' must be a function"),
        (lambda: token_experts(None, 2), "routing=None must be a Routing"),
        (lambda: expert_aware_batches(["ab"], 2), r"needs=\['ab'\] must be a list with a set of experts"),
        (lambda: mask_gate([0.5], ["a"], ["a"]), r"probs=\[0.5\] must be a tensor"),
        (lambda: deal_tasks(3, 2), "rows=3 must be a dict of tasks"),
        (lambda: row_numbers(3, ["a"], "expert"), "names=3 must be a list with one name for each row"),
        (lambda: spread_pins([1], {}), r"routes=\[1\] must be a dict of patterns"),
        (lambda: check_free("domain", ["a"], []), r"domain \['a'\] must be a name"),
    ]


@pytest.mark.parametrize("number", range(len(of_kinds())))
def test_what_is_of_another_kind_is_named_with_what_it_should_be(number: int) -> None:
    call, message = of_kinds()[number]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("name", "value"), [("max_length", 0), ("batch_size", 2.5), ("tokenizer", "words")])
def test_numbers_of_fit_gate_are_looked_at_first(name: str, value: Any, tiny: Any) -> None:
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=["a"], r=2, domain_layers=[1]))
    with pytest.raises(ValueError, match=f"{name}={value!r} must be"):
        model.base_model.fit_gate({"a": [[5, 6]]}, [[7]], **{name: value})
