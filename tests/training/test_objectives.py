from __future__ import annotations

from math import log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from mixadapters import AGDConfig, BottleneckConfig
from mixadapters.training.objectives import (
    ContrastiveObjective,
    MaskedObjectObjective,
    PreservationObjective,
    mean_per_text,
    partners,
    pool,
    preservation_loss,
    require_pretrained_head,
)

TRAINING, EVALUATION = nn.Identity().train(), nn.Identity().eval()


class Context:
    """What objectives use of a ForwardContext, written down instead of acted on."""

    def __init__(self, attention_mask=None, deltas=(), **values) -> None:
        self.record = SimpleNamespace(attention_mask=attention_mask, values=values)
        self.deltas, self.observed = deltas, []
        self.main, self.scale, self.extra = None, 1.0, {}

    def set_loss(self, value) -> None:
        self.main = value

    def scale_loss(self, factor) -> None:
        self.scale *= factor

    def add_loss(self, name, value, weight=1.0) -> None:
        self.extra[name] = weight * value

    def observe(self, module, **inputs):
        self.observed.append((module, inputs))
        return list(self.deltas)


def test_before_leaves_the_inputs_alone() -> None:
    for objective in (ContrastiveObjective(), MaskedObjectObjective(), PreservationObjective()):
        assert objective.before(Context(), (1,), {"x": 2}) == ((1,), {"x": 2})


# --- contrastive ------------------------------------------------------------------------------------------------


def contrast(hidden, mask, labels, module=TRAINING, **options):
    context = Context(mask, labels=labels)
    ContrastiveObjective(**options).after(context, module, BaseModelOutput(last_hidden_state=hidden))
    return context.main


def naive_contrast(anchor, positive, temperature: float):
    total = 0.0
    for one, other in ((anchor, positive), (positive, anchor)):
        for i in range(len(one)):
            scores = (
                torch.stack([F.cosine_similarity(one[i], other[j], dim=0) for j in range(len(other))]) / temperature
            )
            total = total - scores.log_softmax(0)[i]
    return total / (2 * len(anchor))


@pytest.mark.parametrize("order", [[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [2, 0, 1, 1, 0, 2]])
def test_contrastive_loss_equals_a_loop_in_any_order_of_rows(order) -> None:
    torch.manual_seed(0)
    hidden, labels = torch.randn(6, 4, 8), torch.tensor(order)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    means = torch.stack([h[m.bool()].mean(0) for h, m in zip(hidden, mask, strict=True)])
    rows = [[i for i, n in enumerate(order) if n == pair] for pair in range(3)]
    expected = naive_contrast(means[[a for a, _ in rows]], means[[p for _, p in rows]], 0.1)
    torch.testing.assert_close(contrast(hidden, mask, labels, temperature=0.1), expected)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_contrastive_loss_does_not_see_padding(pooling, side) -> None:
    torch.manual_seed(0)
    hidden, mask, labels = torch.randn(4, 3, 8), torch.ones(4, 3).long(), torch.tensor([0, 0, 1, 1])
    alone = contrast(hidden, mask, labels, pooling=pooling)
    extra = (0, 0, 0, 5) if side == "right" else (0, 0, 5, 0)
    padded = F.pad(hidden, extra, value=float("nan"))
    together = contrast(padded, F.pad(mask, extra[2:]), labels, pooling=pooling)
    torch.testing.assert_close(together, alone)


def test_pooling_of_a_row_of_padding_is_finite() -> None:
    assert pool(torch.randn(2, 3, 4), torch.tensor([[0, 0, 0], [1, 1, 0]]), "mean").isfinite().all()


def test_contrastive_gradient_reaches_both_views_and_no_padding() -> None:
    hidden = torch.randn(4, 3, 8, requires_grad=True)
    mask = torch.tensor([[1, 1, 0]] * 4)
    contrast(hidden, mask, torch.tensor([0, 0, 1, 1])).backward()
    assert (hidden.grad[:, :2].abs().sum((1, 2)) > 0).all()
    assert (hidden.grad[:, 2] == 0).all()


def test_contrastive_loss_is_small_for_clear_pairs() -> None:
    hidden = torch.eye(4).repeat_interleave(2, 0).unsqueeze(1)
    labels, mask = torch.arange(4).repeat_interleave(2), torch.ones(8, 1)
    assert contrast(hidden, mask, labels) < 1e-6
    assert contrast(hidden, mask, labels.roll(1)) > 5


@pytest.mark.parametrize(
    ("hidden", "mask", "labels", "message"),
    [
        (torch.randn(4, 3, 8), torch.ones(4, 3), None, "PairCollator"),
        (torch.randn(4, 3, 8), None, torch.tensor([0, 0, 1, 1]), "attention_mask=None"),
        (torch.randn(4, 3, 8), torch.ones(4, 5), torch.tensor([0, 0, 1, 1]), "does not fit"),
        (None, torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), "AutoModel, without a head"),
        (torch.randn(5, 3, 8), torch.ones(5, 3), torch.tensor([0, 0, 1, 1, 2]), "do not number pairs"),
        (torch.randn(2, 3, 8), torch.ones(2, 3), torch.tensor([0, 0]), "dataloader_drop_last"),
        (torch.randn(4, 3, 8), torch.ones(4, 3), torch.tensor([0, 1, 2, 3]), "exactly twice"),
        (torch.randn(4, 3, 8), torch.ones(4, 3), torch.tensor([1, 1, 1, 1]), "exactly twice"),
        (torch.randn(4, 3, 8), torch.ones(4, 3), torch.ones(4, 3), "do not number pairs"),
    ],
)
def test_contrastive_loss_refuses(hidden, mask, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        contrast(hidden, mask, labels)


def test_partners_follow_the_numbers() -> None:
    anchor, positive = partners(torch.tensor([7, 3, 7, 3]))
    assert (anchor.tolist(), positive.tolist()) == ([1, 0], [3, 2])


def test_forwards_without_labels_in_evaluation_are_left_alone() -> None:
    for objective in (ContrastiveObjective(), MaskedObjectObjective()):
        context, output = Context(), BaseModelOutput(last_hidden_state=torch.randn(1, 2, 4))
        assert objective.in_eval
        assert objective.after(context, EVALUATION, output) is output
        assert context.main is None
        with pytest.raises(ValueError, match="labels=None"):
            objective.after(context, TRAINING, output)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": float("nan")}, {"pooling": "max"}])
def test_contrastive_options_are_checked(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ContrastiveObjective(**options)


# --- masked objects ---------------------------------------------------------------------------------------------


def test_masked_object_loss_is_the_mean_of_means() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7)
    labels = torch.full((3, 5), -100)
    labels[0, 1], labels[1, 0:3] = 2, torch.tensor([1, 4, 6])  # the third text has none
    rows = [F.cross_entropy(logits[i][labels[i] >= 0], labels[i][labels[i] >= 0]) for i in range(2)]
    context = Context(labels=labels)
    MaskedObjectObjective().after(context, TRAINING, MaskedLMOutput(logits=logits))
    torch.testing.assert_close(context.main, sum(rows) / 2)
    assert mean_per_text(logits, torch.full_like(labels, -100)) == 0


def test_masked_object_loss_needs_logits_of_the_labels_shape() -> None:
    for output in (BaseModelOutput(last_hidden_state=torch.randn(2, 3, 4)), MaskedLMOutput(logits=torch.randn(2, 9))):
        with pytest.raises(ValueError, match="AutoModelForMaskedLM"):
            MaskedObjectObjective().after(Context(labels=torch.ones(2, 3)), TRAINING, output)


# --- preservation -----------------------------------------------------------------------------------------------


def naive_preservation(deltas, mask) -> float:
    total = 0.0
    for delta in deltas:
        for row, valid in zip(delta, mask, strict=True):
            total += sum(float((row[t] ** 2).sum()) for t in range(len(row)) if valid[t]) / delta.shape[-1]
    return total / (len(deltas) * float(mask.sum()))


def test_preservation_loss_equals_a_loop() -> None:
    torch.manual_seed(0)
    deltas, mask = [torch.randn(2, 4, 8), torch.randn(2, 4, 8)], torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert preservation_loss(deltas, mask).item() == pytest.approx(naive_preservation(deltas, mask), rel=1e-5)


def test_preservation_loss_does_not_see_padding() -> None:
    delta, mask = torch.randn(2, 3, 8), torch.ones(2, 3).long()
    for extra in ((0, 0, 0, 5), (0, 0, 5, 0)):
        padded = preservation_loss([F.pad(delta, extra, value=float("nan"))], F.pad(mask, extra[2:]))
        torch.testing.assert_close(padded, preservation_loss([delta], mask))


def test_preservation_loss_of_padding_alone_is_zero() -> None:
    assert preservation_loss([torch.randn(2, 3, 8)], torch.zeros(2, 3)) == 0


def test_preservation_loss_sums_half_precision_in_full() -> None:
    delta = torch.full((4, 64, 64), 3.0, dtype=torch.float16)  # the sum of squares overflows float16
    assert preservation_loss([delta], torch.ones(4, 64)) == pytest.approx(9.0)


def test_total_is_the_weighted_sum_and_trains_the_adapter() -> None:
    delta = torch.randn(2, 3, 8, requires_grad=True)
    ids, mask = torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [1, 1, 0]])
    context, output = Context(deltas=[delta], old_input_ids=ids, old_attention_mask=mask), object()
    assert PreservationObjective(weight=3.0, knowledge_weight=0.25).after(context, TRAINING, output) is output
    assert context.scale == 0.25
    torch.testing.assert_close(context.extra["preservation"], 3 * preservation_loss([delta], mask))
    assert context.observed == [(TRAINING, {"input_ids": ids, "attention_mask": mask})]
    context.extra["preservation"].backward()
    assert (delta.grad[mask == 1] != 0).all()
    assert (delta.grad[mask == 0] == 0).all()


@pytest.mark.parametrize("given", [{}, {"old_input_ids": torch.ones(2, 3)}, {"old_attention_mask": torch.ones(2, 3)}])
def test_preservation_needs_general_text(given) -> None:
    with pytest.raises(ValueError, match=r"WithGeneralText.*remove_unused_columns=False"):
        PreservationObjective().after(Context(**given), TRAINING, None)
    assert not PreservationObjective.in_eval


def test_preservation_refuses_what_it_cannot_weigh() -> None:
    with pytest.raises(ValueError, match="no adapter was observed"):
        preservation_loss([], torch.ones(2, 3))
    with pytest.raises(ValueError, match="does not fit"):
        preservation_loss([torch.randn(2, 4, 8)], torch.ones(2, 3))
    for options in ({"weight": -1.0}, {"knowledge_weight": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PreservationObjective(**options)


# --- the head ---------------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


def mlm_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(5, 50, (4, 8))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_a_random_head_is_refused_and_flags_are_restored() -> None:
    model, batch = BertForMaskedLM(BertConfig(**TINY)), mlm_batch()
    model.train()
    model.bert.eval()
    flags = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match="newly initialised"):
        require_pretrained_head(model, batch)
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_a_trained_head_passes() -> None:
    model, batch = BertForMaskedLM(BertConfig(**TINY)), mlm_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert require_pretrained_head(model, batch) < 0.8 * log(50)


@pytest.mark.parametrize(
    ("others", "message"),
    [([0.01, 0.01, 0.01], None), ([9.0], "newly initialised"), ([float("nan")], "no finite loss")],
)
def test_all_processes_judge_a_head_alike(
    others: list[float], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that went on alone would wait for the others."""
    model, batch = BertForMaskedLM(BertConfig(**TINY)), mlm_batch()
    with torch.no_grad():
        mine = float(model(**batch).loss)
    monkeypatch.setattr("mixadapters.training.objectives.gathered", lambda value: [value, *others])
    if message is None:
        assert require_pretrained_head(model, batch) == pytest.approx((mine + sum(others)) / 4, rel=0.1)
    else:
        with pytest.raises(ValueError, match=message):
            require_pretrained_head(model, batch)


def test_the_head_is_judged_without_dropout() -> None:
    model, batch = BertForMaskedLM(BertConfig(**TINY, hidden_dropout_prob=0.5)).train(), mlm_batch()
    seen = []
    model.bert.register_forward_hook(lambda module, *_: seen.append(module.training))
    with pytest.raises(ValueError, match="newly initialised"):
        require_pretrained_head(model, batch)
    assert seen == [False]


def test_a_batch_without_loss_cannot_be_judged() -> None:
    model, batch = BertForMaskedLM(BertConfig(**TINY)), mlm_batch()
    for labels in (None, torch.full_like(batch["labels"], -100)):
        with pytest.raises(ValueError, match="no finite loss"):
            require_pretrained_head(model, {**batch, "labels": labels})
    with pytest.raises(ValueError, match="no finite loss"):
        require_pretrained_head(BertModel(BertConfig(**TINY)), {"input_ids": batch["input_ids"]})


# --- in the real context ----------------------------------------------------------------------------------------


def test_the_forward_returns_the_contrastive_loss() -> None:
    from mixadapters.core.context import ForwardContext

    model = BertModel(BertConfig(**TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    ForwardContext.of(model).objectives.append(ContrastiveObjective())
    batch = {**mlm_batch(), "labels": torch.tensor([0, 0, 1, 1])}
    output = model(**batch)
    expected = contrast(output.last_hidden_state, batch["attention_mask"], batch["labels"])
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_the_forward_returns_the_mean_per_text() -> None:
    from mixadapters.core.context import ForwardContext

    model, batch = BertForMaskedLM(BertConfig(**TINY)).train(), mlm_batch()
    batch["labels"] = batch["labels"].masked_fill(torch.arange(8) >= torch.tensor([1, 3, 8, 2])[:, None], -100)
    ForwardContext.of(model).objectives.append(MaskedObjectObjective())
    for training in (True, False):
        output = model.train(training)(**batch)
        torch.testing.assert_close(output.loss, mean_per_text(output.logits, batch["labels"]))
    del batch["labels"]
    assert model(**batch).loss is None


@pytest.mark.parametrize(
    ("config", "name", "objective"),
    [
        (BottleneckConfig(r=2), "old_input_ids", "PreservationObjective"),
        (BottleneckConfig(r=2), "old_attention_mask", "PreservationObjective"),
        (AGDConfig(r=4), "target", "GuidanceDistillation"),
    ],
)
def test_what_a_batch_holds_for_an_objective_that_is_not_there_is_refused(
    config: Any, name: str, objective: str, tiny: Any, tiny_inputs: Any
) -> None:
    model = get_peft_model(tiny("llama", num_hidden_layers=2), config).train()
    batch = tiny_inputs("llama", labels="tokens")
    with pytest.raises(ValueError, match=rf"{name} is for {objective}.*objectives=\[{objective}\(\)\]"):
        model(**batch, **{name: batch["input_ids"]})
