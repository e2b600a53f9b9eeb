"""Experts that leave: perplexity against the number that is kept, for ways to choose and to merge them.

    python examples/studies/surgery.py                       # text that an installation carries: five domains
    python examples/studies/surgery.py --data_dir DATA       # and three of `unlabelled/` in it: eight
    python examples/studies/surgery.py --parts moe --seeds 0 # a first look

Two models of eight experts, top 2, each trained on the spot on the text of all domains, by seed:

mixture  a small decoder that has read general text, frozen, with a MoA of gated FFN experts in each layer
moe      a Mixtral of that size, trained from nothing: its experts are the FFN

Each is cut to fewer experts per layer, and not trained afterwards. Statistics are of text that it was trained on; test
text is of other documents. `task` statistics are those of a domain's own text, `all` those of all domains. A figure is
the change of a domain's perplexity against the uncut model (in per cent of it), as a mean over domains (geometric);
differences are paired by seed.

Expected, written before the run:

* Task statistics: half of the experts are dropped for a few per cent, and there is a cliff, at 1 of 8 at the latest
  (top 2 becomes top 1). Those of all text cost several times as much at 4 and 2 experts, since what one domain does
  not use another does. Random is the worst of those that drop.
* Saliency and usage differ little where weights are renormalised; saliency is ahead at few experts if at all.
* Merging: alignment helps where neurons can be permuted, but experts that never were copies of each other have little
  in common, so merging is behind keeping the dominant expert of each group, and that is close to pruning by usage.
* The MoE base loses more than the mixture at the same number, for its experts are all that the FFN has.
* Switched off: the three experts that a domain uses most beyond the others (of eight in each of three layers) raise
  its perplexity more than that of the others, in most domains and seeds; three random ones do not prefer it.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import operator
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # the demo's models and text

import torch
from demo_files import installation, parted
from demo_models import Progress, new_base, perplexities, train
from demo_table import mean, percent
from demo_text import new_tokenizer, token_rows
from peft import PeftModel, get_peft_model
from routers import kept, table
from study_arguments import check_numbers, read_arguments
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers import logging as transformers_logging

from mixadapters import MoAConfig
from mixadapters.surgery.merging import merge_experts
from mixadapters.surgery.page import write_page
from mixadapters.surgery.pruning import prune_experts
from mixadapters.surgery.tracing import routes
from mixadapters.surgery.tuning import rank_by_usage, selectivity, tune_experts
from mixadapters.surgery.usage import ExpertUsage, record_usage
from mixadapters.tasks.report import t_interval
from mixadapters.tasks.sources import read_texts

PARTS = ("mixture", "moe")
EXPERTS, TOP = 8, 2
KEPT = {"mixture": (6, 4, 2, 1), "moe": (6, 4, 3, 2)}  # a Mixtral has as many as a token uses at least
OFF = 3  # experts that are switched off
# arm -> whose statistics, and what is done with them
PRUNED = {
    "saliency, task": ("task", {"criterion": "saliency"}),
    "usage, task": ("task", {"criterion": "usage"}),
    "saliency, all": ("all", {"criterion": "saliency"}),
    "usage, all": ("all", {"criterion": "usage"}),
    "random": ("all", {"criterion": "random"}),
}
MERGED = {
    "merged, aligned": {"align": True},
    "merged, not aligned": {"align": False},
    "dominant kept": {"weight": "dominant"},
}
ARMS = (*PRUNED, *MERGED, "switched off")
FILES = {"biomed": "biomed_sentences", "films": "imdb_unsup_8000", "products": "amazon_reviews"}  # of `unlabelled/`


@dataclass
class Arguments:
    """What to run. The defaults are the evaluation."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder that has unlabelled/. None: without it."})
    out: str = field(default="runs/surgery", metadata={"help": "Where models, results, table and picture go."})
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    seeds: list[int] = field(default_factory=lambda: list(range(5)))
    tokens: int = field(default=40_000, metadata={"help": "Of training text per domain."})
    test_tokens: int = field(default=2_000, metadata={"help": "Of test text per domain."})
    seen_tokens: int = field(default=4_000, metadata={"help": "Of training text per domain, for statistics."})
    base_tokens: int = field(default=800_000, metadata={"help": "Of general text, for the mixture's base."})
    moe_epochs: int = field(default=3, metadata={"help": "Times that the MoE base reads all text."})
    length: int = 128
    width: int = field(default=128, metadata={"help": "Of the models; a multiple of 32."})
    layers: int = 3
    vocabulary: int = 2000
    rank: int = field(default=32, metadata={"help": "Width of an expert of the mixture."})
    batch: int = 8
    rate: float = field(default=3e-3, metadata={"help": "Of all trainings."})
    cpu_minutes: float = field(default=20.0, metadata={"help": "Nothing begins after these; run again to go on."})

    def __post_init__(self) -> None:
        check_numbers(self, zero=("cpu_minutes",))
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(f"parts={sorted(unknown)} are unknown; choose from {list(PARTS)}")

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on."""
        return {k: v for k, v in vars(self).items() if k not in ("out", "parts", "seeds", "cpu_minutes", "data_dir")}


# --- text and models ----------------------------------------------------------------------------------------------


def read_domains(data_dir: str | None) -> dict[str, list[str]]:
    """Documents by kind, `general` among them."""
    documents = installation()
    for domain, file in FILES.items() if data_dir else ():
        lines = [text for (text,) in read_texts(Path(data_dir or ""), f"unlabelled/{file}", "text")]
        joined = 20 if domain == "biomed" else 1  # single sentences are short documents
        documents[domain] = ["\n".join(lines[i : i + joined]) for i in range(0, min(len(lines), 6000), joined)]
    return documents


class Trial:
    """The text, and the models that are trained on it."""

    def __init__(self, args: Arguments, documents: dict[str, list[str]]) -> None:
        self.args, self.out = args, Path(args.out)
        texts = {kind: parted(texts) for kind, texts in documents.items()}
        self.domains = [kind for kind in texts if kind != "general"]
        self.tokenizer = new_tokenizer((text for read, _ in texts.values() for text in read), args.vocabulary)
        self.rows: dict[str, Tensor] = {}
        self.tests: dict[str, Tensor] = {}
        for kind in self.domains:
            read, held_out = texts[kind]
            self.rows[kind] = token_rows(self.tokenizer, read, args.length, args.tokens, kind)
            self.tests[kind] = token_rows(self.tokenizer, held_out, args.length, args.test_tokens, f"{kind}, test")
        self.general = token_rows(self.tokenizer, texts["general"][0], args.length, args.base_tokens, "general")
        self.progress = Progress()

    def text(self) -> Tensor:
        """(n, T) of all domains, in an order that the training shuffles."""
        return torch.cat([self.rows[kind] for kind in self.domains])

    def train(
        self, model: Any, rows: Tensor, what: str, seed: int, folder: Path, epochs: float = 1,
        rate: float | None = None,
    ) -> None:  # fmt: skip
        start = time.process_time()
        self.progress.step(what)
        self.progress.expect(int(rows.numel() * epochs))
        train(
            model, rows, self.progress, rate=rate or self.args.rate, batch=self.args.batch, epochs=epochs,
            out=str(self.out / "trainer"), seed=seed,
        )  # fmt: skip
        _save(model, folder, time.process_time() - start)

    def base(self) -> Any:
        """The mixture's frozen decoder, which all seeds share."""
        folder = self.out / "base"
        if not folder.exists():
            model = new_base(len(self.tokenizer), self.args.width, self.args.layers, self.args.length)
            self.train(model, self.general, "a small base model", 0, folder)
        return AutoModelForCausalLM.from_pretrained(folder)

    def model(self, part: str, seed: int) -> Any:
        """The trained model of a part, from its folder where it is there already."""
        folder = self.out / part / str(seed)
        if part == "mixture":
            base = self.base()
            if folder.exists():
                return PeftModel.from_pretrained(base, folder).eval()
            torch.manual_seed(seed)
            model = get_peft_model(base, self.mixture())
        elif folder.exists():
            return AutoModelForCausalLM.from_pretrained(folder).eval()
        else:
            torch.manual_seed(seed)
            model = MixtralForCausalLM(self.moe())
        epochs = 1 if part == "mixture" else self.args.moe_epochs
        self.train(model, self.text(), f"{part}, seed {seed}", seed, folder, epochs)
        return model.eval()

    def mixture(self) -> MoAConfig:
        return MoAConfig(
            num_experts=EXPERTS, num_experts_per_tok=TOP, expert_type="glu", activation="silu", r=self.args.rank,
            norm_topk_prob=True, router_aux_loss_coef=0.01, task_type="CAUSAL_LM",
        )  # fmt: skip

    def moe(self) -> MixtralConfig:
        width = self.args.width
        return MixtralConfig(
            vocab_size=len(self.tokenizer), hidden_size=width, intermediate_size=width,
            num_hidden_layers=self.args.layers, num_attention_heads=width // 32, num_key_value_heads=width // 32,
            num_local_experts=EXPERTS, num_experts_per_tok=TOP, output_router_logits=True, router_aux_loss_coef=0.01,
            max_position_embeddings=2 * self.args.length, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip


def _save(model: Any, folder: Path, cpu_seconds: float) -> None:
    """Under its name when it is whole, with what its training took."""
    aside = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(aside)
    (aside / "cpu_seconds.json").write_text(json.dumps(cpu_seconds))
    os.replace(aside, folder)


def owner(part: str) -> str:
    """Whose experts a part is about, as `adapter` of the verbs."""
    return "default" if part == "mixture" else ""


# --- cutting and measuring ----------------------------------------------------------------------------------------


def usage_of(part: str, seed: int, model: Any, trial: Trial) -> ExpertUsage:
    """What the experts do with text of each domain that they were trained on; from its file where that is there."""
    file = trial.out / part / f"usage-{seed}.safetensors"
    if not file.exists():
        with torch.no_grad(), record_usage(model, adapter=owner(part)) as usage:
            for domain in trial.domains:
                count = max(1, trial.args.seen_tokens // trial.args.length)
                for rows in trial.rows[domain][:count].split(16):
                    usage.labels = [domain] * len(rows)
                    model(input_ids=rows, attention_mask=torch.ones_like(rows))
        usage.save(file)
    return ExpertUsage.load(file)


def pruned(part: str, arm: str, kept: int, seed: int, model: Any, trial: Trial) -> dict[str, float]:
    """Perplexity by domain of the model with so many experts: cut once, or for each domain by its own statistics."""
    whose, options = PRUNED[arm]
    usage = usage_of(part, seed, model, trial)

    def cut(of: ExpertUsage) -> Any:
        copied = copy.deepcopy(model)
        prune_experts(copied, of, kept, adapter=owner(part), seed=seed, **options)
        return copied

    if whose == "all":
        return perplexities(cut(usage), trial.tests)
    found = {}
    for domain in trial.domains:
        found |= perplexities(cut(usage.by_label[domain]), {domain: trial.tests[domain]})
    return found


def merged(part: str, arm: str, kept: int, seed: int, model: Any, trial: Trial) -> dict[str, float]:
    """Perplexity by domain of the model whose experts are merged to so many."""
    copied = copy.deepcopy(model)
    merge_experts(copied, usage_of(part, seed, model, trial), kept, adapter=owner(part), **MERGED[arm])
    return perplexities(copied, trial.tests)


def switched_off(part: str, seed: int, model: Any, trial: Trial) -> dict[str, Any]:
    """Selectivity by domain: of its own experts, and of as many random ones."""
    usage = usage_of(part, seed, model, trial)
    before = perplexities(model, trial.tests)
    draw = random.Random(seed)
    found: dict[str, Any] = {"own": {}, "random": {}}
    for domain in trial.domains:
        rest = functools.reduce(operator.add, (usage.by_label[other] for other in trial.domains if other != domain))
        ranked = rank_by_usage(usage.by_label[domain], rest)
        for name, off in (("own", ranked[:OFF]), ("random", draw.sample(ranked, OFF))):
            with tune_experts(model, off=off, adapter=owner(part)):
                after = perplexities(model, trial.tests)
            others = [[found_[other] for other in trial.domains if other != domain] for found_ in (before, after)]
            rest_of = (mean(others[0]), mean(others[1]))
            found[name][domain] = {
                "selectivity": selectivity((before[domain], after[domain]), rest_of),
                "target": percent(after[domain], before[domain]), "rest": percent(rest_of[1], rest_of[0]),
            }  # fmt: skip
    return found


def one(part: str, arm: str, seed: int, model: Any, trial: Trial) -> dict[str, Any]:
    """A result: perplexity by number of experts and domain, or what switching off does."""
    if arm == "whole":
        return {"perplexity": perplexities(model, trial.tests)}
    if arm == "switched off":
        return {"selectivity": switched_off(part, seed, model, trial)}
    cut = pruned if arm in PRUNED else merged
    return {"perplexity": {str(kept): cut(part, arm, kept, seed, model, trial) for kept in KEPT[part]}}


def runs(trial: Trial) -> Iterator[dict[str, Any]]:
    """The result of each run, from its file where that is there already; none begins after `cpu_minutes`.

    Raises:
        ValueError: a file of other settings.
    """
    args, folder = trial.args, trial.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for part in args.parts:
            model = None
            for arm in ("whole", *ARMS):
                path = folder / f"{part}-{arm.replace(', ', '-').replace(' ', '_')}-{seed}.json"
                if path.exists():
                    yield kept(path, args.settings)
                elif time.process_time() < 60 * args.cpu_minutes:
                    model = model or trial.model(part, seed)
                    start = time.process_time()
                    trial.progress.step(f"{part}, seed {seed}: {arm}")
                    result = {"part": part, "arm": arm, "seed": seed, "settings": args.settings,
                              **one(part, arm, seed, model, trial)}  # fmt: skip
                    yield written(path, result, start)


def written(path: Path, result: dict[str, Any], start: float) -> dict[str, Any]:
    """The result with what it has taken since `start`; its file is there when it is whole."""
    result["cpu_seconds"] = time.process_time() - start
    path.with_suffix(".part").write_text(json.dumps(result))
    os.replace(path.with_suffix(".part"), path)
    return result


# --- report -------------------------------------------------------------------------------------------------------

Change = dict[str, dict[int, dict[int, float]]]  # arm -> experts kept -> seed -> change in per cent


def changes(found: list[dict[str, Any]], part: str) -> Change:
    """The change of perplexity against the uncut model: geometric mean over domains."""
    whole = {run["seed"]: run["perplexity"] for run in found if (run["part"], run["arm"]) == (part, "whole")}
    made: Change = {}
    for run in found:
        if run["part"] == part and run["arm"] in (*PRUNED, *MERGED) and run["seed"] in whole:
            for kept, by_domain in run["perplexity"].items():
                before = whole[run["seed"]]
                value = percent(mean([by_domain[d] for d in before]), mean(list(before.values())))
                made.setdefault(run["arm"], {}).setdefault(int(kept), {})[run["seed"]] = value
    return made


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation, in per cent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):+.{digits}f} ± {deviation:.{digits}f}"


def interval(values: list[float], digits: int = 1) -> str:
    """Mean of paired differences with the 95 % interval."""
    found, shown = t_interval(values), f"{statistics.mean(values):+.{digits}f}"
    return shown if found is None else f"{shown} ({found[0]:+.{digits}f} to {found[1]:+.{digits}f})"


PAIRS = (
    ("saliency, all", "saliency, task"),
    ("usage, task", "saliency, task"),
    ("random", "saliency, all"),
    ("usage, all", "saliency, all"),
    ("merged, not aligned", "merged, aligned"),
    ("merged, aligned", "dominant kept"),
    ("dominant kept", "saliency, all"),
)


def paired(made: Change, arm: str, other: str, kept: int) -> str:
    """How much more an arm changes than another, over the seeds that both have."""
    mine, theirs = made[arm][kept], made[other][kept]
    return interval([mine[seed] - theirs[seed] for seed in mine if seed in theirs])


def report(found: list[dict[str, Any]]) -> str:
    """Per part: the change by experts kept, the paired differences, and what switching off does."""
    texts = []
    for part in dict.fromkeys(run["part"] for run in found):
        made = changes(found, part)
        whole = [mean(list(r["perplexity"].values())) for r in found if (r["part"], r["arm"]) == (part, "whole")]
        head = [f"{part}: change of perplexity, %", *(f"{kept} of {EXPERTS}" for kept in KEPT[part])]
        rows = [[arm, *(spread(list(by_kept[kept].values())) for kept in KEPT[part])] for arm, by_kept in made.items()]
        texts.append(f"uncut: perplexity {statistics.mean(whole):.1f}, {len(whole)} seeds\n\n{table([head, *rows])}")
        rows = [[f"{part}: difference, points", *head[1:]]]
        for arm, other in PAIRS:
            if arm in made and other in made:
                rows.append([f"{arm}, less {other}", *(paired(made, arm, other, kept) for kept in KEPT[part])])
        texts.append(table(rows))
        if off := [run["selectivity"] for run in found if (run["part"], run["arm"]) == (part, "switched off")]:
            texts.append(selectivities(part, off))
    return "\n\n".join(texts) + "\n"


def selectivities(part: str, off: list[dict[str, Any]]) -> str:
    """By seed the geometric mean over domains; and in how many of all the domain loses more than the others."""
    rows = [[f"{part}: {OFF} experts off", "selectivity", "the domain, %", "the others, %", "above 1"]]
    for name in ("own", "random"):
        runs_ = [list(run[name].values()) for run in off]
        each = [one_ for run in runs_ for one_ in run]
        logs = [statistics.mean(math.log(one_["selectivity"]) for one_ in run) for run in runs_]
        bounds = t_interval(logs)
        shown = f"{math.exp(statistics.mean(logs)):.2f}"
        if bounds is not None:
            shown += f" ({math.exp(bounds[0]):.2f} to {math.exp(bounds[1]):.2f})"
        by_seed = [[statistics.mean(one_[key] for one_ in run) for run in runs_] for key in ("target", "rest")]
        above = sum(one_["selectivity"] > 1 for one_ in each)
        rows.append([name, shown, *map(spread, by_seed), f"{above} of {len(each)}"])
    return table(rows)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """The change against experts kept: a panel for each part, a line for each arm with its seeds' deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = list(dict.fromkeys(run["part"] for run in found))
    size = (5.5 * len(parts), 4.2)
    figure, panels = pyplot.subplots(1, len(parts), figsize=size, layout="constrained", squeeze=False)
    for axes, part in zip(panels[0], parts, strict=True):
        for i, (arm, by_kept) in enumerate(changes(found, part).items()):
            seeds = [list(by_kept[kept].values()) for kept in KEPT[part]]
            middle, bars = map(statistics.mean, seeds), [statistics.stdev(of) if len(of) > 1 else 0.0 for of in seeds]
            style = "--" if arm in MERGED else ":" if arm == "random" else "-"
            places = [kept + 0.03 * (i - 4) for kept in KEPT[part]]
            axes.errorbar(
                places, list(middle), bars, fmt=f"o{style}", color=f"C{i}", label=arm, capsize=2, markersize=4
            )
        axes.set(title=part, xlabel=f"experts kept of {EXPERTS}", ylabel="change of perplexity, %")
        axes.set_yscale("symlog", linthresh=5)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.invert_xaxis()
        axes.set_xticks(KEPT[part], map(str, KEPT[part]))
    panels[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_pages(trial: Trial) -> None:
    """The page of routes of the first seed's models, on test text."""
    rows = [(domain, row) for domain in trial.domains for row in trial.tests[domain][:2].tolist()]
    texts, labels = [trial.tokenizer.decode(row) for _, row in rows], [domain for domain, _ in rows]
    for part in trial.args.parts:
        if (trial.out / part / str(trial.args.seeds[0])).exists():
            model = trial.model(part, trial.args.seeds[0])
            table = routes(model, trial.tokenizer, texts, labels, adapter=owner(part))
            write_page(table, trial.out / f"{part}.html", title=f"Which expert took each token: {part}")


def main(args: Arguments) -> dict[str, Any]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    trial = Trial(args, read_domains(args.data_dir))
    found = list(runs(trial))
    draw_pages(trial)
    trial.progress.bar.close()
    wanted = len(args.seeds) * len(args.parts) * (1 + len(ARMS))
    trained = sum(json.loads(file.read_text()) for file in trial.out.glob("**/cpu_seconds.json"))
    minutes = (sum(run["cpu_seconds"] for run in found) + trained) / 60
    made = {"settings": args.settings, "runs": found, "missing": wanted - len(found), "cpu_minutes": minutes}
    text = report(found)
    (trial.out / "results.json").write_text(json.dumps(made, indent=1))
    (trial.out / "table.md").write_text(text)
    if found:
        plot(found, trial.out / "surgery.png")
    print(f"{text}\n{len(found)} of {wanted} runs, {minutes:.1f} CPU minutes")
    return made


if __name__ == "__main__":
    main(read_arguments(Arguments))
