"""Questions about images for a model of text: PILL beside its ablations and LoRA.

    python examples/studies/pill_vqa.py --data_dir DATA  # small pieces, pretrained here
    python examples/studies/pill_vqa.py --data_dir DATA --task scienceqa --model Qwen/Qwen3-0.6B \\
        --encoder google/siglip-base-patch16-224 --grid 7 --max_length 512
    python examples/studies/pill_vqa.py --task derek-thomas/ScienceQA --model ... --encoder ...

Without --model a small Llama is pretrained on the questions and answers of the training split, half of them behind a
description of the image in words; without --encoder a small ViT is trained to name these words. Both are kept in --out
and stay frozen: the methods have to bring the two together.
All methods train the same projector; adapters have the size of PILL's. With several --rates the dev split chooses
one for each method, on a seed of its own; test rows are read by the final runs alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pill_vqa_data import Questions, Row, load
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
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
}


@dataclass
class Arguments:
    """What to run."""

    task: str = field(default="easy_vqa", metadata={"help": "'easy_vqa', 'scienceqa', or a ScienceQA set of the hub."})
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


class Comparison:
    """One task: its data, its frozen pieces, and a run for each method and seed."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.out = args, Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.data: Questions = load(args.task, args.data_dir)
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
            blind = [without_images(row) for row in self.data.train]
            rows = [*blind, *({**row, "prompt": f"{' '.join(sorted(row['tags']))} {row['prompt']}"} for row in blind)]
            words = pre_tokenizers.Whitespace()
            count = Counter(w for row in rows for w, _ in words.pre_tokenize_str(row["prompt"] + row["answer"]))
            special = ["<pad>", "<s>", "</s>", "<unk>"]
            vocabulary = {w: i for i, w in enumerate([*special, *(w for w, _ in count.most_common(4000))])}
            tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
            tokenizer.pre_tokenizer = words
            names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
            fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, truncation_side="left", **names)
            width = self.args.width
            config = LlamaConfig(
                vocab_size=len(vocabulary), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
            model = LlamaForCausalLM(config)
            collator = ImageTextCollator(fast, None, len(fast), 1, self.args.max_length)
            self.train(model, rows, collator, 3e-3, self.args.pretraining_steps)
            model.save_pretrained(folder)
            fast.save_pretrained(folder)
        return str(folder)

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
            for _ in range(self.args.pretraining_steps // 5):
                rows = torch.randint(len(pixels), (64,))
                states = model(pixel_values=pixels[rows]).last_hidden_state[:, 1:]
                loss = nn.functional.binary_cross_entropy_with_logits(head(states.mean(1)), target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(f"small ViT: loss {loss.item():.3f} on {len(tags)} words", flush=True)
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
        config = PILLConfig(r=self.args.r, token_ids=images.token_ids, **fields, **shared)
        return get_peft_model(model, config), images

    def pill_size(self) -> int:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(self.model_path), PILLConfig(r=self.args.r))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    # --- a run ----------------------------------------------------------------------------------------------------

    def train(
        self, model: nn.Module, rows: list[Row], collator: Any, rate: float, steps: int, seed: int = 0,
        stage: str | None = None,
    ) -> None:  # fmt: skip
        arguments = TrainingArguments(
            output_dir=str(self.out / "trainer"), max_steps=steps, per_device_train_batch_size=self.args.batch_size,
            learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=0.05, seed=seed, save_strategy="no",
            logging_steps=100, report_to="none", remove_unused_columns=False, disable_tqdm=not sys.stderr.isatty(),
        )  # fmt: skip
        callbacks = [StageCallback(stage)] if stage else []
        Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=callbacks).train()

    def run(self, method: str, seed: int, rate: float, rows: list[Row]) -> dict[str, Any]:
        """Train on the training split, answer `rows`."""
        args, started = self.args, time.perf_counter()
        set_seed(seed)
        model, images = self.build(method)
        adapters = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "projector" not in n)
        collator = ImageTextCollator(
            self.tokenizer, self.processor, images.token_id, images.tokens_per_image, args.max_length
        )
        train = first_of_each(self.data.train, args.per_subject)
        if method == "text_only":
            train, rows = ([without_images(row) for row in some] for some in (train, rows))
        fields, aligned = METHODS[method]
        if aligned:
            self.train(model, train, collator, rate, round(args.steps * aligned), seed, "align")
        stage = None if fields is None else "tune"
        self.train(model, train, collator, rate, args.steps - round(args.steps * aligned), seed, stage)
        right = self.answers(model, images, collator, rows)
        groups: dict[str, list[bool]] = defaultdict(list)
        for row, correct in zip(rows, right, strict=True):
            for group in (f"subject: {row['subject']}", f"modality: {row['modality']}", "all"):
                groups[group].append(correct)
        result = {
            "method": method, "seed": seed, "rate": rate, "adapters": adapters,
            "seconds": round(time.perf_counter() - started), **{g: statistics.mean(c) for g, c in groups.items()},
        }  # fmt: skip
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}, flush=True)
        return result

    @torch.no_grad()
    def answers(
        self, model: nn.Module, images: ImageInputs, collator: ImageTextCollator, rows: list[Row]
    ) -> list[bool]:
        """Whether the greedy answer to each row is the right one."""
        model.eval()
        right = []
        for start in range(0, len(rows), 128):
            part = rows[start : start + 128]
            batch = collator([{k: row[k] for k in ("prompt", "images")} for row in part])
            inputs = images.inputs(**{k: v.to(model.device) for k, v in batch.items()})
            if not isinstance(model.peft_config["default"], PILLConfig):
                del inputs["mm_token_type_ids"]
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            right += [f"{text} ".split()[:1] == row["answer"].split() for text, row in zip(texts, part, strict=True)]
        return right

    # --- the whole ------------------------------------------------------------------------------------------------

    def main(self) -> None:
        args = self.args
        test = self.data.test[: args.test_rows]
        print(f"{args.task}: {len(self.data.train)} questions to train, {len(self.data.dev)} dev, {len(test)} test")
        searched, rates = [], dict.fromkeys(args.methods, args.rates[0])
        if len(args.rates) > 1:
            for method in args.methods:
                found = [self.run(method, args.search_seed, rate, self.data.dev) for rate in args.rates]
                rates[method] = max(found, key=lambda r: r["all"])["rate"]
                searched += found
            print(f"rates chosen on the dev split: {rates}", flush=True)
        runs = [self.run(method, seed, rates[method], test) for seed in args.seeds for method in args.methods]
        report = {"arguments": asdict(args), "search": searched, "rates": rates, "runs": runs}
        (self.out / "report.json").write_text(json.dumps(report, indent=2))
        print("\n" + table(runs))


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
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    for method in args.methods:
        if method not in METHODS:
            raise SystemExit(f"--methods {method!r} is unknown; choose from {', '.join(METHODS)}")
    transformers_logging.set_verbosity_error()
    Comparison(args).main()


if __name__ == "__main__":
    main()
