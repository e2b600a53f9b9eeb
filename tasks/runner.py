"""Runs: one for each task, method and seed; each ends in a JSON file named by the hash of all that decides it."""

from __future__ import annotations

import copy
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PrinterCallback, Seq2SeqTrainer, set_seed
from transformers.trainer_utils import SaveStrategy

from mixadapters.core.folders import ADAPTER_FILE, check_saved
from mixadapters.core.routing import FROZEN
from mixadapters.tasks import baselines, checkpoints, domains, retention
from mixadapters.tasks.arguments import TrainArguments
from mixadapters.tasks.methods import HEAD, MIXTURES, UNTRAINED, Method, domain_layers, trainable, upper_layers
from mixadapters.tasks.metrics import score
from mixadapters.tasks.models import Base
from mixadapters.tasks.protocols import VERSION, Rows, select
from mixadapters.tasks.provenance import FORMAT, fingerprint, provenance
from mixadapters.tasks.registry import TASKS, Task, get_task
from mixadapters.tasks.results import check_writable, made_here, read_result, save_result
from mixadapters.tasks.run_arguments import RunArguments
from mixadapters.tasks.sources import Example, NotThere, check_source, read_task

SETUP = (  # arguments that decide how models train
    "model", "max_length", "pooling", "parameters", "layers", "rates", "full_rates", "head_rate", "domains",
    "stage1_steps", "stage1_batch", "stage1_rate", "max_new_tokens",
)  # fmt: skip
# What a Trainer asks of a model of transformers' own alone, which has no head or ranker of this package around it.
OF_MODELS = ("gradient_checkpointing", "neftune_noise_alpha")


class Diverged(ValueError):
    """A training that ended in weights or predictions that are no numbers."""


class TaskTrainer(Seq2SeqTrainer):
    """A new head learns at a rate of its own; generated text comes without its prompt."""

    head_rate: float
    optimizer: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = [(n.split("."), p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [
                {"params": [p for n, p in named if HEAD in n], "lr": self.head_rate},
                {"params": [p for n, p in named if HEAD not in n]},
            ]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls([g for g in groups if g["params"]], weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss, predicted, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if self.args.predict_with_generate and not self.model.config.is_encoder_decoder:
            predicted = predicted[:, inputs["input_ids"].shape[1] :]
        return loss, predicted, labels


class Runner:
    """All runs of one command, and what they share."""

    def __init__(self, args: RunArguments, training: TrainArguments) -> None:
        self.args, self.training, self.out = args, training, Path(args.out)
        self.failed = 0
        self.first = training.device is not None and training.process_index == 0  # `device` joins the processes
        self._folders: dict[tuple[str, str], str] = {}  # method, domain -> its adapter
        self._texts: dict[str, list[str]] = {}  # domain -> its unlabelled text
        self._counted: dict[str, list[list[int]]] = {}  # kind of text -> token ids that gates count

    def main(self) -> int:
        """Every run that has no result yet. Returns how many failed."""
        if not self.args.keep_going:
            for name in self.args.tasks:
                self._check(get_task(name))
        check_writable(self.out)
        for name in (*self.args.tasks, "domains", "trainer"):
            if os.path.lexists(self.out / name):
                check_writable(self.out / name)
        for name in self.args.tasks:
            self._guard(partial(self._task, get_task(name)), name)
        return self.failed

    def _check(self, task: Task) -> None:
        """Raises ValueError: files are missing, or the model cannot do the task by one of the methods."""
        check_source(task, self.args.data_dir)
        for name in self.args.methods:
            if name not in UNTRAINED:
                base = self.base(task)
                Method(name, self.args.parameters, self.args.layers, {}).check(base)
                if name in MIXTURES:
                    self.domain_names(base, name)
                    for given in self.args.domains:
                        check_saved("--domains", given.partition("=")[2], ADAPTER_FILE)

    def base(self, task: Task) -> Base:
        """The pretrained model as the task needs it. Raises ValueError: it cannot do it, or not at this length."""
        base = Base(str(self.args.model), task, self.args.pooling, self.args.max_length)
        base.check_length(self.args.max_new_tokens)
        for name in OF_MODELS:
            if base.form != "generate" and (value := getattr(self.training, name)):
                raise ValueError(
                    f"{name}={value!r} needs a model of transformers' own, and task {task.name!r} puts "
                    f"{'a head on' if base.form == 'head' else 'a ranker around'} model {base.path!r}; leave it out"
                )
        return base

    def _guard(self, work: Callable[[], None], name: str) -> None:
        try:
            work()
        except Exception as error:
            if not self.args.keep_going:
                raise
            self.failed += 1
            self.say(f"{name}: FAILED: {type(error).__name__}: {error}", file=sys.stderr)

    def say(self, *lines: str, **options: Any) -> None:
        """Print, in one of several processes."""
        if self.first:
            print(*lines, flush=True, **options)

    def _task(self, task: Task) -> None:
        a, splits = self.args, read_task(task, self.args.data_dir)
        seeds = a.seeds[:1] if a.dry_run else a.seeds
        for seed in seeds:
            rows = select(task, splits, seed, a.shots, a.shots_from, a.dev_rows, a.test_rows, a.train_rows)
            for method in a.methods:
                run = Run(self, task, rows, method, seed)
                self._guard(run.describe if a.dry_run else run.do, f"{task.name} {method} seed {seed}")

    @cached_property
    def general(self) -> list[str]:
        """General English; empty where the folder has none."""
        try:
            return domains.general(Path(self.args.data_dir or ""), random.Random(13))
        except NotThere as error:
            if self.args.data_dir:
                self.say(f"general text is left out: {error}")
            return []

    @cached_property
    def pairs(self) -> list[Example]:
        """Pairs of sentences with the scores of their similarity; empty where the folder has none."""
        try:
            return read_task(get_task("stsb"), Path(self.args.data_dir or ""), ("test",))["test"][:150]
        except NotThere:
            return []

    @cached_property
    def unseen(self) -> set[str]:
        """Keys of all sentences of dev and test of any task in the folder: domain adapters never read them."""
        found: set[str] = set()
        # By file: of a set in several, those that are there count.
        parts = [(task, split, name) for task in TASKS.values() for split in ("dev", "test")
                 for name in task.local.get(split, "").split()]  # fmt: skip
        for task, split, name in parts:
            try:
                examples = read_task(replace(task, local={split: name}), self.args.data_dir, (split,))[split]
            except NotThere:
                continue
            texts = (t for e in examples for t in e.texts)
            found.update(domains.key(s) for text in texts for s in domains.split_text(text))
        return found

    def domain_names(self, base: Base, method: str) -> tuple[str, ...]:
        """The domains that a method mixes. Raises ValueError: none are given, and none can be trained or counted."""
        instead = f"pass --domains name=folder, or take {MIXTURES[method]}"
        if self.args.domains:
            names = tuple(given.split("=", 1)[0] for given in self.args.domains)
            unknown = [name for name in names if name not in domains.UNLABELLED]
            if method == "moa" and (unknown or not self.general):
                raise ValueError(
                    f"domains={unknown or self.args.domains}: moa counts text of each domain and {len(self.general)} "
                    f"general texts of the folder, which has domains {', '.join(domains.UNLABELLED)}; name them so"
                )
            return names
        if base.config.is_encoder_decoder:
            raise ValueError(
                f"{method} trains domain adapters of encoders and of decoders, not of an encoder-decoder model_type="
                f"{base.config.model_type!r}; {instead}"
            )
        if not base.task.domain or not self.general:
            raise ValueError(
                f"{method} trains domain adapters on unlabelled text, and task {base.task.name!r} has domain="
                f"{base.task.domain!r} and {len(self.general)} general texts; {instead}"
            )
        return domains.domains_for(base.task.domain)

    def domains(self, base: Base, method: str) -> dict[str, str]:
        """Folders of the domain adapters of a task, trained unless given or there already."""
        names = self.domain_names(base, method)
        if self.args.domains:
            return dict(given.split("=", 1) for given in self.args.domains)
        for name in names:
            if (method, name) not in self._folders:
                self._folders[method, name] = self._domain(base, name, method)
        return {name: self._folders[method, name] for name in names}

    def unlabelled(self, name: str) -> list[str]:
        """Sentences of a domain without those of any dev or test set."""
        if name not in self._texts:
            folder = Path(str(self.args.data_dir))
            self._texts[name], _ = domains.unlabelled(folder, name, self.unseen, random.Random(13))
        return self._texts[name]

    def counted(self, base: Base, names: Iterable[str]) -> dict[str, list[list[int]]]:
        """Token ids of some text of each domain and of general text, for a gate that counts."""
        for name in (*names, FROZEN):
            if name not in self._counted:
                texts = self.general[: -domains.HELD_OUT] if name == FROZEN else self.unlabelled(name)
                some = random.Random(13).sample(texts, min(len(texts), domains.COUNTED))
                self._counted[name] = base.tokenizer(some, add_special_tokens=False)["input_ids"]
        return {name: self._counted[name] for name in (*names, FROZEN)}

    def _domain(self, base: Base, name: str, method: str) -> str:
        a, texts = self.args, self.unlabelled(name)
        depth = base.config.get_text_config().num_hidden_layers
        layers = domain_layers(depth, a.layers) if method == "mixda" else upper_layers(depth, a.layers)
        steps = [a.stage1_steps, a.stage1_batch, a.stage1_rate]
        decides = [FORMAT, a.model, layers, *steps, a.max_length, texts, self.general]
        decides += [] if method == "mixda" else [method, domains.RANK]
        folder = self.out / "domains" / f"{name}-{fingerprint(decides)}"
        if (folder / "adapter_config.json").is_file():
            return str(folder)
        set_seed(0)
        generates = base.form != "head"
        auto = AutoModelForCausalLM if generates else AutoModel
        config = domains.new_domain(method, name, layers, "CAUSAL_LM" if generates else None)
        model = get_peft_model(auto.from_pretrained(base.path, dtype=torch.float32), config)
        arguments = self.arguments(a.stage1_rate, 0, self.out / "trainer" / folder.name)
        arguments.max_steps, arguments.per_device_train_batch_size = a.stage1_steps, a.stage1_batch
        arguments.dataloader_drop_last = True
        # It would not go on as it was: what general text is shown is drawn by a generator of the collator's own.
        arguments.save_strategy = SaveStrategy.NO
        started = time.perf_counter()
        shown = self.general[: -domains.HELD_OUT]
        domains.train_domain(model, base.tokenizer, texts, shown, arguments, a.max_length, generates)
        if self.first:
            domains.save_whole(model, folder)
        PartialState().wait_for_everyone()
        self.say(f"stage 1, {name}: {a.stage1_steps} steps, {time.perf_counter() - started:.0f} s, {folder}")
        return str(folder)

    def arguments(self, rate: float, seed: int, folder: Path) -> TrainArguments:
        """TrainingArguments of one training."""
        arguments = copy.copy(self.training)
        arguments.learning_rate, arguments.seed, arguments.data_seed = rate, seed, seed
        arguments.output_dir = str(folder)
        return arguments


class Run:
    """One task, method and seed."""

    def __init__(self, runner: Runner, task: Task, rows: Rows, method: str, seed: int) -> None:
        self.runner, self.args, self.task, self.rows = runner, runner.args, task, rows
        self.method, self.seed = method, seed
        self.label = f"{task.name:>20} {Path(method).stem:>13}"
        # What all methods of a table have in common, and how models are trained: nothing for those that train none.
        self.protocol = {
            "task": task.name, "shots": self.args.shots, "shots_from": rows.shots_from, "draw": VERSION,
            "dev_rows": self.args.dev_rows, "test_rows": self.args.test_rows, "test": rows.digests["test"],
        }  # fmt: skip
        if self.args.train_rows is not None:
            self.protocol["train_rows"] = self.args.train_rows
        setup = {**{n: getattr(self.args, n) for n in SETUP}, "training": runner.training.changes()}
        self.setup: dict[str, Any] = {} if method in UNTRAINED else setup
        config = Path(method).read_text(encoding="utf-8") if method.endswith(".json") else ""
        decides = [FORMAT, self.protocol, self.setup, rows.digests, method, config, seed]
        self.file = runner.out / task.name / f"{Path(method).stem}-s{seed}-{fingerprint(decides)}.json"

    @cached_property
    def base(self) -> Base:
        return self.runner.base(self.task)

    @property
    def rates(self) -> list[float]:
        if self.method in ("frozen", "probe"):
            return [self.args.head_rate]
        return self.args.full_rates if self.method == "full" else self.args.rates

    def do(self) -> None:
        """Run unless there is a result, and write one."""
        with made_here(self.file, self.runner.first):
            if self.file.exists():
                try:
                    read_result(self.file)
                except ValueError as error:
                    self.runner.say(f"{self.label} seed {self.seed}: runs again: {error}")
                else:
                    self.runner.say(f"{self.label} seed {self.seed}: cached, {self.file}")
                    return
            self._make()

    def _make(self) -> None:
        """Run and write the result."""
        started = time.perf_counter()
        found = self._baseline() if self.method in UNTRAINED else self._train()
        gold = [e.target for e in self.rows.test]
        metrics = score(self.task, found["predictions"], gold)
        if not self.runner.first:
            return
        result = {
            "format": FORMAT, "task": self.task.name, "method": Path(self.method).stem, "seed": self.seed,
            "protocol": self.protocol, "setup": self.setup, "metrics": metrics,
            "rows": {split: len(getattr(self.rows, split)) for split in self.rows.digests},
            "digests": self.rows.digests, "left_out_for_standing_in_test": self.rows.leaked,
            "left_out_for_standing_in_dev": self.rows.shared, **found, "gold": gold,
            "seconds": round(time.perf_counter() - started, 1), **provenance(),
        }  # fmt: skip
        save_result(self.file, result)
        name, value = next(iter(metrics.items()))
        size, took = found["trainable_parameters"], result["seconds"]
        self.runner.say(f"{self.label} seed {self.seed}: {name} {value:.3f}, {size:,} parameters, {took:.0f} s")

    def _baseline(self) -> dict[str, Any]:
        # The most frequent class is that of all of train, also where few rows of each are drawn.
        train = self.rows.train if self.method == "tfidf" else self.rows.known
        predictions = baselines.predict(self.method, self.task, train, self.rows.test)
        return {"predictions": predictions, "trainable_parameters": 0, "head_parameters": 0}

    def _train(self) -> dict[str, Any]:
        """Train with each rate, keep the best on dev, and only that one meets test."""
        known = self.runner.domains(self.base, self.method) if self.method in MIXTURES else {}
        texts = self.runner.counted(self.base, known) if self.method == "moa" else {}
        method = Method(self.method, self.args.parameters, self.args.layers, known, texts)
        best: tuple[float, TaskTrainer, dict[str, Any]] | None = None
        candidates: list[dict[str, Any]] = []
        for rate in self.rates:
            newest = self._newest_checkpoint(rate)
            trainer, settings = self._trainer(method, rate)
            value = 0.0
            try:
                self._fit(trainer, newest)
                if len(self.rates) > 1:
                    value = self._on_dev(trainer)
                    candidates.append({"rate": rate, "dev": value})
            except Diverged as error:
                candidates.append({"rate": rate, "dev": None, "diverged": str(error)})
                if len(candidates) == len(self.rates) and best is None:
                    raise
                self.runner.say(f"{self.label} seed {self.seed}: rate {rate:g} is out: {error}")
                continue
            if best is None or value > best[0]:
                best = value, trainer, {**settings, "rate": rate}
        assert best is not None
        _, trainer, settings = best
        tuned = getattr(trainer.model, "lm", trainer.model)
        if self.args.keep_adapters and isinstance(tuned, PeftModel) and self.runner.first:
            tuned.save_pretrained(str(self.file.with_suffix("")))
        return {
            "predictions": self._predict(trainer, self.rows.test),
            "trainable_parameters": trainable(trainer.model),
            "head_parameters": trainable(trainer.model, head=True),
            "settings": settings,
            "candidates": candidates,
            "retention": self._retention(trainer.model),
        }

    def _folder(self, rate: float) -> Path:
        """Where a training has its checkpoints."""
        return self.runner.out / "trainer" / f"{self.file.stem}-{rate:g}"

    def _newest_checkpoint(self, rate: float) -> str | None:
        """The newest whole checkpoint of a training; others are removed."""
        newest, broken = checkpoints.newest_whole(self._folder(rate))
        for checkpoint, reason in broken.items():
            self.runner.say(f"{self.label} seed {self.seed}: {checkpoint} is not whole, removed: {reason}")
        checkpoints.drop(broken)
        if newest or broken:
            self.runner.say(
                f"{self.label} seed {self.seed}: goes on from {newest.name if newest else 'the beginning'}"
            )
        return str(newest) if newest else None

    def _fit(self, trainer: TaskTrainer, checkpoint: str | None) -> None:
        """Train, from a checkpoint where there is one. Raises Diverged."""
        if self.method == "frozen":
            return
        trainer.train(resume_from_checkpoint=checkpoint)
        odd = [n for n, p in trainer.model.named_parameters() if p.requires_grad and not p.isfinite().all()]
        if odd:
            raise Diverged(
                f"training at rate {trainer.args.learning_rate:g} ended in weights that are NaN or infinite, {odd[0]} "
                f"and {len(odd) - 1} others; pass lower rates"
            )

    def _on_dev(self, trainer: TaskTrainer) -> float:
        """The main metric on dev. Raises Diverged."""
        predictions = self._predict(trainer, self.rows.dev)
        return next(iter(score(self.task, predictions, [e.target for e in self.rows.dev]).values()))

    def _trainer(self, method: Method, rate: float) -> tuple[TaskTrainer, dict[str, Any]]:
        set_seed(self.seed)
        model, callbacks, settings = method.build(self.base)
        arguments = self.runner.arguments(rate, self.seed, self._folder(rate))
        arguments.predict_with_generate = self.base.form == "generate"
        trainer = TaskTrainer(
            model, arguments, train_dataset=self.base.features(self.rows.train, training=True),
            data_collator=self.base.collate, callbacks=[*callbacks, checkpoints.MarkCheckpoints()],
        )  # fmt: skip
        trainer.head_rate = self.args.head_rate
        trainer.remove_callback(PrinterCallback)  # a run is one line
        return trainer, settings

    def _predict(self, trainer: TaskTrainer, examples: Sequence[Example]) -> list[Any]:
        """Predictions in the order of `examples`; they go through the model sorted by length."""
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i].key))
        features = self.base.features([examples[i] for i in order], training=False)
        options: dict[str, Any] = {}
        if self.base.form == "generate":
            options = {"max_new_tokens": self.args.max_new_tokens, "do_sample": False,
                       "num_beams": trainer.args.generation_num_beams or 1}  # fmt: skip
        # Of several processes the last batches are filled up with the first rows.
        read = self._read(trainer.predict(features, **options).predictions)[: len(examples)]
        found = dict(zip(order, read, strict=True))
        return [found[i] for i in range(len(examples))]

    def _read(self, output: Any) -> list[Any]:
        """Predictions out of logits or of generated ids. Raises Diverged: logits are no numbers."""
        if self.base.form == "generate":
            ids = np.where(output < 0, self.base.tokenizer.pad_token_id, output)
            texts = self.base.tokenizer.batch_decode(ids, skip_special_tokens=True)
            return [next(iter(t.strip().splitlines()), "").strip() for t in texts]
        if odd := int((~np.isfinite(output)).reshape(len(output), -1).any(1).sum()):
            raise Diverged(
                f"{odd} of {len(output)} predictions are NaN or infinite and are not scored; pass lower rates, or "
                f"look at the weights of model {self.base.path!r}"
            )
        if self.task.kind == "regression":
            low, high = self.task.bounds
            return (low + (high - low) * output.reshape(-1).astype(float)).tolist()
        return output.argmax(-1).tolist()

    def _retention(self, model: nn.Module) -> dict[str, float] | None:
        """How far general text moved, and the similarity that an encoder still sees; a decoder's loss on it."""
        if not self.args.retention or not self.runner.general or self.base.config.is_encoder_decoder:
            return None
        texts, tokenizer, length = self.runner.general[-domains.HELD_OUT :], self.base.tokenizer, self.args.max_length
        before = untouched(self.base.path, self.base.form, length, tuple(texts))
        if self.base.form != "head":
            lm = getattr(model, "lm", model)
            found = {"token loss": retention.token_loss(lm, tokenizer, texts, length), "untouched": before}
        else:
            encoder = retention.Inside(model)
            found = {"drift": retention.drift(before, retention.embed(encoder, tokenizer, texts, length))}
            if self.runner.pairs:
                found["STS-B"] = retention.similarity(encoder, tokenizer, self.runner.pairs, length)
        if odd := [name for name, value in found.items() if not math.isfinite(value)]:
            self.runner.say(f"{self.label} seed {self.seed}: {', '.join(odd)} of general text is NaN or infinite")
        return {name: value for name, value in found.items() if name not in odd} or None

    def describe(self) -> None:
        """What would train, on how much, and how long that takes here: one step and one batch are timed."""
        sizes = ", ".join(f"{len(getattr(self.rows, split))} {split}" for split in self.rows.digests)
        if self.method in UNTRAINED:
            self.runner.say(f"{self.label}: {sizes} rows")
            return
        # Domain adapters that are still to be trained are stood for by new ones.
        new = dict.fromkeys(self.runner.domain_names(self.base, self.method), "") if self.method in MIXTURES else {}
        name = MIXTURES.get(self.method, self.method)
        trainer, settings = self._trainer(Method(name, self.args.parameters, self.args.layers, new), self.rates[0])
        model, args = trainer.model, trainer.args
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        per_epoch = -(-len(self.rows.train) // (args.train_batch_size * args.gradient_accumulation_steps))
        steps = (args.max_steps if args.max_steps > 0 else per_epoch * args.num_train_epochs) if names else 0
        part = self.rows.test[: args.eval_batch_size]
        time_each = seconds(lambda: self._predict(trainer, part)) * len(self.rows.test) / len(part)
        if steps:
            batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            step = seconds(lambda: trainer.model.train()(**batch).loss.backward())
            time_each += step * steps * args.gradient_accumulation_steps
        runs = len(self.args.seeds) * len(self.rates)
        head, whole = trainable(model, head=True), sum(p.numel() for p in model.parameters())
        self.runner.say(
            f"{self.label}: {sizes} rows; trains {trainable(model):,} parameters and {head:,} of a head, of "
            f"{whole:,}; {settings}; {steps:.0f} steps; {runs} x about {time_each:.0f} s",
            *briefly(names),
            sep="\n" + " " * 36,
        )


@cache
def untouched(path: str, form: str, max_length: int, texts: tuple[str, ...]) -> Any:
    """The pretrained model's embeddings of general text, or its loss on it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if form == "head":
        return retention.embed(AutoModel.from_pretrained(path), tokenizer, texts, max_length)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return retention.token_loss(AutoModelForCausalLM.from_pretrained(path), tokenizer, texts, max_length)


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes when it runs for the second time."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def briefly(names: Sequence[str]) -> list[str]:
    """Parameter names with layer numbers as `*`, each once."""
    return list(dict.fromkeys(".".join("*" if p.isdigit() else p for p in n.split(".")) for n in names))
