"""Guidance distillation on a CPU: a small diffusion transformer on scikit-learn's digits, guided in one pass.

    python examples/studies/agd_digits.py  # all arms, three seeds: about an hour
    python examples/studies/agd_digits.py --arms film --seeds 0 --samples 200  # a first look

Trains a class-conditional DiT of diffusers, stopped early enough that it needs guidance; records trajectories of its
classifier-free guidance (CFG); distils them into adapters of each kind, from several kinds of states, and into the
whole model; and compares all of them with CFG from the same starting noise. Writes results.json, table.md and
samples.png.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from peft import get_peft_model
from sklearn.datasets import load_digits
from study_arguments import check_numbers, read_arguments
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments, set_seed
from transformers import logging as transformers_logging

from mixadapters import AGDConfig, StageCallback
from mixadapters.tuners.agd import (
    GuidanceDistillation,
    Trajectories,
    TrajectoryCollator,
    TrajectoryPlan,
    denoiser,
    guided,
    record,
    sample,
)

NULL = 10  # the class that stands for none
SHAPE = (1, 8, 8)
SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)
# arm -> (kind of adapter, states it is trained on); "whole": all weights of the model train as well
ARMS = {
    "film": ("film", "guided"),
    "film_standard": ("film", "standard"),
    "cross_attention": ("cross_attention", "guided"),
    "film_mixed": ("film", "mixed"),
    "offset": ("offset", "guided"),
    "whole": ("offset", "guided"),
    "film_mixed_real": ("film", "mixed_real"),
}
HEADLINE = "film"
MORE_WIDTH = {"cross_attention": 1}  # no fewer parameters than film


@dataclass
class Arguments:
    """What to run. The defaults are the evaluation."""

    out: str = field(default="runs/agd_digits", metadata={"help": "Where results, table and pictures go."})
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    samples: int = field(default=1000, metadata={"help": "Samples per guidance scale and seed."})
    base_steps: int = field(default=3500, metadata={"help": "Steps of the base model, of a schedule for 8000."})
    steps: int = field(default=2500, metadata={"help": "Steps of distillation."})
    trajectories: int = field(default=640, metadata={"help": "Recorded trajectories, of 50 states each."})
    width: int = field(default=32, metadata={"help": "`r` of the adapters."})
    rate: float = field(default=2e-3, metadata={"help": "Learning rate of adapters."})
    whole_rate: float = field(default=1e-3, metadata={"help": "Learning rate where the whole model trains."})
    judge_epochs: int = 25
    timing_rounds: int = 40

    def __post_init__(self) -> None:
        check_numbers(self)


# --- data, base model, judge --------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) in -1 ... 1 and labels: 1437 to train, 360 to test."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)[order]
    y = torch.tensor(data.target)[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing="trailing"
    )


def new_dit() -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=3, num_attention_heads=4,
        attention_head_dim=16, num_embeds_ada_norm=NULL,
    )  # fmt: skip
    for block in model.transformer_blocks:  # DiT's start: every block the identity
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # it would drop labels in each block on its own
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def train_base(steps: int) -> DiTTransformer2DModel:
    """The moving average of a DiT after `steps`, well before its schedule of 8000 ends: it still needs guidance."""
    torch.manual_seed(0)
    x, y, _, _ = digits()
    model, noising = new_dit(), scheduler()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    for step in range(1, steps + 1):
        rate = 1e-3 * min(1, step / 200) * (0.5 + 0.5 * math.cos(math.pi * step / 8000))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(0, len(x), (64,))
        labels = torch.where(torch.rand(64) < 0.1, NULL, y[rows])
        t, noise = torch.randint(0, 1000, (64,)), torch.randn(64, *SHAPE)
        predicted = model(noising.add_noise(x[rows], noise, t), timestep=t, class_labels=labels).sample
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new.detach(), 0.002)
    return average.eval()


class Judge(nn.Module):
    """A small convolutional classifier; its 64 features are what Frechet distances are measured in."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.25), nn.Linear(1024, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x.clamp(-1, 1))
        return self.head(features), features


def train_judge(epochs: int) -> tuple[Judge, float]:
    """A judge, and its accuracy on the test digits."""
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 1e-3, weight_decay=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(judge(x[rows] + 0.05 * torch.randn_like(x[rows]))[0], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    judge.eval().requires_grad_(False)
    return judge, (judge(x_test)[0].argmax(1) == y_test).float().mean().item()


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features (N, d), as normal distributions."""
    first, second = a.double(), b.double()
    values, vectors = torch.linalg.eigh(first.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # tr sqrt(A B) by the eigenvalues of a symmetric matrix: A and B are singular where features never fire.
    cross = torch.linalg.eigvalsh(root @ second.T.cov() @ root).clamp(min=0).sqrt().sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    return (means + values.sum() + second.T.cov().trace() - 2 * cross).item()


# --- states to train on -------------------------------------------------------------------------------------------


def labels_of(rows: int) -> dict[str, Tensor]:
    return {"class_labels": torch.arange(rows) % 10}


def recorded(base: nn.Module, count: int, seed: int) -> Trajectories:
    """States of guided sampling itself."""
    plan = TrajectoryPlan(SHAPE, scales=(1.0, 6.0), steps=50, batch_size=160, seed=seed, dtype="float32")
    null = {"class_labels": torch.tensor([NULL])}
    return record(denoiser(base), scheduler(), labels_of(count), null, plan)


def noised(base: nn.Module, images: Tensor, labels: Tensor, info: dict[str, Any], seed: int) -> Trajectories:
    """As many states from `images` (N, 1, 8, 8) as N trajectories of 50 steps, with targets of the guided one."""
    generator = torch.Generator().manual_seed(seed)
    noising = scheduler()
    noising.set_timesteps(50)
    null = {"class_labels": torch.tensor([NULL])}
    states: dict[str, list[Tensor]] = {"sample": [], "target": [], "timestep": [], "guidance_scale": []}
    for t in noising.timesteps:
        timestep = t.expand(len(images))
        scale = 1 + 5 * torch.rand(len(images), generator=generator)
        x = noising.add_noise(images, torch.randn(images.shape, generator=generator), timestep)
        with torch.no_grad():
            target = guided(denoiser(base), {"class_labels": labels}, null, scale)(x, timestep)
        for store, value in zip(states.values(), (x, target, timestep.float(), scale), strict=True):
            store.append(value)
    shard = {name: torch.stack(values, 1) for name, values in states.items()}
    return Trajectories([{**shard, "condition.class_labels": labels}], info)


def states(base: nn.Module, kind: str, count: int, seed: int) -> Trajectories:
    """guided; standard: noised real images; mixed: half guided, half noised samples of the guided model (which needs
    no data); mixed_real: half guided, half noised real images."""
    if kind == "guided":
        return recorded(base, count, seed)
    if kind.startswith("mixed"):
        half = recorded(base, count // 2, seed)
        other = states(base, "standard" if kind == "mixed_real" else "renoised", count // 2, seed)
        return Trajectories(half.shards + other.shards, half.info)
    info = {"plan": {"scales": (1.0, 6.0)}, "states": kind}
    generator = torch.Generator().manual_seed(seed + 7)
    if kind == "standard":
        x, y, _, _ = digits()
        rows = torch.randint(0, len(x), (count,), generator=generator)
        return noised(base, x[rows], y[rows], info, seed)
    labels = labels_of(count)
    scale = 1 + 5 * torch.rand(count, generator=generator)
    step = guided(denoiser(base), labels, {"class_labels": torch.tensor([NULL])}, scale)
    images = sample(step, scheduler(), torch.randn(count, *SHAPE, generator=generator), 50)
    return noised(base, images, labels["class_labels"], info, seed)


# --- distillation -------------------------------------------------------------------------------------------------


def distil(base: nn.Module, arm: str, data: Trajectories, args: Arguments, seed: int) -> nn.Module:
    set_seed(seed)
    kind, whole = ARMS[arm][0], arm == "whole"
    width = args.width + MORE_WIDTH.get(arm, 0)
    fields = {**data.config_fields, "gate": not whole}  # a model that trains as a whole is no base at w = 1 anyway
    model = get_peft_model(copy.deepcopy(base), AGDConfig(kind=kind, r=width, **fields))
    if whole:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(Path(args.out) / "trainer"), max_steps=args.steps, per_device_train_batch_size=64,
            learning_rate=args.whole_rate if whole else args.rate, lr_scheduler_type="cosine",
            warmup_steps=math.ceil(0.05 * args.steps), weight_decay=0.0, max_grad_norm=0.0, seed=seed,
            remove_unused_columns=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=data,
        data_collator=TrajectoryCollator(model),
        callbacks=[StageCallback("distill", objectives=[GuidanceDistillation()])],
    )  # fmt: skip
    trainer.train()
    return model.eval()


# --- evaluation ---------------------------------------------------------------------------------------------------


class Counter:
    """Counts the rows that a model is run on."""

    def __init__(self, model: nn.Module) -> None:
        self.rows = 0
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.rows += len(args[0])


@dataclass
class Teacher:
    """What the guided base does at one guidance scale from one set of noise."""

    scale: Tensor  # (N,)
    states: list[tuple[Tensor, Tensor, Tensor]]  # x, timestep, prediction at each step
    images: Tensor
    features: Tensor
    unguided: float  # sum of squares of unguided minus guided predictions
    passes: float  # network evaluations per sample


class Evaluation:
    """One seed: noise and labels that nothing was trained on, and the teachers' answers to them."""

    def __init__(self, base: nn.Module, judge: Judge, count: int, seed: int, steps: int = 25) -> None:
        self.judge, self.steps, self.base = judge, steps, base
        self.labels = labels_of(count)
        self.noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(10_000 + seed))
        x, _, x_test, _ = digits()
        self.real = judge(torch.cat([x, x_test]))[1]
        self.base_images = self.roll_out(self.step_of(base))
        self.teachers = {w: self.teach(torch.full((count,), w)) for w in SCALES}

    def step_of(self, model: nn.Module, scale: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        predict = denoiser(model)
        conditions = self.labels if scale is None else {**self.labels, "guidance_scale": scale}

        def step(x: Tensor, timestep: Tensor) -> Tensor:
            return predict(x, timestep, conditions)

        return step

    def roll_out(self, step: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Tensor:
        return sample(step, scheduler(), self.noise, self.steps, **options)

    @torch.no_grad()
    def teach(self, scale: Tensor) -> Teacher:
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        counter = Counter(self.base)
        step = guided(denoiser(self.base), self.labels, {"class_labels": torch.tensor([NULL])}, scale)
        images = self.roll_out(step, visit=lambda i, x, t, prediction: seen.append((x, t, prediction)))
        counter.handle.remove()
        plain = self.step_of(self.base)
        unguided = sum((plain(x, t) - target).square().sum().item() for x, t, target in seen)
        features = self.judge(images)[1]
        return Teacher(scale, seen, images, features, unguided, counter.rows / len(scale))

    def quality(self, images: Tensor, teacher: Teacher) -> dict[str, float]:
        logits, features = self.judge(images)
        away = (images - teacher.images).square().mean().sqrt()
        unguided = (self.base_images - teacher.images).square().mean().sqrt()
        return {
            "E": (away / unguided).item(),
            "accuracy": (logits.argmax(1) == self.labels["class_labels"]).float().mean().item(),
            "fd_teacher": frechet(features, teacher.features),
            "fd_real": frechet(features, self.real),
        }

    def references(self) -> dict[str, Any]:
        """CFG and the base without guidance."""
        found: dict[str, Any] = {"cfg": {}, "base": {}}
        for w, teacher in self.teachers.items():
            found["cfg"][w] = {"R": 0.0, **self.quality(teacher.images, teacher), "passes": teacher.passes}
            base = self.quality(self.base_images, teacher)
            found["base"][w] = {"R": 1.0, **base, "passes": float(self.steps)}
        return found

    @torch.no_grad()
    def student(self, model: nn.Module) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        root = model.get_base_model()
        for w, teacher in self.teachers.items():
            step = self.step_of(model, teacher.scale)
            error = sum((step(x, t) - target).square().sum().item() for x, t, target in teacher.states)
            counter = Counter(root)
            images = self.roll_out(step)
            counter.handle.remove()
            passes = counter.rows / len(images)
            found[w] = {"R": error / teacher.unguided, **self.quality(images, teacher), "passes": passes}
        x, timestep = self.noise, torch.full((len(self.noise),), 500)
        guided_by_one = self.step_of(model, torch.ones(len(x)))(x, timestep)
        found["base_at_one"] = torch.equal(guided_by_one, self.step_of(self.base)(x, timestep))
        return found


def time_steps(base: nn.Module, student: nn.Module, rounds: int, rows: int = 200, steps: int = 25) -> dict[str, float]:
    """Seconds per image of `steps` steps on one thread: medians of steps that take turns, so that load strikes all
    alike. Of several threads, those that wait would count."""
    x, timestep = torch.randn(rows, *SHAPE), torch.full((rows,), 500)
    labels, scale = labels_of(rows), torch.full((rows,), 3.0)
    plain, one_pass = denoiser(base), denoiser(student)
    ways: dict[str, Callable[[], Tensor]] = {
        "base": lambda: plain(x, timestep, labels),
        "cfg": lambda: guided(plain, labels, {"class_labels": torch.tensor([NULL])}, scale)(x, timestep),
        "film": lambda: one_pass(x, timestep, {**labels, "guidance_scale": scale}),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    products = {name: products_of(run) for name, run in ways.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for turn in range(rounds + 3):
            for name, run in ways.items():
                start = time.thread_time()
                run()
                if turn >= 3:
                    times[name].append(time.thread_time() - start)
    torch.set_num_threads(threads)
    middle = {name: statistics.median(values) * steps / rows for name, values in times.items()}
    ratios = [c / s for c, s in zip(times["cfg"], times["film"], strict=True)]
    return {
        **middle, "ratio": middle["cfg"] / middle["film"], "median_of_ratios": statistics.median(ratios),
        "ratio_by_arithmetic": products["cfg"] / products["film"],
    }  # fmt: skip


def products_of(run: Callable[[], Tensor]) -> int:
    """Floating-point operations of the matrix products and convolutions of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def other_samplers(base: nn.Module, student: nn.Module, evaluation: Evaluation, w: float = 3.0) -> dict[str, float]:
    """E under samplers and numbers of steps that the adapter was not trained with."""
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "trailing"}
    noise, labels = evaluation.noise[:500], labels_of(500)
    scale = torch.full((len(noise),), w)
    labels = {name: value[: len(noise)] for name, value in labels.items()}
    teacher = guided(denoiser(base), labels, {"class_labels": torch.tensor([NULL])}, scale)
    plain, one_pass = denoiser(base), denoiser(student)
    found = {}
    for name, scheme, steps in (
        ("DDIM, 10 steps", scheduler(), 10),
        ("DDIM, 50 steps", scheduler(), 50),
        ("Euler, 25 steps", EulerDiscreteScheduler(**betas), 25),
        ("DPM-Solver++, 15 steps", DPMSolverMultistepScheduler(**betas), 15),
    ):
        wanted, base_images, images = (
            sample(step, scheme, noise, steps)
            for step in (
                teacher,
                lambda x, t: plain(x, t, labels),
                lambda x, t: one_pass(x, t, {**labels, "guidance_scale": scale}),
            )
        )
        found[name] = ((images - wanted).square().mean() / (base_images - wanted).square().mean()).sqrt().item()
    return found


# --- report -------------------------------------------------------------------------------------------------------

KEYS = ("R", "E", "accuracy", "fd_teacher", "fd_real", "passes")


def averages(runs: list[dict[str, Any]]) -> dict[str, dict[float, dict[str, float]]]:
    """arm -> scale -> means over seeds."""
    found: dict[str, dict[float, dict[str, float]]] = {}
    for arm in dict.fromkeys(name for run in runs for name in run["arms"]):
        mine = [run["arms"][arm] for run in runs if arm in run["arms"]]
        found[arm] = {w: {k: statistics.fmean(run[w][k] for run in mine) for k in KEYS} for w in SCALES}
    return found


def thresholds(report: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """(what is asked, whether it is met by the means over seeds, the figures), for the arms that were run."""
    a, found = averages(report["runs"]), []

    def ask(what: str, met: bool, *figures: float) -> None:
        found.append((what, bool(met), " ".join(f"{x:.3g}" for x in figures)))

    adapters = [name for name in a if name not in ("cfg", "base", "whole")]
    exact = [run["arms"][n]["base_at_one"] for run in report["runs"] for n in adapters if n in run["arms"]]
    ask("1. w = 1 is the base bit for bit, all adapters", all(exact), len(exact))
    film, cfg, base = a[HEADLINE], a["cfg"], a["base"]
    errors = [film[w]["R"] for w in SCALES]
    ask("2. R <= 0.22 at w <= 4, <= 0.27 at 6", max(errors[:-1]) <= 0.22 and errors[-1] <= 0.27, *errors)
    errors = [film[w]["E"] for w in SCALES]
    ask("3. E <= 0.33 at w <= 4, <= 0.38 at 6", max(errors[:-1]) <= 0.33 and errors[-1] <= 0.38, *errors)
    shares = [film[w]["fd_teacher"] / base[w]["fd_teacher"] for w in SCALES]
    ask("4. distance to the teacher's samples <= 3 % of the base's", max(shares) <= 0.03, *shares)
    short = [100 * (cfg[w]["accuracy"] - film[w]["accuracy"]) for w in SCALES]
    gain = 100 * (film[1.5]["accuracy"] - base[1.5]["accuracy"])
    room = 100 * (cfg[1.5]["accuracy"] - base[1.5]["accuracy"])
    close = short[0] <= 2 and max(short[1:]) <= 1
    ask("5a. accuracy: at most 2 points below CFG at w = 1.5, 1 above it", close, *short)
    ask("5b. at w = 1.5, 6 points above the base, which leaves 8", gain >= 6 and room >= 8, gain, room)
    halves = all(2 * film[w]["passes"] == cfg[w]["passes"] for w in SCALES)
    ask("6a. half the network evaluations", halves, film[3.0]["passes"], cfg[3.0]["passes"])
    ratio = report["seconds_per_image"]["ratio"]
    ask("6b. time: CFG / adapters >= 1.6 (goal 1.9)", ratio >= 1.6, ratio)
    if "film_standard" in a:
        other = a["film_standard"]
        for w, bounds in ((4.0, {"R": 0.75, "fd_teacher": 0.6}), (6.0, {"R": 0.65, "E": 0.88, "fd_teacher": 0.4})):
            shares = [film[w][k] / other[w][k] for k in bounds]
            names = ", ".join(f"{k} <= {bound}" for k, bound in bounds.items())
            met = all(s <= bound for s, bound in zip(shares, bounds.values(), strict=True))
            ask(f"7. guided / standard states at w = {w:g}: {names}", met, *shares)
        shares = [film[w]["E"] / other[w]["E"] for w in (1.5, 2.0)]
        ask("   (for the record, E at w <= 2; below 1 guided states win)", True, *shares)
        for name in ("film_mixed", "film_mixed_real"):
            if name in a:
                shares = [a[name][w]["E"] / min(film[w]["E"], other[w]["E"]) for w in SCALES]
                ask(f"8. {name}: E within 10 % of the better pure set", max(shares) <= 1.1, *shares)
    if "cross_attention" in a:
        shares = [film[w]["R"] / a["cross_attention"][w]["R"] for w in SCALES]
        fewer = report["parameters"]["film"] <= report["parameters"]["cross_attention"]
        ask("9. R of film <= 0.6 of cross-attention's, with no more parameters", fewer and max(shares) <= 0.6, *shares)
    minutes = report["runs"][0]["minutes"][HEADLINE]
    ask("10. states, training and evaluation of one run <= 5 CPU minutes", minutes <= 5, minutes)
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown: one row for each arm and scale, means over seeds; then the thresholds."""
    seconds = report["seconds_per_image"]
    lines = [
        "| arm | parameters | w | R | E | accuracy | FD to teacher | FD to real | passes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, scales in averages(report["runs"]).items():
        size = report["parameters"].get(arm)
        share = "" if size is None else f"{size:,} ({100 * size / report['parameters']['base_model']:.1f} %)"
        for w, row in scales.items():
            cells = (row["R"], row["E"], row["accuracy"], row["fd_teacher"], row["fd_real"])
            numbers = " | ".join(f"{x:.3f}" if i < 3 else f"{x:.2f}" for i, x in enumerate(cells))
            lines.append(f"| {arm} | {share} | {w:g} | {numbers} | {row['passes']:.0f} |")
    lines += ["", "Seconds per image: " + ", ".join(f"{k} {v:.5f}" for k, v in list(seconds.items())[:3])]
    lines += [f"CFG / film {seconds['ratio']:.2f}, by arithmetic {seconds['ratio_by_arithmetic']:.2f}", ""]
    lines += ["| threshold | met | figures |", "|---|---|---|"]
    lines += [f"| {what} | {'yes' if met else 'no'} | {figures} |" for what, met, figures in report["thresholds"]]
    if "other_samplers" in report:
        lines += ["", "E at w = 3: " + ", ".join(f"{k} {v:.3f}" for k, v in report["other_samplers"].items())]
    return "\n".join(lines) + "\n"


def draw(rows: dict[str, Tensor], file: Path) -> None:
    """One row of pictures per arm, the digits 0 to 9 from the same noise."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 10, figsize=(8, 0.8 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for place, image in zip(line, images, strict=True):
            place.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(args: Arguments) -> dict[str, Any]:
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        raise ValueError(f"arms={unknown} are unknown; have {list(ARMS)}")
    if HEADLINE not in args.arms:
        raise ValueError(f"arms={args.arms} must hold {HEADLINE!r}, with which the others are compared")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    judge, judge_accuracy = train_judge(args.judge_epochs)
    base = train_base(args.base_steps)
    report: dict[str, Any] = {"arguments": asdict(args), "judge_accuracy": judge_accuracy, "runs": []}
    report["parameters"] = {"base_model": sum(p.numel() for p in base.parameters())}
    evaluations = {seed: Evaluation(base, judge, args.samples, seed) for seed in args.seeds}
    for seed, evaluation in evaluations.items():
        report["runs"].append({"seed": seed, "arms": evaluation.references(), "minutes": {}})
    first = evaluations[args.seeds[0]]
    pictures = {"base": first.base_images[:10], "CFG, w = 3": first.teachers[3.0].images[:10]}
    made: dict[tuple[str, int], Trajectories] = {}
    for arm in args.arms:
        for run in report["runs"]:
            seed, start = run["seed"], time.process_time()
            kind = ARMS[arm][1]
            if (kind, seed) not in made:
                made[kind, seed] = states(base, kind, args.trajectories, seed)
            model = distil(base, arm, made[kind, seed], args, seed)
            run["arms"][arm] = evaluations[seed].student(model)
            run["minutes"][arm] = (time.process_time() - start) / 60
            report["parameters"][arm] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            errors = " ".join(f"{run['arms'][arm][w]['R']:.3f}" for w in SCALES)
            print(f"seed {seed} {arm}: R {errors}, {run['minutes'][arm]:.1f} CPU minutes", flush=True)
            if seed == args.seeds[0]:
                images = first.roll_out(first.step_of(model, torch.full((args.samples,), 3.0)))
                pictures[arm] = images[:10].clone()
                draw(pictures, out / "samples.png")
            if seed == args.seeds[0] and arm == HEADLINE:
                model.save_pretrained(out / "adapter")
                report["seconds_per_image"] = time_steps(base, model, args.timing_rounds)
                report["other_samplers"] = other_samplers(base, model, first)
            report["thresholds"] = thresholds(report)
            report["cpu_minutes"] = (time.process_time() - began) / 60
            (out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            (out / "table.md").write_text(table(report), encoding="utf-8")
    print(table(report))
    return report


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    arguments = read_arguments(Arguments)
    main(arguments)
