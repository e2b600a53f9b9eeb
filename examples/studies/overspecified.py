"""More experts than the text has kinds: are there doubles, and what does it cost to make one expert of them?

    python examples/studies/overspecified.py             # text that an installation carries: three kinds of it
    python examples/studies/overspecified.py --seeds 0   # a first look

A small decoder that has read general text, frozen, with eight gated FFN experts in each layer, top 2, trained on three
kinds of text: code, licences and C++ headers. Four ways to eight experts, each by seed:

doubled  four are trained, and each is doubled by `spawn_experts` with a little noise
gently   the same, trained on for as many steps at a tenth of the rate
sown     the same, trained on at the rate of before
grown    eight from the start, each from its own random weights, for as many steps as these in all

`overspecification_report` reads text that the model was trained on, and puts those together that compute the same, at
four tolerances (the distance is 0 of the same function, 2 of two that have nothing in common). `merge_experts` makes
one expert of each group. Beside it a control: groups of the same sizes, of experts drawn at random. A figure is the
change of perplexity on other documents against the whole model, in per cent, as a geometric mean over kinds.

Expected, written before the run:

* sown: at 0.1 every sown pair is found in every layer and seed, and nothing else is; at 0.01 some of them, for noise
  of 5 % in three matrices is about 0.0075 of distance, and training on adds to it. In every layer the report says that
  doubles compete for two places (needed_k 4). Merged, perplexity changes by less than 0.5 %; merged at random to as
  many, by 5 % or more.
* grown: no doubles at 0.1 or below: three kinds of text do not leave eight experts with nothing of their own to do,
  and experts that never were copies have outputs that are nearly orthogonal. At 1.0 there are groups, and merging them
  costs more than merging doubles does, by as much as merging at random.

`doubled` and `gently` were added after a first run of the other two, which found no sown pair below 0.5: trained on at
the full rate, doubles become different experts. Expected of them, written before they were run:

* doubled: every pair is found at 0.1, and nothing else; most at 0.01. Merged, perplexity changes by less than 0.5 %,
  at random by 5 % or more.
* gently: every pair at 0.5, most at 0.1. Merged at 0.5, less than 1 %.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the demo's models and text

import torch
from demo_files import installation
from demo_models import perplexities
from demo_table import mean, percent
from peft import PeftModel, get_peft_model
from routers import kept, table
from study_arguments import check_numbers, read_arguments
from surgery import Arguments as SurgeryArguments
from surgery import Trial, interval, spread, written
from torch import Tensor
from transformers import logging as transformers_logging

from mixadapters import MoAConfig
from mixadapters.surgery.merging import merge_experts
from mixadapters.surgery.overspecification import Overspecification, overspecification_report
from mixadapters.surgery.usage import ExpertUsage, record_usage

PARTS = ("doubled", "gently", "sown", "grown")
RATES = {"gently": 0.1, "sown": 1.0}  # of the training after doubling, as a share
KINDS = ("code", "licences", "headers")
EXPERTS, TOP = 8, 2
NOISE = 0.05  # of a sown double, as a share of the deviation of its weights
TOLERANCES = (0.01, 0.1, 0.5, 1.0)
Groups = dict[str, list[list[str]]]  # layer -> names of experts that become one


@dataclass
class Arguments(SurgeryArguments):
    """What to run. The defaults are the evaluation."""

    out: str = field(default="runs/overspecified", metadata={"help": "Where models, results and table go."})
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    tokens: int = field(default=30_000, metadata={"help": "Of training text per kind."})
    test_tokens: int = field(default=4_000, metadata={"help": "Of test text per kind."})
    base_tokens: int = field(default=400_000, metadata={"help": "Of general text, for the base."})
    cpu_minutes: float = field(default=8.0, metadata={"help": "Nothing begins after these; run again to go on."})

    def __post_init__(self) -> None:
        check_numbers(self, zero=("cpu_minutes",))
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(f"parts={sorted(unknown)} are unknown; choose from {list(PARTS)}")


def read_kinds() -> dict[str, list[str]]:
    """Documents by kind, `general` among them."""
    return {kind: documents for kind, documents in installation().items() if kind in ("general", *KINDS)}


class OverspecifiedTrial(Trial):
    """The text, and the mixtures that are trained on it."""

    def mixture(self, names: tuple[str, ...] = ()) -> MoAConfig:
        return MoAConfig(
            experts=list(names), num_experts_per_tok=TOP, expert_type="glu", activation="silu", r=self.args.rank,
            norm_topk_prob=True, router_aux_loss_coef=0.01, task_type="CAUSAL_LM",
        )  # fmt: skip

    def model(self, part: str, seed: int) -> Any:
        """The trained mixture of a part, from its folder where it is there already."""
        if part == "grown":
            return self.trained(part, EXPERTS, seed, 2)
        folder = self.out / part / str(seed)
        if folder.exists():
            return PeftModel.from_pretrained(self.base(), folder).eval()
        self.trained("four", EXPERTS // 2, seed, 1)
        model = PeftModel.from_pretrained(self.base(), self.out / "four" / str(seed), is_trainable=True)
        torch.manual_seed(seed)
        for i in range(EXPERTS // 2):
            model.base_model.spawn_experts(f"e{i}", [double_of(f"e{i}")], mask_fraction=0, noise=NOISE)
        if part in RATES:
            self.train(model, self.text(), f"{part}, seed {seed}", seed, folder, rate=RATES[part] * self.args.rate)
        return model.eval()

    def trained(self, what: str, count: int, seed: int, epochs: int) -> Any:
        """So many experts, trained from random weights."""
        folder = self.out / what / str(seed)
        if folder.exists():
            return PeftModel.from_pretrained(self.base(), folder).eval()
        torch.manual_seed(seed)
        model = get_peft_model(self.base(), self.mixture(tuple(f"e{i}" for i in range(count))))
        self.train(model, self.text(), f"{count} experts, seed {seed}", seed, folder, epochs)
        return model.eval()

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Text that the models were trained on, of each kind as much."""
        count = max(1, self.args.seen_tokens // self.args.length)
        for rows in torch.cat([self.rows[kind][:count] for kind in self.domains]).split(16):
            yield {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def double_of(name: str) -> str:
    return f"{name}_double"


def random_groups(found: Overspecification, seed: int) -> Groups:
    """Groups of the same sizes, of experts drawn at random."""
    draw, made = random.Random(seed), {}
    for key, layer in found.layers.items():
        names = sorted(name for cell in layer.cells for name in cell)
        draw.shuffle(names)
        sizes = [len(cell) for cell in layer.duplicates]
        made[key] = [[names.pop() for _ in range(size)] for size in sizes]
    return made


def pairs_of(found: Overspecification) -> tuple[int, int]:
    """Sown pairs that are in one group, and other pairs that are."""
    sown = other = 0
    for layer in found.layers.values():
        for cell in layer.cells:
            together = [(a, b) for i, a in enumerate(cell) for b in cell[i + 1 :]]
            right = sum(a == double_of(b) or b == double_of(a) for a, b in together)
            sown, other = sown + right, other + len(together) - right
    return sown, other


def merged(model: Any, usage: ExpertUsage, groups: Any, trial: OverspecifiedTrial) -> dict[str, float]:
    copied = copy.deepcopy(model)
    merge_experts(copied, usage, groups)
    return perplexities(copied, trial.tests)


def one(model: Any, seed: int, trial: OverspecifiedTrial) -> dict[str, Any]:
    """What is found in a model and what merging does to it, at each tolerance."""
    with torch.no_grad(), record_usage(model) as usage:
        for batch in trial.batches():
            model(**batch)
    whole = perplexities(model, trial.tests)
    steps = {}
    for tolerance in TOLERANCES:
        found = overspecification_report(model, trial.batches(), tolerance=tolerance)
        sown, other = pairs_of(found)
        none = not found.groups
        steps[str(tolerance)] = {
            "sown": sown, "other": other, "left": sum(len(layer.cells) for layer in found.layers.values()),
            "needed": [layer.needed_k for layer in found.layers.values()],
            "merged": whole if none else merged(model, usage, found.groups, trial),
            "random": whole if none else merged(model, usage, random_groups(found, seed), trial),
        }  # fmt: skip
    layers = found.layers.values()
    nearest = [float(layer.distances.fill_diagonal_(torch.inf).min(1).values.median()) for layer in layers]
    return {"whole": whole, "nearest": nearest, "steps": steps}


def runs(trial: OverspecifiedTrial) -> Iterator[dict[str, Any]]:
    """The result of each run, from its file where that is there already; none begins after `cpu_minutes`.

    Raises:
        ValueError: a file of other settings.
    """
    args, folder = trial.args, trial.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for part in args.parts:
            path = folder / f"{part}-{seed}.json"
            if path.exists():
                yield kept(path, args.settings)
            elif time.process_time() < 60 * args.cpu_minutes:
                model, start = trial.model(part, seed), time.process_time()
                result = {"part": part, "seed": seed, "settings": args.settings, **one(model, seed, trial)}
                yield written(path, result, start)


def report(found: list[dict[str, Any]]) -> str:
    """Per part and tolerance: what is found, and the change of perplexity."""
    texts = []
    for part in dict.fromkeys(run["part"] for run in found):
        mine = [run for run in found if run["part"] == part]
        layers = len(mine[0]["nearest"])
        rows = [[f"{part}: tolerance", f"experts left of {EXPERTS}", "sown pairs found", "other pairs", "needed_k",
                 "merged, %", "as many at random, %", "random less merged"]]  # fmt: skip
        for tolerance in map(str, TOLERANCES):
            steps = [run["steps"][tolerance] for run in mine]
            left = [step["left"] / layers for step in steps]
            changes = {name: [change(run, tolerance, name) for run in mine] for name in ("merged", "random")}
            differences = [b - a for a, b in zip(*changes.values(), strict=True)]
            sown = f"{sum(step['sown'] for step in steps)} of {len(mine) * layers * EXPERTS // 2}"
            rows.append([
                tolerance, f"{statistics.mean(left):.1f}", sown if part != "grown" else "-",
                str(sum(step["other"] for step in steps)),
                f"{statistics.mean(n for step in steps for n in step['needed']):.1f}",
                *(spread(changes[name], 2) for name in changes), interval(differences, 2),
            ])  # fmt: skip
        whole = statistics.mean(mean(list(run["whole"].values())) for run in mine)
        near = statistics.mean(n for run in mine for n in run["nearest"])
        texts.append(
            f"{part}: perplexity {whole:.1f}, {len(mine)} seeds; an expert's nearest other is at {near:.2f} (median)"
            f"\n\n{table(rows)}"
        )
    return "\n\n".join(texts) + "\n"


def change(run: dict[str, Any], tolerance: str, name: str) -> float:
    """Of the perplexity against the whole model, in per cent: geometric mean over kinds."""
    after = run["steps"][tolerance][name]
    return percent(mean([after[kind] for kind in run["whole"]]), mean(list(run["whole"].values())))


def main(args: Arguments) -> dict[str, Any]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    trial = OverspecifiedTrial(args, read_kinds())
    found = list(runs(trial))
    trial.progress.bar.close()
    wanted = len(args.seeds) * len(args.parts)
    trained = sum(json.loads(file.read_text()) for file in trial.out.glob("**/cpu_seconds.json"))
    minutes = (sum(run["cpu_seconds"] for run in found) + trained) / 60
    made = {"settings": args.settings, "runs": found, "missing": wanted - len(found), "cpu_minutes": minutes}
    text = report(found)
    (trial.out / "results.json").write_text(json.dumps(made, indent=1))
    (trial.out / "table.md").write_text(text)
    print(f"{text}\n{len(found)} of {wanted} runs, {minutes:.1f} CPU minutes")
    return made


if __name__ == "__main__":
    main(read_arguments(Arguments))
