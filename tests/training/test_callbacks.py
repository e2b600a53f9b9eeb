"""StageCallback and GateUsageCallback inside transformers' Trainer."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from mixadapters import BottleneckConfig, GateUsageCallback, MixDAConfig, StageCallback
from mixadapters.routers import DomainGate
from mixadapters.training import callbacks
from mixadapters.training.callbacks import check_launched, collect_usage, find_tuner
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["preserve"], "objectives hold 'preserve', which is no objective"),
        ([PreservationObjective], "objectives hold <class .*PreservationObjective'>, which is a class, not an object"),
        ("preserve", "objectives='preserve' must be a list of objectives"),
        (PreservationObjective(), "objectives=.* must be a list of objectives"),
    ],
)
def test_what_is_no_objective_is_refused_when_the_callback_is_made(given: Any, message: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{message}.*PreservationObjective\(\)\] of mixadapters.training.objectives"
    ):
        StageCallback("task", objectives=given)


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
        (lambda: StageCallback("tune"), r"stage='tune' is unknown; have \['domain', 'task'\]"),  # of another method
        (lambda: StageCallback("task", adapter_name="b"), r"adapter_name='b' is unknown; have \['default'\]"),
    ],
)
def test_unknown_names_are_refused(callback: Any, message: str, classifier: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(model=classifier, args=arguments(tmp_path), callbacks=[callback()])


@pytest.mark.parametrize(("stage", "meant"), [("rooter", "router"), ("tsk", "task"), (["task"], None)])
def test_a_stage_of_no_method_is_refused_when_the_callback_is_made(stage: Any, meant: str | None) -> None:
    with pytest.raises(ValueError, match=re.escape(f"stage={stage!r} is a stage of no method")) as refused:
        StageCallback(stage)
    assert (f"Did you mean {meant!r}?" in str(refused.value)) == (meant is not None)


def test_a_callback_that_comes_after_its_trainer_is_refused(classifier: nn.Module, tmp_path: Path) -> None:
    trainer = Trainer(model=classifier, args=arguments(tmp_path), train_dataset=rows(classes=True))
    trainer.add_callback(StageCallback("task"))
    with pytest.raises(ValueError, match=r"StageCallback\('task'\) was added when .* callbacks=\[...\]"):
        trainer.train()


def test_a_model_without_our_adapters_is_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BertForMaskedLM holds no adapter of mixadapters; pass .*get_peft_model"):
        Trainer(model=tiny("bert"), args=arguments(tmp_path), callbacks=[StageCallback("domain")])


def test_the_tuner_is_found_behind_wrappers(classifier: nn.Module) -> None:
    assert find_tuner(nn.Sequential(classifier)) is classifier.base_model


def transpose_moments(checkpoint: Path) -> None:
    """As a version that laid out weights the other way has saved them: equal values, other strides."""
    saved = torch.load(checkpoint / "optimizer.pt")
    for kept in saved["state"].values():
        for name, value in kept.items():
            if value.dim() == 2:
                kept[name] = value.T.contiguous().T
    torch.save(saved, checkpoint / "optimizer.pt")


@pytest.mark.parametrize("stage", ["domain", "task"])
@pytest.mark.parametrize("saved_as", ["now", "weights that lay transposed"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    stage: str, saved_as: str, tiny: Any, tmp_path: Path
) -> None:
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
    if saved_as != "now":
        transpose_moments(checkpoint)
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


def with_domains(count: int = 16) -> list[dict[str, Any]]:
    return [{**row, "domain_ids": torch.tensor(i % 2)} for i, row in enumerate(rows(count, classes=True))]


@pytest.mark.parametrize("form", ["list", "datasets", "evaluation"])
@pytest.mark.parametrize("field", ["domain_ids", "adapter_names", "prompt_mask"])
def test_columns_of_the_dataset_that_adapters_read_are_not_dropped(
    form: str, field: str, classifier: nn.Module, tmp_path: Path
) -> None:
    """Rows would train at the gate's weight, not in their domain."""
    data: Any = [{**row, field: 0} for row in rows(4, classes=True)]
    given = {"eval_dataset": {"own": data}} if form == "evaluation" else {"train_dataset": data}
    if form == "datasets":
        given = {"train_dataset": Dataset.from_list([{"input_ids": [5], "labels": 0, field: 0}])}
    before = trainable(classifier)
    message = (
        rf"would drop the columns \['{field}'\] of the dataset, which adapters read; pass remove_unused_columns=F"
    )
    with pytest.raises(ValueError, match=message):
        Trainer(model=classifier, args=arguments(tmp_path), callbacks=[StageCallback("domain")], **given)
    assert trainable(classifier) == before
    options = arguments(tmp_path, remove_unused_columns=False)
    Trainer(model=classifier, args=options, callbacks=[StageCallback("domain")], **given)
    options = arguments(tmp_path, label_names=["labels", field])  # Trainer keeps labels
    Trainer(model=classifier, args=options, callbacks=[StageCallback("domain")], **given)


def test_columns_that_no_adapter_reads_are_dropped_as_ever(tiny: Any, classifier: nn.Module, tmp_path: Path) -> None:
    data = [{**row, "text": "a"} for row in rows(4, classes=True)]
    Trainer(model=classifier, args=arguments(tmp_path), train_dataset=data, callbacks=[StageCallback("domain")])
    model = get_peft_model(tiny("bert", "sequence_classification"), BottleneckConfig(r=4))
    Trainer(
        model=model, args=arguments(tmp_path), train_dataset=with_domains(), callbacks=[StageCallback("domain")]
    ).train()


def test_rows_of_a_domain_train_its_expert_alone(classifier: nn.Module, tmp_path: Path) -> None:
    data = [{**row, "domain_ids": torch.tensor(1)} for row in rows(8, classes=True)]
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    options = arguments(tmp_path, remove_unused_columns=False)
    Trainer(model=classifier, args=options, train_dataset=data, callbacks=[StageCallback("domain")]).train()
    moved = {name for name, p in classifier.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".experts.b." in name for name in moved)


def test_loading_the_best_model_is_refused_where_it_reloads_nothing(tiny: Any, tmp_path: Path) -> None:
    options = arguments(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    data = rows(4, classes=True)
    own = get_peft_model(tiny("bert", "sequence_classification"), mixda(), adapter_name="own")
    second = get_peft_model(tiny("bert", "sequence_classification"), mixda())
    second.add_adapter("own", mixda())
    second.set_adapter("own")
    for model, name in ((own, "own"), (second, "own"), (second, "default")):
        with pytest.raises(ValueError, match=r"load_best_model_at_end=True reloads the adapter 'default' only"):
            Trainer(
                model=model, args=options, train_dataset=data, eval_dataset=data,
                callbacks=[StageCallback("task", adapter_name=name)],
            )  # fmt: skip
    second.set_adapter("default")
    with pytest.raises(ValueError, match=r"'own' trains while 'default' is active first"):
        Trainer(
            model=second, args=options, train_dataset=data, eval_dataset=data,
            callbacks=[StageCallback("task", adapter_name="own")],
        )  # fmt: skip


def test_the_best_model_is_loaded_at_the_end(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert", "sequence_classification"), mixda(task_type="SEQ_CLS"))
    options = arguments(
        tmp_path, max_steps=3, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, metric_for_best_model="accuracy", optim="sgd", learning_rate=1.0,
    )  # fmt: skip
    scores = iter([0.1, 0.9, 0.2])
    trainer = Trainer(
        model=model, args=options, train_dataset=rows(classes=True), eval_dataset=rows(4, classes=True),
        callbacks=[StageCallback("task")], compute_metrics=lambda _: {"accuracy": next(scores)},
    )  # fmt: skip
    trainer.train()
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    now = get_peft_model_state_dict(model)
    assert best.keys() == now.keys()
    assert all(torch.equal(now[key], value) for key, value in best.items())


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


def interrupted(model: nn.Module, folder: Path, stage: str = "task") -> Trainer:
    """A Trainer whose run has left checkpoints 1 and 2 behind."""
    options = arguments(folder, save_strategy="steps", save_steps=1)
    trainer = Trainer(
        model=model, args=options, train_dataset=rows(classes=True), callbacks=[StageCallback(stage, check_head=False)]
    )
    trainer.train()
    return trainer


def again(model: nn.Module, folder: Path, stage: str = "task") -> Trainer:
    options = arguments(folder, max_steps=4, save_strategy="steps", save_steps=1)
    return Trainer(model=model, args=options, train_dataset=rows(classes=True), callbacks=[StageCallback(stage)])


def test_a_run_in_another_stage_says_that_it_cannot_go_on(classifier: nn.Module, tmp_path: Path) -> None:
    interrupted(classifier, tmp_path, "domain")
    with pytest.warns(UserWarning, match=r"checkpoint-2 was made in stage='domain'; a run of stage='task' cannot"):
        again(classifier, tmp_path, "task")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the checkpoint.*")
        trainer = again(classifier, tmp_path, "domain")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_the_optimizer_of_another_stage_is_not_taken_over(classifier: nn.Module, tmp_path: Path) -> None:
    """Wherever it lies, and before any of its weights are loaded."""
    interrupted(classifier, tmp_path / "first", "domain")
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    checkpoint = tmp_path / "first" / "checkpoint-1"
    trainer = again(classifier, tmp_path / "second", "task")
    with pytest.raises(ValueError, match=r"checkpoint-1 was made in stage='domain', so the state of the optimizer"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("optimizer.pt", r"ends elsewhere .*the optimizer's moments .* \(optimizer.pt is missing\)$"),
        ("scheduler.pt", r"ends elsewhere .*the optimizer's moments .* \(scheduler.pt is missing\)$"),
        ("rng_state.pth", r"ends elsewhere .*random numbers, .* \(rng_state.pth is missing\)$"),
        ("stage.json", r"checkpoint-2 has no stage.json that says which stage of adapter 'default' made it"),
    ],
)
def test_a_run_from_a_checkpoint_without_a_file_says_what_begins_anew(
    gone: str, said: str, classifier: nn.Module, tmp_path: Path
) -> None:
    interrupted(classifier, tmp_path)
    (tmp_path / "checkpoint-2" / gone).unlink()
    trainer = again(classifier, tmp_path)
    with pytest.warns(UserWarning, match="the checkpoint") as warned:
        trainer.train(resume_from_checkpoint=True)
    (message,) = {str(w.message) for w in warned if "the checkpoint" in str(w.message)}
    assert re.search(said, message)
    assert trainer.state.global_step == 4


def test_a_run_from_a_whole_checkpoint_says_nothing(classifier: nn.Module, tmp_path: Path) -> None:
    interrupted(classifier, tmp_path)
    trainer = again(classifier, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the checkpoint.*")
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "adapter_model.safetensors"])
def test_a_run_from_a_cut_checkpoint_is_refused_before_it_loads_anything(
    name: str, classifier: nn.Module, tmp_path: Path
) -> None:
    interrupted(classifier, tmp_path / "first")
    file = tmp_path / "first" / "checkpoint-1" / name
    file.write_bytes(file.read_bytes()[:-9])
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    trainer = again(classifier, tmp_path / "second")
    with pytest.raises(ValueError, match=rf"no run can go on from the checkpoint .*checkpoint-1: {name} .* older one"):
        trainer.train(resume_from_checkpoint=str(file.parent))
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


def test_a_checkpoint_without_the_adapter_is_refused(classifier: nn.Module, tmp_path: Path) -> None:
    """Trainer loads the others, and the one that trains would begin anew."""
    classifier.add_adapter("own", mixda())
    classifier.set_adapter("own")
    interrupted(classifier, tmp_path)
    (tmp_path / "checkpoint-2" / "own").rename(tmp_path / "checkpoint-2" / "other")
    trainer = again(classifier, tmp_path)
    with pytest.raises(ValueError, match=r"weights of the adapters \['default', 'other'\], and none of 'own'"):
        trainer.train(resume_from_checkpoint=True)


def test_engines_take_frozen_weights_from_where_the_run_goes_on(
    classifier: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(classifier, tmp_path / "first")
    taken: list[Path] = []
    monkeypatch.setattr(callbacks, "shards", lambda trainer: True)
    monkeypatch.setattr(callbacks, "restore_frozen", lambda model, name, folder: taken.append(folder))
    again(classifier, tmp_path / "second").train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert taken == [tmp_path / "first" / "checkpoint-2"]


def test_two_adapters_that_train_each_have_their_stage_in_a_checkpoint(classifier: nn.Module, tmp_path: Path) -> None:
    classifier.add_adapter("own", mixda(task_type="SEQ_CLS"))

    def trainer(own: str) -> Trainer:
        stages = [StageCallback("task", "default"), StageCallback(own, "own", check_head=False)]
        options = arguments(tmp_path, save_strategy="steps", save_steps=1)
        return Trainer(model=classifier, args=options, train_dataset=rows(classes=True), callbacks=stages)

    trainer("domain").train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the checkpoint.*")
        again = trainer("domain")
        for callback in again.callback_handler.callbacks:
            if isinstance(callback, StageCallback):
                callback.run_begins(again, tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match=r"checkpoint-2 was made in stage='domain'"):
        other = trainer("task")
    with pytest.raises(ValueError, match=r"checkpoint-2 was made in stage='domain'.* what stage='task' trains"):
        other.train(resume_from_checkpoint=True)


def test_a_trainer_with_a_train_of_its_own_is_told_of_another_stage(classifier: nn.Module, tmp_path: Path) -> None:
    class Own(Trainer):
        def train(self, resume_from_checkpoint: str) -> Any:
            return self._inner_training_loop(self._train_batch_size, self.args, resume_from_checkpoint)

    def trainer(domain: str) -> Trainer:
        options = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        stage = StageCallback("domain", domain=domain, check_head=False)
        return Own(classifier, options, train_dataset=rows(classes=True), callbacks=[stage])

    Trainer.train(trainer("a"))
    with pytest.warns(UserWarning, match="was made in stage='domain a'"):
        other = trainer("b")
    with pytest.raises(ValueError, match=r"checkpoint-2 was made in stage='domain a', so the state of the optimizer"):
        other.train(str(tmp_path / "checkpoint-2"))


def test_a_last_checkpoint_that_a_killed_run_has_cut_is_named(classifier: nn.Module, tmp_path: Path) -> None:
    interrupted(classifier, tmp_path)
    weights = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    message = r"go on from the checkpoint .*checkpoint-2: adapter_model.safetensors has \d+ bytes.* Remove that folder"
    with pytest.warns(UserWarning, match=message):
        again(classifier, tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the checkpoint.*")
        trainer = again(classifier, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_a_checkpoint_of_deepspeed_is_named_where_there_is_none(classifier: nn.Module, tmp_path: Path) -> None:
    interrupted(classifier, tmp_path)
    (tmp_path / "checkpoint-2" / "latest").write_text("global_step2")
    with pytest.warns(UserWarning, match=r"checkpoint-2 is DeepSpeed's: .*with new moments"):
        again(classifier, tmp_path)


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


@pytest.mark.parametrize(("scaler", "scale"), [(None, 0.25), (8.0, 2.0)])
def test_riding_losses_are_scaled_as_float16_scales_its_loss(scaler: Any, scale: float, classifier: nn.Module) -> None:
    """The optimizer divides all gradients by what the scaler has multiplied the loop's loss with."""
    callback = StageCallback("task")
    own = None if scaler is None else torch.amp.GradScaler("cpu", init_scale=scaler)
    callback.trainer = SimpleNamespace(current_gradient_accumulation_steps=4, accelerator=SimpleNamespace(scaler=own))
    arguments = SimpleNamespace(device="cpu", gradient_accumulation_steps=4)
    callback.on_step_begin(arguments, None, None, model=classifier)
    assert float(classifier.base_model.context.loss_scale) == scale


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


def test_the_head_is_checked_before_the_first_step_only(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert"), BottleneckConfig(r=4))
    for steps, resume in ((1, None), (2, True)):
        options = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=1)
        callback = StageCallback("domain", check_head=resume is not None)  # of a head that would be refused
        trainer = Trainer(model=model, args=options, train_dataset=rows(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 2


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


class Board(TrainerCallback):
    """A logger as TensorBoard's: keeps what `on_log` brings, until the end of training."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []
        self.closed = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        assert not self.closed
        self.entries.append({**logs, "step": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.closed = True


def gates(entries: list[dict[str, float]]) -> list[dict[str, float]]:
    return [entry for entry in entries if any(key.startswith(("gate/", "loss/")) for key in entry)]


def watched(tiny: Any, folder: Path, per_layer: bool = False, **options: Any) -> tuple[Trainer, Board]:
    """A run with a GateUsageCallback and a Board, trained."""
    model = get_peft_model(tiny("bert", "sequence_classification"), mixda(balance_coef=0.5, task_type="SEQ_CLS"))
    board = Board()
    trainer = Trainer(
        model=model, args=arguments(folder, **options), train_dataset=rows(classes=True),
        eval_dataset=rows(4, classes=True), callbacks=[board, StageCallback("task")],
    )  # fmt: skip
    trainer.add_callback(GateUsageCallback(trainer, per_layer=per_layer))
    trainer.train()
    return trainer, board


def test_gate_usage_reaches_the_loggers_of_the_trainer(tiny: Any, tmp_path: Path) -> None:
    trainer, board = watched(tiny, tmp_path, per_layer=True, max_steps=3)
    entries = gates(trainer.state.log_history)
    assert gates(board.entries) == entries
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        assert sum(entry[f"gate/mean/weight/{arm}"] for arm in ("a", "b", "frozen")) == pytest.approx(1, abs=1e-4)
        assert 0 < entry["gate/mean/entropy"] <= torch.tensor(3.0).log() + 1e-4
        assert entry["gate/mean/dead"] == 0
        assert 1 - 1e-4 <= entry["loss/balance"] <= 3  # the loss itself, before its coefficient
    layers = {key.removeprefix("gate/").removesuffix("/entropy") for key in entries[0] if key.endswith("/entropy")}
    assert layers == {"mean", *(f"bert.encoder.layer.{i}.output.dense" for i in (1,))}
    assert all(isinstance(value, (int, float)) for entry in entries for value in entry.values())


def test_gate_usage_leaves_the_entries_of_the_trainer_as_they_are(tiny: Any, tmp_path: Path) -> None:
    trainer, board = watched(tiny, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2)
    plain = Trainer(
        model=trainer.model, args=trainer.args, train_dataset=trainer.train_dataset, eval_dataset=trainer.eval_dataset
    )
    plain.train()
    expected = [(entry["step"], set(entry)) for entry in plain.state.log_history]
    for seen in (trainer.state.log_history, board.entries):
        assert [(e["step"], set(e)) for e in seen if e not in gates(seen)] == expected
    assert sum({"loss", "grad_norm", "learning_rate"} <= set(entry) for entry in board.entries) == 4


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 3, "logging_steps": 500}, [3]),
        ({"max_steps": 3, "logging_steps": 2}, [2, 3]),
        ({"max_steps": 3, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2}, [3]),
        ({"max_steps": 3, "logging_strategy": "no"}, [3]),
        ({"max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch"}, [4, 8]),
    ],
)
def test_what_no_entry_has_reported_is_reported_at_the_end(
    options: dict[str, Any], steps: list[int], tiny: Any, tmp_path: Path
) -> None:
    trainer, board = watched(tiny, tmp_path, **options)
    for entries in (trainer.state.log_history, board.entries):
        assert [entry["step"] for entry in gates(entries)] == steps


def test_gate_usage_of_a_run_holds_nothing_of_before(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert", "sequence_classification"), mixda(balance_coef=0.5, task_type="SEQ_CLS"))
    batch = {name: torch.stack([row[name] for row in rows(4, classes=True)]) for name in rows(1)[0]}
    model.train()(**batch)  # as in a run that has failed
    seen = model.base_model.context
    assert seen.loss_log
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=rows(classes=True))
    counted: list[int] = []

    class Looks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            counted.append(seen.loss_log["balance"][1])

    trainer.add_callback(GateUsageCallback(trainer))
    trainer.add_callback(Looks())
    trainer.train()
    assert counted == [1]


def test_gate_usage_of_a_model_without_a_wrapper(tiny: Any, tmp_path: Path) -> None:
    model = tiny("bert", "sequence_classification")
    model.add_adapter(mixda(balance_coef=0.5))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(classes=True))
    trainer.add_callback(GateUsageCallback(trainer))
    trainer.train()
    assert [entry["step"] for entry in gates(trainer.state.log_history)] == [1, 2]


def test_gate_usage_counts_training_batches_since_the_last_report(tiny: Any, tiny_inputs: Any) -> None:
    model = get_peft_model(tiny("bert"), mixda(balance_coef=1.0, domain_layers=[1, 2]))
    first = next(m for m in model.modules() if isinstance(m, DomainGate))
    with torch.no_grad():
        first.output.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    inputs = tiny_inputs("bert", padding="right", labels="tokens")
    model.eval()(**inputs)
    assert collect_usage(model) == {}
    model.train()(**inputs)
    report = collect_usage(model, per_layer=True)
    assert {key for key in report if "mean" in key} == {
        "gate/mean/weight/a", "gate/mean/weight/b", "gate/mean/weight/frozen", "gate/mean/entropy", "gate/mean/dead",
        "gate/mean/cv",
    }  # fmt: skip
    sharp = "gate/bert.encoder.layer.1.output.dense"
    assert report[f"{sharp}/weight/a"] > 0.99
    assert report[f"{sharp}/dead"] == 2
    assert report["gate/mean/dead"] == 1
    assert report["gate/mean/weight/a"] == pytest.approx((report[f"{sharp}/weight/a"] + 1 / 3) / 2, abs=1e-3)
    assert collect_usage(model) == {}


def test_models_without_gates_report_nothing_and_are_told_so_once(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert", "sequence_classification"), BottleneckConfig(r=4))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(classes=True))
    trainer.add_callback(GateUsageCallback(trainer))
    with pytest.warns(UserWarning, match="GateUsageCallback has nothing to report") as told:
        trainer.train()
    assert len([one for one in told if "GateUsageCallback" in str(one.message)]) == 1
    assert gates(trainer.state.log_history) == []


def test_gate_usage_of_a_model_without_our_adapters_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert", "sequence_classification"), LoraConfig(r=2, target_modules=["query"]))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(classes=True))
    trainer.add_callback(GateUsageCallback(trainer))
    with pytest.raises(ValueError, match="GateUsageCallback: PeftModel holds no adapter of mixadapters"):
        trainer.train()


def test_processes_that_would_train_by_themselves_are_refused(monkeypatch, tmp_path) -> None:
    alone = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    check_launched(alone)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher sets it
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2 processes were launched.*pass use_cpu=True"):
        check_launched(alone)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    check_launched(alone)
