"""Domains that come and go in one frozen language model, against one adapter for everything; measured by perplexity.

    python examples/demo.py                                                      # text that an installation carries
    python examples/demo.py --base Qwen/Qwen3-0.6B --domains law=law.txt code=code.txt --general general.txt \
        --later tax=tax.txt --out runs/mine                                      # a model and text of your own

A LoRA adapter is trained on each domain's text alone, and MoA puts them side by side under a gate of counted tokens,
which is not trained. A joint LoRA adapter of the same total size reads the same text, general text included. Then a
domain is added, and one is removed. Writes report.json, a table, three pictures, a page of coloured text, and the
adapters; a fresh process reloads the mixture and must find the same perplexities.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from demo_models import Progress, lora, mixture, new_base, perplexities, routing, size, train
from demo_pictures import coloured_page, plot_bars, plot_routing
from demo_text import from_files, installation, new_tokenizer, parted, token_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers import logging as transformers_logging

OWN = ("code", "science", "licences", "readmes")  # domains of an installation; "headers" (of C++) come later


@dataclass
class Arguments:
    """What to run. The defaults are the demo."""

    base: str | None = field(default=None, metadata={"help": "Decoder: folder or hub id. None: one trained here."})
    domains: list[str] = field(default_factory=list, metadata={"help": "name=FILE of plain text, UTF-8; two or more."})
    general: str | None = field(default=None, metadata={"help": "FILE of general text. None: the installation's."})
    later: str | None = field(default=None, metadata={"help": "name=FILE of a domain that is added later."})
    out: str = field(default="runs/demo", metadata={"help": "Where everything goes."})
    tokens: int = field(default=40_000, metadata={"help": "Tokens of training text per domain, read once."})
    test_tokens: int = field(default=8_000, metadata={"help": "Tokens of test text per kind, from other documents."})
    length: int = field(default=128, metadata={"help": "Tokens of a row."})
    rank: int = field(default=8, metadata={"help": "Of a domain's LoRA; the joint one has as many times more."})
    rate: float = field(default=5e-3, metadata={"help": "Learning rate of adapters; 2e-4 suits large models."})
    batch: int = 4
    base_tokens: int = field(default=800_000, metadata={"help": "Tokens that the new base model is trained on."})
    base_rate: float = 3e-3
    vocabulary: int = 3000
    width: int = 160
    layers: int = 3
    check: bool = field(default=False, metadata={"help": "Only reload the mixture of --out, and print perplexities."})


class Demo:
    """The text, the base model, and what is made of them."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.out = args, Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.systems: list[dict[str, Any]] = []
        self.own: dict[str, float] = {}  # domain -> perplexity of its own adapter
        self.weights: dict[str, dict[str, float]] = {}  # kind of text -> arm -> mean weight
        self.started = time.perf_counter()
        own = not args.domains
        if not own and args.base is None:
            raise SystemExit("--domains needs --base: the model that they adapt")
        documents = installation() if own or args.general is None else {}
        self.later = "headers" if own else args.later and args.later.partition("=")[0]
        if not own:
            files = dict(pair.split("=", 1) for pair in [*args.domains, *([args.later] if args.later else [])])
            files |= {"general": args.general} if args.general else {}
            documents = {"general": documents.get("general", []), **from_files({n: Path(f) for n, f in files.items()})}
        self.domains = list(OWN) if own else [pair.partition("=")[0] for pair in args.domains]
        self.kinds = [*self.domains, *([self.later] if self.later else []), "general"]
        self._read({kind: parted(documents[kind]) for kind in self.kinds})

    def _read(self, texts: dict[str, tuple[list[str], list[str]]]) -> None:
        args = self.args
        if args.base is None:
            known = (text for kind in (*self.domains, "general") for text in texts[kind][0])
            self.tokenizer = new_tokenizer(known, args.vocabulary)
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(args.base)
        rows = {k: token_rows(self.tokenizer, train, args.length, args.tokens) for k, (train, _) in texts.items()}
        self.rows: dict[str, Tensor] = rows
        self.tests = {k: token_rows(self.tokenizer, t, args.length, args.test_tokens) for k, (_, t) in texts.items()}
        save_file(self.tests, self.out / "tests.safetensors")
        self.base_rows = None
        if args.base is None:
            self.base_rows = token_rows(self.tokenizer, texts["general"][0], args.length, args.base_tokens)

    # --- models -------------------------------------------------------------------------------------------------

    def base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.args.base or self.out / "base")

    def train(self, model: Any, rows: Tensor, what: str, **options: Any) -> Any:
        args = self.args
        self.progress.step(what)
        options = {"rate": args.rate, "batch": args.batch, "epochs": 1, **options}
        train(model, rows, self.progress, out=str(self.out / "trainer"), **options)
        return model

    def train_base(self) -> None:
        args = self.args
        if self.base_rows is not None:
            model = new_base(len(self.tokenizer), args.width, args.layers, args.length)
            epochs = args.base_tokens / self.base_rows.numel()
            self.train(model, self.base_rows, "a small base model", rate=args.base_rate, batch=16, epochs=epochs)
            model.save_pretrained(self.out / "base")
            self.tokenizer.save_pretrained(self.out / "base")

    def domain(self, name: str) -> str:
        """The folder of a LoRA adapter that has read this domain's text alone."""
        model = self.train(lora(self.base(), self.args.rank), self.rows[name], f"domain {name}")
        self.own[name] = perplexities(model, {name: self.tests[name]})[name]
        model.save_pretrained(self.out / "domains" / name)
        return str(self.out / "domains" / name)

    def joint(self, kinds: list[str], what: str) -> Any:
        """One LoRA adapter as large as those of all domains of `kinds` together, which reads all their text."""
        rank = self.args.rank * len([kind for kind in kinds if kind != "general"])
        rows = torch.cat([self.rows[kind] for kind in kinds])
        return self.train(lora(self.base(), rank), rows, what)

    def measure(self, name: str, model: Any, tokens: int, found: dict[str, float] | None = None) -> dict[str, float]:
        """Note the perplexities of a system on every kind of text."""
        found = found or perplexities(model, self.tests)
        added = 0 if model is None else size(model)
        self.systems.append({"name": name, "parameters": added, "tokens": tokens, "perplexity": found})
        return found

    # --- the story ----------------------------------------------------------------------------------------------

    def main(self) -> dict[str, Any]:
        args, old = self.args, self.domains
        count = {kind: rows.numel() for kind, rows in self.rows.items()}
        joint_reads = sum(count[kind] for kind in (*old, "general"))
        total = 2 * joint_reads - count["general"] + (0 if self.base_rows is None else args.base_tokens)
        if self.later:
            total += 2 * count[self.later] + joint_reads + count[self.later]
        self.progress = Progress(total)
        self.train_base()
        base = self.measure("base model", self.base(), 0)
        mixed = mixture(self.base(), {name: self.domain(name) for name in old})
        started = time.perf_counter()
        mixed.base_model.fit_gate({name: self.rows[name] for name in old}, self.rows["general"])
        self.gate_seconds = time.perf_counter() - started
        before = self.measure("mixture", mixed, joint_reads)
        joint = self.joint([*old, "general"], "joint adapter")
        joint_before = self.measure("joint adapter", joint, joint_reads)
        change = {}
        if self.later:
            change = self.add_a_domain(mixed, joint, before, joint_before, joint_reads)
        mixed.save_pretrained(self.out / "mixture")
        self.draw(mixed, base, before, joint_before, change)
        final = perplexities(mixed, self.tests)
        removed = old[0]
        mixed.base_model.remove_expert(removed)
        self.measure(f"mixture without {removed}", mixed, 0)
        self.progress.bar.close()
        return self.report(self.fresh_process(final))

    def add_a_domain(
        self, mixed: Any, joint: Any, before: dict[str, float], joint_before: dict[str, float], joint_reads: int
    ) -> dict[str, dict[str, float]]:
        """A domain comes: into the mixture by its own text alone, into the joint adapter in two ways."""
        new, tokens = self.later, self.rows[self.later].numel()
        mixed.base_model.add_expert(new, self.domain(new))
        mixed.base_model.fit_gate({new: self.rows[new]})
        after = self.measure(f"mixture + {new}", mixed, tokens)
        self.train(joint, self.rows[new], f"joint adapter, {new} alone")
        alone = self.measure(f"joint adapter, gone on with {new} alone", joint, tokens)
        anew = self.joint([*self.domains, new, "general"], "joint adapter, anew")
        again = self.measure("joint adapter, trained anew on everything", anew, joint_reads + tokens)
        old = [kind for kind in self.kinds if kind != new]
        return {
            f"mixture + {new}": {kind: percent(after[kind], before[kind]) for kind in old},
            f"joint, {new} alone": {kind: percent(alone[kind], joint_before[kind]) for kind in old},
            "joint, anew": {kind: percent(again[kind], joint_before[kind]) for kind in old},
        }

    def draw(
        self, mixed: Any, base: dict[str, float], before: dict[str, float], joint: dict[str, float],
        change: dict[str, dict[str, float]],
    ) -> None:  # fmt: skip
        """Three pictures, and the page."""
        texts: dict[str, tuple[Tensor, Tensor]] = {}
        for kind, rows in self.tests.items():
            arms, weights = routing(mixed, rows)
            texts[kind] = rows[:3], weights[:3]
            self.weights[kind] = dict(zip(arms, weights.mean((0, 1)).tolist(), strict=True))
        plot_routing(self.weights, self.out / "routing.png")
        old = [kind for kind in self.kinds if kind != self.later]
        against = {"mixture": before, "joint adapter": joint}
        bars = {name: {kind: percent(found[kind], base[kind]) for kind in old} for name, found in against.items()}
        plot_bars(bars, self.out / "perplexity.png", "Perplexity against the base model", "%")
        if change:
            plot_bars(change, self.out / "adding.png", f"After {self.later} came: change of the others", "%")
        coloured_page(self.tokenizer, arms, texts, self.out / "text.html")

    def fresh_process(self, expected: dict[str, float]) -> bool:
        """Whether another process finds the same perplexities in the saved mixture."""
        command = [sys.executable, __file__, "--check", "True", "--out", str(self.out)]
        command += ["--base", self.args.base] if self.args.base else []
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
        return json.loads(run.stdout.splitlines()[-1]) == expected

    def report(self, same: bool) -> dict[str, Any]:
        for system in self.systems:
            found = system["perplexity"]
            system["domains"] = mean([found[kind] for kind in self.domains])
            system["all"] = mean(list(found.values()))
        report = {
            "arguments": asdict(self.args), "kinds": self.kinds, "later": self.later, "systems": self.systems,
            "own_adapter": self.own, "routing": self.weights, "seconds": time.perf_counter() - self.started,
            "gate_seconds": self.gate_seconds, "equal_in_a_fresh_process": same,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "mixadapters")},
        }  # fmt: skip
        (self.out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        return report


def percent(new: float, old: float) -> float:
    return 100 * (new / old - 1)


def mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(report: dict[str, Any]) -> str:
    """The systems by kind of text, in Markdown."""
    kinds = report["kinds"]
    lines = [f"| perplexity | {' | '.join(kinds)} | first domains | all | adds | tokens read |"]
    lines.append("|---" * (len(kinds) + 5) + "|")
    for system in report["systems"]:
        cells = [f"{system['perplexity'][kind]:.1f}" for kind in kinds]
        cells += [f"{system['domains']:.1f}", f"{system['all']:.1f}"]
        cells += [f"{system['parameters']:,}", f"{system['tokens']:,}"]
        lines.append(f"| {system['name']} | {' | '.join(cells)} |")
    own = " | ".join(f"{report['own_adapter'][kind]:.1f}" if kind in report["own_adapter"] else "" for kind in kinds)
    return "\n".join([*lines, f"| each domain's own adapter | {own} | | | | |"])


def verdict(report: dict[str, Any]) -> str:
    """Who is ahead, whoever it is."""
    systems = {system["name"]: system for system in report["systems"]}
    one, other = systems["mixture"], systems["joint adapter"]
    old = [kind for kind in report["kinds"] if kind != report["later"]]
    with_general = [mean([s["perplexity"][kind] for kind in old]) for s in (one, other)]
    lines = [
        ahead("On the domains", one["domains"], other["domains"]),
        ahead("With general text", *with_general),
    ]
    if report["later"]:
        anew = systems["joint adapter, trained anew on everything"]["all"]
        lines.append(ahead(f"With {report['later']} added", systems[f"mixture + {report['later']}"]["all"], anew))
    return "\n".join(lines)


def ahead(where: str, mixed: float, joint: float) -> str:
    first, by = ("the mixture", joint / mixed) if mixed < joint else ("the joint adapter", mixed / joint)
    return f"{where} {first} is ahead: {mixed:.1f} (mixture), {joint:.1f} (joint), {100 * (by - 1):.1f} %."


def check(args: Arguments) -> None:
    """In a fresh process: the saved mixture's perplexities, as JSON."""
    base = AutoModelForCausalLM.from_pretrained(args.base or Path(args.out) / "base")
    model = PeftModel.from_pretrained(base, Path(args.out) / "mixture").eval()
    print(json.dumps(perplexities(model, load_file(Path(args.out) / "tests.safetensors"))))


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.check:
        return check(args)
    report = Demo(args).main()
    text = f"{table(report)}\n\n{verdict(report)}\n"
    (Path(args.out) / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nThe gate counted in {report['gate_seconds']:.1f} s. A fresh process found "
          f"{'the same' if report['equal_in_a_fresh_process'] else 'OTHER'} perplexities. "
          f"{report['seconds']:.0f} s in all; see {args.out}/ for pictures and text.html.")  # fmt: skip
    return report


if __name__ == "__main__":
    main()
