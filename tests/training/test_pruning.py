"""Experts that the router has given up go in the middle of a run of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_bases import moe
from peft import PeftModel, get_peft_model
from runs import arguments, rows
from torch import nn
from transformers import Trainer, TrainerState

from mixadapters import ExpertPruneCallback, MoAConfig
from mixadapters.surgery import expert_layers, record_usage


def with_a_dead_expert(base: nn.Module, **fields: Any) -> Any:
    """Four experts behind a top-1 router that never takes the third."""
    config = {"num_experts": 4, "num_experts_per_tok": 1, "r": 2, "target_modules": ["down_proj"], **fields}
    model = get_peft_model(base, MoAConfig(**config))
    for layer in expert_layers(model):
        layer.mixture.router.output.bias.data[2] = -50.0  # type: ignore[attr-defined]
    return model


def train(model: Any, folder: Path, callback: ExpertPruneCallback, steps: int = 6, **options: Any) -> Trainer:
    trainer = Trainer(model, arguments(folder, max_steps=steps, **options), train_dataset=rows(), callbacks=[callback])
    trainer.train()
    return trainer


def test_what_the_router_has_given_up_goes_and_the_optimizer_goes_on(tiny: Any, tmp_path: Path) -> None:
    model = with_a_dead_expert(tiny("llama", num_hidden_layers=2))
    callback = ExpertPruneCallback(beta=0.05, every=2, min_experts=3)
    trainer = train(model, tmp_path, callback, save_strategy="steps", save_steps=4)
    assert [(gone.step, list(gone.shares)) for gone in callback.pruned] == [(2, ["expert2"])] * 2
    assert all(share < 0.05 / 4 for gone in callback.pruned for share in gone.shares.values())
    assert list(model.peft_config["default"].experts) == ["expert0", "expert1", "expert3"]
    optimizer = trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.state} == held
    assert not any(layer.mixture.watchers for layer in expert_layers(model))  # type: ignore[attr-defined]
    again = PeftModel.from_pretrained(tiny("llama", num_hidden_layers=2), tmp_path / "checkpoint-4")
    assert [layer.names for layer in expert_layers(again)] == [("expert0", "expert1", "expert3")] * 2


def test_a_base_is_pruned_while_it_trains(tmp_path: Path) -> None:
    model: Any = moe("mixtral", num_local_experts=4)
    for layer in expert_layers(model):
        layer.gate.weight.data[1] = 0.0  # type: ignore[attr-defined]
    callback = ExpertPruneCallback(beta=0.9, every=2, min_experts=3, ema=0.0)
    train(model, tmp_path, callback, steps=4, learning_rate=1e-4, save_strategy="no")
    assert callback.pruned
    counts = [len(layer.names) for layer in expert_layers(model)]
    assert min(counts) == 3
    cut = {layer.key for layer, count in zip(expert_layers(model), counts, strict=True) if count < 4}
    assert {gone.key for gone in callback.pruned} == cut


def test_a_layer_keeps_its_least_and_shares_are_an_average(tiny: Any) -> None:
    model = with_a_dead_expert(tiny("llama", num_hidden_layers=2), num_experts_per_tok=2)
    callback = ExpertPruneCallback(beta=0.5, min_experts=1, every=1, ema=0.5)
    layer = expert_layers(model)[0]
    callback._sums[layer.key] = torch.tensor([8.0, 1.0, 0.0, 1.0]).double()
    assert callback._kept(layer, 1) == [0, 1]  # the two that a token uses, though the second has less than 1/8
    shares, weight = callback.averages[layer.key]
    assert (shares / weight).tolist() == pytest.approx([0.8, 0.1, 0.0, 0.1])
    callback._sums[layer.key] = torch.tensor([0.0, 1.0, 0.0, 0.0]).double()
    callback._kept(layer, 2)
    shares, weight = callback.averages[layer.key]
    assert (shares / weight).tolist() == pytest.approx([0.2 / 0.75, 0.525 / 0.75, 0.0, 0.025 / 0.75])


def test_what_cannot_be_pruned_is_refused_before_the_run(tiny: Any, tmp_path: Path) -> None:
    for options in ({"beta": 0}, {"beta": 1.5}, {"ema": 1.0}, {"every": 0}, {"min_experts": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ExpertPruneCallback(**options)
    hashed = get_peft_model(
        tiny("llama", num_hidden_layers=2), MoAConfig(num_experts=2, r=2, router="hash", target_modules=["down_proj"])
    )
    for model, said in ((hashed, "cannot lose experts"), (tiny("llama", num_hidden_layers=2), "no routed experts")):
        with pytest.raises(ValueError, match=said):
            Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[ExpertPruneCallback()])


def test_an_average_of_few_looks_is_not_smaller_for_that(tiny: Any) -> None:
    model = with_a_dead_expert(tiny("llama", num_hidden_layers=2))
    callback = ExpertPruneCallback(beta=0.5, every=1, ema=0.9)
    layer = expert_layers(model)[0]
    callback._sums[layer.key] = torch.tensor([4.0, 3.0, 1.0, 2.0]).double()
    assert callback._kept(layer, 1) == [0, 1, 3]  # below 1/8 is the third alone
    assert callback.pruned[0].shares == pytest.approx({"expert2": 0.1})


def test_shares_are_those_of_real_tokens_in_training_since_the_last_look(tiny: Any, tiny_inputs: Any) -> None:
    model = with_a_dead_expert(tiny("llama", num_hidden_layers=2))
    callback, inputs = ExpertPruneCallback(every=2, min_experts=4), tiny_inputs("llama", batch=3, padding="right")
    state = TrainerState(global_step=2, max_steps=8)
    with watched(callback, model):
        model.eval()(**inputs)
        assert not callback._sums
        model.train()
        with torch.no_grad(), record_usage(model) as usage:
            model(**inputs)
        for layer in expert_layers(model):
            assert torch.allclose(callback._sums[layer.key], usage[layer.key].mass)
        callback.on_step_end(None, state, None, model=model)
        assert not callback._sums


def test_averages_of_those_that_stay_go_on(tiny: Any, tmp_path: Path) -> None:
    model = with_a_dead_expert(tiny("llama", num_hidden_layers=2))
    callback = ExpertPruneCallback(beta=0.5, every=1, ema=0.5)
    callback.trainer = Trainer(model, arguments(tmp_path))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    keys = [layer.key for layer in expert_layers(model)]
    for sums in ([0.0, 5.0, 3.0, 2.0], [5.0, 3.0, 2.0]):  # the first goes
        callback._sums = {key: torch.tensor(sums).double() for key in keys}
        callback.on_step_end(None, TrainerState(global_step=1), None, model=model, optimizer=optimizer)
    for shares, weight in callback.averages.values():
        assert (shares / weight).tolist() == pytest.approx([0.5, 0.3, 0.2])
    callback.run_ended(model)


@contextmanager
def watched(callback: ExpertPruneCallback, model: nn.Module) -> Iterator[None]:
    callback._watch(model)
    try:
        yield
    finally:
        callback.run_ended(model)
