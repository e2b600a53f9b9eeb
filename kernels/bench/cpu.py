"""The operation on one CPU thread: ours, each of its backends, and what else one would write, side by side in one run.

    python kernels/bench/cpu.py                      all cases, about ten minutes
    python kernels/bench/cpu.py --only figures       the cases of the first table of docs/kernels-results.md
    python kernels/bench/cpu.py --rule --drawn 60    how well the rule chooses: the backends alone, on cases drawn anew

Every contender computes the adapters' part alone, on the same tensors; their results are compared before any is timed.
They take turns, and the time is CPU time of the thread, so that a neighbour on the machine disturbs all of them alike.
Writes cpu.json and cpu.png; with --rule rule.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mixadapters import kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = ("segments", "grouped", "gathered", "dense")


@dataclass(frozen=True)
class Case:
    """T rows of width d; E adapters of rank r, k for each row; `sequences`: one adapter per T / sequences rows."""

    group: str
    task: str  # "lora", or "mixture": gated GELU bottlenecks with biases
    T: int
    E: int
    r: int = 16
    d: int = 768
    k: int = 1
    sequences: int | None = None
    dtype: str = "fp32"
    training: bool = False

    @property
    def grouped_takes_it(self) -> bool:
        """grouped_mm asks for rows of multiples of 16 bytes."""
        return self.r * DTYPES[self.dtype].itemsize % 16 == 0

    @property
    def label(self) -> str:
        who = f"{self.sequences} sequences" if self.sequences else "rows"
        mode = "train" if self.training else "infer"
        k = "" if self.task == "lora" else f" k={self.k}"
        return f"{self.task} {mode} {self.dtype} E={self.E}{k} T={self.T} d={self.d} r={self.r}, {who}"


def cases() -> list[Case]:
    found = []
    for training in (False, True):
        found += [
            Case("figures", "lora", 2048, 8, sequences=8, training=training),
            Case("figures", "lora", 8192, 64, sequences=64, training=training),
            Case("figures", "mixture", 2048, 8, k=8, training=training),
            Case("figures", "mixture", 2048, 16, k=16, training=training),
        ]
        found += [Case("adapters", "lora", 2048, E, sequences=min(E, 64), training=training) for E in (1, 2, 4, 16)]
        found += [Case("adapters", "lora", 2048, E, sequences=64, training=training) for E in (64, 256, 1024)]
        found += [Case("ranks", "lora", 2048, 8, r, sequences=8, training=training) for r in (8, 32, 64, 128)]
        found += [Case("rows", "lora", T, E, training=training) for T in (256, 2048) for E in (2, 4, 8, 64)]
        found += [Case("rows", "lora", 2048, 8, r, training=training) for r in (8, 64)]
        found += [Case("mixtures", "mixture", 2048, E, k=k, training=training) for E in (4, 8, 16) for k in (1, 2, 4)]
        found += [Case("mixtures", "mixture", 2048, 8, r, k=2, training=training) for r in (8, 64)]
        found += [Case("mixtures", "mixture", 2048, 64, k=2, training=training)]
        found += [
            Case("bf16", task, T, E, k=k, sequences=sequences, dtype="bf16", training=training)
            for task, T, E, k, sequences in (
                ("lora", 2048, 8, 1, 8), ("lora", 8192, 64, 1, 64), ("lora", 2048, 8, 1, None),
                ("lora", 2048, 2, 1, None), ("mixture", 2048, 8, 2, None), ("mixture", 2048, 8, 8, None),
                ("mixture", 2048, 16, 2, None),
            )
        ]  # fmt: skip
    for dtype in DTYPES:
        for B, E in ((1, 8), (8, 8), (8, 64), (64, 8), (64, 64), (16, 1024), (256, 64)):
            found.append(Case("decode", "lora", B, E, dtype=dtype))
        found.append(Case("decode", "lora", 64, 64, r=8, d=256, dtype=dtype))
    return found


def drawn(number: int, seed: int) -> list[Case]:
    """Cases that nobody chose: each field is drawn by itself, from the same list whatever the seed.

    Half are LoRA, of which half name an adapter by sequence, half mixtures; 7 of 10 are of float32; half train.
    """
    draw = random.Random(seed)
    found = []
    while len(found) < number:
        task, training = draw.choice(("lora", "mixture")), draw.random() < 0.5
        T, E = draw.choice((16, 64, 256, 512, 1024, 2048, 4096)), draw.choice((2, 4, 8, 16, 32, 64))
        r, d = draw.choice((4, 8, 16, 32, 64)), draw.choice((256, 512, 768, 1024))
        k = min(E, draw.choice((1, 2, 3, 4, 8))) if task == "mixture" else 1
        sequences = draw.choice((4, 8, 16, 32)) if task == "lora" and draw.random() < 0.5 else None
        dtype = "fp32" if draw.random() < 0.7 else "bf16"
        if sequences is None or T % sequences == 0:
            found.append(Case("drawn", task, T, E, r, d, k, sequences, dtype, training))
    return found


class Setting:
    """The tensors of a case, and its contenders: each returns y (T, d)."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        g = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[case.dtype]
        self.case = case
        E, r, d, T = case.E, case.r, case.d, case.T

        def make(*shape: int, by: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g, device=device) / by).to(dtype)

        self.x, self.base, self.grad = make(T, d), make(T, d), make(T, d)
        self.down, self.up = make(E, r, d, by=d**0.5), make(E, r, d, by=r**0.5)
        self.bias = make(E, r)
        self.scale = torch.full((E,), 2.0, device=device)
        n = case.sequences or T
        self.run = T // n
        self.weights = None
        if case.task == "lora":
            self.owners = torch.randperm(max(n, E), generator=g, device=device)[:n] % E
            self.indices = self.owners.repeat_interleave(self.run).unsqueeze(1)
        else:
            weights, self.indices = torch.rand(T, E, generator=g, device=device).topk(case.k, 1)
            if case.k == E:
                self.indices = torch.arange(E, device=device).expand(T, -1)
            self.weights = weights.softmax(1).to(dtype)
        self.leaves = [self.x, self.base, self.down, self.up]
        if case.task == "mixture":
            self.leaves += [self.bias, self.weights]
        # Loops elsewhere hold a module per adapter, and lists of the sequences that name it.
        self.apart = [list(self.down.clone()), [u.t().contiguous() for u in self.up], list(self.bias.clone())]
        if case.task == "lora":
            self.members, self.rows = (
                [(ids == e).nonzero().squeeze(1).tolist() for e in range(E)]
                for ids in (self.owners, self.indices[:, 0])
            )
        if case.training:
            for t in (*self.leaves, *(t for part in self.apart for t in part)):
                t.requires_grad_()

    def contenders(self) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
        case = self.case
        lora = case.task == "lora"
        stacked = self.leaves
        downs, ups, biases = self.apart
        apart = [self.x, self.base, *downs, *ups] + ([] if lora else [*biases, self.weights])
        found = {"ours": (self.ours, stacked)}
        for name in OURS:
            if self.pays(name):
                found[name] = (lambda name=name: self.ours(name), stacked)
        if lora:
            found |= {"peft_loop": (self.peft_loop, apart), "row_loop": (self.row_loop, apart)}
        else:
            found |= {"loop_over_experts": (self.loop_masked, apart), "loop_all_rows": (self.loop_all, apart)}
        found["grouped_mm"] = (self.grouped_mm, stacked)
        if self.pays("dense"):
            found["chain"] = (self.chain, stacked)
        return found

    def beside(self) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
        """What the others are held against: one adapter by plain products; ours as the layers of a model call it.

        They share what is derived from the indices, and pack weights in the order in which sequences name them.
        """
        if self.case.task != "lora":
            return {}
        known = kernels.constant(self.indices.clone())
        found = {
            "one adapter": (self.one_adapter, self.leaves),
            "ours, shared plan": (lambda: self.ours(indices=known), self.leaves),
        }
        if self.case.sequences == self.case.E:
            like = copy.copy(self)
            like.indices = kernels.constant(torch.arange(self.case.E).repeat_interleave(self.run).unsqueeze(1))
            like.down, like.up = (t.detach()[self.owners] for t in (self.down, self.up))
            if self.case.training:
                like.down.requires_grad_()
                like.up.requires_grad_()
            found["ours, in order"] = (like.ours, [self.x, self.base, like.down, like.up])
        return found

    def one_adapter(self) -> Tensor:
        return torch.addmm(self.base, F.linear(self.x, self.down[0]) * 2.0, self.up[0])

    def pays(self, name: str) -> bool:
        """Leaves out what would take minutes, or gigabytes."""
        case = self.case
        if name == "dense":
            return case.T * case.d * case.E * case.r < 1e10
        if name == "gathered":
            return case.T // self.run * case.k * case.r * case.d < 1e8
        return name != "grouped" or case.grouped_takes_it

    def ours(self, backend: str | None = None, indices: Tensor | None = None) -> Tensor:
        case, mixture = self.case, self.weights is not None
        indices = self.indices if indices is None else indices
        with nullcontext() if backend is None else kernels.adapter_backend(backend):
            return kernels.lowrank(
                self.x, self.down.flatten(0, 1), self.up.flatten(0, 1).t(), (case.r,) * case.E,
                b_down=self.bias.flatten() if mixture else None, weights=self.weights,
                indices=None if mixture and case.k == case.E else indices, base=self.base, run=self.run,
                scale=None if mixture else self.scale, act="gelu" if mixture else "identity",
            )  # fmt: skip

    def peft_loop(self) -> Tensor:
        """As PEFT's mixed batch: lists of sequences, adapter by adapter; in training the same under autograd."""
        x, base = (t.view(-1, self.run, self.case.d) for t in (self.x, self.base))
        return self._loop(x, base, self.members).flatten(0, 1)

    def row_loop(self) -> Tensor:
        """The same with lists of rows, which a batch needs whose rows are not whole sequences."""
        return self._loop(self.x, self.base, self.rows)

    def _loop(self, x: Tensor, base: Tensor, lists: list[list[int]]) -> Tensor:
        out = base.clone()
        for members, down, up in zip(lists, *self.apart[:2], strict=True):
            if members:
                out[members] += F.linear(F.linear(x[members], down), up) * 2.0
        return out

    def loop_masked(self) -> Tensor:
        """As in mixture-of-experts layers: for each expert, the rows that chose it."""
        out = self.base.clone()
        for e, (down, up, bias) in enumerate(zip(*self.apart, strict=True)):
            rows, slots = (self.indices == e).nonzero(as_tuple=True)
            if len(rows):
                y = F.linear(F.gelu(F.linear(self.x[rows], down, bias)), up)
                out = out.index_add(0, rows, y * self.weights[rows, slots].unsqueeze(1))
        return out

    def loop_all(self) -> Tensor:
        """Every expert on every row."""
        out = self.base
        weights = self.all_weights()
        for e, (down, up, bias) in enumerate(zip(*self.apart, strict=True)):
            out = out + F.linear(F.gelu(F.linear(self.x, down, bias)), up) * weights[:, e : e + 1]
        return out

    def all_weights(self) -> Tensor:
        return self.x.new_zeros(self.case.T, self.case.E).scatter(1, self.indices, self.weights)

    def grouped_mm(self) -> Tensor:
        """Rows sorted by expert, two grouped products."""
        experts = self.indices.reshape(-1)
        order = experts.argsort(stable=True)
        ends = torch.bincount(experts, minlength=self.case.E).cumsum(0).to(torch.int32)
        rows = order // self.indices.shape[1]
        h = F.grouped_mm(self.x.index_select(0, rows), self.down.transpose(1, 2), offs=ends)
        if self.weights is None:
            y = F.grouped_mm(h, self.up, offs=ends) * 2.0
        else:
            h = F.gelu(h + self.bias.index_select(0, experts.index_select(0, order)))
            y = F.grouped_mm(h * self.weights.reshape(-1).index_select(0, order).unsqueeze(1), self.up, offs=ends)
        return self.base.index_add(0, rows, y)

    def chain(self) -> Tensor:
        """One wide product, masked, another: plain operations under autograd."""
        E, r = self.case.E, self.case.r
        h = F.linear(self.x, self.down.flatten(0, 1))
        if self.weights is None:
            weights = F.one_hot(self.indices.squeeze(1), E).to(h.dtype) * 2.0
        else:
            h, weights = F.gelu(h + self.bias.flatten()), self.all_weights()
        h = (h.view(-1, E, r) * weights.unsqueeze(2)).flatten(1)
        return torch.addmm(self.base, h, self.up.flatten(0, 1))


def measure(case: Case, seconds: float, among: tuple[str, ...] = ()) -> dict[str, float]:
    """Median milliseconds of each contender, or of those among them."""
    setting = Setting(case)
    steps: dict[str, Callable[[], object]] = {}
    expected = None
    for name, (run, leaves) in (setting.contenders() | setting.beside()).items():
        if among and name not in among:
            continue

        def step(run=run, leaves=leaves):
            if case.training:
                return torch.autograd.grad(run(), leaves, setting.grad, allow_unused=True)
            with torch.inference_mode():
                return run()

        y = run().detach().float()
        if name == "one adapter":  # which is another thing
            y = expected
        expected = y if expected is None else expected
        error = ((y - expected).norm() / expected.norm()).item()
        if error > (1e-5 if case.dtype == "fp32" else 2e-2):
            raise SystemExit(f"{case.label}: {name} computes something else (relative error {error:.1e})")
        step()
        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    for turn in range(400):
        waiting = [name for name in steps if turn < 3 or spent[name] < seconds]
        if not waiting:
            break
        random.shuffle(waiting)  # what ran before leaves its traces in the caches
        for name in waiting:
            start = time.thread_time()
            steps[name]()
            spent[name] += time.thread_time() - start
            times[name].append(time.thread_time() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def chosen(case: Case) -> str:
    return kernels.choose_backend(
        case.T, case.k, case.E, case.E * case.r, DTYPES[case.dtype],
        run=case.T // (case.sequences or case.T), width=case.d, training=case.training,
        refused=() if case.grouped_takes_it else ("grouped",),
    )  # fmt: skip


def report_rule(results: list[dict]) -> dict[str, float]:
    """How often the rule takes the fastest backend, and what it loses where it does not."""
    regrets = []
    for result in results:
        times = {name: result["ms"][name] for name in OURS if name in result["ms"]}
        regrets.append(times[result["chosen"]] / min(times.values()) - 1)
    return {
        "cases": len(regrets),
        "fastest_or_within_5_percent": sum(regret <= 0.05 for regret in regrets),
        "mean_regret": statistics.mean(regrets),
        "worst_regret": max(regrets),
    }


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 0.26 * len(results) / 2 + 2))
    for axis, training in zip(axes, (False, True), strict=True):
        some = [result for result in results if result["case"]["training"] is training]
        for name in dict.fromkeys(name for result in some for name in result["ms"] if name not in (*OURS, "ours")):
            at = [
                (result["ms"][name] / result["ms"]["ours"], i) for i, result in enumerate(some) if name in result["ms"]
            ]
            axis.plot(*zip(*at, strict=True), "o", label=name, alpha=0.7)
        axis.axvline(1, color="k", linewidth=0.8)
        axis.set(xscale="log", yticks=range(len(some)), xlabel="time / ours")
        axis.set_yticklabels(
            [result["label"].replace(" train", "").replace(" infer", "") for result in some], fontsize=6
        )
        axis.set_title("training step" if training else "inference")
        axis.invert_yaxis()
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for cpu.json and cpu.png")
    parser.add_argument("--only", nargs="*", help="groups of cases, such as figures, decode, bf16")
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU time of each contender in each case")
    parser.add_argument("--rule", action="store_true", help="time the backends alone, without what one would write")
    parser.add_argument("--drawn", type=int, metavar="N", help="N cases drawn at random, in place of those listed")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    args = parser.parse_args()
    torch.set_num_threads(1)
    groups = {case.group for case in cases()}
    if unknown := set(args.only or ()) - groups:
        parser.error(f"--only {' '.join(sorted(unknown))}: choose from {' '.join(sorted(groups))}")
    results = []
    for case in cases() if args.drawn is None else drawn(args.drawn, args.seed):
        if args.only and case.group not in args.only:
            continue
        ms = measure(case, args.seconds, OURS if args.rule else ())
        results.append({"case": asdict(case), "label": case.label, "chosen": chosen(case), "ms": ms})
        best = min(ms, key=ms.__getitem__)
        row = "  ".join(f"{name} {value:.3g}{'*' if name == best else ''}" for name, value in ms.items())
        print(f"{case.label} [{results[-1]['chosen']}]: {row}", flush=True)
    rule = report_rule(results)
    print("rule:", "  ".join(f"{name} {value:.3g}" for name, value in rule.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), "cpu": cpu_name(), "threads": 1}
    path = args.out / ("rule.json" if args.rule else "cpu.json")
    path.write_text(json.dumps({"about": about, "rule": rule, "results": results}, indent=1))
    if not args.rule:
        plot(results, args.out / "cpu.png")
    print(f"wrote {path}")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
