"""MoSA against the plain adapter of its size, and what each of its two halves does: sparsity, and consistency.

    python examples/studies/mosa_vision.py  # scikit-learn's digits, no data needed
    python examples/studies/mosa_vision.py --dataset cifar --data_dir data/vision  # or mnist, omniglot: local files
    python examples/studies/mosa_vision.py --dataset sst2 --data_dir data  # a text set: MiniLM is the base
    python examples/studies/mosa_vision.py --dataset uoft-cs/cifar100 \\
        --model google/vit-base-patch16-224-in21k --shots 0

Each seed draws its own training and validation rows from the training part of the set: `--shots` of each class, or
with `--shots 0` all of them and a tenth for validation. The rate of each method is the best on the validation rows of
the tuning seeds, the epoch the best on those of the run; test rows are read once, at the end. Writes report.json,
table.md and plot.png. Without `--model` the base for images is a small ViT that the script trains on classes that no
task uses (see mosa_vision_data.py) and keeps in `--cache`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from mosa_vision_data import TEXT_SETS, Rows, load_images, load_pretraining, load_texts
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import t as student
from study_arguments import check_numbers, read_arguments
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, set_seed
from transformers import logging as transformers_logging

from mixadapters import MoSAConfig

ABLATION = ("adapter", "sparsity", "consistency", "mosa")  # neither, one, the other, both
METHODS = ("linear", "full", "lora", *ABLATION)
RATES = {"linear": [1e-2, 1e-1], "full": [3e-4, 1e-3]}


@dataclass
class Arguments:
    """What to run. The defaults are the demo."""

    dataset: str = field(
        default="digits", metadata={"help": f"digits, cifar, mnist, omniglot, {TEXT_SETS}, or a hub name."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the local sets."})
    model: str | None = field(default=None, metadata={"help": "A vision model: folder or hub id. None: a small ViT."})
    cache: str = field(default="runs/mosa_vision/base", metadata={"help": "Where small ViTs are kept."})
    pretrain_epochs: int = field(default=12, metadata={"help": "Of the small ViT."})
    out: str | None = field(default=None, metadata={"help": "Default: runs/mosa_vision/<dataset>."})
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    tuning_seeds: list[int] = field(default_factory=lambda: [100], metadata={"help": "They choose the rates."})
    shots: int = field(default=8, metadata={"help": "Training rows per class, as many for validation; 0: all."})
    test_rows: int = field(default=1000, metadata={"help": "The first so many test rows."})
    epochs: int = 30
    batch_size: int = 20
    rates: list[float] = field(
        default_factory=lambda: [3e-3, 1e-2], metadata={"help": "Learning rates of adapters and LoRA, to choose from."}
    )
    r: int = field(default=16, metadata={"help": "Width of the adapter; LoRA gets the rank of nearest size."})
    num_experts: int = 4
    style: str = "adaptformer"
    scale: float = field(default=1.0, metadata={"help": "Factor on the adapter's output (paper: 0.1)."})
    layers: list[int] | None = field(default=None, metadata={"help": "Layers that take adapters. None: all."})
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_numbers(self, zero=("shots", "layers", "weight_decay"))


class Base:
    """The frozen model of a task: makes fresh copies of it, and batches."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.text = args, args.dataset in TEXT_SETS
        if self.text:
            from sentences_corpus import minilm_path
            from transformers import AutoModel, AutoTokenizer

            from mixadapters.tasks.models import PooledHead

            path = args.model or minilm_path()
            self.data, labels = load_texts(args.dataset, args.data_dir, AutoTokenizer.from_pretrained(path))
            self.make: Callable[[], nn.Module] = lambda: PooledHead(AutoModel.from_pretrained(path), labels)
            return
        path = args.model or str(self.pretrained())
        config = AutoModelForImageClassification.from_pretrained(path).config
        look = {"size": config.image_size}
        if args.model is not None:
            processor = AutoImageProcessor.from_pretrained(path)
            look |= {"mean": processor.image_mean, "std": processor.image_std}
        self.data, labels = load_images(args.dataset, args.data_dir, **look)
        self.make = lambda: AutoModelForImageClassification.from_pretrained(
            path, num_labels=labels, ignore_mismatched_sizes=True
        )

    def batch(self, rows: Rows, index: Tensor, augment: bool = False) -> dict[str, Tensor]:
        """Rows (n,) as what the model reads, with labels."""
        if self.text:
            mask = rows.inputs[index] != rows.padding
            length = int(mask.sum(1).max())
            return {"input_ids": rows.inputs[index, :length], "attention_mask": mask[:, :length].long(),
                    "labels": rows.labels[index]}  # fmt: skip
        images = rows.inputs[index]
        return {"pixel_values": shifted(images, rows.flip) if augment else images, "labels": rows.labels[index]}

    def pretrained(self) -> Path:
        """The folder of the small ViT; trains it if it is not there."""
        args = self.args
        folder = Path(args.cache) / f"vit-{'files' if args.data_dir else 'digits'}-{args.pretrain_epochs}"
        if (folder / "config.json").is_file():
            return folder
        rows, labels = load_pretraining(args.data_dir, size=28)
        set_seed(0)
        config = ViTConfig(
            image_size=28, patch_size=4, hidden_size=64, intermediate_size=256, num_hidden_layers=6,
            num_attention_heads=4, hidden_dropout_prob=0.1, num_labels=labels,
        )  # fmt: skip
        model = AutoModelForImageClassification.from_config(config).train()
        started, batches = time.perf_counter(), -(-len(rows.labels) // 64)
        optimizer, schedule = adamw([{"params": model.parameters(), "lr": 1e-3}], args.pretrain_epochs * batches, 0.05)
        for epoch in range(args.pretrain_epochs):
            for index in torch.randperm(len(rows.labels)).split(64):
                images = shifted(rows.inputs[index], rows.flip)
                loss = model(pixel_values=images, labels=rows.labels[index]).loss
                loss.backward()
                update(model, optimizer, schedule)
            print(f"pretraining, epoch {epoch}: loss {loss.item():.2f}", flush=True)
        model.save_pretrained(folder)
        facts = {"images": len(rows.labels), "classes": labels, "epochs": args.pretrain_epochs,
                 "seconds": round(time.perf_counter() - started)}  # fmt: skip
        (folder / "pretraining.json").write_text(json.dumps(facts))
        return folder


def shifted(images: Tensor, flip: bool) -> Tensor:
    """images (n, 3, S, S), moved by up to two pixels and, if `flip`, half of them mirrored."""
    size = images.shape[-1]
    top, left = torch.randint(0, 5, (2,)).tolist()
    images = F.pad(images, (2, 2, 2, 2), mode="replicate")[:, :, top : top + size, left : left + size]
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images) if flip else images


def adamw(groups: list[dict[str, Any]], steps: int, decay: float) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, and one cycle: a tenth of the steps up, cosine down."""
    optimizer = torch.optim.AdamW(groups, weight_decay=decay)
    rates, rise = [group["lr"] for group in groups], min(0.9, max(0.1, 1.5 / steps))
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=rise)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


class Experiment:
    def __init__(self, args: Arguments) -> None:
        self.args, self.base = args, Base(args)
        self.out = Path(args.out or f"runs/mosa_vision/{args.dataset.replace('/', '--')}")
        self.runs: list[dict[str, Any]] = []
        self.tuning: list[dict[str, Any]] = []

    # --- rows -----------------------------------------------------------------------------------------------------

    def split(self, seed: int) -> tuple[Tensor, Tensor]:
        """Training and validation rows of a seed, (n,) each, apart from each other."""
        labels, generator = self.base.data.train.labels, torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        if self.args.shots == 0:
            held = max(1, len(order) // 10)
            return order[held:], order[:held]
        train, val = [], []
        for label in labels.unique():
            mine = order[labels[order] == label]
            if len(mine) < 2 * self.args.shots:
                raise SystemExit(f"--shots {self.args.shots} needs twice as many rows of a class; one has {len(mine)}")
            train.append(mine[: self.args.shots])
            val.append(mine[self.args.shots : 2 * self.args.shots])
        return torch.cat(train), torch.cat(val)

    # --- models ---------------------------------------------------------------------------------------------------

    def config(self, method: str) -> Any:
        args = self.args
        shared = {"modules_to_save": ["classifier"], "layers_to_transform": args.layers}
        if method == "lora":
            model, target = self.base.make(), self.size("adapter")
            roles = MoSAConfig(base="lora", r=1, modules_to_save=["classifier"], layers_to_transform=args.layers)
            per_rank = trainable(get_peft_model(model, roles)) - head_size(model)
            names = [host.path for host in model_hosts(model)]
            rank = max(1, round(target / per_rank))
            return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, modules_to_save=["classifier"])
        experts = args.num_experts if method in ("sparsity", "mosa") else 1
        weight = 1.0 if method in ("consistency", "mosa") else 0.0
        return MoSAConfig(
            style=args.style, r=args.r, scale=args.scale, num_experts=experts, consistency=weight, **shared
        )

    def size(self, method: str) -> int:
        """Trainable parameters besides the head."""
        model = self.base.make()
        return trainable(get_peft_model(model, self.config(method))) - head_size(model)

    def build(self, method: str) -> nn.Module:
        model = self.base.make()
        if method == "full":
            return model.train()
        if method == "linear":
            model.requires_grad_(False).classifier.requires_grad_(True)
            return model
        return get_peft_model(model, self.config(method)).train()

    # --- one run --------------------------------------------------------------------------------------------------

    def run(self, method: str, seed: int, rate: float, test: bool) -> dict[str, Any]:
        args, rows = self.args, self.base.data
        train, val = self.split(seed)
        set_seed(seed)
        model = self.build(method)
        started = time.perf_counter()
        fit = self.fit_head if method == "linear" else self.fit
        accuracy = fit(model, train, val, rate)
        seconds = round(time.perf_counter() - started, 1)
        result = {"method": method, "seed": seed, "rate": rate, "validation": accuracy, "seconds": seconds,
                  "trainable_parameters": trainable(model)}  # fmt: skip
        if test:
            result["accuracy"] = self.accuracy(model, rows.test, torch.arange(len(rows.test.labels))[: args.test_rows])
            if method == "mosa" and seed == args.seeds[0]:
                result["merged_equal"] = self.check_merged(model, train)
        return result

    def fit(self, model: nn.Module, train: Tensor, val: Tensor, rate: float) -> float:
        """Trains; leaves the weights of the best validation epoch, and returns its accuracy."""
        args, rows = self.args, self.base.data.train
        weights = [p for p in model.parameters() if p.requires_grad]
        batches = -(-len(train) // args.batch_size)
        optimizer, schedule = adamw([{"params": weights, "lr": rate}], args.epochs * batches, args.weight_decay)
        best, kept = -1.0, [p.detach().clone() for p in weights]
        for epoch in range(args.epochs):
            model.train()
            for index in train[torch.randperm(len(train))].split(args.batch_size):
                model(**self.base.batch(rows, index, augment=True)).loss.backward()
                update(model, optimizer, schedule)
            if (epoch + 1) % max(1, args.epochs // 6) == 0 or epoch + 1 == args.epochs:
                accuracy = self.accuracy(model, rows, val)
                if accuracy >= best:  # of equals the later
                    best, kept = accuracy, [p.detach().clone() for p in weights]
        with torch.no_grad():
            for parameter, value in zip(weights, kept, strict=True):
                parameter.copy_(value)
        return best

    def fit_head(self, model: nn.Module, train: Tensor, val: Tensor, rate: float) -> float:
        """As `fit`, for the head alone, on features that are computed once."""
        rows, head = self.base.data.train, model.classifier
        features, held = self.features(model, rows, train), self.features(model, rows, val)
        optimizer, schedule = adamw([{"params": head.parameters(), "lr": rate}], 200, self.args.weight_decay)
        best, kept = -1.0, head.state_dict()
        for step in range(200):
            F.cross_entropy(head(features), rows.labels[train]).backward()
            update(head, optimizer, schedule)
            if (step + 1) % 20 == 0:
                accuracy = (head(held).argmax(-1) == rows.labels[val]).float().mean().item()
                if accuracy >= best:
                    best, kept = accuracy, {n: p.clone() for n, p in head.state_dict().items()}
        head.load_state_dict(kept)
        return best

    @torch.no_grad()
    def features(self, model: nn.Module, rows: Rows, index: Tensor) -> Tensor:
        """(n, d) what the head reads."""
        seen: list[Tensor] = []
        handle = model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        self.accuracy(model, rows, index)
        handle.remove()
        return torch.cat(seen)

    @torch.no_grad()
    def logits(self, model: nn.Module, rows: Rows, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        model.eval()
        for part in index.split(100):
            batch = self.base.batch(rows, part)
            labels = batch.pop("labels")
            yield model(**batch).logits, labels

    def accuracy(self, model: nn.Module, rows: Rows, index: Tensor) -> float:
        right = [(logits.argmax(-1) == labels).sum() for logits, labels in self.logits(model, rows, index)]
        return (torch.stack(right).sum() / len(index)).item()

    def check_merged(self, model: Any, index: Tensor) -> bool:
        """Whether the experts, merged and saved, give the same logits as a plain adapter."""
        before = torch.cat([logits for logits, _ in self.logits(model, self.base.data.train, index)])
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            model.base_model.save_merged(folder)
            plain = PeftModel.from_pretrained(self.base.make(), folder)
        after = torch.cat([logits for logits, _ in self.logits(plain, self.base.data.train, index)])
        return torch.allclose(before, after, atol=1e-5)

    # --- what a step costs ----------------------------------------------------------------------------------------

    def costs(self, steps: int = 8) -> dict[str, dict[str, float]]:
        """Seconds of a training step (median), bytes kept for backward, trainable and optimizer bytes, by method.

        Methods take turns, so that a busy machine slows all alike. "adapter, two batches" runs twice the rows.
        """
        rows = self.base.data.train
        index = self.split(0)[0]
        index = index.repeat(-(-self.args.batch_size // len(index)))[: self.args.batch_size]
        batch = self.base.batch(rows, index)
        twice = {name: value.repeat_interleave(2, dim=0) for name, value in batch.items()}
        trials = {name: (name, batch) for name in ABLATION} | {"adapter, two batches": ("adapter", twice)}
        models = {name: self.build(method) for name, (method, _) in trials.items()}
        optimizers = {n: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for n, m in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in trials}
        kept: dict[str, int] = {}
        for _ in range(steps + 2):
            for name, (_, inputs) in trials.items():
                saved: dict[int, int] = {}

                def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
                    storage = tensor.untyped_storage()
                    saved[storage.data_ptr()] = storage.nbytes()
                    return tensor

                started = time.perf_counter()
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    loss = models[name](**inputs).loss
                loss.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                seconds[name].append(time.perf_counter() - started)
                weights = {p.untyped_storage().data_ptr() for p in models[name].parameters()}
                kept[name] = sum(size for pointer, size in saved.items() if pointer not in weights)
        state = {n: sum(t.nbytes for s in o.state.values() for t in s.values()) for n, o in optimizers.items()}
        return {
            name: {
                "seconds": statistics.median(seconds[name][2:]),
                "bytes_for_backward": kept[name],
                "trainable_bytes": 4 * trainable(models[name]),
                "optimizer_bytes": state[name],
                "buffer_bytes": sum(b.nbytes for n, b in models[name].named_buffers() if "mosa_" in n),
            }
            for name in trials
        }

    # --- the whole ------------------------------------------------------------------------------------------------

    def main(self) -> None:
        args = self.args
        self.out.mkdir(parents=True, exist_ok=True)
        costs = self.costs() if set(ABLATION) <= set(args.methods) else {}
        for method in args.methods:
            rates = RATES.get(method, args.rates)
            if len(rates) > 1:
                self.tuning += [self.run(method, seed, rate, False) for seed in args.tuning_seeds for rate in rates]
        for seed in args.seeds:
            for method in args.methods:
                run = self.run(method, seed, self.best_rate(method), True)
                self.runs.append(run)
                print(
                    f"{method:>11} seed {seed}: test {run['accuracy']:.3f}, validation {run['validation']:.3f}, "
                    f"rate {run['rate']:g}, {run['trainable_parameters']:,} parameters, {run['seconds']:.0f} s",
                    flush=True,
                )
                self.write(costs)
        print(f"\n{self.table()}\n\n{cost_table(costs)}\n\nreport: {self.out / 'report.json'}")

    def best_rate(self, method: str) -> float:
        """The rate with the best mean accuracy on the validation rows of the tuning seeds; of equals the smaller."""
        rates = RATES.get(method, self.args.rates)

        def score(rate: float) -> float:
            return sum(r["validation"] for r in self.tuning if r["method"] == method and r["rate"] == rate)

        return max(rates, key=lambda rate: (score(rate), -rate))

    def write(self, costs: dict[str, Any]) -> None:
        facts = Path(self.args.model or self.base.pretrained()) / "pretraining.json" if not self.base.text else Path()
        report = {
            "arguments": asdict(self.args), "runs": self.runs, "tuning": self.tuning, "costs_of_a_step": costs,
            "pretraining": json.loads(facts.read_text()) if facts.is_file() else None,
        }  # fmt: skip
        (self.out / "report.json").write_text(json.dumps(report, indent=2))
        (self.out / "table.md").write_text(f"{self.table()}\n\n{cost_table(costs)}\n")
        plot(self.runs, self.out / "plot.png")

    def table(self) -> str:
        """Mean and standard deviation over seeds; the difference to the plain adapter, seed by seed, with a 95 %
        interval of its mean (Student)."""
        lines = ["| method | test accuracy | minus adapter, paired | seeds better / worse | trainable | seconds |",
                 "|---|---|---|---|---|---|"]  # fmt: skip
        plain = {run["seed"]: run["accuracy"] for run in self.runs if run["method"] == "adapter"}
        for method in self.args.methods:
            group = [run for run in self.runs if run["method"] == method]
            if not group:
                continue
            gaps = [run["accuracy"] - plain[run["seed"]] for run in group if run["seed"] in plain]
            better, worse = sum(g > 0 for g in gaps), sum(g < 0 for g in gaps)
            paired = ("-", "-") if method == "adapter" or not gaps else (interval(gaps), f"{better} / {worse}")
            seconds = statistics.mean(run["seconds"] for run in group)
            lines.append(
                f"| {method} | {spread([run['accuracy'] for run in group])} | {paired[0]} | {paired[1]} "
                f"| {group[0]['trainable_parameters']:,} | {seconds:.0f} |"
            )
        return "\n".join(lines)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def head_size(model: nn.Module) -> int:
    head = model.classifier
    return sum(p.numel() for p in getattr(head, "original_module", head).parameters())


def model_hosts(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "adapters") and hasattr(module, "path")]


def cost_table(costs: dict[str, dict[str, float]]) -> str:
    """What a training step costs, as multiples of the plain adapter's."""
    names = {"seconds": "time", "bytes_for_backward": "kept for backward", "trainable_bytes": "trainable",
             "optimizer_bytes": "optimizer"}  # fmt: skip
    lines = [f"| a training step of | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    plain = costs.get("adapter", {})
    for method, cost in costs.items():
        lines.append(f"| {method} | {' | '.join(f'{cost[n] / plain[n]:.2f}' for n in names)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def interval(values: list[float]) -> str:
    """Mean with the 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:+.3f}"
    mean = statistics.mean(values)
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy by method; a line joins the runs of a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(run["method"] for run in runs))
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for seed in sorted({run["seed"] for run in runs}):
        mine = {run["method"]: run["accuracy"] for run in runs if run["seed"] == seed}
        axes.plot(
            [n for n in names if n in mine], [mine[n] for n in names if n in mine], "o-", alpha=0.5, label=f"{seed}"
        )
    axes.set(ylabel="test accuracy")
    axes.legend(title="seed", fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(Arguments, argv)
    for method in args.methods:
        if method not in METHODS:
            raise SystemExit(f"--methods {method!r} is unknown; choose from {', '.join(METHODS)}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    Experiment(args).main()


if __name__ == "__main__":
    main()
