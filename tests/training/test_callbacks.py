"""StageCallback and GateUsageCallback inside transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from mixadapters import BottleneckConfig, GateUsageCallback, MixDAConfig, StageCallback
from mixadapters.routers import DomainGate
from mixadapters.training.callbacks import collect_usage, find_tuner
from mixadapters.training.objectives import MaskedObjectObjective, PreservationObjective

LENGTH = 6


def rows(count: int = 16, classes: bool = False) -> list[dict[str, Tensor]]:
    """Texts in which a token tells the next one, so that a language model can learn them."""
    made = []
    for i in range(count):
        ids = 5 + (7 * i + torch.arange(LENGTH)) % 80
        labels = torch.tensor(i % 3) if classes else ids.clone()
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    options = {
        "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, **options,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **options)


def mixda(**fields: Any) -> MixDAConfig:
    return MixDAConfig(**{"domains": ["a", "b"], "r": 4, "init_weights": False, **fields})


@pytest.fixture
def classifier(tiny: Any) -> nn.Module:
    return get_peft_model(tiny("bert", "sequence_classification"), mixda(task_type="SEQ_CLS"))


@pytest.fixture(scope="module")
def trained_head(tiny: Any) -> dict[str, Tensor]:
    """Weights of a tiny masked language model that has learnt `rows`."""
    model = tiny("bert").train()
    batch = {k: torch.stack([row[k] for row in rows()]) for k in rows()[0]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.fixture
def language_model(tiny: Any, trained_head: dict[str, Tensor]) -> nn.Module:
    model = tiny("bert")
    model.load_state_dict(trained_head)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def in_optimizer(trainer: Trainer) -> set[str]:
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    return {name for name, p in trainer.model.named_parameters() if id(p) in held}


# --- what trains --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("domain", (".domain.bank.",)),
        ("task", (".domain.router.", ".task.", ".modules_to_save.")),
    ],
)
def test_the_optimizer_holds_what_the_stage_trains_and_nothing_else(
    stage: str, parts: tuple[str, ...], classifier: nn.Module, tmp_path: Path
) -> None:
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    trainer = Trainer(
        model=classifier, args=arguments(tmp_path), train_dataset=rows(classes=True), callbacks=[StageCallback(stage)]
    )
    assert trainer.optimizer is None
    assert all(any(part in name for part in parts) for name in trainable(classifier))
    assert all(any(part in name for name in trainable(classifier)) for part in parts)
    trainer.train()
    assert in_optimizer(trainer) == trainable(classifier)
    moved = {name for name, p in classifier.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= trainable(classifier)


def test_stage_of_another_adapter(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert", "sequence_classification"), mixda(), adapter_name="first")
    model.add_adapter("second", mixda())
    model.set_adapter("second")
    Trainer(model=model, args=arguments(tmp_path), callbacks=[StageCallback("domain", adapter_name="second")])
    assert trainable(model)
    assert all(".second.domain.bank." in name for name in trainable(model))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: StageCallback("tsk"), r"stage='tsk' is unknown; have \['domain', 'task'\]. Did you mean 'task'"),
        (lambda: StageCallback("task", adapter_name="b"), r"adapter_name='b' is unknown; have \['default'\]"),
    ],
)
def test_unknown_names_are_refused(callback: Any, message: str, classifier: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(model=classifier, args=arguments(tmp_path), callbacks=[callback()])


def test_a_model_without_our_adapters_is_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BertForMaskedLM holds no adapter of mixadapters; pass .*get_peft_model"):
        Trainer(model=tiny("bert"), args=arguments(tmp_path), callbacks=[StageCallback("domain")])


def test_the_tuner_is_found_behind_wrappers(classifier: nn.Module) -> None:
    assert find_tuner(nn.Sequential(classifier)) is classifier.base_model


@pytest.mark.parametrize("stage", ["domain", "task"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(stage: str, tiny: Any, tmp_path: Path) -> None:
    def run(folder: Path, resume: str | None) -> tuple[Trainer, dict[str, Tensor]]:
        torch.manual_seed(0 if resume is None else 1)
        model = get_peft_model(tiny("bert", "sequence_classification"), mixda(task_type="SEQ_CLS"))
        trainer = Trainer(
            model=model, args=arguments(folder, max_steps=6, save_strategy="steps", save_steps=3),
            train_dataset=rows(32, classes=True), callbacks=[StageCallback(stage)],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer, {k: v.clone() for k, v in model.state_dict().items()}

    _, full = run(tmp_path / "full", None)
    checkpoint = tmp_path / "full" / "checkpoint-3"
    names = {p.name for p in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
    assert "model.safetensors" not in names
    trainer, resumed = run(tmp_path / "resumed", str(checkpoint))
    assert in_optimizer(trainer) == trainable(trainer.model)
    assert full.keys() == resumed.keys()
    for name, value in full.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_trainer_that_would_drop_needed_columns_is_refused(language_model: nn.Module, tmp_path: Path) -> None:
    model = get_peft_model(language_model, BottleneckConfig(r=4))
    callback = StageCallback("domain", objectives=[PreservationObjective()])
    message = r"remove_unused_columns=True would drop the columns \['old_attention_mask', 'old_input_ids'\]"
    with pytest.raises(ValueError, match=message):
        Trainer(model=model, args=arguments(tmp_path), callbacks=[callback])
    Trainer(model=model, args=arguments(tmp_path, remove_unused_columns=False), callbacks=[callback])


def test_columns_that_a_method_needs_count_too(
    classifier: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MixDAConfig, "needs", frozenset({"domain_ids"}))
    with pytest.raises(ValueError, match=r"would drop the columns \['domain_ids'\] that this stage needs"):
        Trainer(model=classifier, args=arguments(tmp_path), callbacks=[StageCallback("task")])


@pytest.mark.parametrize("coefficient", ["balance_coef", "z_coef", "entropy_coef"])
def test_reentrant_checkpointing_is_refused_with_auxiliary_losses(coefficient: str, tiny: Any, tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    model = get_peft_model(tiny("bert"), mixda(**{coefficient: 0.1}))
    with pytest.raises(ValueError, match="drops the gradient of auxiliary losses"):
        Trainer(model=model, args=arguments(tmp_path, **options), callbacks=[StageCallback("task")])
    plain = get_peft_model(tiny("bert"), mixda())
    Trainer(model=plain, args=arguments(tmp_path, **options), callbacks=[StageCallback("task")])
    objectives = [MaskedObjectObjective()]
    callback = StageCallback("domain", objectives=objectives)
    options["remove_unused_columns"] = False
    with pytest.raises(ValueError, match="drops the gradient of auxiliary losses"):
        Trainer(model=plain, args=arguments(tmp_path, **options), callbacks=[callback])


def test_a_trainer_whose_stage_was_changed_behind_it_does_not_train(classifier: nn.Module, tmp_path: Path) -> None:
    first, _second = (
        Trainer(
            model=classifier,
            args=arguments(tmp_path),
            train_dataset=rows(classes=True),
            callbacks=[StageCallback(stage)],
        )
        for stage in ("domain", "task")
    )
    with pytest.raises(ValueError, match="set to stage='task' since this Trainer was made for stage='domain'"):
        first.train()


# --- objectives ---------------------------------------------------------------------------------------------------


class Noted(MaskedObjectObjective):
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def after(self, context: Any, module: nn.Module, output: Any) -> Any:
        self.seen.append(module.training)
        return super().after(context, module, output)


def test_objectives_hold_in_training_and_evaluation_again_and_again(language_model: nn.Module, tmp_path: Path) -> None:
    model = get_peft_model(language_model, BottleneckConfig(r=4))
    objective = Noted()
    options = arguments(tmp_path, remove_unused_columns=False)
    callback = StageCallback("domain", objectives=[objective])
    trainer = Trainer(model=model, args=options, train_dataset=rows(), eval_dataset=rows(4), callbacks=[callback])
    for _ in range(2):
        objective.seen.clear()
        trainer.train()
        assert objective.seen == [False, True, True]  # the check of the head, then the steps
        assert trainer.evaluate()["eval_loss"] > 0
        assert objective.seen == [False, True, True, False]
    assert model.base_model.context.objectives == [objective]


def test_the_next_stage_replaces_objectives_and_keeps_those_of_the_user(classifier: nn.Module, tmp_path: Path) -> None:
    context = classifier.base_model.context
    mine, first, second = Noted(), Noted(), Noted()
    context.objectives.append(mine)
    options = arguments(tmp_path, remove_unused_columns=False)
    Trainer(model=classifier, args=options, callbacks=[StageCallback("domain", objectives=[first])])
    assert context.objectives == [mine, first]
    Trainer(model=classifier, args=options, callbacks=[StageCallback("task", objectives=[second])])
    assert context.objectives == [mine, second]
    Trainer(model=classifier, args=options, callbacks=[StageCallback("task")])
    assert context.objectives == [mine]


# --- the head of a language model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_newly_initialised_language_model_head_is_refused(kind: str, tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny(kind), BottleneckConfig(r=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[StageCallback("domain")])
    with pytest.raises(ValueError, match=r"the head looks newly initialised.*ContrastiveObjective"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_head_is_checked_in_the_domain_stage_only_and_on_request(tiny: Any, tmp_path: Path) -> None:
    for callback in (StageCallback("task"), StageCallback("domain", check_head=False)):
        model = get_peft_model(tiny("bert"), mixda())
        Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback]).train()


def test_checking_a_trained_head_does_not_change_the_run(
    tiny: Any, trained_head: dict[str, Tensor], tmp_path: Path
) -> None:
    ends = []
    for check_head in (True, False):
        torch.manual_seed(0)
        model = tiny("bert")
        model.load_state_dict(trained_head)
        model = get_peft_model(model, BottleneckConfig(r=4))
        callback = StageCallback("domain", check_head=check_head)
        Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback]).train()
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# --- gate usage ---------------------------------------------------------------------------------------------------


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if any(key.startswith(("gate/", "loss/")) for key in entry)]


def test_gate_usage_reaches_the_loggers_of_the_trainer(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert", "sequence_classification"), mixda(balance_coef=0.5, task_type="SEQ_CLS"))
    trainer = Trainer(
        model=model, args=arguments(tmp_path, max_steps=3), train_dataset=rows(classes=True),
        callbacks=[StageCallback("task")],
    )  # fmt: skip
    trainer.add_callback(GateUsageCallback(trainer, per_layer=True))
    trainer.train()
    entries = logged(trainer)
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        assert sum(entry[f"gate/mean/weight/{arm}"] for arm in ("a", "b", "frozen")) == pytest.approx(1, abs=1e-4)
        assert 0 < entry["gate/mean/entropy"] <= torch.tensor(3.0).log() + 1e-4
        assert entry["gate/mean/dead"] == 0
        assert 1 - 1e-4 <= entry["loss/balance"] <= 3  # the loss itself, before its coefficient
    layers = {key.removeprefix("gate/").removesuffix("/entropy") for key in entries[0] if key.endswith("/entropy")}
    assert layers == {"mean", *(f"bert.encoder.layer.{i}.output.dense" for i in (1,))}
    assert all(isinstance(value, (int, float)) for entry in entries for value in entry.values())


def test_gate_usage_counts_training_batches_since_the_last_report(tiny: Any, tiny_inputs: Any) -> None:
    model = get_peft_model(tiny("bert"), mixda(balance_coef=1.0, domain_layers=[1, 2]))
    gates = [m for m in model.modules() if isinstance(m, DomainGate)]
    with torch.no_grad():
        gates[0].output.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    inputs = tiny_inputs("bert", padding="right", labels="tokens")
    model.eval()(**inputs)
    assert collect_usage(model) == {}
    model.train()(**inputs)
    report = collect_usage(model, per_layer=True)
    assert {key for key in report if "mean" in key} == {
        "gate/mean/weight/a", "gate/mean/weight/b", "gate/mean/weight/frozen", "gate/mean/entropy", "gate/mean/dead",
    }  # fmt: skip
    sharp = "gate/bert.encoder.layer.1.output.dense"
    assert report[f"{sharp}/weight/a"] > 0.99
    assert report[f"{sharp}/dead"] == 2
    assert report["gate/mean/dead"] == 1
    assert report["gate/mean/weight/a"] == pytest.approx((report[f"{sharp}/weight/a"] + 1 / 3) / 2, abs=1e-3)
    assert collect_usage(model) == {}


def test_models_without_gates_report_nothing(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert", "sequence_classification"), BottleneckConfig(r=4))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(classes=True))
    trainer.add_callback(GateUsageCallback(trainer))
    trainer.train()
    assert logged(trainer) == []
