"""What ternary experts cost: the loss of a small MoE model against the bytes of its experts.

    python examples/studies/compression.py  # two seeds, under two CPU minutes

A byte-level Mixtral of two layers with eight experts each, two for a byte, is trained on this checkout's own pages and
code, all but every eighth file. Its experts are then compressed in each way, calibrated on text of the training, and
the loss is measured on the files that were left out, in nats per byte. Bytes are those of the experts: as float32, and
in codes as `save_compressed` writes them. The model is small and hardly trained: what counts are the differences.

Expected, written before the run: rounding the extremes (minmax, nearest) ruins the model, GPTQ mends part of it; the
means of large weights lose far less but have too few zeros for the codec, so they are packed; words beat packed codes
for minmax only, whose rows of 128 and 512 leave them above one bit; no form is free without training after it.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from study_arguments import check_numbers, read_arguments
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from mixadapters.surgery import compress_experts, expert_layers, save_compressed

ROOT = Path(__file__).resolve().parents[2]
FORMS: dict[str, dict[str, Any]] = {
    "minmax, nearest, words": {"scale": "minmax", "rounding": "nearest", "codec": "qmoe"},
    "minmax, GPTQ, words": {"scale": "minmax", "rounding": "gptq", "codec": "qmoe"},
    "mean, nearest, packed": {"scale": "mean", "rounding": "nearest", "codec": "packed"},
    "mean, GPTQ, packed": {"scale": "mean", "rounding": "gptq", "codec": "packed"},
    "LoSparse, a quarter and a tenth": {"method": "lowrank_sparse", "share": 0.25, "keep": 0.1},
}


@dataclass
class Arguments:
    out: str = field(default="runs/compression", metadata={"help": "Folder for results.json and table.md."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Of weights and batches."})
    steps: int = field(default=200, metadata={"help": "Of training."})
    width: int = field(default=128, metadata={"help": "Of the hidden states; experts have four times as many units."})
    batch: int = field(default=16, metadata={"help": "Pieces of text in a batch."})
    length: int = field(default=64, metadata={"help": "Bytes of a piece."})

    def __post_init__(self) -> None:
        check_numbers(self)


def texts() -> tuple[Tensor, Tensor]:
    """Bytes (n,) to train on, and those of every eighth file: pages and code of this checkout."""
    files = sorted(path for name in ("docs", "mixadapters", "kernels/ops") for path in (ROOT / name).rglob("*"))
    files = [path for path in files if path.suffix in (".md", ".py")]
    parts = [[path for i, path in enumerate(files) if (i % 8 == 0) == held] for held in (False, True)]
    train, test = (torch.tensor(list(b"".join(path.read_bytes() for path in part))) for part in parts)
    return train, test


def batches(text: Tensor, count: int, args: Arguments, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        starts = torch.randint(len(text) - args.length, (args.batch, 1), generator=generator)
        found.append({"input_ids": text[starts + torch.arange(args.length)]})
    return found


def trained(text: Tensor, args: Arguments, seed: int) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=256, hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=args.length, router_aux_loss_coef=0.01, output_router_logits=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    for batch in batches(text, args.steps, args, seed):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def nats(model: MixtralForCausalLM, tests: list[dict[str, Tensor]]) -> float:
    """The mean loss of a byte, without that of the router."""
    return statistics.mean(
        float(model(**batch, labels=batch["input_ids"], output_router_logits=False).loss) for batch in tests
    )


def run(args: Arguments, seed: int) -> dict[str, Any]:
    started, (train, test) = time.process_time(), texts()
    model = trained(train, args, seed)
    calibration, tests = batches(train, 8, args, 1000 + seed), batches(test, 32, args, 2000 + seed)
    bare = copy.deepcopy(model)
    for layer in expert_layers(bare):
        for e in range(len(layer.names)):
            weights = layer.weights(e)
            layer.set_weights(e, weights._replace(up=torch.zeros_like(weights.up)))
    rows: dict[str, Any] = {"no experts": {"loss": nats(bare, tests), "bytes": 0, "bits": 0.0}}
    for name, options in FORMS.items():
        smaller = copy.deepcopy(model)
        told = compress_experts(smaller, calibration, **options)
        rows["float32"] = {"loss": nats(model, tests), "bytes": told.plain_bytes, "bits": 32.0}
        rows[name] = {"loss": nats(smaller, tests), "bytes": told.nbytes, "bits": told.bits_per_weight}
        if "codec" in options:
            with tempfile.TemporaryDirectory() as folder:
                sizes = save_compressed(smaller, Path(folder) / "codes", codec=options["codec"])
            rows[name]["on_disk"] = sizes.coded
    return {"seed": seed, "rows": rows, "cpu_seconds": time.process_time() - started}


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["| experts | nats per byte, by seed | bytes of experts | bits per weight |", "|---|---|---|---|"]
    for name in runs[0]["rows"]:
        rows = [run["rows"][name] for run in runs]
        losses = ", ".join(f"{row['loss']:.3f}" for row in rows)
        size, bits = (statistics.mean(row[what] for row in rows) for what in ("bytes", "bits"))
        lines.append(f"| {name} | {losses} | {round(size):,} | {bits:.2f} |")
    return "\n".join(lines) + "\n"


def main(args: Arguments) -> list[dict[str, Any]]:
    runs = [run(args, seed) for seed in args.seeds]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(runs, indent=1))
    (out / "table.md").write_text(table(runs))
    print(f"{table(runs)}\n{sum(run['cpu_seconds'] for run in runs) / 60:.1f} CPU minutes")
    return runs


if __name__ == "__main__":
    main(read_arguments(Arguments))
