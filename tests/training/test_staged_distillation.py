"""A teacher in the first part of a run, and none in the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from mixadapters import BottleneckConfig, StageCallback, StagedDistillCallback
from mixadapters.core.context import ForwardContext
from mixadapters.core.joining import predicts_next
from mixadapters.training.staged_distillation import TeacherDistillation, distillation_loss


def trained(
    model: Any, rows: list[dict[str, Any]], folder: Any, callbacks: list[TrainerCallback], **options: Any
) -> Any:
    given = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": [], **options}
    args = TrainingArguments(str(folder), save_strategy="no", disable_tqdm=True, use_cpu=True, **given)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


class Losses(TrainerCallback):
    """What each step added, by the context's log."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        log = ForwardContext.of(model).loss_log
        self.seen.append("distillation" in log)
        log.clear()


@pytest.fixture
def rows(tiny_inputs) -> list[dict[str, Any]]:
    batch = tiny_inputs("llama", batch=8, length=6, labels="tokens")
    return [{name: tensor[i] for name, tensor in batch.items()} for i in range(8)]


def adapter(tiny) -> Any:
    return get_peft_model(tiny("llama", num_hidden_layers=2), BottleneckConfig(r=4, task_type="CAUSAL_LM"))


def test_the_teacher_is_heard_until_its_share_of_the_run_and_not_after(tiny, rows, tmp_path) -> None:
    teacher, model, losses = tiny("llama", num_hidden_layers=3).train(), adapter(tiny), Losses()
    callback = StagedDistillCallback(teacher, stop_at=0.5)
    trained(model, rows, tmp_path, [StageCallback("task"), callback, losses])
    assert losses.seen == [True, True, False, False]
    assert callback.objective not in ForwardContext.of(model).objectives
    assert not teacher.training


def test_a_bare_base_whose_experts_were_cut_learns_from_what_it_was(tiny, rows, tmp_path) -> None:
    teacher, model, losses = tiny("mixtral", num_hidden_layers=1), tiny("mixtral", num_hidden_layers=1), Losses()
    trained(model, rows, tmp_path, [StagedDistillCallback(teacher, stop_at=0.5), losses], max_steps=2)
    assert losses.seen == [True, False]
    context = ForwardContext.find(model)
    assert context is None or not context.objectives


@pytest.mark.parametrize(("alpha", "T"), [(1.0, 1.0), (0.3, 2.0)])
def test_the_loss_is_that_of_the_task_and_the_divergence_of_what_has_a_label(
    tiny, tiny_inputs, alpha: float, T: float
) -> None:
    teacher, model = tiny("llama", num_hidden_layers=3), adapter(tiny).train()
    batch = tiny_inputs("llama", batch=3, padding="right", labels="tokens")
    callback = StagedDistillCallback(teacher, alpha=alpha, T=T)
    plain = model(**batch)
    callback.objective.weight = alpha
    ForwardContext.of(model).objectives.append(callback.objective)
    both = model(**batch)
    with torch.no_grad():
        theirs = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1] / T
    ours = plain.logits[:, :-1] / T
    distance = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
    expected = plain.loss + alpha * T**2 * distance[batch["labels"][:, 1:] != -100].mean()
    assert float(both.loss) == pytest.approx(float(expected), rel=1e-5)
    model.eval()
    assert torch.allclose(model(**batch).loss, plain.loss)  # not in evaluation


def test_a_teacher_may_be_a_function_and_classes_all_count(tiny, tiny_inputs) -> None:
    config = BottleneckConfig(r=4, task_type="SEQ_CLS")
    model = get_peft_model(tiny("bert", "sequence_classification", num_hidden_layers=2), config).train()
    model.base_model.model.config.hidden_dropout_prob = 0.0
    batch = tiny_inputs("bert", labels="classes")
    logits = torch.randn(2, 3)
    callback = StagedDistillCallback(lambda **inputs: logits)
    callback.objective.weight = 1.0
    model.eval()
    plain = model(**batch)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ForwardContext.of(model).objectives.append(callback.objective)
    expected = plain.loss + F.kl_div(plain.logits.log_softmax(-1), logits.softmax(-1), reduction="batchmean")
    assert float(model(**batch).loss) == pytest.approx(float(expected), rel=1e-5)
    callback.objective.teacher = lambda **inputs: torch.randn(2, 4)
    with pytest.raises(ValueError, match="not for the same words or labels"):
        model(**batch)


def test_equal_logits_have_no_distance_and_rows_that_do_not_count_none() -> None:
    logits, other = torch.randn(4, 5), torch.randn(4, 5)
    assert float(distillation_loss(logits, logits, None, 3.0)) == pytest.approx(0, abs=1e-6)
    counts = torch.tensor([True, False, True, False])
    assert torch.allclose(distillation_loss(logits, other, counts), distillation_loss(logits[::2], other[::2], None))
    assert float(distillation_loss(logits, other, torch.zeros(4).bool())) == 0


def test_what_cannot_teach_is_refused(tiny, rows, tmp_path) -> None:
    for options, message in (({"stop_at": 1.5}, "stop_at=1.5"), ({"alpha": 0}, "alpha=0"), ({"T": -1}, "T=-1")):
        with pytest.raises(ValueError, match=message):
            StagedDistillCallback(lambda **inputs: None, **options)
    model = adapter(tiny)
    with pytest.raises(ValueError, match="shares parameters with the model that trains"):
        trained(model, rows, tmp_path, [StagedDistillCallback(model.get_base_model())])


class Fails(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("the run has failed")


class Interrupts(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("ends", [Fails, Interrupts])
def test_a_run_that_fails_leaves_no_teacher_no_scale_and_no_context(ends, tiny, rows, tmp_path) -> None:
    model, callback = adapter(tiny), StagedDistillCallback(tiny("llama", num_hidden_layers=3), stop_at=1.0)
    context, bare = ForwardContext.of(model), tiny("llama", num_hidden_layers=1)
    for one, stage in ((model, [StageCallback("task")]), (bare, [])):
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            trained(one, rows, tmp_path, [*stage, callback, ends()], gradient_accumulation_steps=2)
    assert (context.objectives, context.loss_scale) == ([], None)
    assert ForwardContext.find(bare) is None


def test_a_copy_that_is_made_in_a_run_has_no_teacher_and_no_scale(tiny, rows, tmp_path) -> None:
    copies: list[Any] = []

    class Copies(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            copies.append(copy.deepcopy(model))

    callback = StagedDistillCallback(tiny("llama", num_hidden_layers=3), stop_at=1.0)
    trained(adapter(tiny), rows, tmp_path, [StageCallback("task"), callback, Copies()], max_steps=1)
    context = ForwardContext.of(copies[0])
    assert (context.objectives, context.loss_scale) == ([], None)


def test_contexts_that_a_run_has_made_go_with_it_and_no_others(tiny, rows, tmp_path) -> None:
    callback = StagedDistillCallback(tiny("llama", num_hidden_layers=3))
    own = tiny("llama", num_hidden_layers=1)
    context, bare = ForwardContext.of(own), tiny("llama", num_hidden_layers=1)
    for one in (own, bare, own):
        trained(one, rows, tmp_path, [callback], max_steps=1)
    assert ForwardContext.find(own) is context
    assert ForwardContext.find(bare) is None


def test_only_what_has_classes_in_its_last_axis_is_brought_to_a_teacher() -> None:
    from transformers.modeling_outputs import BaseModelOutput, SemanticSegmenterOutput, SequenceClassifierOutput

    for output, message in (
        (SemanticSegmenterOutput(logits=torch.zeros(2, 3, 4, 4)), r"\(2, 3, 4, 4\).*not for segmentation"),
        (SequenceClassifierOutput(logits=torch.zeros(2, 1)), r"\(2, 1\) are no distribution"),
        (BaseModelOutput(last_hidden_state=torch.zeros(2, 3, 4)), "BaseModelOutput has no logits"),
    ):
        objective = TeacherDistillation(lambda output=output, **_: output.get("logits", torch.zeros(2, 3)))
        objective.weight, context = 1.0, ForwardContext()
        context.record.training = True
        with pytest.raises(ValueError, match=message):
            objective.after(context, torch.nn.Module(), output)


def test_what_is_no_teacher_and_no_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher='gpt2' must be a model"):
        TeacherDistillation("gpt2")  # type: ignore[arg-type]
    for wrong in (0.0, float("nan"), True):
        with pytest.raises(ValueError, match="temperature="):
            TeacherDistillation(len, wrong)


def test_causal_models_that_name_no_loss_compare_the_logits_before_each_label(tiny, tiny_inputs) -> None:
    """GPT-2's class names none, and its loss shifts the labels all the same."""
    model, batch = tiny("gpt2"), tiny_inputs("gpt2", labels="tokens")
    logits, labels = model(**batch).logits, batch["labels"]
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(**batch).loss, shifted)
    assert predicts_next(model)
    assert predicts_next(tiny("llama"))
    assert not predicts_next(tiny("bert"))
    two_texts = tiny("t5")
    for named in (two_texts.loss_type, None):  # which EncoderDecoderModel has
        two_texts.loss_type = named
        assert not predicts_next(two_texts)
