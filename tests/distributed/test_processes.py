"""Two processes train as one: auxiliary losses keep their ratio to the main loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_together

WORKER = """
import os, sys, tempfile
import torch
from peft import get_peft_model
from transformers import (
    BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments,
)
from mixadapters import GateUsageCallback, MixDAConfig, StageCallback
from mixadapters.training.callbacks import collect_usage

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(os.environ["RANK"])
WIDTHS = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
SIZES = {**WIDTHS, "num_hidden_layers": 2, "num_attention_heads": 4}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}

def model_of(kind, coefficient):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "causal" else BertForSequenceClassification(
        BertConfig(**SIZES, **STILL)
    )
    return get_peft_model(base, MixDAConfig(domains=["a", "b"], r=4, init_weights=False, balance_coef=coefficient))

def rows_of(kind):
    ids = torch.randint(5, 64, (4, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 3:], labels[2, 2:] = -100, -100  # other numbers of labels in every row
    labels = labels if kind == "causal" else torch.arange(4) % 3
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": l} for i, l in zip(ids, labels)]

def trained(kind, coefficient, smoothing, everywhere):
    model = model_of(kind, coefficient)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, ddp_backend="gloo",
        report_to=[], save_strategy="no", disable_tqdm=True, label_smoothing_factor=smoothing,
        average_tokens_across_devices=everywhere, train_sampling_strategy="sequential",
    )
    callbacks = [StageCallback("task")] if smoothing else []
    Trainer(model=model, args=arguments, train_dataset=rows_of(kind), callbacks=callbacks).train()
    assert arguments.world_size == 2
    return {n: before[n] - p.detach() for n, p in model.named_parameters() if n in before}

def parts(kind, coefficient):
    # The gradients of each row alone, main and auxiliary loss together; and of how many labels.
    model = model_of(kind, coefficient).train()
    for row in rows_of(kind):
        model.zero_grad()
        model(**{k: v[None] for k, v in row.items()}).loss.backward()
        count = int((row["labels"][1:] != -100).sum()) if kind == "causal" else 1
        yield {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, count

CASES = {
    "causal": ("causal", 0.0, True), "causal, each by its own count": ("causal", 0.0, False),
    "classes": ("classes", 0.0, True), "classes, each by its own count": ("classes", 0.0, False),
    "causal, smoothed": ("causal", 0.1, True), "classes, smoothed": ("classes", 0.1, True),
}
found = {}
for name, case in CASES.items():
    pairs = [trained(case[0], 3.0, *case[1:]), trained(case[0], 0.0, *case[1:])]
    found[name] = {"got": pairs, "parts": [list(parts(case[0], 3.0)), list(parts(case[0], 0.0))]}

def staged(stage, **more):
    # Two steps of one stage, of 4 rows each in all processes together; what moved, and what the gates reported.
    model = model_of("classes", 0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=2, per_device_train_batch_size=2, optim="sgd", learning_rate=1.0,
        logging_steps=2, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, ddp_backend="gloo",
        save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential", report_to=[],
        average_tokens_across_devices=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows_of("classes"),
                      callbacks=[StageCallback(stage, **more)])
    trainer.add_callback(GateUsageCallback(trainer))
    trainer.train()
    moved = {n: p.detach() - before[n] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    gates = next(entry for entry in trainer.state.log_history if "gate/mean/cv" in entry) if stage == "task" else {}
    return moved, gates

def whole(stage, **more):
    # The same in this process alone.
    model = model_of("classes", 0.0).train()
    model.base_model.set_stage(stage, **more)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = {k: torch.stack([row[k] for row in rows_of("classes")]) for k in ("input_ids", "attention_mask", "labels")}
    weights = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        model(**batch).loss.backward()
        with torch.no_grad():
            for p in weights:
                p -= 0 if p.grad is None else p.grad
                p.grad = None
    moved = {n: p.detach() - before[n] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    return moved, collect_usage(model)

STAGES = {"task": {}, "domain": {"domain": "b"}}
found["stages"] = {
    stage: {"got": staged(stage, **more), "whole": whole(stage, **more)} for stage, more in STAGES.items()
}
torch.save(found, f"{folder}/{rank}")
"""


EXPERTS = """
import os, sys
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from mixadapters import MoAConfig

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(os.environ["RANK"])
dist.init_process_group("gloo")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(5, 64, (2, 6), generator=torch.Generator().manual_seed(1))

def made(scope):
    torch.manual_seed(0)
    fields = {"num_experts": 4, "r": 4, "router_scope": scope, "num_experts_per_tok": 1, "router_init_range": 0.5}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES))
    return get_peft_model(base, MoAConfig(**fields, router_aux_loss_coef=1.0, init_weights=False)).train()

def gradients(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}

found = {}
for scope in ("module", "block", "model"):
    rows = [gradients(made(scope), IDS[i : i + 1]) for i in range(2)]
    unused = sum(not grad.any() for n, grad in rows[rank].items() if n.endswith("down.weight"))
    parallel = gradients(DistributedDataParallel(made(scope)), IDS[rank : rank + 1])
    sharded = made(scope)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    whole = {n: grad.full_tensor() for n, grad in gradients(sharded, IDS[rank : rank + 1]).items()}
    found[scope] = {"rows": rows, "unused": unused, "DDP": parallel, "FSDP2": whole}
torch.save(found, f"{folder}/{rank}")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    folder = tmp_path_factory.mktemp("experts")
    run_together(EXPERTS, folder)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["module", "block", "model"])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_experts_that_no_token_of_a_process_uses_train_by_the_mean(kind: str, scope: str, experts: list[dict]) -> None:
    for own in experts:
        case = own[scope]
        assert case["unused"] > 0
        assert case[kind].keys() == case["rows"][0].keys() | case["rows"][1].keys()
        for name, grad in case[kind].items():
            parts = [row.get(name, torch.zeros(())) for row in case["rows"]]
            torch.testing.assert_close(grad, sum(parts) / 2, atol=1e-5, rtol=1e-3, msg=name)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("processes")
    run_together(WORKER, folder)
    both = [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(2)]
    for name, case in both[0].items():
        if name == "stages":
            continue
        for one, other in zip(case["got"], both[1][name]["got"], strict=True):
            assert all(torch.equal(value, other[key]) for key, value in one.items())
    for stage, case in both[0]["stages"].items():
        other = both[1]["stages"][stage]["got"]
        assert case["got"][1] == {**other[1], **{k: v for k, v in case["got"][1].items() if k in ("step", "epoch")}}
        assert all(torch.equal(moved, other[0][name]) for name, moved in case["got"][0].items())
    return both[0]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "inside"), [("task", (".router.", ".task.")), ("domain", (".experts.b.",))])
def test_both_stages_train_over_processes_as_in_one(stage: str, inside: tuple, found: dict[str, dict]) -> None:
    """What a stage trains, by the mean of all processes' gradients; and usage is that of all rows together."""
    (got, gates), (whole, alone) = found["stages"][stage]["got"], found["stages"][stage]["whole"]
    assert got
    assert got.keys() == whole.keys()
    assert all(any(part in name for part in inside) for name in got)
    assert all(any(part in name for name in got) for part in inside)
    for name, moved in whole.items():
        torch.testing.assert_close(
            got[name], moved, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    if stage == "task":
        for name, value in alone.items():
            assert gates[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [f"{kind}{more}" for kind in ("causal", "classes") for more in ("", ", each by its own count", ", smoothed")],
)
def test_auxiliary_losses_keep_their_ratio_over_processes(name: str, found: dict[str, dict]) -> None:
    """Four rows, one per micro-batch, two micro-batches in each of two processes."""
    (got, without), (parts, mains) = found[name]["got"], found[name]["parts"]
    counts = [count for _, count in parts]
    if "smoothed" in name:  # the loop makes its loss of the logits, a mean over the step: so is what rides on them
        weights = [1 / 4] * 4
    elif name.startswith("classes"):  # a mean of each micro-batch; by its own count: of two processes the mean
        weights = [1.0] * 4 if name == "classes" else [1 / 2] * 4
    elif "own" in name:  # of a process, whose rows are every other one
        weights = [counts[i] / (counts[i] + counts[(i + 2) % 4]) / 2 for i in range(4)]
    else:
        weights = [count / sum(counts) for count in counts]
    largest = 0.0
    for key in parts[0][0]:
        whole = sum(w * grads[key] for w, (grads, _) in zip(weights, parts, strict=True))
        main = sum(w * grads[key] for w, (grads, _) in zip(weights, mains, strict=True))
        torch.testing.assert_close(got[key] - without[key], whole - main, atol=1e-5, rtol=1e-3, msg=key)
        if "smoothed" not in name:
            torch.testing.assert_close(got[key], whole, atol=1e-5, rtol=1e-3, msg=key)
        largest = max(largest, float((whole - main).abs().max()))
    assert largest > 1e-2
