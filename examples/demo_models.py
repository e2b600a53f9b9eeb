"""The demo's models: a small base, LoRA adapters of domains, and the mixture of them; training and perplexity."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mixadapters import MoAConfig

Rows = Tensor  # (n, T) token ids

MOST_LOGITS = 2**27  # half a gigabyte
ASTRAY = 100.0  # nats of a token, which no model needs that has learnt anything


def new_base(vocabulary: int, width: int, layers: int, length: int, seed: int = 0) -> LlamaForCausalLM:
    """An untrained decoder."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
            num_attention_heads=width // 32, max_position_embeddings=2 * length, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(name: str | Path) -> Any:
    """A frozen decoder, on the device that trains it. Half precision stays where that is the faster one.

    Raises:
        ValueError: it cannot be loaded, or has no trained head that foretells tokens.
    """
    dtype = "auto" if has_bfloat16() else torch.float32
    try:
        model, told = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"--base {name} cannot be loaded: {str(error).partition(chr(10))[0]}") from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"--base {name} has no weights of {missing[0]}, which {type(model).__name__} foretells with")
    return model.to(device()).eval()


@torch.no_grad()
def check_base(model: Any, name: str, tests: dict[str, Rows]) -> None:
    """Find out whether a user's model can read these rows, and go from left to right, before anything is trained.

    Raises:
        ValueError: it cannot.
    """
    rows = next(iter(tests.values()))[:1]
    reads = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(reads, int) and rows.shape[1] > reads:
        raise ValueError(f"--length {rows.shape[1]} is too long: --base {name} reads {reads} tokens")
    known, largest = model.get_input_embeddings().num_embeddings, max(int(of.max()) for of in tests.values())
    if largest >= known:
        raise ValueError(
            f"--base {name}: its tokenizer gives token {largest}, and it knows {known}: they are not of one model"
        )
    other = rows.clone()
    other[:, -1] = (rows[:, -1] + 1) % known
    one, two = (model(input_ids=part.to(model.device)).logits.float() for part in (rows, other))
    moved = (one - two).abs().amax((0, 2))  # (T,), by another last token: nothing before it, up to rounding
    if moved[:-1].max() > 1e-4 * moved[-1]:
        raise ValueError(
            f"--base {name} is no decoder: what {type(model).__name__} says of a token depends on later ones. Name a "
            "causal language model"
        )


def lora(base: nn.Module, rank: int, seed: int = 0) -> Any:
    """A LoRA of PEFT on every linear layer."""
    torch.manual_seed(seed)
    return get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def mixture(
    base: nn.Module, folders: dict[str, str], shared_rank: int = 0, seed: int = 0, router: Any = "counts",
    scope: Any = "model",
) -> Any:  # fmt: skip
    """The LoRA adapters of some domains side by side, under a gate: one that counts tokens, or `router`.

    shared_rank: above 0, one more LoRA that is always on, and the only part that trains.
    """
    torch.manual_seed(seed)
    shared = {"n_shared_experts": 1, "r": shared_rank, "lora_alpha": 2 * shared_rank} if shared_rank else {}
    config = MoAConfig(experts=folders, router=router, router_scope=scope, task_type="CAUSAL_LM", **shared)
    return get_peft_model(base, config).eval()


def has_bfloat16() -> bool:
    """Whether half precision is the faster one here."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Progress:
    """The one progress bar: tokens of training, or what else is counted."""

    def __init__(self, unit: str = "tok") -> None:
        often = 0.1 if sys.stderr.isatty() else 30  # seconds: a log keeps every line
        self.bar = tqdm(total=0, unit=unit, unit_scale=True, smoothing=0.05, leave=False, mininterval=often)

    def expect(self, count: int) -> None:
        self.bar.total += count

    def step(self, text: str) -> None:
        self.bar.set_description(f"{text:<34.34}", refresh=sys.stderr.isatty())

    def say(self, text: str) -> None:
        self.bar.write(text)


class Advance(TrainerCallback):
    """Moves the bar with each step, which counts so much."""

    def __init__(self, progress: Progress, count: int) -> None:
        self.progress, self.count = progress, count

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.progress.bar.update(self.count)


def train(
    model: nn.Module, rows: Rows, progress: Progress, *, rate: float, batch: int, epochs: float, out: str,
    seed: int = 0, **fields: int,
) -> None:  # fmt: skip
    """One run of transformers' Trainer over the rows, without its logs.

    fields: more of the batch, the same for every row.
    """
    arguments = TrainingArguments(
        out, per_device_train_batch_size=batch, num_train_epochs=epochs, learning_rate=rate, warmup_steps=0.06,
        lr_scheduler_type="cosine", adam_beta2=0.98, bf16=has_bfloat16(), save_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(), dataloader_drop_last=True,
        seed=seed, remove_unused_columns=not fields,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row, **fields} for row in rows]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Advance(progress, batch * rows.shape[1])])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()


@torch.no_grad()
def token_losses(model: Any, rows: Rows, batch: int = 16) -> Tensor:
    """(n, T - 1) nats of each token after the first. No forward has more than `MOST_LOGITS` of them."""
    model.eval()
    device = next(model.parameters()).device
    fit = MOST_LOGITS // (rows.shape[1] * model.get_input_embeddings().num_embeddings)
    found = []
    with autocast(device):
        for part in rows.to(device).split(max(1, min(batch, fit))):
            logits = model(input_ids=part, attention_mask=torch.ones_like(part)).logits[:, :-1].float()
            flat = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            found.append(flat.view(len(part), -1).cpu())
    return torch.cat(found)


def perplexities(model: nn.Module, tests: dict[str, Rows]) -> dict[str, float]:
    """By kind of text. Raises ValueError: one is beyond all numbers, as after a training that went astray."""
    losses = {kind: token_losses(model, rows).mean().item() for kind, rows in tests.items()}
    for kind, loss in losses.items():
        if not loss < ASTRAY:
            raise ValueError(f"the loss on text of {kind} is {loss:g}: training went astray; give a lower --rate")
    return {kind: math.exp(loss) for kind, loss in losses.items()}


@torch.no_grad()
def routing(model: Any, rows: Rows) -> tuple[list[str], Tensor]:
    """Names of the gate's arms, and their weights at each token: (n, T, A)."""
    tuner, seen = model.base_model, []
    for part in rows.to(next(model.parameters()).device).split(16):
        model(input_ids=part, attention_mask=torch.ones_like(part))
        decided = next(iter(tuner.context.record.routings.values()))  # one serves all layers
        seen.append(decided.probs.float().cpu())
    arms = next(iter(tuner.mixtures().values())).router.arms
    return arms, torch.cat(seen).view(*rows.shape, -1)


@contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16()):
        yield


def size(model: nn.Module) -> int:
    """Parameters that adapters add."""
    parts = ("lora_A", "lora_B", "bank.experts")
    return sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in parts))
