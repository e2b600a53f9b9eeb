"""Adversarial training: bounded perturbations, and steps that train experts or routers alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import get_peft_model
from placing import FIRST, SECOND, put, two_devices
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from mixadapters import BottleneckConfig, MoAConfig
from mixadapters.training.adversarial import AdversarialTrainerMixin, EmbeddingAttack, perturbed, robustness

IDS = torch.randint(5, 60, (8, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[:, 4:] = torch.tensor([0, 1]).repeat(4).unsqueeze(1)
LABELS = torch.arange(8) % 2
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
ROWS = [{name: value[i] for name, value in BATCH.items()} for i in range(8)]


class AdversarialTrainer(AdversarialTrainerMixin, Trainer):
    pass


def made(config: Any = None, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    base = BertForSequenceClassification(BertConfig(vocab_size=64, initializer_range=0.3, **sizes, **still))
    default = MoAConfig(
        num_experts=3, num_experts_per_tok=1, r=4, target_modules=["query", "value"], task_type="SEQ_CLS",
        init_weights=False, router_init_range=0.5,
    )  # fmt: skip
    return get_peft_model(base, config or default)


def trained(tmp_path, steps: int, trainer: type = AdversarialTrainer, **options: Any) -> nn.Module:
    model = made()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
        learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.1, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer(model=model, args=arguments, train_dataset=ROWS, **options).train()
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_steps_train_all_but_the_routers_and_then_the_routers_alone(tmp_path) -> None:
    start, first, second = (weights(trained(tmp_path, steps) if steps else made()) for steps in (0, 1, 2))
    routers = {name for name in start if ".router." in name}
    assert routers
    assert changed(start, first) == start.keys() - routers  # the head and the experts, decay and moments included
    assert changed(first, second) == routers


def test_together_trains_everything_in_each_step(tmp_path) -> None:
    start = weights(made())
    assert changed(start, weights(trained(tmp_path, 1, alternate=False))) == start.keys()


def test_without_perturbation_it_is_plain_training(tmp_path) -> None:
    plain = weights(trained(tmp_path, 2, Trainer))
    assert not changed(plain, weights(trained(tmp_path, 2, eps=0.0)))
    assert changed(plain, weights(trained(tmp_path, 2, alternate=False)))


def test_the_losses_are_those_of_the_definition(tmp_path) -> None:
    """A step of the experts adds beta times a mean of KL(clean || moved); by another beta another loss."""
    model = made()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = AdversarialTrainer(model=model, args=arguments, train_dataset=ROWS, beta=2.0, eps=0.3)
    model.train()
    delta = 0.05 * torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(3))
    trainer.attack.find = lambda *_: delta
    main = float(model(**BATCH).loss.detach())
    with perturbed(model, delta):
        moved = model(**BATCH).logits.log_softmax(-1)
    clean = model(**BATCH).logits.log_softmax(-1)
    wanted = main + 2 * float((clean.exp() * (clean - moved)).sum(-1).mean().detach())
    assert float(trainer.compute_loss(model, dict(BATCH)).detach()) == pytest.approx(wanted, rel=1e-5)
    model.eval()  # evaluation is never attacked, and has no auxiliary losses
    plain = float(model(**BATCH).loss.detach())
    assert float(trainer.compute_loss(model, dict(BATCH)).detach()) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("labels", [None, LABELS])
def test_a_change_is_bounded_leaves_padding_out_and_does_its_work(labels: Tensor | None) -> None:
    model = made(dropout=0.5).train()
    model.base_model.model.classifier.eval()
    attack = EmbeddingAttack(eps=0.3, steps=4, step_size=0.2)
    with torch.random.fork_rng():
        delta = attack.find(model, BATCH, labels)
    bound = 0.3 * float(model.get_input_embeddings().weight.std())
    assert float(delta.abs().max()) == pytest.approx(bound, rel=1e-5)
    assert not delta[MASK == 0].any()
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not model.base_model.model.classifier.training  # as it was
    model.eval()
    before = model(**BATCH)
    with perturbed(model, delta):
        after = model(**BATCH)
    torch.testing.assert_close(model(**BATCH).logits, before.logits)  # it is gone
    if labels is None:
        assert float((after.logits - before.logits).abs().max()) > 1e-2
    else:
        assert float(after.loss) > float(before.loss) + 1e-2


def test_robustness_falls_with_the_strength_of_the_attack() -> None:
    model = made().eval()
    none, some, much = (robustness(model, [BATCH], EmbeddingAttack(eps, 5, eps / 2)) for eps in (0.0, 0.1, 2.0))
    assert none.accuracy == none.robust_accuracy == some.accuracy
    assert none.flip_rate == 0
    assert 0 < some.flip_rate < much.flip_rate <= 1
    assert much.robust_accuracy < none.robust_accuracy
    with pytest.raises(ValueError, match="batches are empty"):
        robustness(model, [], EmbeddingAttack())


def attacked(tmp_path, spread: bool, apart: str) -> dict[str, Any]:
    """What attacks and losses are; spread: with the upper layers on another device, and there the field `apart`."""
    model = made()
    base = model.get_base_model()
    upper = (*base.bert.encoder.layer[1:], base.bert.pooler, base.classifier)
    with two_devices(base, *upper) if spread else nullcontext():
        batch = {name: value.clone() for name, value in BATCH.items()}
        if spread:
            batch = {name: put(value, SECOND if name == apart else FIRST) for name, value in batch.items()}
        torch.manual_seed(0)
        attack = EmbeddingAttack(0.3, 3)
        found = {"moved": attack.find(model, batch), "missed": attack.find(model, batch, batch["labels"])}
        found["robustness"] = torch.tensor(robustness(model, [batch], attack))
        if apart == "labels":  # where the logits are: BERT's own loss asks for that
            arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
            trainer = AdversarialTrainer(
                model=model, args=arguments, train_dataset=ROWS, eps=0.3, router_alpha=0.5
            )  # fmt: skip
            for step in (0, 1):
                trainer.state.global_step = step
                loss = trainer.compute_loss(model.train(), dict(batch))
                loss.backward()
                found[f"loss {step}"] = loss.detach()
        return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("apart", ["", "labels"])
def test_layers_on_another_device_change_nothing(tmp_path, apart: str) -> None:
    wanted, found = (attacked(tmp_path, spread, apart) for spread in (False, True))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"eps": -1.0}, "eps=-1"), ({"steps": 0}, "steps=0"), ({"beta": float("nan")}, "beta=nan")],
)
def test_numbers_out_of_range_are_refused(options: dict, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialTrainer(model=made(), args=TrainingArguments(str(tmp_path), use_cpu=True), **options)


def test_a_model_without_routers_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no router that learns"):
        AdversarialTrainer(
            model=made(BottleneckConfig(r=4, task_type="SEQ_CLS")),
            args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
        )
