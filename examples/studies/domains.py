"""Mixtures of domains against joint adapters, by perplexity: kinds of adapters, gates, adding and removing.

    python examples/studies/domains.py  # text that an installation carries
    python examples/studies/domains.py --domains biomed=biomed.txt film=film.txt product=product.txt code=code.txt \
        --later headers=headers.txt --general general.txt  # text of your own
    python examples/studies/domains.py ... --size large  # 300,000 tokens of each kind: a GPU, or hours
    python examples/studies/domains.py ... --size large --base_tokens 1200000 --kinds lora --cells main \
        --rates expert=5e-3 temperature=3 joint=2e-3 twice=2e-3 shared=2e-3  # the main claims: 20 CPU minutes a seed

For each seed a small decoder learns general text; each domain has an adapter of its own, from its text alone; mixtures
of them stand against adapters that read all text, general text included. All that is compared has the same seed, base
model and text. Rates and the temperature of the counts gate are chosen on dev text with a seed that is not reported.
Two kinds of adapters: LoRA on all linear layers (MoA), and bottlenecks of that size beside the FFN (MixDA).

Each result is a file of its own: the command goes on where it was ended. Cells run in the order of CELLS, kind by kind
and seed by seed; none begins after `--cpu_minutes`, and what is dropped then is dropped from the end and reported as
missing. Where there is less time than that, run the cells of FEWER or MAIN alone. Those of MORE were
thought of after the others. The claims are in
`domains_claims.py`, with what was expected of them before the first run.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # the demo's models and text

import torch
from demo_files import parted, read_text
from demo_models import Progress, lora, mixture, new_base, perplexities, routing, size, token_losses, train
from demo_table import mean
from demo_text import new_tokenizer, token_rows
from domains_claims import report
from peft import PeftModel, XLoraConfig, get_peft_model
from study_arguments import check_numbers, read_arguments
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import logging as transformers_logging

from mixadapters import BottleneckConfig, MixDAConfig

KINDS = ("lora", "bottleneck")
GATES: dict[str, Any] = {  # router -> its specification; how it is fitted is in `Trial.gate`
    "counts": "counts",
    "features": {"kind": "softmax", "granularity": "causal_prefix"},
    "lm_token": {"kind": "softmax", "granularity": "token"},
    "lm_prefix": {"kind": "softmax", "granularity": "causal_prefix"},
    "uniform": "constant",
    "arrow": "arrow",
    "arrow_prefix": {"kind": "arrow", "k": None, "granularity": "causal_prefix"},
    "phatgoose": "phatgoose",
}
FEATURE_ROWS = 200  # of each kind of text, for gates that a regression on states fits
CHOOSING = 100  # the seed that rates are chosen with
# size -> what it is where it is not given; tokens but those of `base_tokens` are of each kind of text
SIZES: dict[str, dict[str, int]] = {
    "small": {"tokens": 24_000, "dev_tokens": 4_000, "test_tokens": 6_000, "base_tokens": 400_000},
    "large": {"tokens": 300_000, "dev_tokens": 12_000, "test_tokens": 24_000, "base_tokens": 3_000_000},
}
# kind -> what is chosen -> the values to choose from, or what it has the value of
CHOICES: dict[str, dict[str, Any]] = {
    "lora": {
        "expert": (5e-3, 1e-2, 2e-2), "temperature": (1.0, 3.0, 10.0), "joint": (2e-3, 5e-3, 1e-2),
        "twice": (2e-3, 5e-3), "shared": (5e-3, 1e-2), "gate": (3e-3, 3e-2), "phatgoose": (1e-3, 3e-3, 3e-2),
        "xlora": (1e-3, 3e-3, 3e-2),
    },
    "bottleneck": {
        "expert": (5e-3, 1e-2, 2e-2), "temperature": (1.0, 3.0, 10.0), "joint": (2e-3, 5e-3, 1e-2),
        "twice": "joint", "shared": "expert", "gate": (3e-3, 3e-2),
    },
}  # fmt: skip


# Where more text is read lower rates do: on 60,000 tokens of each kind those of LoRA have their best inside.
LARGE_CHOICES: dict[str, dict[str, Any]] = {
    "lora": {
        "expert": (5e-3, 1e-2, 2e-2),
        "joint": (1e-3, 2e-3, 5e-3, 1e-2),
        "twice": (1e-3, 2e-3, 5e-3),
        "shared": (2e-3, 5e-3, 1e-2),
        "gate": (1e-3, 3e-3, 3e-2),
    },
    "bottleneck": {"joint": (2e-3, 5e-3, 1e-2, 2e-2), "twice": (2e-3, 5e-3, 1e-2)},
}


@dataclass
class Arguments:
    """What to run. The defaults are the evaluation on one CPU."""

    out: str = field(default="runs/domains", metadata={"help": "Where results, adapters and tables go."})
    domains: list[str] = field(default_factory=list, metadata={"help": "name=FILE. None: the installation's."})
    general: str | None = field(default=None, metadata={"help": "FILE of general text. None: the installation's."})
    later: str | None = field(default=None, metadata={"help": "name=FILE of a domain that is added later."})
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    cells: list[str] = field(
        default_factory=lambda: ["usual"], metadata={"help": "Of CELLS; or usual, fewer, main, more, others."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    size: str = field(default="small", metadata={"help": "What the next four are unless given: small or large."})
    tokens: int | None = field(default=None, metadata={"help": "Of training text per kind of text."})
    dev_tokens: int | None = field(default=None, metadata={"help": "Of dev text per kind."})
    test_tokens: int | None = field(default=None, metadata={"help": "Of test text per kind."})
    base_tokens: int | None = field(default=None, metadata={"help": "Tokens that a base model is trained on."})
    rates: list[str] = field(
        default_factory=list, metadata={"help": "what=value that is not to be chosen, of CHOICES."}
    )
    length: int = field(default=128, metadata={"help": "Tokens of a row."})
    rank: int = field(default=8, metadata={"help": "Of a domain's LoRA; bottlenecks have its size."})
    batch: int = field(default=4, metadata={"help": "Rows of a training step."})
    base_rate: float = field(default=3e-3, metadata={"help": "Learning rate of base models."})
    vocabulary: int = field(default=3000, metadata={"help": "Tokens that they know."})
    width: int = field(default=160, metadata={"help": "Of a base model; a multiple of 32."})
    layers: int = field(default=3, metadata={"help": "Of a base model."})
    cpu_minutes: float = field(default=70.0, metadata={"help": "No cell begins after these; run again to go on."})

    def __post_init__(self) -> None:
        if len(self.cells) == 1:
            self.cells = list(NAMED.get(self.cells[0], self.cells))
        if self.size not in SIZES:
            raise ValueError(f"size={self.size!r} is unknown; choose from {list(SIZES)}")
        for name, value in SIZES[self.size].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_numbers(self, zero=("cpu_minutes",))
        known_rates = {what for choices in CHOICES.values() for what in choices}
        for what, value in self.given.items():
            if what not in known_rates or not 0 < value < math.inf:
                raise ValueError(f"rates: {what}={value} must be one of {sorted(known_rates)} and a number above 0")
        for name, known in (("kinds", KINDS), ("cells", CELLS)):
            if unknown := set(getattr(self, name)) - set(known):
                raise ValueError(f"{name}={sorted(unknown)} are unknown; choose from {list(known)}")
        if "bottleneck" in self.kinds and any("_first" in cell for cell in self.cells):
            raise ValueError(
                "cells: shared adapters first need --kinds lora, since no bottleneck merges into its base"
            )
        if "bottleneck" in self.kinds and (others := set(OTHERS).intersection(self.cells)):
            raise ValueError(f"cells={sorted(others)} need --kinds lora, since they route LoRA adapters alone")
        if CHOOSING in self.seeds:
            raise ValueError(f"seeds={self.seeds}: {CHOOSING} is the seed that rates are chosen with")

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on."""
        left_out = ["out", "kinds", "cells", "seeds", "cpu_minutes", "size"]
        if not self.rates:
            left_out.append("rates")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    @property
    def given(self) -> dict[str, float]:
        """What is not to be chosen -> its value."""
        try:
            return {what: float(value) for what, _, value in (rate.partition("=") for rate in self.rates)}
        except ValueError:
            raise ValueError(f"rates={self.rates} must be what=value, such as expert=5e-3") from None

    def choices(self, kind: str) -> dict[str, Any]:
        """What is chosen for a kind of adapters -> the values to choose from."""
        return {**CHOICES[kind], **(LARGE_CHOICES[kind] if self.size == "large" else {})}


class Texts:
    """Train, dev and test text of each kind, by document, as rows of token ids (n, T)."""

    def __init__(self, args: Arguments) -> None:
        self.domains, later, documents = read_text(args.domains, args.general, args.later)
        if later is None:
            raise ValueError("--later is missing: the study adds a domain")
        self.later, self.old = later, [*self.domains, "general"]
        self.kinds = [*self.domains, later, "general"]
        parts = {}
        for kind in self.kinds:
            rest, test = parted(documents[kind])
            parts[kind] = (*parted(rest), test)
        self.tokenizer = new_tokenizer((text for kind in self.old for text in parts[kind][0]), args.vocabulary)
        sizes = (args.tokens, args.dev_tokens, args.test_tokens)
        rows: list[dict[str, Tensor]] = [{}, {}, {}]
        for kind in self.kinds:
            for found, part, tokens in zip(rows, parts[kind], sizes, strict=True):
                found[kind] = token_rows(self.tokenizer, part, args.length, tokens, kind)
        self.train, self.dev, self.test = rows
        wanted = args.tokens // args.length
        if short := {kind: found.numel() for kind, found in self.train.items() if len(found) < wanted}:
            raise ValueError(f"--tokens {args.tokens}: there are only {short}; give more text, or fewer tokens")
        self.base = token_rows(self.tokenizer, parts["general"][0], args.length, args.base_tokens, "general")

    def of(self, kinds: list[str]) -> Tensor:
        return torch.cat([self.train[kind] for kind in kinds])


# --- one seed of one kind of adapters -----------------------------------------------------------------------------


class Trial:
    """A base model, the adapters of one kind on it, and what is made of them."""

    def __init__(self, args: Arguments, texts: Texts, kind: str, seed: int, choices: dict[str, float]) -> None:
        self.args, self.texts, self.kind, self.seed, self.choices = args, texts, kind, seed, choices
        self.folder = Path(args.out) / f"seed{seed}"
        self.own = self.folder / kind
        self.start = self.folder / "base"  # the frozen model under the adapters
        self.readings = 1  # of its text by a domain's own adapter
        self.progress = Progress()
        self.read = 0  # tokens that the last training has read, besides those of the domains' own adapters
        self.adds = 0  # parameters of what is measured

    def base(self) -> Any:
        """The frozen model of this seed, anew."""
        if not (self.start / "config.json").exists():
            args, rows = self.args, self.texts.base
            model = new_base(len(self.texts.tokenizer), args.width, args.layers, args.length, self.seed)
            epochs = args.base_tokens / rows.numel()
            self.train(model, rows, args.base_rate, epochs, batch=16)
            self.read = 0
            model.save_pretrained(self.start)
        return AutoModelForCausalLM.from_pretrained(self.start)

    def train(
        self, model: Any, rows: Tensor, rate: float, epochs: float = 1, batch: int | None = None, **fields: int
    ) -> Any:
        """fields: of the batch, the same for every row."""
        out = str(Path(self.args.out) / "trainer")
        train(model, rows, self.progress, rate=rate, batch=batch or self.args.batch, epochs=epochs, out=out,
              seed=self.seed, **fields)  # fmt: skip
        self.read = round(rows.numel() * epochs)
        return model

    # --- adapters -------------------------------------------------------------------------------------------------

    def new(self, times: int = 1) -> Any:
        """An adapter that is `times` as large as a domain's."""
        if self.kind == "lora":
            return lora(self.base(), self.args.rank * times, self.seed)
        torch.manual_seed(self.seed)
        return get_peft_model(self.base(), BottleneckConfig.domain(r=self.width_of(times)))

    def width_of(self, times: int = 1) -> int:
        """The width at which bottlenecks are as large as LoRA adapters of `times` the rank."""
        sizes = [size(get_peft_model(self.base(), BottleneckConfig.domain(r=r))) for r in (1, 2)]
        wanted = size(lora(self.base(), self.args.rank * times))
        return max(1, round(1 + (wanted - sizes[0]) / (sizes[1] - sizes[0])))

    def adapter(self, name: str, kinds: list[str], what: str, times: int = 1, epochs: int = 1) -> Any:
        """An adapter that has read all text of `kinds`, from its folder where it is there already."""
        folder = self.own / name
        if (folder / "adapter_config.json").exists():
            self.read = epochs * self.texts.of(kinds).numel()
            return PeftModel.from_pretrained(self.base(), folder).eval()
        model = self.train(self.new(times), self.texts.of(kinds), self.choices[what], epochs)
        model.save_pretrained(folder)
        return model

    def going_on(self, name: str) -> Any:
        """An adapter that is there, to be trained further."""
        return PeftModel.from_pretrained(self.base(), self.own / name, is_trainable=True)

    def expert(self, name: str) -> Any:
        return self.adapter(name, [name], "expert" if self.readings == 1 else "twice", epochs=self.readings)

    def joint(self) -> Any:
        return self.adapter("joint", self.texts.old, "joint", len(self.texts.domains))

    def nearest(self) -> str:
        """The domain whose adapter does best on dev text of the later one."""
        dev = {self.texts.later: self.texts.dev[self.texts.later]}
        return min(self.texts.domains, key=lambda name: perplexities(self.expert(name), dev)[self.texts.later])

    # --- mixtures -------------------------------------------------------------------------------------------------

    def mixture(self, gate: str, shared: bool = False, domains: list[str] | None = None) -> Any:
        """The domains' adapters side by side under a gate that is not fitted yet."""
        for name in (domains := domains or self.texts.domains):
            self.expert(name)
        router, folders = GATES[gate], {name: str(self.own / name) for name in domains}
        if gate == "counts":
            router = {"kind": "counts", "temperature": self.choices.get("temperature", 3.0)}
        if self.kind == "lora":
            scope = "model" if gate == "counts" else "module"
            return mixture(self.base(), folders, self.args.rank if shared else 0, self.seed, router, scope)
        torch.manual_seed(self.seed)
        task: dict[str, Any] = {"task_adapter": None}
        if shared:
            task = {"task_adapter": "parallel", "task_r": self.task_width()}
        return get_peft_model(self.base(), MixDAConfig(domains=folders, router=router, **task)).eval()

    def task_width(self) -> int:
        """The width at which MixDA's task adapter is as large as a domain's LoRA."""
        models = (get_peft_model(self.base(), BottleneckConfig(placement="parallel", r=r)) for r in (1, 2))
        sizes = [size(model) for model in models]
        return max(1, round(1 + (size(lora(self.base(), self.args.rank)) - sizes[0]) / (sizes[1] - sizes[0])))

    def gate(self, gate: str, shared: bool = False, domains: list[str] | None = None) -> Any:
        """The mixture under a gate that has been fitted, or trained on all text by the language model's loss."""
        model = self.mixture(gate, shared, domains)
        names = domains or self.texts.domains
        self.read = 0
        if gate in ("counts", "features"):
            some = None if gate == "counts" else FEATURE_ROWS
            texts = {name: self.texts.train[name][:some] for name in [*names, "general"]}
            model.base_model.fit_gate(texts, texts.pop("general"), method=gate)
        elif gate.startswith("lm_"):
            model.base_model.set_stage("router" if self.kind == "lora" else "task")
            self.train(model, self.texts.of(self.texts.old), self.choices["gate"])
        return model

    def shared(self, parts: int = 1) -> Any:
        """The mixture under the counts gate, with one more adapter that reads all text under it, or a part of it."""
        folder = self.own / ("shared" if parts == 1 else f"shared_{parts}")
        rows = self.texts.of(self.texts.old)[::parts]
        if (folder / "adapter_config.json").exists():
            self.read = rows.numel()
            return PeftModel.from_pretrained(self.base(), folder).eval()
        model = self.gate("counts", shared=True)
        if self.kind == "bottleneck":
            model.base_model.set_stage("task")
        self.train(model, rows, self.choices["shared"])
        model.save_pretrained(folder)
        return model

    def add(self, model: Any, folder: str) -> Any:
        """The later domain comes into a mixture by the adapter in `folder` and its counted text."""
        verb = model.base_model.add_expert if self.kind == "lora" else model.base_model.add_domain
        verb(self.texts.later, str(self.own / folder))
        model.base_model.fit_gate({self.texts.later: self.texts.train[self.texts.later]})
        return model


# --- cells: name -> model and tokens read, or perplexities --------------------------------------------------------

Cell = Callable[[Trial], Any]


def base(trial: Trial) -> Any:
    return trial.base()


def own_adapters(trial: Trial) -> dict[str, float]:
    """What each domain's adapter does on its own text; general text is the base model's. Reads all domains' text."""
    tests = trial.texts.test
    found = {name: perplexities(trial.expert(name), {name: tests[name]})[name]
             for name in (*trial.texts.domains, trial.texts.later)}  # fmt: skip
    trial.read = trial.texts.of(trial.texts.domains).numel()
    return found | perplexities(trial.base(), {"general": tests["general"]})


def under(gate: str) -> Cell:
    return lambda trial: trial.gate(gate)


def posterior(trial: Trial) -> dict[str, float]:
    return by_posterior(trial, trial.gate("counts"))


def posterior_added(trial: Trial) -> dict[str, float]:
    return by_posterior(trial, added(trial))


def by_posterior(trial: Trial, model: Any) -> dict[str, float]:
    trial.adds = size(model)
    with model.base_model.posterior():
        return perplexities(model, trial.texts.test)


def joint(trial: Trial) -> Any:
    return trial.joint()


def joint_active(trial: Trial) -> Any:
    return trial.adapter("joint_active", trial.texts.old, "joint")


def shared(trial: Trial) -> Any:
    return trial.shared()


def joint_twice(trial: Trial) -> Any:
    return trial.adapter("joint_twice", trial.texts.old, "twice", len(trial.texts.domains) + 1, epochs=2)


def added(trial: Trial) -> Any:
    trial.expert(trial.texts.later)
    model = trial.add(trial.gate("counts"), trial.texts.later)
    trial.read = trial.texts.train[trial.texts.later].numel()
    return model


def added_warm(trial: Trial) -> Any:
    """The later domain's adapter begins as that of the nearest domain."""
    model = trial.going_on(trial.nearest())
    trial.train(model, trial.texts.train[trial.texts.later], trial.choices["expert"])
    model.save_pretrained(trial.own / "later_warm")
    model = trial.add(trial.gate("counts"), "later_warm")
    trial.read = trial.texts.train[trial.texts.later].numel()
    return model


def added_features(trial: Trial) -> Any:
    """Gates by features have to be fitted anew, on text of all domains."""
    return trial.gate("features", domains=[*trial.texts.domains, trial.texts.later])


def added_shared(trial: Trial) -> Any:
    trial.expert(trial.texts.later)
    model = trial.add(trial.shared(), trial.texts.later)
    trial.read = trial.texts.train[trial.texts.later].numel()
    return model


def joint_new_alone(trial: Trial) -> Any:
    trial.joint()
    new = trial.texts.train[trial.texts.later]
    return trial.train(trial.going_on("joint"), new, trial.choices["joint"])


def joint_replay(trial: Trial) -> Any:
    """The joint adapter goes on with the new text and as many rows of the old, drawn evenly."""
    trial.joint()
    texts = trial.texts
    new, share = texts.train[texts.later], len(texts.train[texts.later]) // len(texts.old)
    draw = torch.Generator().manual_seed(trial.seed)
    old = [rows[torch.randperm(len(rows), generator=draw)[:share]] for rows in map(texts.train.get, texts.old)]
    return trial.train(trial.going_on("joint"), torch.cat([new, *old]), trial.choices["joint"])


def joint_anew(trial: Trial) -> Any:
    texts = trial.texts
    return trial.adapter("joint_anew", [*texts.old, texts.later], "joint", len(texts.domains) + 1)


def removed(trial: Trial) -> Any:
    """The last of the first domains goes out of the mixture that has got one more."""
    model = added(trial)
    verb = model.base_model.remove_expert if trial.kind == "lora" else model.base_model.remove_domain
    verb(trial.texts.domains[-1])
    trial.read = 0
    return model


def shared_of(parts: int) -> Cell:
    return lambda trial: trial.shared(parts)


def first_shared(times: int, share: float, then: Cell) -> Cell:
    """One adapter, `times` as large as a domain's, reads all text first and becomes part of the base model; the
    domains' adapters, of `share` of their usual rank, learn on top of it, and `then` is made of them."""

    def cell(trial: Trial) -> dict[str, float]:
        first = trial.adapter("joint_active" if times == 1 else f"joint_{times}", trial.texts.old, "joint", times)
        read, adds = trial.read, size(first)
        after = copy.copy(trial)
        after.start, after.own = trial.own / f"base_shared_{times}", trial.own / f"after_shared_{times}"
        after.args = replace(trial.args, rank=max(1, round(share * trial.args.rank)))
        if not (after.start / "config.json").exists():
            first.merge_and_unload().save_pretrained(after.start)
        model = then(after)
        trial.read, trial.adds = read + after.read, adds + size(model)
        return perplexities(model, trial.texts.test)

    return cell


def counts_twice(trial: Trial) -> Any:
    """The domains' adapters read their text twice, and are as large together as the joint adapter that reads twice."""
    twice, texts = copy.copy(trial), trial.texts
    twice.own, twice.readings = trial.own / "twice", 2
    twice.args = replace(trial.args, rank=round(trial.args.rank * (1 + 1 / len(texts.domains))))
    model = twice.gate("counts")
    trial.read = texts.of(texts.domains).numel()
    return model


def product(trial: Trial) -> dict[str, float]:
    """Counts and features as a product of experts: at each gate its probabilities times those of counts."""
    counts, features = trial.gate("counts"), trial.gate("features")
    trial.read, trial.adds = 0, size(features)
    order = next(iter(features.base_model.mixtures().values())).router.arms
    found = {}
    for kind, rows in trial.texts.test.items():
        losses = []
        for part in rows.split(16):
            arms, prior = routing(counts, part)
            prior = prior.flatten(0, 1)[:, [arms.index(arm) for arm in order]]
            with features.base_model.pin_routes({"*": partial(times, prior, len(trial.texts.domains))}):
                losses.append(token_losses(features, part))
        found[kind] = math.exp(torch.cat(losses).mean().item())
    return found


def times(prior: Tensor, experts: int, decided: Any) -> Any:
    """What a gate has decided, times the prior (N, A) over its arms: the experts, then the frozen layer."""
    probs = decided.probs.float() * prior
    probs = probs / probs.sum(1, keepdim=True)
    return decided._replace(probs=probs, weights=probs[:, :experts].to(decided.weights.dtype))


def counts_few(trial: Trial) -> Any:
    """The gate has counted the first 24 rows of each kind alone: 3,072 tokens where rows have 128."""
    model = trial.mixture("counts")
    texts = {name: trial.texts.train[name][:24] for name in trial.texts.old}
    model.base_model.fit_gate(texts, texts.pop("general"))
    trial.read = 0
    return model


def phatgoose(trial: Trial) -> Any:
    """A gate vector for each domain, trained on its text with its own adapter alone."""
    model = trial.mixture("phatgoose")
    model.base_model.set_stage("router")
    for place, name in enumerate(trial.texts.domains):
        trial.train(model, trial.texts.train[name], trial.choices["phatgoose"], expert_ids=place)
    trial.read = trial.texts.of(trial.texts.domains).numel()
    return model


def xlora(trial: Trial) -> Any:
    """PEFT's own mixture: a classifier on the base model's last states, from a first pass, trained on all text."""
    for name in trial.texts.domains:
        trial.expert(name)
    base = trial.base()
    base.config.use_cache = False
    folders = {str(i): str(trial.own / name) for i, name in enumerate(trial.texts.domains)}  # it knows numbers alone
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=folders)
    return trial.train(get_peft_model(base, config), trial.texts.of(trial.texts.old), trial.choices["xlora"])


CELLS: dict[str, Cell] = {
    "base": base, "own": own_adapters, "counts": under("counts"), "joint": joint, "joint_active": joint_active,
    "added": added, "joint_anew": joint_anew, "joint_replay": joint_replay, "joint_new_alone": joint_new_alone,
    "removed": removed, "shared": shared, "joint_twice": joint_twice, "added_shared": added_shared,
    "features": under("features"), "uniform": under("uniform"), "lm_token": under("lm_token"),
    "lm_prefix": under("lm_prefix"), "added_warm": added_warm, "added_features": added_features,
    "posterior": posterior, "posterior_added": posterior_added, "shared_half": shared_of(2),
    "shared_quarter": shared_of(4), "shared_first": first_shared(1, 1, under("counts")),
    "shared_first_wide": first_shared(3, 0.5, under("counts")), "added_first_wide": first_shared(3, 0.5, added),
    "removed_first_wide": first_shared(3, 0.5, removed),
    "counts_twice": counts_twice, "product": product, "counts_few": counts_few,
    "arrow": under("arrow"), "arrow_prefix": under("arrow_prefix"), "phatgoose": phatgoose, "xlora": xlora,
}  # fmt: skip
FEWER = ("base", "own", "counts", "joint", "added", "removed", "shared", "joint_twice", "added_shared", "features",
         "uniform", "posterior")  # fmt: skip
MAIN = ("base", "own", "counts", "joint", "added", "joint_anew", "joint_new_alone", "removed", "shared", "joint_twice",
        "added_shared", "uniform")  # fmt: skip
# What may do more; run when it is asked for. A bottleneck cannot become part of the base model.
MORE = ("shared_half", "shared_quarter", "shared_first", "shared_first_wide", "added_first_wide",
        "removed_first_wide", "counts_twice", "product", "counts_few")  # fmt: skip
OTHERS = ("arrow", "arrow_prefix", "phatgoose", "xlora")  # how other systems route trained LoRA adapters
NAMED = {
    "usual": [cell for cell in CELLS if cell not in (*MORE, *OTHERS)], "fewer": FEWER, "main": MAIN, "more": MORE,
    "others": OTHERS,
}  # fmt: skip
# What is chosen where cells that begin so are run, and only there.
CHOSEN_FOR = {"gate": "lm_", "phatgoose": "phatgoose", "xlora": "xlora"}


# --- choices on dev text ------------------------------------------------------------------------------------------


def choose(args: Arguments, texts: Texts, kind: str) -> dict[str, float]:
    """Rates and the temperature of a kind, by dev perplexity with a seed of its own; kept in a file."""
    path = Path(args.out) / f"choices-{kind}.json"
    known = json.loads(path.read_text()) if path.exists() else {"settings": args.settings, "tried": {}, "chosen": {}}
    _refuse_other(path, known, args)
    chosen = known["chosen"]
    chosen.update(args.given)
    for what, values in args.choices(kind).items():
        wanted = what not in CHOSEN_FOR or any(cell.startswith(CHOSEN_FOR[what]) for cell in args.cells)
        if what not in chosen and wanted:
            if isinstance(values, str):
                chosen[what] = chosen[values]
            else:
                found = {str(value): _dev(args, texts, kind, what, value, chosen) for value in values}
                known["tried"][what] = found
                chosen[what] = float(min(found, key=lambda value: found[value]))
                print(f"{kind} {what}: {chosen[what]} of {found}", flush=True)
            path.write_text(json.dumps(known, indent=1))
    return chosen


def _dev(args: Arguments, texts: Texts, kind: str, what: str, value: float, chosen: dict[str, float]) -> float:
    """Geometric mean of the dev perplexities of the kinds of text that are read, `what` having this value."""
    trial = Trial(args, texts, kind, CHOOSING, {**chosen, what: value})
    if what == "expert":
        trial.own = trial.own / f"rate{value}"
        return mean([perplexities(trial.expert(name), {name: texts.dev[name]})[name] for name in texts.domains])
    if "expert" in chosen and what in ("gate", "shared", "temperature", *OTHERS):
        trial.own = trial.own / f"rate{chosen['expert']}"
    size_of = len(texts.domains)
    made: dict[str, Callable[[], Any]] = {
        "joint": lambda: trial.adapter(f"joint{value}", texts.old, "joint", size_of),
        "twice": lambda: trial.adapter(f"twice{value}", texts.old, "twice", size_of + 1, epochs=2),
        "shared": lambda: trial.train(trial.gate("counts", shared=True), texts.of(texts.old), value),
        "gate": lambda: trial.gate("lm_prefix"),
        "phatgoose": lambda: phatgoose(trial),
        "xlora": lambda: xlora(trial),
        "temperature": lambda: trial.gate("counts"),
    }
    return mean(list(perplexities(made[what](), {name: texts.dev[name] for name in texts.old}).values()))


# --- runs ---------------------------------------------------------------------------------------------------------


def _refuse_other(path: Path, found: dict[str, Any], args: Arguments) -> None:
    if found["settings"] != args.settings:
        raise ValueError(f"{path} is of {found['settings']}, not {args.settings}: choose another out")


def runs(args: Arguments, texts: Texts) -> Iterator[dict[str, Any]]:
    """The result of each cell, from its file where that is there already.

    Raises:
        ValueError: a file of other settings.
    """
    folder = Path(args.out) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds:
        for seed in args.seeds:
            for cell in [cell for cell in CELLS if cell in args.cells]:
                path = folder / f"{kind}-{cell}-{seed}.json"
                if path.exists():
                    found = json.loads(path.read_text())
                    _refuse_other(path, found, args)
                    yield found
                elif time.process_time() < 60 * args.cpu_minutes:
                    yield one(Trial(args, texts, kind, seed, choose(args, texts, kind)), cell, path)


def one(trial: Trial, cell: str, path: Path) -> dict[str, Any]:
    start = time.process_time()
    trial.base()
    model = CELLS[cell](trial)
    if not isinstance(model, dict):
        trial.adds, model = size(model), perplexities(model, trial.texts.test)
    result = {
        "kind": trial.kind, "cell": cell, "seed": trial.seed, "settings": trial.args.settings,
        "parameters": trial.adds, "tokens": trial.read, "perplexity": model,
        "cpu_seconds": time.process_time() - start,
    }  # fmt: skip
    path.with_suffix(".part").write_text(json.dumps(result))
    os.replace(path.with_suffix(".part"), path)
    old = math.exp(sum(math.log(model[name]) for name in trial.texts.domains) / len(trial.texts.domains))
    print(f"{trial.kind} {cell} {trial.seed}: {old:.1f} ({result['cpu_seconds']:.0f} s)", flush=True)
    return result


def main(args: Arguments) -> dict[str, Any]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    texts, out = Texts(args), Path(args.out)
    found = list(runs(args, texts))
    wanted = len(args.kinds) * len(args.seeds) * len(args.cells)
    cpu_minutes = sum(run["cpu_seconds"] for run in found) / 60
    kinds = {"domains": texts.domains, "later": texts.later, "removed": texts.domains[-1]}
    chosen = {kind: json.loads(path.read_text()) for kind in args.kinds
              if (path := out / f"choices-{kind}.json").exists()}  # fmt: skip
    made = {
        "settings": args.settings, **kinds, "choices": chosen, "runs": found, "missing": wanted - len(found),
        "cpu_minutes": cpu_minutes,
    }  # fmt: skip
    made["claims"], text = report(found, **kinds)
    (out / "results.json").write_text(json.dumps(made, indent=1))
    (out / "table.md").write_text(text)
    print(f"{text}\n{len(found)} of {wanted} cells, {cpu_minutes:.1f} CPU minutes without the choices")
    return made


if __name__ == "__main__":
    main(read_arguments(Arguments))
