"""What learning images costs the text: perplexity before and after a model of text has learned questions about images.

    python examples/studies/pill_text.py  # shapes that are drawn here, text of the Python installation
    python examples/studies/pill_text.py --data_dir DATA --general text.txt  # easy_vqa; blank lines part documents

A small Llama is pretrained on general text and on the questions in words, as much of each, and stays frozen. Methods
of pill_vqa.py, equal in size, then teach it questions about images and read no general text. The perplexity of other
documents is measured on text alone, and on text behind an image that has nothing to do with it; both against the base
model on text alone. `pill_images` has experts and a gate for images alone. One rate for all. Written before the first
run:

    1. Text alone: LoRA raises perplexity by more than 10 %, and by more than PILL (pill_zero, pill_one), half of whose
       weights never act on text. `pill_images` leaves it as it was to the last bit, which its construction says.
    2. Text behind an image: a gate protects it, so that pill_zero raises perplexity less than gate_off.
    3. What is kept is paid for in answers: pill_images is right less often than pill_one.

Writes report.json and table.md after every run.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the demo's text

import torch
from demo_files import from_files, installation, parted
from demo_text import new_tokenizer
from pill_vqa import Arguments, Comparison, size_of_adapters, spread
from pill_vqa_data import Row
from study_arguments import read_arguments
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from mixadapters.tuners.pill import ImageTextCollator

WORDS = 24  # of a piece of text
MEASURES = {"text": "text alone", "behind": "text behind an image"}


@dataclass
class TextArguments(Arguments):
    """What to run."""

    out: str = "runs/pill_text"
    general: str | None = field(default=None, metadata={"help": "FILE of text. None: docstrings of the installation."})
    methods: list[str] = field(default_factory=lambda: ["lora", "gate_off", "pill_zero", "pill_one", "pill_images"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    rates: list[float] = field(default_factory=lambda: [3e-3], metadata={"help": "One, of all runs."})
    steps: int = 120
    batch_size: int = 16
    pretraining_steps: int = 1000
    test_rows: int | None = 300
    vocabulary: int = field(default=2000, metadata={"help": "Tokens of the small Llama."})
    text_rows: int = field(default=6000, metadata={"help": "Pieces of text that the small Llama reads."})
    text_test_rows: int = field(default=128, metadata={"help": "Pieces of other documents."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rates) != 1:
            raise SystemExit(f"--rates {self.rates}: this study has one rate for all methods; give one")


class TextKept(Comparison):
    """The comparison on a base that knows text, which is measured before and after."""

    args: TextArguments

    def __init__(self, args: TextArguments) -> None:
        files = None if args.general is None else {"general": Path(args.general)}
        documents = (installation() if files is None else from_files(files))["general"]
        read, held = parted(documents)
        self.read, self.held = pieces(read, args.text_rows), pieces(held, args.text_test_rows)
        super().__init__(args)

    def pretraining_rows(self) -> list[Row]:
        rows = super().pretraining_rows()
        text = [{"prompt": "", "answer": piece, "images": []} for piece in self.read]
        return [*text, *(rows * -(-len(text) // len(rows)))[: len(text)]]

    def new_tokenizer(self, rows: list[Row]) -> PreTrainedTokenizerFast:
        tokenizer = new_tokenizer((row["prompt"] + row["answer"] for row in rows), self.args.vocabulary)
        tokenizer.truncation_side = "left"
        return tokenizer

    @torch.no_grad()
    def perplexity(self, model: nn.Module, collator: ImageTextCollator, behind: bool) -> float:
        """Of the pieces of text without their first tokens, alone or behind the images of test questions."""
        model.eval()
        collator, total, count = replace(collator, max_length=None), 0.0, 0
        images = [row["images"][0] for row in self.data.test if row["images"]]
        for start in range(0, len(self.held), 32):
            part = [
                {"prompt": "<image>", "answer": piece, "images": [images[(start + i) % len(images)]]}
                if behind else {"prompt": "", "answer": piece}
                for i, piece in enumerate(self.held[start : start + 32])
            ]  # fmt: skip
            batch = collator(part)
            labels = batch.pop("labels")
            first = (labels != -100).int().argmax(1, keepdim=True)
            labels = labels.scatter(1, first, -100).masked_fill(labels == self.tokenizer.eos_token_id, -100)[:, 1:]
            logits = model(**{k: v.to(model.device) for k, v in batch.items()}).logits[:, :-1].float().cpu()
            total += nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += int((labels != -100).sum())
        return math.exp(total / count)

    def main(self) -> None:
        args, test = self.args, self.data.test[: self.args.test_rows]
        self.progress.expect(args.steps * len(args.methods) * len(args.seeds))
        plain = ImageTextCollator(self.tokenizer, self.processor, len(self.tokenizer), 1)
        before = self.perplexity(AutoModelForCausalLM.from_pretrained(self.model_path), plain, behind=False)
        self.progress.say(f"base: perplexity of text {before:.1f}")
        runs: list[dict[str, Any]] = []
        for seed in args.seeds:
            for method in args.methods:
                model, images, collator = self.fit(method, seed, args.rates[0])
                after = {name: self.perplexity(model, collator, name == "behind") for name in MEASURES}
                texts = self.answers(model, images, collator, test)
                right = statistics.mean(t == row["answer"].strip() for t, row in zip(texts, test, strict=True))
                runs.append({
                    "method": method, "seed": seed, "adapters": size_of_adapters(model), "right": right,
                    **{name: 100 * (value / before - 1) for name, value in after.items()},
                })  # fmt: skip
                self.progress.say(str({k: round(v, 3) if isinstance(v, float) else v for k, v in runs[-1].items()}))
                report = {"arguments": asdict(args), "perplexity of the base": before, "runs": runs}
                (self.out / "report.json").write_text(json.dumps(report, indent=2))
                (self.out / "table.md").write_text(table_of_text(runs) + "\n")
        self.progress.bar.close()
        print(f"\nperplexity of the base on text: {before:.1f}\n\n{table_of_text(runs)}")


def pieces(documents: list[str], count: int) -> list[str]:
    """The first `count` runs of WORDS words; what is left of a document is left out."""
    found: list[str] = []
    for document in documents:
        words = document.split()
        found += [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS + 1, WORDS)]
        if len(found) >= count:
            break
    return found[:count]


def table_of_text(runs: list[dict[str, Any]], reference: str = "lora") -> str:
    """Mean and deviation over seeds; how much perplexity rises in per cent, and the difference to `reference`."""
    beside = {run["seed"]: run for run in runs if run["method"] == reference}
    heads = [head for name in MEASURES.values() for head in (f"{name}, %", f"minus {reference}")]
    lines = [f"| method | adapters | right | {' | '.join(heads)} |", "|" + "---|" * (3 + len(heads))]
    for method in dict.fromkeys(run["method"] for run in runs):
        group = [run for run in runs if run["method"] == method]
        cells = [f"{group[0]['adapters']:,}", spread([run["right"] for run in group])]
        for name in MEASURES:
            gaps = [run[name] - beside[run["seed"]][name] for run in group if run["seed"] in beside]
            cells += [percent([run[name] for run in group])]
            cells += [percent(gaps) if gaps and method != reference else "-"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):+.1f} ± {deviation:.1f}"


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(TextArguments, argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    TextKept(args).main()


if __name__ == "__main__":
    main()
