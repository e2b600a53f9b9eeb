"""A cascade and a composition on labelled sets: what a strong call buys, and what it is worth to know the domain.

    python examples/studies/choosing.py --data_dir DATA  # three seeds, about four CPU minutes
    python examples/studies/choosing.py --data_dir DATA --seeds 0 --rows 50 --eval_rows 20  # a first look

MiniLM reads sentiment in reviews of books, films, electronics and kitchen goods (Blitzer et al. 2007), and in SST-2.
Experts are LoRA adapters in the upper two of its six layers, each with its head: one for each of the four domains,
one for all four together (`joint`, on four times the rows), and one for SST-2. The layers below are frozen and run
once for each text. A weak expert is a logistic regression on the mean states after the first layer: a sixth of a
strong one.

cascade      weak, then strong where the weak one is not sure: on SST-2, and on the four domains, where the strong
             one is the joint adapter, which has read the same rows. The threshold is calibrated on the dev rows: to
             the strong expert's accuracy (`calibrated`), or to a share of strong calls.
composition  the domain of a review by a logistic regression on base states, then the adapter: the domain's own, or
             the one that does best on dev (`fit_mapping`), with one to four adapters in use.

Rates are those of the study of sentences; nothing was chosen on the seeds that are reported.

Expected, written before the run:

cascade      the strong expert's accuracy, within a point, at half of the strong calls, on both sets; at a quarter more
             than half of the gap. Calls at random buy in proportion.
composition  the router knows the domain of 85 to 90 % of the reviews. Routed is 1 to 3 points above the best single
             adapter, and within half a point of the true domain's adapter: reviews that are taken for another
             domain's are those where it matters little. With two adapters in use most of that is there. The joint
             adapter is ahead of all of them by a point or two, for sentiment is much the same everywhere and it has
             read four times as much.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sentences_corpus import minilm_path
from sklearn.linear_model import LogisticRegression
from study_arguments import check_numbers, read_arguments
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers import logging as transformers_logging

from mixadapters.serving import CompositionRouter, ConfidenceCascade, PooledStates, confidence, fit_mapping
from mixadapters.tasks.models import PooledHead
from mixadapters.tasks.registry import get_task
from mixadapters.tasks.report import t_interval
from mixadapters.tasks.sources import Example, read_task
from mixadapters.training.objectives import pool

SPLITS = ("train", "dev", "test")
DOMAINS = ("books", "dvd", "electronics", "kitchen")
SHARES = (0.1, 0.25, 0.5, 0.75)
WEAK_LAYERS, UPPER_LAYERS = 1, 2  # whose states a weak expert reads; where adapters are


@dataclass
class Arguments:
    """What to run. The defaults are the evaluation."""

    data_dir: str = field(metadata={"help": "Folder of published sets; see docs/tasks.md."})
    model: str | None = field(default=None, metadata={"help": "Encoder. Default: MiniLM of the extra `tasks`."})
    out: str = field(default="runs/choosing", metadata={"help": "Where results and tables go."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    rows: int = field(default=200, metadata={"help": "Training rows of each domain; of SST-2 three times as many."})
    eval_rows: int = field(
        default=200, metadata={"help": "Test rows of each domain, half as many for dev; SST-2: x 4."}
    )
    router_rows: int = field(default=100, metadata={"help": "Rows of each domain that the router learns from."})
    epochs: int = 2
    batch_size: int = 16
    max_length: int = 32
    rank: int = field(default=16, metadata={"help": "Of an adapter."})
    head_rate: float = 3e-2
    rate: float = 1e-3

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on."""
        return {name: value for name, value in vars(self).items() if name not in ("data_dir", "model", "out", "seeds")}


class Lookup(nn.Module):
    """States that are known, (N * T, d), in place of embeddings: `input_ids` number them."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.register_buffer("states", states, persistent=False)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.states[input_ids]


class Texts:
    """Texts of one split: their states after the frozen layers, and after the first of them."""

    def __init__(self, ids: Tensor, mask: Tensor, labels: Tensor) -> None:
        self.ids, self.mask, self.labels = ids, mask, labels
        self.states = torch.zeros(0)  # (N, T, d)
        self.first = torch.zeros(0)  # (N, d), the mean

    def __len__(self) -> int:
        return len(self.labels)

    @torch.no_grad()
    def read(self, encoder: nn.Module) -> Texts:
        parts = [encoder(input_ids=self.ids[rows], attention_mask=self.mask[rows], output_hidden_states=True)
                 for rows in torch.arange(len(self)).split(64)]  # fmt: skip
        self.states = torch.cat([part.hidden_states[-1] for part in parts])
        self.first = pool(torch.cat([part.hidden_states[WEAK_LAYERS] for part in parts]), self.mask, "mean")
        return self

    def part(self, rows: Any) -> Texts:
        found = Texts(self.ids[rows], self.mask[rows], self.labels[rows])
        found.states, found.first = self.states[rows], self.first[rows]
        return found

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        """Of one padded length."""
        found = cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "mask", "labels")))
        found.states, found.first = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("states", "first")
        )
        return found


class Experts:
    """The upper layers of one encoder with an adapter and a head for each name, trained one after another."""

    def __init__(self, path: str, names: Sequence[str], args: Arguments) -> None:
        self.args = args
        encoder = AutoModel.from_pretrained(path)
        encoder.encoder.layer = encoder.encoder.layer[-UPPER_LAYERS:]
        encoder.embeddings = Lookup(torch.zeros(0))
        config = LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules=["query", "value", "dense"],
            modules_to_save=["classifier"],
        )  # fmt: skip
        self.encoder = encoder
        self.model: Any = get_peft_model(PooledHead(encoder, 2), config, names[0])
        for name in names[1:]:
            self.model.add_adapter(name, config)

    def batch(self, texts: Texts, rows: Tensor) -> dict[str, Tensor]:
        """The rows of `texts`, whose states the encoder holds, without columns that are padding in all of them."""
        mask = texts.mask[rows]
        length = int(mask.sum(1).max())
        numbers = rows.unsqueeze(1) * texts.mask.shape[1] + torch.arange(length)
        return {"input_ids": numbers, "attention_mask": mask[:, :length]}

    def hold(self, texts: Texts) -> None:
        self.encoder.embeddings.states = texts.states.flatten(0, 1)

    def train(self, name: str, texts: Texts, seed: int) -> None:
        args, draw = self.args, torch.Generator().manual_seed(seed)
        self.hold(texts)
        self.model.set_adapter(name)
        self.model.train()
        named = [(key, p) for key, p in self.model.named_parameters() if p.requires_grad]
        assert all(f".{name}." in key for key, _ in named)
        heads = [p for key, p in named if "classifier" in key]
        adapters = [p for key, p in named if "classifier" not in key]
        groups = [{"params": heads, "lr": args.head_rate}, {"params": adapters, "lr": args.rate}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        steps = args.epochs * -(-len(texts) // args.batch_size)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(args.epochs):
            for rows in torch.randperm(len(texts), generator=draw).split(args.batch_size):
                loss = self.model(**self.batch(texts, rows), labels=texts.labels[rows]).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                falling.step()

    @torch.no_grad()
    def logits(self, name: str, texts: Texts) -> Tensor:
        """(N, 2) of one expert."""
        self.hold(texts)
        self.model.eval()
        self.model.set_adapter(name)
        return torch.cat([self.model(**self.batch(texts, rows)).logits for rows in torch.arange(len(texts)).split(64)])

    @torch.no_grad()
    def base_states(self, texts: Texts) -> Tensor:
        """(N, d), the mean of the base model's last states."""
        self.hold(texts)
        self.model.eval()
        with self.model.disable_adapter():
            parts = [(self.batch(texts, rows), rows) for rows in torch.arange(len(texts)).split(64)]
            return torch.cat(
                [pool(self.encoder(**b).last_hidden_state, b["attention_mask"], "mean") for b, _ in parts]
            )


class Study:
    def __init__(self, args: Arguments) -> None:
        self.args, self.path = args, args.model or minilm_path()
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.trunk = AutoModel.from_pretrained(self.path).eval()
        self.trunk.encoder.layer = self.trunk.encoder.layer[:-UPPER_LAYERS]
        self.fixed: dict[tuple[str, str], Texts] = {}  # dev and test rows are those of all seeds

    def draw(self, task: str, seed: int, train: int, evaluation: int) -> dict[str, Texts]:
        """Train, dev and test rows of a task. Where it has no dev rows, they are the last of its train rows."""
        found = read_task(get_task(task), self.args.data_dir)
        dev = found.get("dev", found["train"][-(evaluation // 2) :])
        rest = found["train"] if "dev" in found else found["train"][: -(evaluation // 2)]
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
        texts = {"train": self.read([rest[i] for i in order[:train]])}
        for split, rows in (("dev", dev[: evaluation // 2]), ("test", found["test"][:evaluation])):
            if (task, split) not in self.fixed:
                self.fixed[task, split] = self.read(rows)
            texts[split] = self.fixed[task, split]
        return texts

    def read(self, rows: Sequence[Example]) -> Texts:
        tokens = self.tokenizer(
            [row.texts[0] for row in rows], truncation=True, max_length=self.args.max_length, padding="max_length",
            return_tensors="pt",
        )  # fmt: skip
        labels = torch.tensor([row.target for row in rows])
        return Texts(tokens["input_ids"], tokens["attention_mask"], labels).read(self.trunk)

    def run(self, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        args, start = self.args, time.process_time()
        sets = {domain: self.draw(f"sentiment_{domain}", seed, args.rows, args.eval_rows) for domain in DOMAINS}
        sst2 = self.draw("sst2", seed, 3 * args.rows, 4 * args.eval_rows)
        whole = {
            split: Texts.joined([sets[domain][split] for domain in DOMAINS]) for split in ("train", "dev", "test")
        }
        experts = Experts(self.path, (*DOMAINS, "joint", "sst2"), args)
        for domain in DOMAINS:
            experts.train(domain, sets[domain]["train"], seed)
        experts.train("joint", whole["train"], seed)
        experts.train("sst2", sst2["train"], seed)
        logits = {
            split: {name: experts.logits(name, whole[split]) for name in (*DOMAINS, "joint")}
            for split in ("dev", "test")
        }
        strong = {split: experts.logits("sst2", sst2[split]) for split in ("dev", "test")}
        return {
            "seed": seed, "settings": args.settings,
            "composition": self.compose(experts, sets, whole, logits),
            "cascades": {
                "four domains": cascade(whole, {split: logits[split]["joint"] for split in ("dev", "test")}),
                "SST-2": cascade(sst2, strong),
            },
            "cpu_seconds": time.process_time() - start,
        }  # fmt: skip

    def compose(
        self, experts: Experts, sets: dict[str, dict[str, Texts]], whole: dict[str, Texts],
        logits: dict[str, dict[str, Tensor]],
    ) -> dict[str, Any]:  # fmt: skip
        """Test accuracies of what composition may do, and how often the router is right."""
        rows = self.args.router_rows
        learned = Texts.joined([sets[domain]["train"].part(slice(rows)) for domain in DOMAINS])
        names = [domain for domain in DOMAINS for _ in range(len(sets[domain]["train"].part(slice(rows))))]
        router = CompositionRouter(PooledStates(self.trunk))
        router.fit_features(experts.base_states(learned), names)
        true = {split: [domain for domain in DOMAINS for _ in sets[domain][split].labels] for split in ("dev", "test")}
        found = router.choose(experts.base_states(whole["test"]))
        count = len(found)

        def accuracy(chosen: Sequence[str]) -> float:
            return accuracy_of(pick(logits["test"], chosen), whole["test"])

        right = {name: (logits["dev"][name].argmax(1) == whole["dev"].labels).double() for name in DOMAINS}
        where = {domain: torch.tensor([one == domain for one in true["dev"]]) for domain in DOMAINS}
        scores = {d: {name: right[name][where[d]].mean().item() for name in DOMAINS} for d in DOMAINS}
        single = max(DOMAINS, key=lambda name: right[name].mean().item())
        result = {
            "best single adapter": accuracy([single] * count),
            "routed to the domain's own": accuracy(found),
            "true domain's own": accuracy(true["test"]),
            "mean of the four": accuracy_of(sum(logits["test"][d].softmax(-1) for d in DOMAINS), whole["test"]),
            "joint adapter": accuracy(["joint"] * count),
        }
        for kept in range(1, len(DOMAINS) + 1):
            mapping = fit_mapping(scores, dict.fromkeys(DOMAINS, 1.0), total=float(kept))
            result[f"fitted, {kept} in use"] = accuracy([mapping[name] for name in found])
        knows = sum(a == b for a, b in zip(found, true["test"], strict=True)) / count
        return {"accuracy": result, "router": knows}


def pick(logits: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """(N, 2) row by row of the expert that is named for it."""
    return torch.stack([logits[name][row] for row, name in enumerate(names)])


def accuracy_of(logits: Any, texts: Texts) -> float:
    return (logits.argmax(1) == texts.labels).double().mean().item()


class Table(nn.Module):
    """An expert whose logits are known: rows -> (N, 2)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.known = logits

    def forward(self, rows: Tensor) -> Tensor:
        return self.known[rows]


def cascade(texts: dict[str, Texts], strong: dict[str, Tensor]) -> dict[str, Any]:
    """Test accuracy and share of strong calls, thresholds by the dev rows. strong: logits by split."""
    train, dev, test = (texts[split] for split in ("train", "dev", "test"))
    model = LogisticRegression(max_iter=1000).fit(train.first.numpy(), train.labels.numpy())
    weak = {s: torch.from_numpy(model.predict_log_proba(texts[s].first.numpy())).float() for s in ("dev", "test")}
    found = {"weak": accuracy_of(weak["test"], test), "strong": accuracy_of(strong["test"], test)}
    sure = confidence(weak["dev"])
    right = [logits["dev"].argmax(1) == dev.labels for logits in (weak, strong)]
    points: dict[str, Any] = {}
    for name, share in {"calibrated": None, **{f"{share:.0%}": share for share in SHARES}}.items():
        run = ConfidenceCascade(Table(weak["test"]), Table(strong["test"]))
        if share is None:
            run.calibrate(sure, *right)
        else:  # so many calls, whether or not fewer would do better on dev
            fitting = [point for point in run.curve(sure, *right) if point.strong_share <= share]
            run.threshold = fitting[-1].threshold
        output = run.classify({"rows": torch.arange(len(test))})
        at_random = found["weak"] + run.strong_share * (found["strong"] - found["weak"])
        points[name] = {
            "accuracy": accuracy_of(output.logits, test), "strong_share": run.strong_share, "at_random": at_random,
        }  # fmt: skip
    return {**found, "points": points}


# --- tables -------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.3f} ± {deviation:.3f}"


def paired(values: Sequence[float]) -> str:
    interval = t_interval(values)
    return f"{statistics.mean(values):+.3f}" + (f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else "")


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Means and deviations over seeds; differences are paired by seed, with 95 % intervals."""
    lines = ["| set | | strong calls | accuracy | at random | less the strong expert's |", "|---|---|---|---|---|---|"]
    for name in results[0]["cascades"]:
        runs = [result["cascades"][name] for result in results]
        for end, share in (("weak", 0.0), ("strong", 1.0)):
            gaps = [run[end] - run["strong"] for run in runs]
            lines.append(
                f"| {name} | {end} | {share:.2f} | {spread([run[end] for run in runs])} | - | {paired(gaps)} |"
            )
        for point in runs[0]["points"]:
            at = [run["points"][point] for run in runs]
            gaps = [one["accuracy"] - run["strong"] for one, run in zip(at, runs, strict=True)]
            lines.append(
                f"| {name} | {point} | {spread([one['strong_share'] for one in at])} "
                f"| {spread([one['accuracy'] for one in at])} | {spread([one['at_random'] for one in at])} "
                f"| {paired(gaps)} |"
            )
    lines += ["", "| four domains | accuracy | less the best single adapter's |", "|---|---|---|"]
    for name in results[0]["composition"]["accuracy"]:
        values = [result["composition"]["accuracy"] for result in results]
        gaps = [value[name] - value["best single adapter"] for value in values]
        lines.append(f"| {name} | {spread([value[name] for value in values])} | {paired(gaps)} |")
    knows = spread([result["composition"]["router"] for result in results])
    minutes = sum(result["cpu_seconds"] for result in results) / 60
    return "\n".join(lines) + f"\n\nThe router knows the domain of {knows}. {minutes:.1f} CPU minutes."


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(Arguments, argv)
    transformers_logging.set_verbosity_error()
    study, folder = Study(args), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in args.seeds:
        path = folder / f"seed{seed}.json"
        if path.exists():
            result = json.loads(path.read_text())
            if result["settings"] != args.settings:
                raise SystemExit(f"{path} is of {result['settings']}, not {args.settings}: choose another --out")
        else:
            result = study.run(seed)
            path.write_text(json.dumps(result, indent=2))
        results.append(result)
        print(f"seed {seed}: {result['composition']['accuracy']}", flush=True)
    table = tables(results)
    (folder / "table.md").write_text(table + "\n")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
