"""Guidance of a small language model in one pass: how much of it adapters take over, and what they must know for it.

    python examples/studies/agd_language.py --model FOLDER  # a small causal model: with 260,000 weights 12 CPU minutes
    python examples/studies/agd_language.py --model FOLDER --steps 50 --seeds 0 --texts 512  # a first look

`generate(guidance_scale=w)` of transformers runs a second pass that reads the text without its prompt (Sanchez et al.
2023). Texts are sampled from the model itself, and cut into prompt and continuation at random. Compared are adapters
that know which tokens follow the prompt, adapters that do not, and the whole model trained likewise, on
R = sum KL(guided || student) / sum KL(guided || model without guidance) of texts that nothing was trained on: 0 is
perfect, 1 is no guidance. Writes results.json and table.md.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from study_arguments import check_numbers, read_arguments
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers import logging as transformers_logging

from mixadapters import AGDConfig, StageCallback
from mixadapters.tuners.agd import LanguageGuidanceDistillation, guided_log_probabilities

SCALES = (1.5, 2.0, 3.0)
AGES = ((0, 2), (2, 8), (8, 24), (24, 1000))  # predicted tokens, by how many tokens after the prompt they follow
# arm -> fields of the config, and whether all weights of the model train as well
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "knows the prompt": ({}, False),
    "does not": ({"after_prompt": False}, False),
    "whole model, knows": ({"gate": False}, True),
    "whole model, does not": ({"gate": False, "after_prompt": False}, True),
}


@dataclass
class Arguments:
    """What to run. The defaults are the evaluation."""

    model: str = field(
        metadata={"help": "Folder or hub id of a causal language model with a beginning-of-text token."}
    )
    out: str = field(default="runs/agd_language", metadata={"help": "Where results and table go."})
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    seeds: list[int] = field(default_factory=lambda: [0])
    texts: int = field(default=2304, metadata={"help": "Texts sampled from the model, of which 256 are held out."})
    held_out: int = 256
    length: int = field(default=96, metadata={"help": "Tokens of a text."})
    prompts: list[int] = field(default_factory=lambda: [4, 48], metadata={"help": "Least and largest of a prompt."})
    steps: int = 600
    batch_size: int = 16
    width: int = field(default=64, metadata={"help": "`r` of the adapters."})
    rate: float = field(default=4e-3, metadata={"help": "Learning rate of adapters."})
    whole_rate: float = field(default=1e-3, metadata={"help": "Learning rate where the whole model trains."})

    def __post_init__(self) -> None:
        check_numbers(self)


@torch.no_grad()
def sampled(model: nn.Module, count: int, length: int, seed: int = 0) -> Tensor:
    """(count, length) texts as the model writes them, at temperature 1."""
    torch.manual_seed(seed)
    found = []
    for start in range(0, count, 256):
        ids = torch.full((min(256, count - start), 1), model.config.bos_token_id)
        options = {"max_new_tokens": length - 1, "min_new_tokens": length - 1, "do_sample": True, "top_k": 0}
        found.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options))
    return torch.cat(found)


def prompts_of(texts: Tensor, least: int, largest: int, seed: int) -> Tensor:
    """(N, T) 1 on the prompt of each text."""
    ends = torch.randint(least, largest + 1, (len(texts), 1), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(texts.shape[1]) < ends).long()


class Continuations(torch.utils.data.Dataset):
    """Texts, each drawn several times with another prompt and scale."""

    def __init__(self, texts: Tensor, args: Arguments, rounds: int, seed: int) -> None:
        self.texts = texts
        self.prompts = torch.cat([prompts_of(texts, *args.prompts, seed + i) for i in range(rounds)])
        generator = torch.Generator().manual_seed(seed)
        self.scales = 1 + (SCALES[-1] - 1) * torch.rand(len(self.prompts), generator=generator)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = self.texts[index % len(self.texts)]
        return {
            "input_ids": text, "attention_mask": torch.ones_like(text), "prompt_mask": self.prompts[index],
            "guidance_scale": self.scales[index],
        }  # fmt: skip


def distil(base: nn.Module, texts: Tensor, arm: str, args: Arguments, seed: int) -> PeftModel:
    set_seed(seed)
    fields, whole = ARMS[arm]
    model = get_peft_model(
        copy.deepcopy(base), AGDConfig(r=args.width, max_scale=SCALES[-1], task_type="CAUSAL_LM", **fields)
    )
    if whole:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    rounds = -(-args.steps * args.batch_size // len(texts))
    objective = LanguageGuidanceDistillation(base if whole else None)  # the teacher is the model as it was
    Trainer(
        model,
        TrainingArguments(
            output_dir=str(Path(args.out) / "trainer"), max_steps=args.steps, seed=seed,
            per_device_train_batch_size=args.batch_size, learning_rate=args.whole_rate if whole else args.rate,
            lr_scheduler_type="cosine", warmup_steps=args.steps // 10, weight_decay=0.0, remove_unused_columns=False,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=Continuations(texts, args, rounds, seed),
        callbacks=[StageCallback("distill", objectives=[objective], check_head=False)],
    ).train()  # fmt: skip
    return model.eval()


@torch.no_grad()
def errors(base: nn.Module, model: PeftModel, texts: Tensor, args: Arguments) -> dict[str, Any]:
    """R by scale, and at the middle scale by the distance from the prompt."""
    prompt = prompts_of(texts, *args.prompts, seed=12345)
    real = torch.ones_like(prompt).bool()
    age = torch.arange(texts.shape[1]) - (prompt.sum(1, keepdim=True) - 1)
    unguided = base(input_ids=texts, use_cache=False).logits.float().log_softmax(-1)
    found: dict[str, Any] = {}
    for w in SCALES:
        teacher = guided_log_probabilities(base, texts, real, prompt.bool(), w)
        logits = model(input_ids=texts, prompt_mask=prompt, guidance_scale=w, use_cache=False).logits
        ours, without = (
            (teacher.exp() * (teacher - other)).sum(-1) for other in (logits.float().log_softmax(-1), unguided)
        )
        found[f"{w:g}"] = (ours[age >= 0].sum() / without[age >= 0].sum()).item()
        if w == SCALES[1]:
            parts = [(age >= low) & (age < high) for low, high in AGES]
            found["by distance"] = [
                (ours[part].sum() / without[part].sum()).item() if part.any() else None for part in parts
            ]
            found["KL without guidance"] = without[age >= 0].mean().item()
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown: a row for each arm, means over seeds."""
    heads = [f"R at w = {w:g}" for w in SCALES] + [f"w = 2, tokens {a} to {b - 1}" for a, b in AGES[:-1]]
    heads.append(f"from {AGES[-1][0]} on")
    lines = ["| arm | trained | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for arm in dict.fromkeys(run["arm"] for run in report["runs"]):
        runs = [run for run in report["runs"] if run["arm"] == arm]
        rows = [[run["errors"][f"{w:g}"] for w in SCALES] + run["errors"]["by distance"] for run in runs]
        columns = list(zip(*rows, strict=True))
        cells = " | ".join("-" if None in column else f"{statistics.fmean(column):.2f}" for column in columns)
        share = f"{runs[0]['trained']:,} ({100 * runs[0]['trained'] / report['weights']:.0f} %)"
        lines.append(f"| {arm} | {share} | {cells} |")
    return "\n".join(lines) + "\n"


def main(args: Arguments) -> dict[str, Any]:
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        raise ValueError(f"arms={unknown} are unknown; have {list(ARMS)}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    base = AutoModelForCausalLM.from_pretrained(args.model).eval().requires_grad_(False)
    texts = sampled(base, args.texts, args.length)
    held_out, train = texts[: args.held_out], texts[args.held_out :]
    report: dict[str, Any] = {"arguments": asdict(args), "runs": []}
    report["weights"] = sum(p.numel() for p in base.parameters())
    for seed in args.seeds:
        for arm in args.arms:
            start = time.process_time()
            model = distil(base, train, arm, args, seed)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            run = {"arm": arm, "seed": seed, "trained": trained, "errors": errors(base, model, held_out, args)}
            run["cpu_minutes"] = (time.process_time() - start) / 60
            report["runs"].append(run)
            print(json.dumps(run), flush=True)
            (out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            (out / "table.md").write_text(table(report), encoding="utf-8")
    return report


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    arguments = read_arguments(Arguments)
    print(table(main(arguments)))
