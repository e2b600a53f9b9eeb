"""Under torch.compile, ours against plain products that are compiled as well, on one CPU thread.

    python kernels/bench/compiled.py                      both
    python kernels/bench/compiled.py --only models        or: operation

The adapters' part alone, of width 768 and rank 16, in float32: whole batches, training steps and decoding. *plain* is
what one would write: for one adapter two products; for eight the weights of each sequence or row, gathered, and two
batched products; *keeping* the same that leaves rows of the number -1, without adapter, as they are, which ours does
and which plain gives the last adapter. Then whole models with one adapter on all linear layers, against PEFT's LoRA
and a bottleneck as a module of its own: decoding, batches, training steps. Contenders take turns in random order; the
time is CPU time of the thread, the median of all turns. Each is compiled by inductor with shapes that do not change.
Writes compiled.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from cpu import Case, Setting, cpu_name
from models import LINEARS, both, bottlenecks, llama
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
    return timed(steps, turns)


def timed(steps: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name in random.sample(list(steps), len(steps)):
            start = time.thread_time()
            steps[name]()
            times[name].append(time.thread_time() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


PAIRS = (("ours, LoRA", "PEFT, LoRA"), ("ours, bottleneck", "plain, bottleneck"))
WORKLOADS = [("decoding", (rows, 1)) for rows in (1, 4, 64)]
WORKLOADS += [(kind, shape) for kind in ("batch", "training step") for shape in ((4, 64), (16, 128))]


def model_results(turns: int) -> Iterator[dict[str, Any]]:
    """Models of seven million parameters with one adapter of rank 16 on all linear layers."""
    base = llama()
    found = dict(zip(itertools.chain(*PAIRS), (*both(base, LINEARS, 16, adapters=1), *bottlenecks(base)), strict=True))
    for model in found.values():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in (".down.", ".up.", "lora_")))
    for kind, shape in WORKLOADS:
        torch._dynamo.reset()
        ids = torch.randint(1, 8000, shape)
        steps = {name: model_step(model, kind, ids) for name, model in found.items()}
        for ours, theirs in PAIRS:
            if (steps[ours]() - steps[theirs]()).norm() > CLOSE * steps[theirs]().norm():
                raise SystemExit(f"{kind}, {shape}: {ours} computes something else")
        ms = timed(steps, turns if kind == "decoding" else max(10, turns // 4))
        label = f"{kind}, {shape[0]} x {shape[1]} tokens"
        yield {"label": label, "group": "models", "ms": ms, **{f"{a} / {b}": ms[a] / ms[b] for a, b in PAIRS}}


def model_step(model: Any, kind: str, ids: Tensor) -> Callable[[], Tensor]:
    """What one turn runs; it returns logits, of a training step the gradients of an adapter's first layer."""
    compiled = torch.compile(model, fullgraph=True)
    if kind == "decoding":
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        prompt = torch.ones(len(ids), 16, dtype=torch.int64)
        with torch.no_grad():
            model(input_ids=prompt, past_key_values=cache)

    def step() -> Tensor:
        if kind == "training step":
            model.zero_grad()
            compiled(input_ids=ids, use_cache=False).logits.square().mean().backward()
            return next(p.grad for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            if kind == "batch":
                return compiled(input_ids=ids, use_cache=False).logits
            for layer in cache.layers:
                layer.cumulative_length.fill_(16)  # the same step again
            return compiled(input_ids=ids, past_key_values=cache).logits

    step()
    step()
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for compiled.json")
    parser.add_argument("--only", choices=("operation", "models"))
    parser.add_argument("--turns", type=int, default=100, help="of each contender; in decoding four times as many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for case in [] if args.only == "models" else cases():
        ms = measure(case, args.turns * (1 if case.T > 64 else 4))
        others = [name for name in ("plain", "keeping") if name in ms]
        ratios = {f"compiled, ours / {name}": ms["ours, compiled"] / ms[f"{name}, compiled"] for name in others}
        results.append({"label": case.label, "group": case.group, "ms": ms, **ratios})
        label = f"{case.label}, {LAYERS} layers" if case.group == "layers" else case.label
        found = "  ".join(f"{ratio:.2f}" for ratio in ratios.values())
        print(f"{label}: {found}  ", "  ".join(f"{n} {v:.3g}" for n, v in ms.items()), flush=True)
    for result in model_results(args.turns) if args.only != "operation" else ():
        results.append(result)
        ratios = "  ".join(f"{a} / {b} {result[f'{a} / {b}']:.2f}" for a, b in PAIRS)
        ms = "  ".join(f"{name} {value:.4g}" for name, value in result["ms"].items())
        print(f"models, {result['label']}: {ratios}  ", ms, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), "cpu": cpu_name(), "threads": 1}
    (args.out / "compiled.json").write_text(json.dumps({"about": about, "results": results}, indent=1))
    print(f"wrote {args.out / 'compiled.json'}")


if __name__ == "__main__":
    main()
