"""One expert becomes several in the middle of a run of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from runs import arguments, rows
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from mixadapters import ExpertSpawnCallback, MixDAConfig, MoAConfig, StageCallback


def one_expert(base: nn.Module, **fields: Any) -> nn.Module:
    config = {"num_experts": 1, "r": 2, "target_modules": ["q_proj", "down_proj"], "n_shared_experts": 1, **fields}
    return get_peft_model(base, MoAConfig(**config))


class After(TrainerCallback):
    """Looks at the run when the step with this number has ended, after the callbacks before it."""

    def __init__(self, step: int, look: Any) -> None:
        self.step, self.look, self.seen = step, look, None

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if state.global_step == self.step:
            self.seen = self.look(model, getattr(optimizer, "optimizer", optimizer))


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[list[str]], set[str]]:
    """Names of the parameters by group, and of those that have moments."""
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    return groups, {names[id(p)] for p in optimizer.state}


@pytest.mark.parametrize("expert_type", ["lora", "bottleneck"])
def test_the_optimizer_goes_on_with_the_experts_that_are_there_now(
    expert_type: str, tiny: Any, tmp_path: Path
) -> None:
    fields = {} if expert_type == "lora" else {"target_modules": None, "expert_type": "bottleneck"}
    model = one_expert(tiny("llama"), **fields)
    look = After(2, moments)
    trainer = Trainer(
        model=model, args=arguments(tmp_path, max_steps=4), train_dataset=rows(),
        callbacks=[StageCallback("all"), ExpertSpawnCallback(2, 4), look],
    )  # fmt: skip
    trainer.train()
    groups, with_moments = look.seen
    decays = set(trainer.get_decay_parameter_names(model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    # As an optimizer that is made for this model: what a checkpoint holds is read by position.
    assert groups == [[n for n in trained if n in decays], [n for n in trained if n not in decays]]
    assert with_moments  # of what has not changed: here the shared experts
    assert all(".shared0." in name for name in with_moments)
    _, at_end = moments(model, trainer.optimizer.optimizer)
    assert at_end == set(trained)
    for _, mixture in model.base_model._mixtures("default"):
        assert mixture.bank.names == ["expert0", "expert1", "expert2", "expert3", "shared0"]
        ups = [mixture.bank.experts[f"expert{i}"].up.weight for i in range(4)]
        assert len({up.sum().item() for up in ups}) == 4


def run(model: nn.Module, folder: Path, resume: str | None, at_step: int = 2) -> dict[str, Tensor]:
    trainer = Trainer(
        model=model, args=arguments(folder, save_strategy="steps", save_steps=1), train_dataset=rows(),
        callbacks=[ExpertSpawnCallback(at_step, 3, noise=0.1)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_run_that_is_resumed_before_or_after_the_copies_is_the_uninterrupted_one(tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    full = run(one_expert(tiny("llama")), tmp_path / "full", None)
    torch.manual_seed(1)
    before = run(one_expert(tiny("llama")), tmp_path / "before", str(tmp_path / "full" / "checkpoint-1"))
    later = tmp_path / "full" / "checkpoint-3"
    model = PeftModel.from_pretrained(tiny("llama"), later, is_trainable=True)
    after = run(model, tmp_path / "after", str(later))
    for resumed in (before, after):
        assert resumed.keys() == full.keys()
        assert [name for name, value in full.items() if not torch.equal(resumed[name], value)] == []


def test_a_model_of_other_experts_than_the_checkpoint_is_refused(tiny: Any, tmp_path: Path) -> None:
    run(one_expert(tiny("llama")), tmp_path, None)
    with pytest.raises(ValueError, match=r"num_experts=8 in the file, 1 here.*a model made with the file's config"):
        run(one_expert(tiny("llama")), tmp_path / "other", str(tmp_path / "checkpoint-3"))
    spawned = PeftModel.from_pretrained(tiny("llama"), tmp_path / "checkpoint-3", is_trainable=True)
    with pytest.raises(ValueError, match=r"after step 0 the copies \['expert1', 'expert2'\] .* should not be there"):
        run(spawned, tmp_path / "fresh", None)
    with pytest.raises(ValueError, match=r"after step 1 the copies .* should be there.*from_pretrained"):
        run(one_expert(tiny("llama")), tmp_path / "late", str(tmp_path / "checkpoint-1"), at_step=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at_step": 0}, "at_step=0 must be an integer, at least 1"),
        ({"n": 1}, "n=1 must be an integer, at least 2"),
        ({"n": True}, "n=True"),
        ({"mask_fraction": 1.0}, "mask_fraction="),
        ({"noise": float("inf")}, "noise=inf"),
    ],
)
def test_numbers_are_checked_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertSpawnCallback(**{"at_step": 2, "n": 4, **options})


def test_what_cannot_be_spawned_in_a_run_is_refused_before_it(tiny: Any, tmp_path: Path) -> None:
    model = one_expert(tiny("llama"))
    with pytest.raises(ValueError, match="from_expert='law' is unknown"):
        Trainer(model=model, args=arguments(tmp_path), callbacks=[ExpertSpawnCallback(2, 4, from_expert="law")])
    several = one_expert(tiny("llama"), num_experts=3)
    with pytest.raises(ValueError, match="None means the only expert, and there are"):
        Trainer(model=several, args=arguments(tmp_path), callbacks=[ExpertSpawnCallback(2, 6)])
    other = get_peft_model(tiny("llama"), MixDAConfig(domains=["a"], r=2))
    with pytest.raises(ValueError, match="is for MoA, and adapter 'default' is of type MIXDA"):
        Trainer(model=other, args=arguments(tmp_path), callbacks=[ExpertSpawnCallback(2, 4)])
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[ExpertSpawnCallback(6, 4)]
    )
    with pytest.raises(ValueError, match="at_step=6 is not before the end of this run of 6 steps"):
        trainer.train()
    together = SimpleNamespace(world_size=2, deepspeed=None)
    with pytest.raises(ValueError, match=r"several processes .* call model.base_model.spawn_experts"):
        ExpertSpawnCallback(2, 4).on_init_end(together, None, None, model=model)
