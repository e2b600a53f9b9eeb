"""A plain Trainer trains right: auxiliary losses, accumulation, checkpointing; and both stages from end to end."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from mixadapters import BottleneckConfig, GateUsageCallback, MixDAConfig, StageCallback
from mixadapters.training.collators import PairCollator, WithGeneralText
from mixadapters.training.objectives import ContrastiveObjective, PreservationObjective

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEADS = {  # kind of the tiny model, its head, options, labels
    "classes": ("bert", "sequence_classification", NO_DROPOUT, "classes"),
    "masked": ("bert", "masked_lm", NO_DROPOUT, "tokens"),
    "causal": ("llama", "causal_lm", {}, "tokens"),
}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    options = {
        "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0.0, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "train_sampling_strategy": "sequential", "logging_steps": 1, **options,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return TrainingArguments(output_dir=str(folder), **options)


def mixda(**fields: Any) -> MixDAConfig:
    return MixDAConfig(**{"domains": ["a", "b"], "r": 4, "init_weights": False, "balance_coef": 3.0, **fields})


def made(tiny: Any, head: str, config: Any = None) -> nn.Module:
    torch.manual_seed(0)
    kind, name, options, _ = HEADS[head]
    return get_peft_model(tiny(kind, name, **options), config or mixda())


def batch_of(tiny_inputs: Any, head: str) -> dict[str, Tensor]:
    return tiny_inputs(HEADS[head][0], batch=2, labels=HEADS[head][3], padding="right")


def as_rows(batch: dict[str, Tensor], times: int = 1) -> list[dict[str, Tensor]]:
    return [{k: v[i] for k, v in batch.items()} for _ in range(times) for i in range(2)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, msg=lambda text, name=name: f"{name}: {text}", atol=1e-6, rtol=1e-4)


# --- auxiliary losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_a_plain_trainer_descends_on_the_sum_of_all_losses(
    head: str, tiny: Any, tiny_inputs: Any, tmp_path: Path
) -> None:
    batch = batch_of(tiny_inputs, head)
    by_hand = made(tiny, head)
    by_hand.train()(**batch).loss.backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            if p.requires_grad:
                p -= 0.1 * p.grad
    model = made(tiny, head)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=as_rows(batch)).train()
    equal(state(by_hand), state(model))
    without = made(tiny, head, mixda(balance_coef=0.0))
    Trainer(model=without, args=arguments(tmp_path), train_dataset=as_rows(batch)).train()
    gates = [name for name in state(model) if ".router." in name]
    assert gates
    assert any(not torch.allclose(state(model)[name], state(without)[name], atol=1e-4) for name in gates)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("head", HEADS)
def test_accumulated_micro_batches_weigh_as_one_batch(
    head: str, smoothing: float, tiny: Any, tiny_inputs: Any, tmp_path: Path
) -> None:
    """The same micro-batch three times is that batch once. With label smoothing the model gives no loss to join.

    BERT's own loss counts once per micro-batch (transformers tells it `num_items_in_batch`, and it does not listen),
    so what the auxiliary loss adds is compared: one step of SGD is linear in the losses.
    """
    batch, added = batch_of(tiny_inputs, head), []
    for accumulated in (1, 3):
        ends = []
        for coefficient in (3.0, 0.0):
            model = made(tiny, head, mixda(balance_coef=coefficient))
            options = arguments(tmp_path, gradient_accumulation_steps=accumulated, label_smoothing_factor=smoothing)
            rows = as_rows(batch, accumulated)
            Trainer(model=model, args=options, train_dataset=rows, callbacks=[StageCallback("task")]).train()
            ends.append(state(model))
        added.append({name: value - ends[1][name] for name, value in ends[0].items()})
    equal(*added)
    assert max(value.abs().max() for value in added[0].values()) > 0.1


def test_label_smoothing_keeps_the_auxiliary_loss(tiny: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    batch = batch_of(tiny_inputs, "classes")
    by_hand = made(tiny, "classes").train()
    labels = batch["labels"]
    output = by_hand(**{k: v for k, v in batch.items() if k != "labels"})
    assert getattr(output, "loss", None) is None
    LabelSmoother(0.1)(output, labels).backward()
    context = by_hand.base_model.context
    with torch.no_grad():
        for p in by_hand.parameters():
            if p.requires_grad:
                p -= 0.1 * p.grad
    assert set(context.loss_log) == {"balance"}
    model = made(tiny, "classes")
    Trainer(model=model, args=arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=as_rows(batch)).train()
    equal(state(by_hand), state(model))
    without = made(tiny, "classes", mixda(balance_coef=0.0))
    Trainer(model=without, args=arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=as_rows(batch)).train()
    assert any(not torch.allclose(v, state(without)[k], atol=1e-4) for k, v in state(model).items())


def test_weighing_a_loss_that_the_model_does_not_give_is_refused(tiny: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    batch = batch_of(tiny_inputs, "masked")
    batch |= {"old_input_ids": batch["input_ids"], "old_attention_mask": batch["attention_mask"]}
    model = made(tiny, "masked", BottleneckConfig(r=4))
    callback = StageCallback("domain", objectives=[PreservationObjective()], check_head=False)
    options = arguments(tmp_path, label_smoothing_factor=0.1, remove_unused_columns=False)
    trainer = Trainer(model=model, args=options, train_dataset=as_rows(batch), callbacks=[callback])
    with pytest.raises(ValueError, match="the forward has no loss to weigh; pass labels"):
        trainer.train()


def test_evaluation_reports_the_main_loss_alone(tiny: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    batch = batch_of(tiny_inputs, "classes")
    losses = []
    for config in (mixda(), mixda(balance_coef=0.0)):
        trainer = Trainer(model=made(tiny, "classes", config), args=arguments(tmp_path), eval_dataset=as_rows(batch))
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.predict(as_rows(batch)).predictions.shape == (2, 3)
    assert losses[0] == pytest.approx(losses[1])


def test_a_model_without_a_wrapper_trains_too(tiny: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    batch = batch_of(tiny_inputs, "causal")
    torch.manual_seed(0)
    bare = tiny("llama")
    bare.add_adapter(mixda())
    Trainer(model=bare, args=arguments(tmp_path), train_dataset=as_rows(batch)).train()
    wrapped = made(tiny, "causal")
    Trainer(model=wrapped, args=arguments(tmp_path), train_dataset=as_rows(batch)).train()
    equal({f"base_model.model.{name}": value for name, value in state(bare).items()}, state(wrapped))


# --- activation checkpointing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_checkpointing_changes_no_weight(head: str, tiny: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    batch, ends = batch_of(tiny_inputs, head), []
    for checkpointing in (False, True):
        model = made(tiny, head, mixda(z_coef=0.1, gate_dropout=0.2, adapter_dropout=0.2))
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
        options = arguments(tmp_path, max_steps=3, gradient_checkpointing=checkpointing, **options)
        torch.manual_seed(1)
        Trainer(model=model, args=options, train_dataset=as_rows(batch, 3)).train()
        ends.append(state(model))
    equal(*ends)


def test_checkpointing_changes_no_old_domain_loss(tiny: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    batch, ends = batch_of(tiny_inputs, "masked"), []
    batch |= {"old_input_ids": batch["input_ids"].flip(1), "old_attention_mask": batch["attention_mask"].flip(1)}
    for checkpointing in (False, True):
        model = made(tiny, "masked", BottleneckConfig(r=4, init_weights=False))
        callback = StageCallback("domain", objectives=[PreservationObjective()], check_head=False)
        options = arguments(tmp_path, max_steps=2, gradient_checkpointing=checkpointing, remove_unused_columns=False)
        Trainer(model=model, args=options, train_dataset=as_rows(batch, 2), callbacks=[callback]).train()
        ends.append(state(model))
    equal(*ends)


@pytest.mark.parametrize("losses", ["gate", "preservation"])
def test_reentrant_checkpointing_that_would_lose_a_gradient_is_refused(
    losses: str, tiny: Any, tiny_inputs: Any, tmp_path: Path
) -> None:
    """Without a StageCallback, which refuses it before the run."""
    batch = batch_of(tiny_inputs, "masked")
    options = arguments(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True},
        remove_unused_columns=False,
    )  # fmt: skip
    if losses == "gate":
        model = made(tiny, "masked")
    else:
        model = made(tiny, "masked", BottleneckConfig(r=4, init_weights=False))
        model.base_model.context.objectives.append(PreservationObjective())
        batch |= {"old_input_ids": batch["input_ids"], "old_attention_mask": batch["attention_mask"]}
    trainer = Trainer(model=model, args=options, train_dataset=as_rows(batch))
    with pytest.raises(ValueError, match="reentrant activation checkpointing"):
        trainer.train()


# --- both stages --------------------------------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(91)]
DOMAINS = {"biomed": (0, 30), "reviews": (30, 60)}  # ranges of their own words; the rest is shared


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=fast, **{f"{k}_token": v for k, v in names.items()})


def texts(first: int, last: int, count: int, own: int = 0) -> list[str]:
    """A word over and over; every third one is the `own`-th word after it."""
    size = last - first
    return [
        " ".join(WORDS[first + (i + (own if j % 3 == 2 else 0)) % size] for j in range(6 + i % 3))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def base(tiny: Any, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny masked language model that knows general text, saved as a checkpoint would be."""
    torch.manual_seed(0)
    model = tiny("bert", **NO_DROPOUT).train()
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.2)
    rows = [tokenizer(text) for text in texts(0, 91, 91)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for i in range(100):
        model(**collator(rows[i % 2 :: 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stage_1(name: str, base: Path, tokenizer: Any, folder: Path) -> tuple[Path, Trainer]:
    config = BottleneckConfig(placement="parallel", adapter_input="ffn_intermediate", r=4, layers_to_transform=[1, 2])
    model = get_peft_model(AutoModelForMaskedLM.from_pretrained(base), config)
    own = Dataset.from_list([dict(tokenizer(text)) for text in texts(*DOMAINS[name], 32, own=1)])
    masked = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    trainer = Trainer(
        model=model,
        args=arguments(
            folder / "runs", max_steps=8, per_device_train_batch_size=8, optim="adamw_torch", learning_rate=1e-2,
            remove_unused_columns=False, logging_steps=4,
        ),
        train_dataset=own,
        data_collator=WithGeneralText(masked, texts(0, 91, 32), tokenizer, max_length=16, batch_size=4),
        callbacks=[StageCallback("domain", objectives=[PreservationObjective()])],
    )  # fmt: skip
    trainer.add_callback(GateUsageCallback(trainer))
    trainer.train()
    model.save_pretrained(folder / name)
    return folder / name, trainer


def of_expert(state: dict[str, Tensor], expert: str) -> dict[tuple[str, str], Tensor]:
    """(layer, parameter) -> weight of one expert."""
    found = {}
    for key, value in state.items():
        before, here, parameter = key.partition(f".experts.{expert}.")
        if here:
            found[before.split(".layer.")[1].split(".")[0], parameter] = value
    return found


def test_both_stages_from_end_to_end(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    sources = {}
    for name in DOMAINS:
        sources[name], trainer = stage_1(name, base, tokenizer, tmp_path)
        entries = [entry for entry in trainer.state.log_history if "loss/preservation" in entry]
        assert len(entries) == 2
        assert all(entry["loss/preservation"] >= 0 for entry in entries)
        assert trainer.model.base_model.context.objectives
    for source in sources.values():
        assert any(value.abs().sum() > 0 for key, value in load_file(source / "adapter_model.safetensors").items())

    config = MixDAConfig(
        domains={name: str(path) for name, path in sources.items()}, task_type="SEQ_CLS", task_r=4, balance_coef=0.01,
        modules_to_save=["pooler"],  # which a masked language model has none of: new, so it must train and be saved
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)
    experts = {n: p.detach().clone() for n, p in model.named_parameters() if ".domain.bank." in n}
    for name, path in sources.items():  # every weight of a source arrives as it was
        saved = of_expert(load_file(path / "adapter_model.safetensors"), "adapter")
        here = of_expert(experts, name)
        assert saved.keys() == here.keys()
        assert all(torch.equal(here[key], value) for key, value in saved.items())

    rows = [
        {**tokenizer(text), "labels": label}
        for label, words in enumerate(DOMAINS.values())
        for text in texts(*words, 16, own=1)
    ]
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path / "task", max_steps=40, per_device_train_batch_size=8, optim="adamw_torch", learning_rate=1e-2,
            train_sampling_strategy="random", logging_steps=10,
        ),
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[StageCallback("task")],
    )  # fmt: skip
    trainer.add_callback(GateUsageCallback(trainer))
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.7
    assert all(torch.equal(p, experts[n]) for n, p in model.named_parameters() if n in experts)
    entry = next(entry for entry in trainer.state.log_history if "gate/mean/entropy" in entry)
    for key in ("weight/biomed", "weight/reviews", "weight/frozen"):
        assert 0 < entry[f"gate/mean/{key}"] < 1
    assert "loss/balance" in entry

    expected = trainer.predict(trainer.eval_dataset).predictions
    model.save_pretrained(tmp_path / "mixture")
    for path in sources.values():  # the mixture needs its sources no more
        path.rename(path.with_name(f"{path.name}-gone"))
    fresh = AutoModelForSequenceClassification.from_pretrained(base)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "mixture").eval()
    got = Trainer(
        model=loaded, args=arguments(tmp_path / "task"), data_collator=DataCollatorWithPadding(tokenizer)
    ).predict(trainer.eval_dataset)
    torch.testing.assert_close(torch.tensor(got.predictions), torch.tensor(expected))


def test_contrastive_stage_1_of_a_sentence_encoder(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = get_peft_model(AutoModel.from_pretrained(base), BottleneckConfig(r=4, placement="parallel"))
    pairs = [{"text": a, "positive": b} for a, b in zip(texts(0, 30, 16), texts(0, 30, 16, own=1), strict=True)]
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path, max_steps=12, per_device_train_batch_size=8, optim="adamw_torch", learning_rate=1e-2,
            remove_unused_columns=False, dataloader_drop_last=True, label_names=["labels"],
        ),
        train_dataset=pairs, eval_dataset=pairs, data_collator=PairCollator(tokenizer, max_length=16),
        callbacks=[StageCallback("domain", objectives=[ContrastiveObjective()])],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    with torch.no_grad():  # encoding texts is as before
        inputs = tokenizer(["w1 w2"], return_tensors="pt", return_token_type_ids=False)
        expected = model.eval()(**inputs).last_hidden_state
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).last_hidden_state, expected)
