"""TRL's SFTTrainer and DPOTrainer with `peft_config=`, and DPO's reference pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mixadapters import BottleneckConfig, GateUsageCallback, MixDAConfig, MoAConfig, StageCallback
from mixadapters.training.callbacks import collect_usage
from mixadapters.training.objectives import PreservationObjective

trl = pytest.importorskip("trl")

CONFIGS = {
    "bottleneck": lambda **f: BottleneckConfig(**{"r": 4, "task_type": "CAUSAL_LM", **f}),
    "mixda": lambda **f: MixDAConfig(**{"domains": ["a", "b"], "r": 4, "task_type": "CAUSAL_LM", **f}),
    "moa": lambda **f: MoAConfig(**{"num_experts": 3, "r": 4, "router_scope": "block", "task_type": "CAUSAL_LM", **f}),
}
every = pytest.mark.parametrize("kind", CONFIGS)
WORDS = [f"w{i}" for i in range(92)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def base(tiny: Any, tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fresh(base: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(base)


def words(first: int, count: int) -> str:
    return " ".join(WORDS[(first * j) % len(WORDS)] for j in range(1, count + 1))


def options(folder: Path, **given: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
        "bf16": False, "learning_rate": 1e-2, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", **given,
    }  # fmt: skip


def sft(base: Any, tokenizer: Any, folder: Path, peft_config: Any = None, **given: Any) -> Any:
    return trl.SFTTrainer(
        model=fresh(base) if isinstance(base, Path) else base,
        args=trl.SFTConfig(**options(folder, **given)),
        train_dataset=Dataset.from_list([{"text": words(i, 5 + i % 3)} for i in range(1, 9)]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def dpo(base: Any, tokenizer: Any, folder: Path, peft_config: Any = None, callbacks: Any = None, **given: Any) -> Any:
    rows = [
        {"prompt": words(i, 3), "chosen": f" {words(i + 1, 3)}", "rejected": f" {words(i + 2, 2)}"}
        for i in range(1, 9)
    ]
    return trl.DPOTrainer(
        model=fresh(base) if isinstance(base, Path) else base,
        args=trl.DPOConfig(**options(folder, **given)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )


def gradients(trainer: Any, batch: Any = None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first batch, as the trainer computes them."""
    batch = first_batch(trainer) if batch is None else batch
    model = trainer.model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, copy.copy(batch))
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_batch(trainer: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(next(iter(trainer.get_train_dataloader())))


def state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, msg=lambda text, name=name: f"{name}: {text}")


# --- SFT ----------------------------------------------------------------------------------------------------------


@every
def test_sft_trains_saves_and_loads(kind: str, base: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = sft(base, tokenizer, tmp_path / "run", CONFIGS[kind](), save_strategy="steps", save_steps=2)
    assert isinstance(trainer.model, PeftModel)
    before = state(trainer.model)
    trainer.train()
    after = state(trainer.model)
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    equal(state(loaded), after)


def stirred(model: nn.Module) -> nn.Module:
    """With gates that tell tokens apart: they start constant."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("router.output.weight"):
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
    return model


def balance_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the balance loss alone, by hand."""
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    model.base_model.context.record.losses["balance"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def balanced(kind: str, coefficient: float) -> Any:
    name = "router_aux_loss_coef" if kind == "moa" else "balance_coef"
    return CONFIGS[kind](**{name: coefficient}, init_weights=False)


@pytest.mark.parametrize("kind", ["mixda", "moa"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sft_trains_the_auxiliary_loss_once(
    kind: str, smoothing: float, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """SFT makes its loss of the outputs and leaves `outputs.loss`, to which gates add theirs, aside."""
    ends = []
    for coefficient in (0.0, 5.0):
        torch.manual_seed(0)
        config = balanced(kind, coefficient)
        trainer = sft(base, tokenizer, tmp_path, config, label_smoothing_factor=smoothing)
        stirred(trainer.model)
        batch = first_batch(trainer)
        ends.append(gradients(trainer, batch)[1])
    expected = balance_gradients(trainer.model, batch)
    assert max(value.abs().max() for value in expected.values()) > 1e-2
    for name, value in expected.items():
        torch.testing.assert_close(ends[1][name] - ends[0][name], value, atol=1e-5, rtol=1e-3)


def test_sft_logs_what_sums_to_the_loss_by_hand(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    """SFT logs the loss that it makes of the outputs, and the callback the mean over routers, unweighted."""
    trainer = sft(base, tokenizer, tmp_path, balanced("moa", 5.0), max_steps=1, gradient_checkpointing=False)
    stirred(trainer.model)
    trainer.add_callback(GateUsageCallback(trainer))
    batch = first_batch(trainer)
    model = trainer.model.train()
    main = trainer.compute_loss(model, copy.copy(batch))
    auxiliary = model.base_model.context.record.losses["balance"]
    routers = len({id(m.router) for _, m in model.base_model._mixtures("default") if not hasattr(m.router, "follows")})
    assert auxiliary.item() > 1
    collect_usage(model)
    torch.manual_seed(0)
    trainer.train()
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    assert logged["loss"] == pytest.approx(main.item(), abs=1e-3)
    assert logged["loss/balance"] * routers * 5.0 == pytest.approx(auxiliary.item(), abs=1e-3)


def test_sft_of_one_stage(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = get_peft_model(fresh(base), CONFIGS["mixda"](domains=["a"]))
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list([{"text": words(i, 5)} for i in range(1, 9)]),
        processing_class=tokenizer,
        callbacks=[StageCallback("domain", check_head=False)],
    )
    before = state(model)
    trainer.train()
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".domain.bank." in name for name in moved)


# --- DPO ----------------------------------------------------------------------------------------------------------


def log_probabilities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(2B,) of the completions, chosen first."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, :-1]
    labels = batch["input_ids"][:, 1:]
    mask = batch["completion_mask"][:, 1:].bool()
    return (logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2) * mask).sum(1)


def dpo_loss(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


@every
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_compares_with_the_base_model(
    kind: str, checkpointing: bool, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    config = CONFIGS[kind](init_weights=False)
    trainer = dpo(base, tokenizer, tmp_path, config, gradient_checkpointing=checkpointing)
    batch = first_batch(trainer)
    loss, grads = gradients(trainer, batch)
    with torch.no_grad():
        reference = log_probabilities(fresh(base), batch)
    model = trainer.model
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_disable()
    expected = dpo_loss(log_probabilities(model, batch), reference)
    assert abs(expected.item() - 0.6931) > 1e-3  # the policy is not the reference
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, grads)


@every
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_of_a_trained_adapter_compares_with_a_frozen_copy(
    kind: str, checkpointing: bool, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = get_peft_model(fresh(base), CONFIGS[kind](init_weights=False))
    trainer = dpo(model, tokenizer, tmp_path, gradient_checkpointing=checkpointing)
    assert set(model.peft_config) == {"default", "ref"}
    start = state(model)
    equal(state(model, "ref"), start)
    loss, grads = gradients(trainer)
    assert loss == pytest.approx(0.6931, abs=1e-3)
    assert grads
    assert not [name for name in grads if ".ref." in name]
    trainer.train()
    equal(state(model, "ref"), start)
    assert any(not torch.equal(value, start[name]) for name, value in state(model).items())
    assert gradients(trainer)[0] != pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_dpo_trains_the_auxiliary_loss_of_the_policy_once(
    copied: bool, checkpointing: bool, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """DPO makes its loss of the outputs and leaves `outputs.loss`, to which gates add theirs, aside."""
    ends = []
    for coefficient in (0.0, 5.0):
        torch.manual_seed(0)
        config = CONFIGS["mixda"](balance_coef=coefficient, init_weights=False)
        given = (get_peft_model(fresh(base), config), None) if copied else (base, config)
        trainer = dpo(given[0], tokenizer, tmp_path, given[1], gradient_checkpointing=checkpointing)
        stirred(trainer.model)
        batch = first_batch(trainer)
        ends.append((trainer, gradients(trainer, batch)))
    (_, (_, without)), (trainer, (_, grads)) = ends
    gates = [name for name in grads if name.endswith("router.output.weight")]
    assert trainer.model.base_model.context.loss_log["balance"][1] == len(gates)  # the policy's forward only
    expected = balance_gradients(trainer.model, batch)
    assert max(value.abs().max() for value in expected.values()) > 1e-2
    for name, value in expected.items():
        torch.testing.assert_close(grads[name] - without[name], value, atol=1e-5, rtol=1e-3)


def test_dpo_weighs_the_auxiliary_loss_as_its_own_under_accumulation(
    base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """One step of SGD over two micro-batches is the mean of both, main and auxiliary loss."""
    ends = []
    for coefficient in (0.0, 5.0):
        torch.manual_seed(0)
        model = stirred(get_peft_model(fresh(base), CONFIGS["mixda"](balance_coef=coefficient, init_weights=False)))
        given = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
        trainer = dpo(
            model, tokenizer, tmp_path, callbacks=[StageCallback("task")], gradient_accumulation_steps=2,
            max_grad_norm=0.0, gradient_checkpointing=False, train_sampling_strategy="sequential", **given,
        )  # fmt: skip
        batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False)]
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        expected = [balance_gradients(model, batch) for batch in batches] if coefficient else []
        model.zero_grad()
        trainer.train()
        ends.append({n: before[n] - p.detach() for n, p in model.named_parameters() if n in before})
    assert max(value.abs().max() for value in expected[0].values()) > 1e-2
    for name in expected[0].keys() & ends[0].keys():
        mean = (expected[0][name] + expected[1][name]) / 2
        torch.testing.assert_close(ends[1][name] - ends[0][name], mean, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("copied", [False, True])
def test_dpo_keeps_the_stage_through_its_reference_pass(
    copied: bool, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    config = CONFIGS["mixda"](init_weights=False)
    given = (get_peft_model(fresh(base), config), None) if copied else (base, config)
    trainer = dpo(given[0], tokenizer, tmp_path, given[1], callbacks=[StageCallback("task")])
    model = trainer.model
    before = state(model)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved
    assert not [name for name in moved if ".domain.bank." in name]


def test_dpo_reports_the_gates_of_the_policy_only(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = get_peft_model(fresh(base), CONFIGS["mixda"](init_weights=False))
    trainer = dpo(model, tokenizer, tmp_path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".ref." in name and name.endswith("router.output.bias"):
                p[0] = 20.0
    collect_usage(model)
    gradients(trainer)
    assert collect_usage(model)["gate/mean/weight/a"] == pytest.approx(1 / 3, abs=1e-3)


def test_an_objective_that_weighs_the_loss_of_the_model_does_not_fit_dpo(
    base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = get_peft_model(fresh(base), CONFIGS["bottleneck"](init_weights=False))
    trainer = dpo(model, tokenizer, tmp_path)
    model.set_adapter("default")
    batch = first_batch(trainer)
    batch |= {"old_input_ids": batch["input_ids"], "old_attention_mask": batch["attention_mask"]}
    model.base_model.context.objectives.append(PreservationObjective())
    with pytest.raises(ValueError, match="the training loop makes its own"):
        gradients(trainer, batch)


@every
def test_dpo_of_two_steps_saves_and_loads(kind: str, base: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = dpo(base, tokenizer, tmp_path / "run", CONFIGS[kind](), save_strategy="steps", save_steps=2)
    trainer.train()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    equal(state(loaded), state(trainer.model))
    card = (tmp_path / "run" / "checkpoint-2" / "README.md").read_text(encoding="utf-8")
    assert "import mixadapters" in card
