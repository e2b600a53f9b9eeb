"""What each engine trains: one small model for each method, and the two loops that train it.

The same functions run in one process, whose results are what two processes must come to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mixadapters import (
    AGDConfig,
    BottleneckConfig,
    GateUsageCallback,
    MixDAConfig,
    MoAConfig,
    MoSAConfig,
    PILLConfig,
    StageCallback,
)
from mixadapters.core.hooks import root_of
from mixadapters.training.callbacks import collect_usage
from mixadapters.training.events import find_tuner
from mixadapters.tuners.agd import GuidanceDistillation, TrajectoryCollator, TrajectoryPlan, denoiser, record
from mixadapters.tuners.pill import ImageInputs

STEPS, PROCESSES, ACCUMULATED, ROWS = 3, 2, 2, 2
VOCAB, TOKENS = 64, 8
Rows = list[dict[str, Any]]


@dataclass
class Cell:
    """A method in training.

    Args:
        model: makes it, the same in every process.
        rows: of the dataset; ROWS of them are a micro-batch.
        stage: what trains; "": everything.
        collate: rows -> a batch.
        objectives: of the stage.
        together: whether the rows of all processes are one micro-batch of the run in one process, which draws once for
            them; else they are micro-batches of their own, over which auxiliary losses are means.
    """

    model: Callable[[], PeftModel]
    rows: Callable[[], Any]
    stage: str = ""
    collate: Callable[[PeftModel], Callable[[Rows], dict[str, Any]]] = field(default=lambda model: stacked)
    objectives: Callable[[], Sequence[Any]] = tuple
    together: bool = False


# --- models and rows ----------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, tie_word_embeddings=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # with the usual 0.02 an adapter's effect drowns in rounding
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        model.model.embed_tokens.weight.mul_(4)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)  # a head that says what it has read
    return model


def adapted(config: Any, base: nn.Module | None = None) -> PeftModel:
    base = llama() if base is None else base
    torch.manual_seed(1)
    return get_peft_model(base, config)


def text(equal: bool = False) -> Rows:
    """One word again and again, and another now and then; unequal numbers of labels, or as many in each row."""
    count, generator = STEPS * PROCESSES * ACCUMULATED * ROWS, torch.Generator().manual_seed(2)
    words = torch.randint(5, VOCAB, (count, TOKENS), generator=generator)
    ids = torch.where(torch.rand(count, TOKENS, generator=generator) < 0.8, words[:, :1], words)
    labels = ids.clone()
    for row in range(0, 0 if equal else count, 3):
        labels[row, 3 + row % 5 :] = -100
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": label}
            for i, label in zip(ids, labels, strict=True)]  # fmt: skip


def stacked(rows: Rows) -> dict[str, Any]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def two_adapters() -> PeftModel:
    config = {"r": 4, "init_weights": False, "task_type": "CAUSAL_LM"}
    model = adapted(BottleneckConfig(**config))
    model.add_adapter("other", BottleneckConfig(**config))
    model.base_model.set_adapter(["default", "other"])
    return model


def named() -> Rows:
    """In each step one process has rows of an adapter that the other has none of."""
    names = ["default", "__base__", "other", "other", "other", "default", "default", "default"]
    return [{**row, "adapter_names": names[i % len(names)]} for i, row in enumerate(text())]


def stacked_but_names(rows: Rows) -> dict[str, Any]:
    names, tensors = [], []
    for row in rows:
        names.append(row["adapter_names"])
        tensors.append({name: value for name, value in row.items() if name != "adapter_names"})
    return {**stacked(tensors), "adapter_names": names}


def with_images() -> PeftModel:
    base = llama()
    torch.manual_seed(3)
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPVisionModel(CLIPVisionConfig(**small, image_size=8, patch_size=4))
    images = ImageInputs.attach(base, encoder)
    config = PILLConfig(
        r=4, token_ids=images.token_ids, modules_to_save=["projector"], task_type="CAUSAL_LM", init_weights=False
    )
    return adapted(config, base)


def pictures() -> Rows:
    """Every second micro-batch has images, so that in each step one process has none."""
    rows = text()
    generator = torch.Generator().manual_seed(4)
    for i, row in enumerate(rows):
        if i // ROWS % 2 == 0:
            row["input_ids"] = row["input_ids"].clone()
            row["input_ids"][2:6] = VOCAB
            row["labels"] = row["labels"].masked_fill(row["input_ids"] == VOCAB, -100)
            row["pixel_values"] = torch.randn(3, 8, 8, generator=generator)
    return rows


def denoising() -> Any:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=2, out_channels=2, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=5,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval().requires_grad_(False)


def trajectories() -> Any:
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    plan = TrajectoryPlan((2, 4, 4), steps=4, batch_size=8, dtype="float32")
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    classes = {"class_labels": torch.arange(STEPS * PROCESSES * ACCUMULATED * ROWS // 4) % 5}
    return record(denoiser(denoising()), scheduler, classes, {"class_labels": torch.tensor([5])}, plan)


def guided() -> PeftModel:
    model = adapted(AGDConfig(r=4, init_weights=False, **trajectories().config_fields), denoising())
    return model


LM = {"r": 4, "task_type": "CAUSAL_LM", "init_weights": False}
MIXDA = {**LM, "domains": ["a", "b"], "balance_coef": 0.5}
MOA = {**LM, "num_experts": 6, "num_experts_per_tok": 1, "router_init_range": 0.5}
CELLS = {
    "Bottleneck": Cell(lambda: adapted(BottleneckConfig(**LM, layer_norm=True, scale="learnable")), text),
    "MixDA, stage domain": Cell(lambda: adapted(MixDAConfig(**MIXDA)), text, "domain"),
    "MixDA, stage task": Cell(lambda: adapted(MixDAConfig(**MIXDA)), text, "task"),
    "MoSA": Cell(lambda: adapted(MoSAConfig(**LM, num_experts=3)), lambda: text(equal=True), "task", together=True),
    "PILL": Cell(with_images, pictures, "tune"),
    "AGD": Cell(guided, trajectories, "distill", TrajectoryCollator, lambda: [GuidanceDistillation()]),
    "MoA": Cell(lambda: adapted(MoAConfig(**MOA, router_aux_loss_coef=0.5)), text, "all"),
    "MoA, balanced by bias": Cell(
        lambda: adapted(MoAConfig(**MOA, router_aux_loss_coef=0.0, router_bias_update_rate=0.01)), text, "all"
    ),
    "MoA, a router for each block": Cell(
        lambda: adapted(MoAConfig(**MOA, router_scope="block", router_aux_loss_coef=0.5)), text, "router"
    ),
    "mixed batch": Cell(two_adapters, named, collate=lambda model: stacked_but_names),
}


# --- loops --------------------------------------------------------------------------------------------------------


def batches(cell: Cell, processes: int) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches of a step, in each of so many processes."""
    if cell.together:
        return ROWS * PROCESSES // processes, ACCUMULATED
    return ROWS, ACCUMULATED * PROCESSES // processes


def by_trainer(cell: Cell, folder: Path, processes: int, **options: Any) -> dict[str, Any]:
    """A run of Trainer, which leaves a checkpoint after each step and the adapter at the end, in `folder`."""
    model = cell.model()
    size, accumulated = batches(cell, processes)
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated,
        "optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-3, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_steps": 1, "report_to": [], "disable_tqdm": True, "remove_unused_columns": False,
        "train_sampling_strategy": "sequential", "use_cpu": True, "seed": 5, **options,
    }  # fmt: skip
    resume, callbacks = arguments.pop("resume", None), arguments.pop("callbacks", [])
    if cell.stage:
        callbacks = [StageCallback(cell.stage, "default", objectives=cell.objectives()), *callbacks]
    trainer = Trainer(
        model=model, args=TrainingArguments(str(folder), **arguments), train_dataset=cell.rows(),
        data_collator=cell.collate(model),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.add_callback(GateUsageCallback(trainer))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "end"))
    log = trainer.state.log_history
    gates = [entry for entry in log if any(name.startswith("gate/") for name in entry)]
    return {"losses": [entry["loss"] for entry in log if "loss" in entry], "usage": gates[-1] if gates else {}}


def by_hand(cell: Cell, folder: Path, processes: int) -> dict[str, Any]:
    """The same in a loop of one's own over accelerate."""
    size, accumulated = batches(cell, processes)
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # which has its own way to say so
    accelerator = Accelerator(cpu=not deepspeed, gradient_accumulation_steps=accumulated)
    model = cell.model()
    tuner = find_tuner(model)
    if cell.stage:
        tuner.set_stage(cell.stage, "default")
    tuner.context.objectives.extend(cell.objectives())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
    rows = cell.rows()
    loader: Any = DataLoader([rows[i] for i in range(len(rows))], size, collate_fn=cell.collate(model))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    losses: list[Tensor] = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean"))
        if accelerator.sync_gradients:
            tuner.update_biases("default")
    weights = accelerator.get_state_dict(model)
    plain = accelerator.unwrap_model(model)
    if accelerator.is_main_process or not plain.active_peft_config.modules_to_save:
        plain.save_pretrained(str(folder / "end"), state_dict=weights, is_main_process=accelerator.is_main_process)
    losses = torch.stack(losses).view(STEPS, -1).mean(1)
    return {"losses": losses.tolist(), "usage": collect_usage(root_of(model))}


LOOPS = {"Trainer": by_trainer, "accelerate": by_hand}
