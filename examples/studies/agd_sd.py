"""Guidance adapters for a checkpoint of diffusers: record its guided trajectories, distil them, compare pictures.

    python examples/studies/agd_sd.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt \\
        --precision bf16
    python examples/studies/agd_sd.py --model facebook/DiT-XL-2-256 --classes 1000 --max_scale 6

Works for pipelines whose denoiser is a UNet2DConditionModel, a DiTTransformer2DModel or an SD3Transformer2DModel. The
record is resumed if it was interrupted. Writes trajectories/, adapter/, report.json, and pictures by both ways.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel, get_peft_model
from study_arguments import check_numbers, read_arguments
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from mixadapters import AGDConfig, StageCallback
from mixadapters.tuners.agd import (
    GuidanceDistillation,
    OnePass,
    Trajectories,
    TrajectoryCollator,
    record_pipeline,
    relative_error,
)
from mixadapters.tuners.agd.calls import denoiser_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Arguments:
    """What to run."""

    model: str = field(metadata={"help": "Folder or hub id of a pipeline."})
    prompts: str | None = field(default=None, metadata={"help": "Text file, one prompt per line."})
    classes: int | None = field(default=None, metadata={"help": "For class-conditional models: how many classes."})
    out: str = "runs/agd_sd"
    precision: str = field(default="fp32", metadata={"help": f"Of the frozen model: one of {list(DTYPES)}."})
    min_scale: float = 1.0
    max_scale: float = 12.0
    sample_steps: int = field(default=50, metadata={"help": "Steps of a recorded trajectory."})
    keep: int | None = field(default=None, metadata={"help": "States kept of each, at random. Default: all."})
    max_gigabytes: float = field(default=20.0, metadata={"help": "The record is refused if it would be larger."})
    record_batch: int = 8
    kind: str = "film"
    width: int = field(default=256, metadata={"help": "`r` of the adapters."})
    steps: int = 5000
    batch_size: int = 8
    accumulate: int = field(default=8, metadata={"help": "Micro-batches per step."})
    rate: float = 1e-4
    checkpointing: bool = field(default=True, metadata={"help": "Activation checkpointing."})
    held_out: int = field(default=8, metadata={"help": "Trajectories not trained on, for the report."})
    test_scale: float = 5.0
    test_steps: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)


def recorded(pipe: Any, args: Arguments) -> Trajectories:
    conditions: dict[str, Any] = {}
    if args.prompts is not None:
        lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
        conditions["prompts"] = [line.strip() for line in lines if line.strip()]
    if args.classes is not None:
        conditions["class_labels"] = list(range(args.classes))
    return record_pipeline(
        pipe, folder=Path(args.out) / "trajectories", scales=(args.min_scale, args.max_scale),
        steps=args.sample_steps, keep=args.keep, batch_size=args.record_batch, seed=args.seed,
        max_bytes=int(args.max_gigabytes * 2**30), **conditions,
    )  # fmt: skip


def distil(pipe: Any, data: Trajectories, args: Arguments) -> PeftModel:
    set_seed(args.seed)
    base = denoiser_of(pipe)
    model = get_peft_model(base, AGDConfig(kind=args.kind, r=args.width, **data.config_fields))
    model.print_trainable_parameters()
    if args.checkpointing:
        base.enable_gradient_checkpointing()
    on_gpu = torch.cuda.is_available()
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(Path(args.out) / "trainer"), max_steps=args.steps, learning_rate=args.rate,
            per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=args.accumulate,
            lr_scheduler_type="cosine", warmup_steps=args.steps // 10, weight_decay=0.0, seed=args.seed,
            bf16=args.precision == "bf16", fp16=args.precision == "fp16" and on_gpu, remove_unused_columns=False,
            report_to=[], save_steps=500, logging_steps=50, use_cpu=not on_gpu,
        ),
        train_dataset=data,
        data_collator=TrajectoryCollator(model),
        callbacks=[StageCallback("distill", objectives=[GuidanceDistillation()])],
    )  # fmt: skip
    trainer.train()
    if args.checkpointing:
        base.disable_gradient_checkpointing()
    model.save_pretrained(Path(args.out) / "adapter")
    return model.eval()


def errors(model: PeftModel, data: Trajectories, args: Arguments) -> dict[str, list[float]]:
    """R on held-out trajectories, by guidance scale and by timestep, each in three parts."""
    device = next(model.parameters()).device
    collate = TrajectoryCollator(model)

    def batches() -> Any:
        for batch in DataLoader(data, args.batch_size, collate_fn=collate):
            yield move(batch, device)

    span = args.max_scale - args.min_scale
    thirds = [args.min_scale + span / 3, args.min_scale + 2 * span / 3]
    with torch.autocast(device.type, DTYPES[args.precision], enabled=args.precision != "fp32"):
        return {
            "by_scale": relative_error(model, batches(), "guidance_scale", thirds),
            "by_timestep": relative_error(model, batches(), "timestep", [333.0, 667.0]),
        }


def move(batch: Any, device: torch.device) -> Any:
    return {k: move(v, device) if isinstance(v, dict) else v.to(device) for k, v in batch.items()}


def compare(pipe: Any, model: PeftModel, args: Arguments) -> dict[str, float]:
    """Pictures and seconds: with two passes per step and adapters off, and in one pass."""
    if args.prompts is not None:
        given: dict[str, Any] = {"prompt": Path(args.prompts).read_text(encoding="utf-8").splitlines()[0]}
    else:
        given = {"class_labels": [1]}
    seconds = {}

    def draw(name: str) -> None:
        generator = torch.Generator("cpu").manual_seed(args.seed)
        start = time.perf_counter()
        images = pipe(
            **given, guidance_scale=args.test_scale, num_inference_steps=args.test_steps, generator=generator
        ).images
        seconds[name] = time.perf_counter() - start
        images[0].save(Path(args.out) / f"{name}.png")

    with model.disable_adapter():
        draw("two_passes")
    with OnePass(pipe):
        draw("one_pass")
    return seconds


def main(args: Arguments) -> dict[str, Any]:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=DTYPES[args.precision])
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    train, held_out = recorded(pipe, args).split(args.held_out)
    model = distil(pipe, train, args)
    report = {"relative_error": errors(model, held_out, args), "seconds": compare(pipe, model, args)}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    arguments = read_arguments(Arguments)
    print(json.dumps(main(arguments), indent=1))
