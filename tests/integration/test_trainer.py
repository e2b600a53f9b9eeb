"""A plain Trainer trains right: auxiliary losses, accumulation, checkpointing; and both stages from end to end."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from seeing import IMAGE, seeing, seen
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

from mixadapters import BottleneckConfig, GateUsageCallback, MixDAConfig, MoAConfig, PILLConfig, StageCallback
from mixadapters.training.collators import PairCollator, WithGeneralText
from mixadapters.training.objectives import ContrastiveObjective, PreservationObjective

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEADS = {  # kind of the tiny model, its head, options, labels
    "classes": ("bert", "sequence_classification", NO_DROPOUT, "classes"),
    "masked": ("bert", "masked_lm", NO_DROPOUT, "tokens"),
    "causal": ("llama", "causal_lm", {}, "tokens"),
}


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of three layers where a test asks for no more: MixDA adapts two of them by default."""
    return partial(tiny, layers=3)


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


def one_layer(**fields: Any) -> MixDAConfig:
    return mixda(domain_layers=[1], **fields)


def moa(balance_coef: float = 3.0, **fields: Any) -> MoAConfig:
    fields = {"num_experts": 3, "r": 4, "router_init_range": 0.5, "init_weights": False, **fields}
    return MoAConfig(router_aux_loss_coef=balance_coef, layers_to_transform=[1], **fields)


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


class Weighed:
    """A model, four rows of unequal length, and what Trainer makes of the loss of a micro-batch."""

    def __init__(
        self, kind: str, head: str, labels: str, divides: bool, config: Any = one_layer, **options: Any
    ) -> None:
        self.config = config
        self.kind, self.head, self.labels, self.divides, self.options = kind, head, labels, divides, options

    def model(self, tiny: Any, **fields: Any) -> nn.Module:
        torch.manual_seed(0)
        return get_peft_model(tiny(self.kind, self.head, **self.options), self.config(**fields))

    def rows(self, tiny_inputs: Any) -> list[dict[str, Tensor]]:
        labels = "tokens" if self.labels in ("numbers", "tags") else self.labels
        made = tiny_inputs(self.kind, batch=4, padding=None if self.labels == "images" else "right",
                           labels="classes" if self.labels == "images" else labels)  # fmt: skip
        if self.labels == "tags":
            made["labels"] = made["labels"].where(made["labels"] < 0, made["labels"] % 3)
        elif self.labels == "numbers":
            made["labels"] = torch.tensor([0.5, -1.0, 2.0, 0.0])
        if made["labels"].dim() > 1:
            made["labels"][1, 2:] = -100
        return [{k: v[i] for k, v in made.items()} for i in range(4)]

    def share(self, part: list[dict[str, Tensor]], rows: list[dict[str, Tensor]]) -> float:
        """The weight of a micro-batch in a step over `rows`."""
        if not self.divides:
            return 1.0
        first = int(self.kind == "llama")  # its loss is of the next token
        counts = [sum(int((row["labels"][..., first:] != -100).sum()) if row["labels"].dim() else 1 for row in group)
                  for group in (part, rows)]  # fmt: skip
        return counts[0] / counts[1]


STILL = {"dropout_rate": 0.0}
MODELS = {
    "causal": Weighed("llama", "causal_lm", "tokens", True),
    "masked": Weighed("bert", "masked_lm", "tokens", False, **NO_DROPOUT),
    "classes": Weighed("bert", "sequence_classification", "classes", False, **NO_DROPOUT),
    "numbers": Weighed("bert", "sequence_classification", "numbers", False, num_labels=1, **NO_DROPOUT),
    "tags": Weighed("bert", "token_classification", "tags", False, **NO_DROPOUT),
    "classes of a decoder": Weighed("llama", "sequence_classification", "classes", False),
    "seq2seq": Weighed("t5", "seq2seq_lm", "tokens", False, **STILL),
    "experts of each module": Weighed("llama", "causal_lm", "tokens", True, moa),
    "experts of each block": Weighed(
        "bert", "sequence_classification", "classes", False, lambda **f: moa(router_scope="block", **f), **NO_DROPOUT
    ),
    "images": Weighed("vit", "image_classification", "images", True, **NO_DROPOUT),
}


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def one_step(model: nn.Module, rows: list[dict[str, Tensor]], folder: Path, size: int, **options: Any) -> Any:
    """The gradients of one step of a Trainer over all rows: of SGD with a rate of 1, from the weights."""
    before = state(model)
    given = options.pop("trainer", {})
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": len(rows) // size, **options}
    options = arguments(folder, learning_rate=1.0, **options)
    options.label_names = ["labels"]
    kind = given.pop("kind", Trainer)
    kind(model=model, args=options, train_dataset=rows, **given).train()
    return {name: before[name] - value for name, value in state(model).items()}


@pytest.mark.parametrize("accumulated", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_auxiliary_losses_keep_their_ratio_under_accumulation(
    name: str, accumulated: int, tiny: Any, tiny_inputs: Any, tmp_path: Path
) -> None:
    """A step is a sum over micro-batches of main + auxiliary loss, each with the weight that the main loss gets.

    Where the model divides by all labels of the step, the main part is that of one large batch; others are means of
    their micro-batch, and Trainer adds those up.
    """
    case = MODELS[name]
    rows, size = case.rows(tiny_inputs), 4 // accumulated
    for coefficient in (3.0, 0.0):
        by_hand = case.model(tiny, balance_coef=coefficient).train()
        for i in range(0, 4, size):
            part = rows[i : i + size]
            (by_hand(**stack(part)).loss * case.share(part, rows)).backward()
        expected = {n: p.grad for n, p in by_hand.named_parameters() if p.requires_grad}
        equal(expected, one_step(case.model(tiny, balance_coef=coefficient), rows, tmp_path, size))
    model = case.model(tiny, balance_coef=0.0).train()
    model(**stack(rows)).loss.backward()
    if case.divides:
        equal(expected, {n: p.grad for n, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("rows_of_last_step", [2, 4])
@pytest.mark.parametrize("name", ["causal", "classes", "images", "experts of each module"])
@pytest.mark.parametrize("loop", ["smoothing", "function", "own"])
def test_losses_that_ride_on_the_outputs_weigh_as_one_batch(
    loop: str, name: str, rows_of_last_step: int, tiny: Any, tiny_inputs: Any, tmp_path: Path
) -> None:
    """Where the training loop makes the loss of logits; and where the last step has fewer micro-batches."""
    case, added = MODELS[name], []
    rows = case.rows(tiny_inputs)[:rows_of_last_step]
    for coefficient in (3.0, 0.0):
        model = case.model(tiny, balance_coef=coefficient)
        options: dict[str, Any] = {"trainer": {"callbacks": [StageCallback("task")]}}
        options |= {"label_smoothing_factor": 0.1} if loop == "smoothing" else {}
        options["trainer"] |= {"compute_loss_func": total_of_logits} if loop == "function" else {}
        options["trainer"] |= {"kind": MakesItsOwn} if loop == "own" else {}
        added.append(one_step(model, rows, tmp_path, 1, gradient_accumulation_steps=4, **options))
    model = case.model(tiny).train()
    for row in rows:
        inputs = {k: v for k, v in stack([row]).items() if k != "labels"}
        model(**inputs)
        sum(model.base_model.context.record.losses.values()).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for key, value in expected.items():
        if value is not None:
            got = added[0][key] - added[1][key]
            torch.testing.assert_close(got, value / len(rows), atol=1e-5, rtol=1e-3, msg=key)
    assert any(value is not None and value.abs().max() > 1e-2 for value in expected.values())


def total_of_logits(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    return outputs["logits"].mean()


class MakesItsOwn(Trainer):
    """As trainers of preferences do: a mean over its micro-batch, which Trainer divides by their number."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        del inputs["labels"]
        return model(**inputs).logits.mean()


def test_the_weight_of_riding_losses_ends_with_the_run(tiny: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    model = MODELS["classes"].model(tiny)
    rows = MODELS["classes"].rows(tiny_inputs)
    one_step(model, rows, tmp_path, 1, trainer={"callbacks": [StageCallback("task")]})
    assert model.base_model.context.loss_scale is None


def test_riding_losses_of_unknown_weight_are_refused(tiny: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    rows = MODELS["classes"].rows(tiny_inputs)
    with pytest.raises(ValueError, match=r"accumulates gradients.* StageCallback.*loss_scale = 1 / number"):
        one_step(MODELS["classes"].model(tiny), rows, tmp_path, 1, label_smoothing_factor=0.1)
    one_step(MODELS["classes"].model(tiny), rows, tmp_path, 4, label_smoothing_factor=0.1)


def test_a_loss_counts_once_where_the_loop_uses_loss_and_outputs(tiny: Any, tiny_inputs: Any) -> None:
    case = MODELS["causal"]
    batch = stack(case.rows(tiny_inputs))
    ends = []
    for coefficient in (3.0, 0.0):
        model = case.model(tiny, balance_coef=coefficient).train()
        output = model(**batch, output_hidden_states=True)
        (output.loss + output.logits.square().mean() + output.hidden_states[-1].mean()).backward()
        ends.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    alone = case.model(tiny).train()
    alone(**batch)
    alone.base_model.context.record.losses["balance"].backward()
    for name, p in alone.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ends[0][name] - ends[1][name], p.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_losses_ride_on_hidden_states_too(tiny: Any, tiny_inputs: Any) -> None:
    case = MODELS["causal"]
    batch = stack(case.rows(tiny_inputs))
    model = case.model(tiny).train()
    (model(**batch, output_hidden_states=True).hidden_states[-1].sum() * 0).backward()
    assert any(
        p.grad is not None and p.grad.abs().max() > 1e-3 for n, p in model.named_parameters() if ".router." in n
    )


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
    model = tiny("bert", layers=4, **NO_DROPOUT).train()
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


@pytest.mark.parametrize("head", ["causal", "classes"])
def test_a_trainer_of_a_model_in_which_nothing_trains_is_refused(tiny, tiny_inputs, tmp_path, head) -> None:
    model = made(tiny, head, moa()).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in this model trains"):
        Trainer(model, arguments(tmp_path), train_dataset=as_rows(batch_of(tiny_inputs, head))).train()
    with torch.no_grad():
        assert model.train()(**batch_of(tiny_inputs, head)).loss.isfinite()


# --- models that see ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("paligemma", MoAConfig(num_experts=2, r=2, target_modules=["q_proj", "v_proj"])),
        ("internvl", PILLConfig(r=2)),
        ("idefics3", MixDAConfig(domains=["a"], r=2, domain_layers=[0, 1])),
        ("smolvlm", BottleneckConfig(r=2)),
        ("mllama", MoAConfig(num_experts=2, r=2, target_modules=["q_proj", "v_proj"])),
        ("mllama", PILLConfig(r=2, layers_to_transform=[0, 2])),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_models_of_images_and_text_train_the_same_under_checkpointing_and_come_back_from_a_checkpoint(
    kind, config, tmp_path
) -> None:
    inputs, losses = seen(kind, [2, 1]), []
    hidden = (inputs["input_ids"] >= IMAGE) | (inputs["attention_mask"] == 0)
    batch = {**inputs, "labels": inputs["input_ids"].masked_fill(hidden, -100)}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(seeing(kind), copy.deepcopy(config))
        options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "remove_unused_columns": False}
        args = arguments(tmp_path, gradient_checkpointing=checkpointing, **options)
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        trainer = Trainer(model, args, train_dataset=[0] * 8, data_collator=lambda rows: dict(batch))
        trainer.train()
        assert getattr(model.get_base_model(), "is_gradient_checkpointing", False) is checkpointing
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[0][2] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    logits = model.eval()(**inputs).logits
    assert not torch.allclose(logits, seeing(kind)(**inputs).logits, atol=1e-3)
    again = PeftModel.from_pretrained(seeing(kind), tmp_path / "checkpoint-3").eval()
    assert torch.equal(again(**inputs).logits, logits)
