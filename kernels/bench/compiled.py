"""The operation under torch.compile against plain products that are compiled as well, on one CPU thread.

    python kernels/bench/compiled.py

The adapters' part alone, of width 768 and rank 16, in float32: whole batches, training steps and decoding. *plain* is
what one would write: for one adapter two products; for eight the weights of each sequence or row, gathered, and two
batched products; *keeping* the same that leaves rows of the number -1, without adapter, as they are, which ours does
and which plain gives the last adapter. Contenders take turns in random order; the time is CPU time of the thread, the
median of all turns. Each is compiled by inductor with shapes that do not change. Writes compiled.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cpu import Case, Setting, cpu_name
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters import kernels

CLOSE = 1e-5  # relative distance of results
LAYERS = 16


class Ours(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.ranks, self.run = (case.r,) * case.E, case.T // (case.sequences or case.T)

    def forward(self, x: Tensor, base: Tensor, down: Tensor, up: Tensor, owners: Tensor) -> Tensor:
        indices = None if len(self.ranks) == 1 else owners.repeat_interleave(self.run).unsqueeze(1)
        return kernels.lowrank(
            x, down.flatten(0, 1), up.flatten(0, 1).t(), self.ranks, indices=indices, base=base, run=self.run,
            act="identity",
        )  # fmt: skip


class Plain(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.one, self.run = case.E == 1, case.T // (case.sequences or case.T)

    def forward(self, x: Tensor, base: Tensor, down: Tensor, up: Tensor, owners: Tensor) -> Tensor:
        if self.one:
            return torch.addmm(base, F.linear(x, down[0]), up[0])
        rows, start = (t.unflatten(0, (-1, self.run)) for t in (x, base))
        return torch.baddbmm(start, torch.bmm(rows, down[owners].mT), up[owners]).flatten(0, 1)


class Keeping(Plain):
    def forward(self, x: Tensor, base: Tensor, down: Tensor, up: Tensor, owners: Tensor) -> Tensor:
        rows, start = (t.unflatten(0, (-1, self.run)) for t in (x, base))
        named = owners.clamp_min(0)
        y = torch.baddbmm(start, torch.bmm(rows, down[named].mT), up[named])
        return torch.where((owners < 0)[:, None, None], start, y).flatten(0, 1)


class Layers(nn.Module):
    """As many in one graph as a model has: what is checked before each call is checked once for all."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one = one

    def forward(self, x: Tensor, base: Tensor, down: Tensor, up: Tensor, owners: Tensor) -> Tensor:
        for _ in range(LAYERS):
            x = self.one(x, base + x, down, up, owners)
        return x


def cases() -> list[Case]:
    found = [Case("compiled", "lora", 2048, E, sequences=E, training=t) for t in (False, True) for E in (1, 8)]
    found += [Case("compiled", "lora", rows, 1, sequences=1) for rows in (1, 8, 64)]
    found += [Case("layers", "lora", rows, 1, sequences=1) for rows in (1, 8, 64)]
    return [*found, Case("compiled", "lora", 64, 8), Case("layers", "lora", 64, 8)]


def measure(case: Case, turns: int) -> dict[str, float]:
    """Median milliseconds of each contender."""
    setting = Setting(case)
    given = (setting.x, setting.base, setting.down, setting.up)
    steps: dict[str, Callable[[], object]] = {}
    modules = {"ours": Ours(case), "plain": Plain(case)} | ({} if case.E == 1 else {"keeping": Keeping(case)})
    if case.group == "layers":
        modules = {name: Layers(module) for name, module in modules.items()}
    expected = modules["plain"](*given, setting.owners).detach()
    torch._dynamo.reset()  # or shapes that change from case to case would be dynamic
    for name, module in modules.items():
        for way, run in ((name, module), (f"{name}, compiled", torch.compile(module, fullgraph=True))):

            def step(run: Callable[..., Tensor] = run) -> object:
                if case.training:
                    return torch.autograd.grad(run(*given, setting.owners), given, setting.grad)
                with torch.no_grad():
                    return run(*given, setting.owners)

            if (run(*given, setting.owners) - expected).norm() > CLOSE * expected.norm():
                raise SystemExit(f"{case.label}: {way} computes something else")
            step()
            steps[way] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name in random.sample(list(steps), len(steps)):
            start = time.thread_time()
            steps[name]()
            times[name].append(time.thread_time() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for compiled.json")
    parser.add_argument("--turns", type=int, default=100, help="of each contender; in decoding four times as many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for case in cases():
        ms = measure(case, args.turns * (1 if case.T > 64 else 4))
        others = [name for name in ("plain", "keeping") if name in ms]
        ratios = {f"compiled, ours / {name}": ms["ours, compiled"] / ms[f"{name}, compiled"] for name in others}
        results.append({"label": case.label, "group": case.group, "ms": ms, **ratios})
        label = f"{case.label}, {LAYERS} layers" if case.group == "layers" else case.label
        found = "  ".join(f"{ratio:.2f}" for ratio in ratios.values())
        print(f"{label}: {found}  ", "  ".join(f"{n} {v:.3g}" for n, v in ms.items()), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), "cpu": cpu_name(), "threads": 1}
    (args.out / "compiled.json").write_text(json.dumps({"about": about, "results": results}, indent=1))
    print(f"wrote {args.out / 'compiled.json'}")


if __name__ == "__main__":
    main()
