"""Layers and models on one CPU thread: many adapters in a batch against one, ours against PEFT's LoRA, in one run.

    python kernels/bench/models.py                       all groups, about ten minutes
    python kernels/bench/models.py --only generate       some of: module, single, generate, forward, step

Both libraries hold the same weights: low-rank adapters on every linear layer. Outputs, generated tokens and gradients
are compared before anything is timed. Contenders take turns in random order; the time is CPU time of the thread, the
median of all turns. PEFT's mixed batch is for inference: its training step is the loop that a user has to write in its
place, the rows of each adapter by themselves with `set_adapter` before. Writes models.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from mixadapters import BottleneckConfig

SCALE = 1.5
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUPS = ("module", "single", "generate", "forward", "step")
ADAPTERS = 64
CLOSE = 1e-5  # relative distance of results, in float32


@dataclass
class Contender:
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None  # not timed


@dataclass
class Case:
    """`errors`: how far results lie from what they should be. `ratios`: pairs of contenders to compare."""

    label: str
    contenders: dict[str, Contender]
    errors: dict[str, float]
    ratios: list[tuple[str, str]]


class OneLayer(nn.Module):
    """A linear layer with the interface of a model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def llama() -> nn.Module:
    """Seven million parameters, random."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8, vocab_size=8000,
        max_position_embeddings=256, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def both(base: nn.Module, targets: list[str], rank: int, adapters: int = ADAPTERS) -> tuple[Any, Any]:
    """The model with adapters "a0", "a1" ... by this library and by PEFT, with the same weights."""
    configs: tuple[Any, ...] = (
        BottleneckConfig(
            r=rank, target_modules=targets, activation="identity", use_bias=False, placement="parallel", scale=SCALE
        ),
        peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=targets, init_lora_weights=False),
    )
    models = []
    for config in configs:
        model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
        for i in range(1, adapters):
            model.add_adapter(f"a{i}", copy.deepcopy(config))
        models.append(model.eval())
    for mine, its in pairs(*models):
        mine.data.copy_(its)
    return models[0], models[1]


def pairs(ours: Any, theirs: Any) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of both that should be equal."""
    for path, layer in theirs.named_modules():
        if hasattr(layer, "lora_A"):
            for name, adapter in ours.get_submodule(path).adapters.items():
                expert = adapter.bank.experts["adapter"]
                yield expert.down.weight, layer.lora_A[name].weight
                yield expert.up.weight, layer.lora_B[name].weight


def names_of(adapters: int, rows: int) -> list[str]:
    """An adapter for each row, in turn."""
    return [f"a{i % adapters}" for i in range(rows)]


def one(model: Any) -> Callable[[], object]:
    return lambda: model.set_adapter("a0")


def every(model: Any) -> Callable[[], object]:
    """All adapters trainable."""
    return lambda: model.base_model.set_adapter(list(model.peft_config))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


def module_cases() -> Iterator[Case]:
    """One frozen linear layer with its adapters."""
    for length in (128, 32):
        yield from layer_cases(64, length, 768)


def layer_cases(rows: int, length: int, width: int) -> Iterator[Case]:
    ours, theirs = both(OneLayer(width), ["linear"], 16)
    x, grad = torch.randn(2, rows, length, width)
    label = f"Linear({width}) and adapters of rank 16, T={rows * length}"

    def infer(model: Any, adapters: int | None = None) -> Tensor:
        with torch.inference_mode():
            return model(x) if adapters is None else model(x, adapter_names=names_of(adapters, rows))

    def train(model: Any, adapters: int | None = None) -> None:
        model.zero_grad()
        y = model(x) if adapters is None else model(x, adapter_names=names_of(adapters, rows))
        y.backward(grad)

    errors = {"output, 64 adapters": distance(infer(ours, 64), infer(theirs, 64))}
    for mode, run in (("inference", infer), ("training step", train)):
        contenders = {"frozen layer, inference": Contender(lambda: infer(ours.get_base_model().linear.base_layer))}
        contenders["ours, 1"] = Contender(lambda run=run: run(ours), one(ours))
        contenders["PEFT, 1"] = Contender(lambda run=run: run(theirs), one(theirs))
        for n in (8, 64):
            contenders[f"ours, {n}"] = Contender(lambda run=run, n=n: run(ours, n), every(ours))
            if mode == "inference":
                contenders[f"PEFT, {n}"] = Contender(lambda n=n: infer(theirs, n), one(theirs))
        yield Case(f"{label}, {mode}", contenders, errors, [("ours, 8", "ours, 1"), ("ours, 64", "ours, 1")])


class Beside(nn.Module):
    """A linear layer and a GELU bottleneck beside it, as one would write them."""

    def __init__(self, base: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up = base, down, up

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(nn.functional.gelu(self.down(x))) * SCALE


def bottlenecks(base: nn.Module) -> tuple[Any, Any]:
    """The model with GELU bottlenecks by this library, and the same layers as plain modules."""
    config = BottleneckConfig(r=16, target_modules=LINEARS, placement="parallel", scale=SCALE, init_weights=False)
    plain, ours = copy.deepcopy(base), peft.get_peft_model(copy.deepcopy(base), config).eval()
    # Frozen too: torch multiplies the last tokens of a prompt by a frozen head row after row, by another all at once.
    plain.requires_grad_(False)
    for path in [name for name, _ in plain.named_modules() if name.rpartition(".")[2] in LINEARS]:
        expert = ours.get_base_model().get_submodule(path).adapters["default"].bank.experts["adapter"]
        plain.set_submodule(path, Beside(plain.get_submodule(path), expert.down, expert.up))
    return ours, plain.eval()


def single_cases() -> Iterator[Case]:
    """Decoding with one adapter: prompts of 16 tokens, 12 new tokens."""
    base = llama()
    ours, theirs = both(base, LINEARS, 16, adapters=1)
    bottleneck, plain = bottlenecks(base)
    models = {"ours, LoRA": ours, "PEFT, LoRA": theirs, "ours, bottleneck": bottleneck, "plain, bottleneck": plain}
    compared = [("ours, LoRA", "PEFT, LoRA"), ("ours, bottleneck", "plain, bottleneck")]
    for rows in (1, 4, 64):
        ids = torch.randint(1, 8000, (rows, 16))

        def run(model: Any, ids: Tensor = ids) -> Tensor:
            with torch.no_grad():
                return model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
                )

        errors = {}
        for one, other in compared:
            with torch.no_grad():
                errors[f"logits of {one}"] = distance(
                    models[one](input_ids=ids).logits, models[other](input_ids=ids).logits
                )
        contenders = {name: Contender(lambda model=model, run=run: run(model)) for name, model in models.items()}
        yield Case(f"generate, one adapter, Llama of 7M, {rows} rows", contenders, errors, compared)


def generate_cases() -> Iterator[Case]:
    """Decoding: 64 prompts of 16 tokens, 12 new tokens."""
    for rank in (8, 16):
        ours, theirs = both(llama(), LINEARS, rank)
        ids = torch.randint(1, 8000, (64, 16))

        def run(model: Any, adapters: int | None = None, ids: Tensor = ids) -> Tensor:
            names = {} if adapters is None else {"adapter_names": names_of(adapters, len(ids))}
            with torch.no_grad():
                return model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **names
                )

        contenders = {}
        for library, model in (("ours", ours), ("PEFT", theirs)):
            contenders[f"{library}, 1"] = Contender(lambda model=model: run(model), one(model))
            for n in (8, 64):
                contenders[f"{library}, {n}"] = Contender(lambda model=model, n=n: run(model, n), one(model))
        ratios = [(f"{library}, {n}", f"{library}, 1") for library in ("ours", "PEFT") for n in (8, 64)]
        errors = logit_errors(ours, theirs, ids)
        errors["generated tokens that differ from PEFT's"] = (run(ours, 64) != run(theirs, 64)).float().mean().item()
        yield Case(f"generate, Llama of 7M, rank {rank}", contenders, errors, [*ratios, ("PEFT, 64", "ours, 64")])


def logit_errors(ours: Any, theirs: Any, ids: Tensor) -> dict[str, float]:
    """Logits of a batch over 64 adapters against PEFT's, and against each adapter by itself."""
    names = names_of(64, len(ids))
    with torch.no_grad():
        mixed = ours(input_ids=ids, adapter_names=names).logits
        errors = {"logits, against PEFT": distance(mixed, theirs(input_ids=ids, adapter_names=names).logits)}
        alone = []
        for row in (0, 21, 63):
            ours.set_adapter(names[row])
            alone.append(distance(mixed[row], ours(input_ids=ids[row : row + 1]).logits[0]))
        with ours.disable_adapter():
            assert distance(mixed, ours(input_ids=ids).logits) > 1e-2, "the adapters do nothing"
    ours.set_adapter("a0")
    return errors | {"logits, against each adapter alone": max(alone)}


def forward_cases() -> Iterator[Case]:
    """A forward over whole sequences."""
    ours, theirs = both(llama(), LINEARS, 16)
    ids = torch.randint(1, 8000, (64, 64))

    def run(model: Any, adapters: int | None = None) -> object:
        names = {} if adapters is None else {"adapter_names": names_of(adapters, len(ids))}
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False, **names)

    contenders = {}
    for library, model in (("ours", ours), ("PEFT", theirs)):
        contenders[f"{library}, 1"] = Contender(lambda model=model: run(model), one(model))
        for n in (8, 64):
            contenders[f"{library}, {n}"] = Contender(lambda model=model, n=n: run(model, n), one(model))
    ratios = [("ours, 8", "ours, 1"), ("ours, 64", "ours, 1"), ("PEFT, 8", "ours, 8"), ("PEFT, 64", "ours, 64")]
    yield Case("forward, Llama of 7M, 64 x 64 tokens", contenders, logit_errors(ours, theirs, ids), ratios)


def step_cases() -> Iterator[Case]:
    """A training step without the optimizer: forward, and backward to all adapters."""
    ours, theirs = both(llama(), LINEARS, 16)
    ids = torch.randint(1, 8000, (64, 32))
    weight = torch.randn(8000, generator=torch.Generator().manual_seed(0))

    def loss(model: Any, ids: Tensor, **names: Any) -> Tensor:
        return (model(input_ids=ids, use_cache=False, **names).logits @ weight).square().sum()

    def alone() -> None:
        ours.zero_grad()
        loss(ours, ids).backward()

    def mixed(adapters: int) -> None:
        ours.zero_grad()
        loss(ours, ids, adapter_names=names_of(adapters, len(ids))).backward()

    def loop(adapters: int) -> None:
        theirs.zero_grad()
        for i in range(adapters):
            theirs.set_adapter(f"a{i}")
            loss(theirs, ids[i::adapters]).backward()

    contenders = {"ours, 1": Contender(alone, one(ours))}
    errors = {}
    for n in (8, 64):
        contenders[f"ours, {n}"] = Contender(lambda n=n: mixed(n), every(ours))
        contenders[f"PEFT's loop, {n}"] = Contender(lambda n=n: loop(n))
        every(ours)()
        mixed(n)
        loop(n)
        gradients = [(a.grad, b.grad) for a, b in pairs(ours, theirs) if b.grad is not None]
        errors[f"gradients, {n} adapters"] = max(distance(a, b) for a, b in gradients)
    ratios = [("ours, 8", "ours, 1"), ("ours, 64", "ours, 1")]
    ratios += [(f"PEFT's loop, {n}", f"ours, {n}") for n in (8, 64)]
    yield Case("training step, Llama of 7M, 64 x 32 tokens", contenders, errors, ratios)


def measure(case: Case, seconds: float) -> dict[str, float]:
    """Median milliseconds of each contender."""
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    while min(map(len, times.values())) < 5 or min(map(sum, times.values())) < seconds:
        for name in random.sample(list(times), len(times)):  # whoever comes next finds what another has left in caches
            contender = case.contenders[name]
            contender.prepare()
            if not times[name]:
                contender.run()  # warm
            start = time.thread_time()
            contender.run()
            times[name].append(time.thread_time() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for models.json")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=GROUPS)
    parser.add_argument("--seconds", type=float, default=1.0, help="least CPU time of each contender in each case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {
        "module": module_cases, "single": single_cases, "generate": generate_cases, "forward": forward_cases,
        "step": step_cases,
    }  # fmt: skip
    results = []
    for group in args.only:
        for case in found[group]():
            if wrong := {name: error for name, error in case.errors.items() if not error <= 10 * CLOSE}:
                raise SystemExit(f"{case.label}: computes something else: {wrong}")
            ms = measure(case, args.seconds)
            ratios = {f"{a} / {b}": ms[a] / ms[b] for a, b in case.ratios}
            results.append({"group": group, "label": case.label, "errors": case.errors, "ms": ms, "ratios": ratios})
            print(f"\n{case.label}")
            for title, numbers, form in (("ms", ms, ".4g"), ("ratio", ratios, ".2f"), ("error", case.errors, ".1e")):
                for name, value in numbers.items():
                    print(f"  {title:6} {name:42} {value:{form}}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    about = {
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
        "python": platform.python_version(), "threads": 1,
    }  # fmt: skip
    (args.out / "models.json").write_text(json.dumps({"about": about, "results": results}, indent=1))
    print(f"wrote {args.out / 'models.json'}")


if __name__ == "__main__":
    main()
