"""MixDA end to end on real text: domain adapters from unlabelled text, then a gate and a task adapter on labels.

    python examples/studies/sentences.py  # text of the Python installation
    python examples/studies/sentences.py --data_dir data --task chemprot --methods head lora mixda  # JSON lines

Compares, at equal trainable size and over several seeds, a frozen encoder with a linear head, PEFT's LoRA, one
bottleneck adapter, and MixDA. Writes report.json, a table, a plot of the gates, and the adapters; reloads them in a
fresh process and compares predictions.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sentences_corpus import SentenceData, load_folder, load_installation, minilm_path
from sklearn.metrics import accuracy_score, f1_score
from study_arguments import check_numbers, read_arguments
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers import logging as transformers_logging

from mixadapters import BottleneckConfig, GateUsageCallback, MixDAConfig, StageCallback
from mixadapters.tasks.domains import HELD_OUT, train_domain
from mixadapters.tasks.models import PooledHead
from mixadapters.tasks.registry import get_task
from mixadapters.tasks.retention import drift, embed, similarity
from mixadapters.tasks.sources import read_task

METHODS = ("head", "lora", "bottleneck", "mixda_untuned", "mixda_one", "mixda")


@dataclass
class Arguments:
    """What to run. The defaults need no data."""

    model: str | None = field(
        default=None, metadata={"help": "Encoder: folder or hub id. Default: MiniLM of the extra `tasks`."}
    )
    task: str = field(default="areas", metadata={"help": "'areas' (from the installation), or a task of --data_dir."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of published sets; see docs/tasks.md."})
    out: str = field(default="runs/sentences", metadata={"help": "Where report, plot and adapters go."})
    methods: list[str] = field(default_factory=lambda: ["head", "lora", "bottleneck", "mixda"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train_rows: int = field(default=440, metadata={"help": "Training rows, drawn anew for each seed."})
    test_rows: int = field(default=1000, metadata={"help": "The first so many test rows."})
    epochs: int = 4
    batch_size: int = 16
    max_length: int = 48
    parameters: int = field(default=40_000, metadata={"help": "Trainable parameters besides the head."})
    layers: int = field(default=3, metadata={"help": "Adapters sit in so many of the upper layers."})
    stage1_steps: int = field(default=60, metadata={"help": "Steps per domain on unlabelled text."})
    stage1_batch: int = field(default=32, metadata={"help": "Texts per step; each is read twice."})
    stage1_rate: float = 5e-4
    # Rates: the best for each method on the dev split of the demo's task, seed 100.
    head_rate: float = field(default=3e-2, metadata={"help": "Learning rate of the new head, in all methods."})
    rate: float = field(default=1e-3, metadata={"help": "Learning rate of adapters."})
    check: str | None = field(default=None, metadata={"help": "Only predict with the adapter in this folder."})

    def __post_init__(self) -> None:
        check_numbers(self)


class TwoRateTrainer(Trainer):
    """The new head learns faster than the adapters below it, whatever these are."""

    adapter_rate: float

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        head = [p for name, p in named if "classifier" in name]
        adapters = [p for name, p in named if "classifier" not in name]
        groups = [{"params": head, "lr": self.args.learning_rate}, {"params": adapters, "lr": self.adapter_rate}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=self.args.weight_decay)
        return self.optimizer


class Demo:
    """One task: its data, its domain adapters, and a run for each method and seed."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.out = args, Path(args.out)
        self.path = args.model or minilm_path()
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.data: SentenceData = load_folder(args.data_dir, args.task) if args.data_dir else load_installation()
        self.depth = AutoModel.from_pretrained(self.path).config.num_hidden_layers
        self.upper = list(range(self.depth - args.layers, self.depth))
        self.domain_layers = self.upper[:2]
        self.runs: list[dict[str, Any]] = []

    # --- stage 1: unlabelled text ---------------------------------------------------------------------------------

    def domain_config(self) -> BottleneckConfig:
        return BottleneckConfig.domain(layers_to_transform=self.domain_layers)

    def train_domain(self, name: str) -> dict[str, float]:
        """Train and save one domain adapter; returns how far it moved the embeddings of general text."""
        args, folder = self.args, self.out / "domains" / name
        set_seed(0)
        model = get_peft_model(AutoModel.from_pretrained(self.path), self.domain_config())
        general, held_out = self.data.general[:-HELD_OUT], self.data.general[-HELD_OUT:]
        before, stsb = self.embed(model, held_out), self.similarity(model)
        arguments = self.training_arguments(
            args.stage1_batch,
            args.stage1_rate,
            max_steps=args.stage1_steps,
            dataloader_drop_last=True,
            train_sampling_strategy="random",
        )
        train_domain(model, self.tokenizer, self.data.domains[name], general, arguments, args.max_length)
        after = self.embed(model, held_out)
        model.save_pretrained(folder)
        measure = {"drift_on_general_text": drift(before, after)}
        if stsb is not None:
            measure |= {"stsb_before": stsb, "stsb_after": self.similarity(model)}
        return measure

    def similarity(self, encoder: nn.Module) -> float | None:
        """Spearman correlation with the scores of 500 sentence pairs of STS-B, where `data_dir` has them."""
        if self.args.data_dir is None:
            return None
        rows = read_task(get_task("stsb"), self.args.data_dir, ("test",))["test"][:500]
        return similarity(encoder, self.tokenizer, rows, self.args.max_length)

    def embed(self, model: nn.Module, texts: list[str]) -> Tensor:
        return embed(model, self.tokenizer, texts, self.args.max_length)

    # --- stage 2: labels ------------------------------------------------------------------------------------------

    def classifier(self) -> PooledHead:
        return PooledHead(AutoModel.from_pretrained(self.path), len(self.data.labels))

    def build(self, method: str, domains: dict[str, str]) -> nn.Module:
        """The classifier with the adapters of `method`, sized to the budget."""
        base = self.classifier()
        if method == "head":
            return base.requires_grad_(False).train()
        shared = {"layers_to_transform": self.upper, "modules_to_save": ["classifier"]}
        width, inner, count = base.config.hidden_size, base.config.intermediate_size, len(self.upper)
        budget = self.args.parameters
        if method == "lora":
            rank = round(budget / (4 * width * count))
            config: Any = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], **shared)
        elif method == "bottleneck":
            config = BottleneckConfig(r=round(budget / (2 * width * count)), activation="relu", **shared)
        else:
            chosen: Any = {
                "mixda_untuned": list(domains),
                "mixda_one": dict(list(domains.items())[:1]),
                "mixda": domains,
            }[method]
            gates = (len(chosen) + 1) * (inner + 1) * len(self.domain_layers)
            config = MixDAConfig(
                domains=chosen, domain_layers=self.domain_layers, task_r=round((budget - gates) / (2 * width * count)),
                **shared,
            )  # fmt: skip
        return get_peft_model(base, config)

    def run(self, method: str, seed: int, domains: dict[str, str]) -> None:
        args = self.args
        set_seed(seed)
        model = self.build(method, domains)
        if method == "head":
            model.classifier.requires_grad_(True)
        callbacks = [StageCallback("task")] if method not in ("head", "lora") else []
        trainer = TwoRateTrainer(
            model,
            self.training_arguments(
                args.batch_size,
                args.head_rate,
                num_train_epochs=args.epochs,
                seed=seed,
            ),
            train_dataset=self.rows(self.sample(seed)),
            data_collator=self.collate,
            callbacks=callbacks,
        )
        trainer.adapter_rate = args.rate
        if method.startswith("mixda"):
            trainer.add_callback(GateUsageCallback(trainer))
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        test = self.data.test[: args.test_rows]
        predictions = self.predict(model, [text for text, _ in test])
        gold = torch.tensor([label for _, label in test])
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        result = {
            "method": method,
            "seed": seed,
            "accuracy": accuracy_score(gold, predictions),
            "macro_f1": f1_score(gold, predictions, average="macro", zero_division=0),
            "trainable_parameters": trainable,
            "seconds": round(seconds, 1),
        }
        if self.args.data_dir and seed == self.args.seeds[0]:
            result["stsb"] = self.similarity(model.encoder)
        self.runs.append(result)
        print(f"{method:>14} seed {seed}: accuracy {result['accuracy']:.3f}, macro-F1 {result['macro_f1']:.3f}, "
              f"{trainable:,} parameters, {seconds:.0f} s", flush=True)  # fmt: skip
        if method.startswith("mixda") and seed == args.seeds[0]:
            plot_gates(trainer.state.log_history, self.out / f"gates_{method}.png")
        if method == "mixda" and seed == args.seeds[0]:
            model.save_pretrained(self.out / "mixda")
            (self.out / "mixda" / "expected.json").write_text(json.dumps(predictions.tolist()))

    def sample(self, seed: int) -> list[tuple[str, int]]:
        """Training rows of a seed: as many of each class as there are, up to an equal share."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.data.train), generator=generator).tolist()
        return [self.data.train[i] for i in order[: self.args.train_rows]]

    # --- shared -----------------------------------------------------------------------------------------------------

    def training_arguments(self, batch_size: int, rate: float, **more: Any) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(self.out / "trainer"), per_device_train_batch_size=batch_size, learning_rate=rate,
            lr_scheduler_type="linear", warmup_steps=0.06, weight_decay=0.01, logging_steps=10, save_strategy="no",
            report_to="none", remove_unused_columns=False, disable_tqdm=not sys.stderr.isatty(),
            **{"train_sampling_strategy": "group_by_length", **more},
        )  # fmt: skip

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        batch = self.tokenizer(
            texts, truncation=True, max_length=self.args.max_length, padding=True, return_tensors="pt"
        )
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def rows(self, texts: list[tuple[str, int]]) -> list[dict[str, Any]]:
        tokens = self.tokenizer([t for t, _ in texts], truncation=True, max_length=self.args.max_length)["input_ids"]
        return [{"input_ids": ids, "labels": label} for ids, (_, label) in zip(tokens, texts, strict=True)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    @torch.no_grad()
    def predict(self, model: nn.Module, texts: list[str]) -> Tensor:
        """(N,) labels; texts go through the model sorted by length."""
        model.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.empty(len(texts), dtype=torch.long)
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            out[part] = model(**self.tokenize([texts[i] for i in part])).logits.argmax(-1)
        return out

    # --- the whole --------------------------------------------------------------------------------------------------

    def main(self) -> None:
        args = self.args
        print(f"task: {self.data.description}\n{len(self.data.train)} training rows, {len(self.data.test)} for test; "
              + ", ".join(f"{len(t)} texts of {n}" for n, t in self.data.domains.items()), flush=True)  # fmt: skip
        stage1 = {}
        if any(m in ("mixda", "mixda_one") for m in args.methods):
            for name in self.data.domains:
                started = time.perf_counter()
                measure = self.train_domain(name)
                stage1[name] = {**measure, "seconds": round(time.perf_counter() - started, 1)}
                print(f"stage 1, {name}: {stage1[name]}", flush=True)
        domains = {name: str(self.out / "domains" / name) for name in self.data.domains}
        for seed in args.seeds:
            for method in args.methods:
                self.run(method, seed, domains)
        same = self.check_in_fresh_process() if "mixda" in args.methods else None
        report = {
            "task": args.task,
            "runs": self.runs,
            "stage1": stage1,
            "reload_in_fresh_process_equal": same,
            "majority_accuracy": self.majority(),
            "arguments": asdict(args),
            "sources": self.data.sources,
        }
        (self.out / "report.json").write_text(json.dumps(report, indent=2))
        print("\n" + table(self.runs) + f"\n\nmajority class: {report['majority_accuracy']:.3f}", flush=True)
        if same is not None:
            print(f"reloaded in a fresh process: predictions {'equal' if same else 'DIFFER'}")
        print(f"report: {self.out / 'report.json'}")
        if same is False:
            raise SystemExit(1)

    def majority(self) -> float:
        labels = [label for _, label in self.data.test[: self.args.test_rows]]
        return max(labels.count(label) for label in set(labels)) / len(labels)

    def check_in_fresh_process(self) -> bool:
        command = [sys.executable, __file__, "--check", str(self.out / "mixda"), "--task", self.args.task,
                   "--max_length", str(self.args.max_length), "--test_rows", str(self.args.test_rows),
                   "--model", self.path]  # fmt: skip
        if self.args.data_dir:
            command += ["--data_dir", self.args.data_dir]
        return subprocess.run(command, check=False).returncode == 0

    def check(self, folder: Path) -> None:
        model = PeftModel.from_pretrained(self.classifier(), folder)
        found = self.predict(model, [text for text, _ in self.data.test[: self.args.test_rows]])
        expected = json.loads((folder / "expected.json").read_text())
        raise SystemExit(0 if found.tolist() == expected else 1)


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, and paired differences to the single bottleneck adapter."""
    lines = ["| method | accuracy | macro-F1 | paired difference to bottleneck | trainable | seconds |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    reference = {run["seed"]: run["accuracy"] for run in by_method.get("bottleneck", [])}
    for method, group in by_method.items():
        gaps = [run["accuracy"] - reference[run["seed"]] for run in group if run["seed"] in reference]
        gap = spread(gaps, "+") if gaps and method != "bottleneck" else "-"
        accuracy, macro_f1, seconds = ([run[n] for run in group] for n in ("accuracy", "macro_f1", "seconds"))
        lines.append(
            f"| {method} | {spread(accuracy)} | {spread(macro_f1)} | {gap} "
            f"| {group[0]['trainable_parameters']:,} | {spread(seconds, digits=0)} |"
        )
    return "\n".join(lines)


def spread(values: list[float], sign: str = "", digits: int = 3) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"


def plot_gates(history: list[dict[str, Any]], path: Path) -> None:
    """Mean weight of each arm of the gates over training steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mark = "gate/mean/weight/"
    points = [entry for entry in history if any(k.startswith(mark) for k in entry)]
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for name in sorted({k for entry in points for k in entry if k.startswith(mark)}):
        axes.plot([e["step"] for e in points], [e[name] for e in points], label=name.removeprefix(mark))
    axes.set(xlabel="step of stage 2", ylabel="mean weight of the gate", ylim=(0, 1), title="Which arm the gates use")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(Arguments, argv)
    for method in args.methods:
        if method not in METHODS:
            raise SystemExit(f"--methods {method!r} is unknown; choose from {', '.join(METHODS)}")
    transformers_logging.set_verbosity_error()
    demo = Demo(args)
    demo.out.mkdir(parents=True, exist_ok=True)
    if args.check:
        demo.check(Path(args.check))
    demo.main()


if __name__ == "__main__":
    main()
