"""Questions about images for a model of text: PILL beside its ablations and LoRA.

    python examples/studies/pill_vqa.py  # shapes that are drawn here, small pieces that are pretrained here
    python examples/studies/pill_vqa.py --data_dir DATA  # easy_vqa
    python examples/studies/pill_vqa.py --data_dir DATA --task scienceqa --max_length 192
    python examples/studies/pill_vqa.py --data_dir DATA --task scienceqa --model Qwen/Qwen3-0.6B \\
        --encoder google/siglip-base-patch16-224 --grid 7 --max_length 512
    python examples/studies/pill_vqa.py --task derek-thomas/ScienceQA --model ... --encoder ...

Without --model a small Llama is pretrained on the questions and answers of the training split, half of them behind a
description of the image in words; without --encoder a small ViT is trained to name these words. Both are kept in --out
and stay frozen: the methods have to bring the two together.
All methods train the same projector; adapters have the size of PILL's. With several --rates the dev split chooses
one for each method, on a seed of its own; test rows are read by the final runs alone. Writes report.json, table.md and
answers.png, a picture of questions that the last method of the first seed answers rightly and wrongly.

Expected of ScienceQA with small pieces, written before that run: they know neither English nor the world, so every
method is within 0.05 of always giving the most frequent answer, and the image adds nothing (text_only is level).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import textwrap
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # the demo's progress bar

import torch
from demo_models import Advance, Progress
from peft import LoraConfig, get_peft_model
from pill_vqa_data import Questions, Row, load
from study_arguments import check_numbers, read_arguments
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    set_seed,
)
from transformers import logging as transformers_logging

from mixadapters import PILLConfig, StageCallback
from mixadapters.tuners.pill import ImageInputs, ImageTextCollator

# name -> (fields of PILLConfig or None for LoRA, share of the steps that go to the stage `align`)
METHODS: dict[str, tuple[dict[str, Any] | None, float]] = {
    "text_only": ({"gate": False}, 0.0),
    "lora": (None, 0.0),
    "gate_off": ({"gate": False}, 0.0),
    "pill_zero": ({"gate_init": "zero"}, 0.0),
    "pill_align": ({"gate_init": "zero"}, 0.4),
    "pill_one": ({"gate_init": "one"}, 0.0),
    "pill_images": ({"gate_init": "one", "ffn_experts": ["image"], "attention_adapter": "none"}, 0.0),
}


@dataclass
class Arguments:
    """What to run."""

    task: str | None = field(
        default=None,
        metadata={
            "help": "'shapes', 'easy_vqa', 'scienceqa', or a ScienceQA set of the hub. None: easy_vqa with "
            "--data_dir, shapes without it, which need no files."
        },
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with vision/easy_vqa and scienceqa."})
    model: str | None = field(default=None, metadata={"help": "Text model: folder or hub id. None: a small one."})
    encoder: str | None = field(
        default=None, metadata={"help": "Vision encoder: folder or hub id. None: a small one."}
    )
    out: str = "runs/pill_vqa"
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    rates: list[float] = field(default_factory=lambda: [1e-2, 3e-3])
    search_seed: int = 100
    steps: int = 300
    batch_size: int = 32
    r: int = 16
    grid: int = field(default=2, metadata={"help": "An image becomes grid x grid tokens."})
    max_length: int = 64
    pretraining_steps: int = field(
        default=2500, metadata={"help": "Of the small Llama; a fifth of it of the small ViT."}
    )
    width: int = field(default=64, metadata={"help": "Of the small pieces."})
    image_size: int = field(default=64, metadata={"help": "What the small encoder reads."})
    per_subject: int | None = field(
        default=None, metadata={"help": "At most so many training questions of a subject."}
    )
    test_rows: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        self.task = self.task or ("easy_vqa" if self.data_dir else "shapes")
        if self.task == "shapes" and self.data_dir:
            raise SystemExit(f"--task shapes draws its images and reads no --data_dir {self.data_dir}; leave one out")
        if unknown := [method for method in self.methods if method not in METHODS]:
            raise SystemExit(f"--methods {unknown[0]!r} is unknown; choose from {', '.join(METHODS)}")


class Comparison:
    """One task: its data, its frozen pieces, and a run for each method and seed."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.out = args, Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.progress = Progress("step")
        self.data: Questions = load(str(args.task), args.data_dir)
        self.model_path, self.encoder_path = args.model or self.small_llama(), args.encoder or self.small_vit()
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.processor = AutoImageProcessor.from_pretrained(self.encoder_path, backend="pil")

    # --- the pieces -----------------------------------------------------------------------------------------------

    def small_llama(self) -> str:
        """A Llama that answers the questions from a description in words, or guesses without; it has seen no image."""
        folder = self.out / "llama"
        if not (folder / "config.json").exists():
            set_seed(0)
            rows = self.pretraining_rows()
            tokenizer = self.new_tokenizer(rows)
            width = self.args.width
            config = LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            model = LlamaForCausalLM(config)
            collator = ImageTextCollator(tokenizer, None, len(tokenizer), 1, self.args.max_length)
            self.progress.expect(self.args.pretraining_steps)
            self.train(model, rows, collator, 3e-3, self.args.pretraining_steps, "a small Llama")
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    def pretraining_rows(self) -> list[Row]:
        """The questions of the training split without their images, and once more behind their words."""
        blind = [without_images(row) for row in self.data.train]
        return [*blind, *({**row, "prompt": f"{' '.join(sorted(row['tags']))} {row['prompt']}"} for row in blind)]

    def new_tokenizer(self, rows: list[Row]) -> PreTrainedTokenizerFast:
        """Whole words, those that `rows` have most."""
        words = pre_tokenizers.Whitespace()
        count = Counter(w for row in rows for w, _ in words.pre_tokenize_str(row["prompt"] + row["answer"]))
        special = ["<pad>", "<s>", "</s>", "<unk>"]
        vocabulary = {w: i for i, w in enumerate([*special, *(w for w, _ in count.most_common(4000))])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = words
        names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, truncation_side="left", **names)

    def small_vit(self) -> str:
        """A ViT that was trained to name the words which describe an image of the training split."""
        folder = self.out / "vit"
        if not (folder / "config.json").exists():
            set_seed(0)
            size, width = self.args.image_size, self.args.width
            config = ViTConfig(
                image_size=size, patch_size=size // 8, hidden_size=width, intermediate_size=2 * width,
                num_hidden_layers=3, num_attention_heads=4,
            )  # fmt: skip
            model = ViTModel(config, add_pooling_layer=False)
            processor = ViTImageProcessorPil(size={"height": size, "width": size})
            images = {id(row["images"][0]): row for row in self.data.train if row["images"] and row["tags"]}
            if not images:
                raise SystemExit(
                    f"--task {self.args.task} has no words for its images to train a small ViT; name one: --encoder"
                )
            tags = sorted({tag for row in images.values() for tag in row["tags"]})
            pixels = processor(images=[r["images"][0] for r in images.values()], return_tensors="pt")["pixel_values"]
            target = torch.tensor([[float(tag in row["tags"]) for tag in tags] for row in images.values()])
            head = nn.Linear(width, len(tags))
            optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
            self.progress.expect(self.args.pretraining_steps // 5)
            self.progress.step("a small ViT")
            for _ in range(self.args.pretraining_steps // 5):
                rows = torch.randint(len(pixels), (64,))
                states = model(pixel_values=pixels[rows]).last_hidden_state[:, 1:]
                loss = nn.functional.binary_cross_entropy_with_logits(head(states.mean(1)), target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.progress.bar.update()
            self.progress.say(f"small ViT: loss {loss.item():.3f} on {len(tags)} words")
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        return str(folder)

    def build(self, method: str) -> tuple[nn.Module, ImageInputs]:
        """The text model with images and the adapters of `method`."""
        model = AutoModelForCausalLM.from_pretrained(self.model_path)
        encoder = AutoModel.from_pretrained(self.encoder_path)
        images = ImageInputs.attach(model, getattr(encoder, "vision_model", encoder), grid=self.args.grid)
        fields = METHODS[method][0]
        shared: dict[str, Any] = {"modules_to_save": ["projector"], "task_type": "CAUSAL_LM"}
        if fields is None:
            rank = round(self.pill_size() / size_of_lora(model))
            targets = r".*layers\.\d+\.(self_attn|mlp)\.\w+_proj"
            return get_peft_model(
                model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **shared)
            ), images
        rank = self.args.r
        if "ffn_experts" in fields:  # fewer experts, which are wider
            rank = round(rank * self.pill_size() / self.pill_size(**fields))
        config = PILLConfig(r=rank, token_ids=images.token_ids, **fields, **shared)
        return get_peft_model(model, config), images

    def pill_size(self, **fields: Any) -> int:
        """Parameters of PILL's adapters."""
        base = AutoModelForCausalLM.from_pretrained(self.model_path)
        return size_of_adapters(get_peft_model(base, PILLConfig(r=self.args.r, **fields)))

    # --- a run ----------------------------------------------------------------------------------------------------

    def train(
        self, model: nn.Module, rows: list[Row], collator: Any, rate: float, steps: int, what: str, seed: int = 0,
        stage: str | None = None,
    ) -> None:  # fmt: skip
        if steps == 0:
            return
        arguments = TrainingArguments(
            output_dir=str(self.out / "trainer"), max_steps=steps, per_device_train_batch_size=self.args.batch_size,
            learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=0.05, seed=seed, save_strategy="no",
            logging_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        self.progress.step(what)
        callbacks = [Advance(self.progress, 1), *([StageCallback(stage)] if stage else [])]
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def fit(self, method: str, seed: int, rate: float) -> tuple[nn.Module, ImageInputs, ImageTextCollator]:
        """The model of `method`, trained on the training split; its images, and what makes its batches."""
        args = self.args
        set_seed(seed)
        model, images = self.build(method)
        collator = ImageTextCollator(
            self.tokenizer, self.processor, images.token_id, images.tokens_per_image, args.max_length
        )
        train = first_of_each(self.data.train, args.per_subject)
        if method == "text_only":
            train = [without_images(row) for row in train]
        fields, share = METHODS[method]
        aligned, what = round(args.steps * share), f"{method}, seed {seed}"
        self.train(model, train, collator, rate, aligned, what, seed, "align")
        self.train(model, train, collator, rate, args.steps - aligned, what, seed, None if fields is None else "tune")
        return model, images, collator

    def run(self, method: str, seed: int, rate: float, rows: list[Row]) -> dict[str, Any]:
        """Train on the training split, answer `rows`."""
        started = time.perf_counter()
        model, images, collator = self.fit(method, seed, rate)
        asked = [without_images(row) for row in rows] if method == "text_only" else rows
        texts = self.answers(model, images, collator, asked)
        groups: dict[str, list[bool]] = defaultdict(list)
        for row, text in zip(rows, texts, strict=True):
            for group in (f"subject: {row['subject']}", f"modality: {row['modality']}", "all"):
                groups[group].append(text == row["answer"].strip())
        result = {
            "method": method, "seed": seed, "rate": rate, "adapters": size_of_adapters(model),
            "seconds": round(time.perf_counter() - started), **{g: statistics.mean(c) for g, c in groups.items()},
        }  # fmt: skip
        self.progress.say(str({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))
        return {**result, "answers": texts}

    @torch.no_grad()
    def answers(
        self, model: nn.Module, images: ImageInputs, collator: ImageTextCollator, rows: list[Row]
    ) -> list[str]:
        """The first word of the greedy answer to each row."""
        model.eval()
        found = []
        for start in range(0, len(rows), 128):
            batch = collator([{k: row[k] for k in ("prompt", "images")} for row in rows[start : start + 128]])
            inputs = images.inputs(**{k: v.to(model.device) for k, v in batch.items()})
            if not isinstance(model.peft_config["default"], PILLConfig):
                del inputs["mm_token_type_ids"]
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            found += [f"{text} x".split()[0] for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        return found

    # --- the whole ------------------------------------------------------------------------------------------------

    def main(self) -> None:
        args = self.args
        test = self.data.test[: args.test_rows]
        say = self.progress.say
        say(f"{args.task}: {len(self.data.train)} questions to train, {len(self.data.dev)} dev, {len(test)} test")
        say(f"always answering what is most frequent in training: {guessed(self.data.train, test):.3f}")
        searched, rates = [], dict.fromkeys(args.methods, args.rates[0])
        search = len(args.rates) if len(args.rates) > 1 else 0
        self.progress.expect(args.steps * len(args.methods) * (search + len(args.seeds)))
        if search:
            for method in args.methods:
                found = [self.run(method, args.search_seed, rate, self.data.dev) for rate in args.rates]
                rates[method] = max(found, key=lambda r: r["all"])["rate"]
                searched += [{name: value for name, value in run.items() if name != "answers"} for run in found]
            say(f"rates chosen on the dev split: {rates}")
        runs: list[dict[str, Any]] = []
        for seed in args.seeds:
            for method in args.methods:
                run = self.run(method, seed, rates[method], test)
                texts = run.pop("answers")
                if seed == args.seeds[0] and method == args.methods[-1]:
                    plot_answers(test, texts, self.out / "answers.png", method)
                runs.append(run)
                report = {"arguments": asdict(args), "search": searched, "rates": rates, "runs": runs}
                (self.out / "report.json").write_text(json.dumps(report, indent=2))
                (self.out / "table.md").write_text(table(runs) + "\n")
        self.progress.bar.close()
        print("\n" + table(runs))


def size_of_adapters(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "projector" not in n)


def guessed(train: list[Row], test: list[Row]) -> float:
    """How often the most frequent answer of `train` is right."""
    ((answer, _),) = Counter(row["answer"] for row in train).most_common(1)
    return statistics.mean(row["answer"] == answer for row in test)


def plot_answers(rows: list[Row], answers: list[str], path: Path, method: str, each: int = 6) -> None:
    """The first questions on images that were answered rightly, and those that were answered wrongly."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    asked = [(row, text) for row, text in zip(rows, answers, strict=True) if row["images"]]
    right = [pair for pair in asked if pair[1] == pair[0]["answer"].strip()][:each]
    wrong = [pair for pair in asked if pair[1] != pair[0]["answer"].strip()][:each]
    figure, axes = pyplot.subplots(2, each, figsize=(2.6 * each, 8.6), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for line, pairs, color in zip(axes, (right, wrong), ("#2a7f3f", "#b03030"), strict=True):
        for axis, (row, text) in zip(line, pairs, strict=False):
            axis.imshow(row["images"][0])
            question = textwrap.wrap(without_image(row["prompt"]), 34)
            told = f"{method}: {text}" + ("" if color == "#2a7f3f" else f"   right: {row['answer'].strip()}")
            axis.set_title(told, color=color, fontsize=9)
            shown = "\n".join([*question[:8], *(["..."] if len(question) > 8 else [])])
            axis.text(0.5, -0.05, shown, ha="center", va="top", fontsize=7, transform=axis.transAxes)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def first_of_each(rows: list[Row], count: int | None) -> list[Row]:
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row["subject"]] += 1
        if count is None or seen[row["subject"]] <= count:
            kept.append(row)
    return kept


def size_of_lora(model: nn.Module) -> int:
    """Parameters of LoRA with r=1 on every projection of the layers."""
    linear = (m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n)
    return sum(m.in_features + m.out_features for m in linear)


def without_image(prompt: str) -> str:
    return prompt.replace("<image>", "").lstrip()


def without_images(row: Row) -> Row:
    return {**row, "prompt": without_image(row["prompt"]), "images": []}


def table(runs: list[dict[str, Any]], reference: str = "gate_off") -> str:
    """Mean and standard deviation over seeds for each group of questions, and paired differences to `reference`."""
    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        by_method[run["method"]].append(run)
    groups = ["all", *sorted(g for g in runs[0] if ": " in g)]
    beside = {run["seed"]: run["all"] for run in by_method.get(reference, [])}
    lines = [
        f"| method | adapters | {' | '.join(groups)} | all, paired difference to {reference} |",
        "|" + "---|" * (len(groups) + 3),
    ]
    for method, group in by_method.items():
        gaps = [run["all"] - beside[run["seed"]] for run in group if run["seed"] in beside]
        cells = [spread([run[name] for run in group]) for name in groups]
        cells.append(spread(gaps, "+") if gaps and method != reference else "-")
        lines.append(f"| {method} | {group[0]['adapters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.3f} ± {deviation:.3f}"


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(Arguments, argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    Comparison(args).main()


if __name__ == "__main__":
    main()
