"""The operation on a GPU: numerics first, then ours, what else one would write, and the memory roof, in one run.

    python kernels/bench/gpu.py               all cases, under eight minutes
    python kernels/bench/gpu.py --dry-run     tiny cases in triton's interpreter, without a GPU: only that all runs

Contenders are those of cpu.py, and PEFT's own layer with `adapter_names`. The roof is what the tensors' bytes take at
the bandwidth of a copy, measured in the same run. Every case stands alone: one that fails is reported and left behind.
Writes gpu.json, after every case, and gpu.png; tables.py makes the tables of the documentation of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"
if find_spec("mixadapters") is None:  # not installed: the kernels alone need nothing else
    links = Path(tempfile.mkdtemp()) / "mixadapters"
    links.mkdir()
    (links / "kernels").symlink_to(Path(__file__).resolve().parents[1] / "ops")
    sys.path.insert(0, str(links.parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from cpu import DTYPES, Case, Setting
from torch import Tensor, nn

from mixadapters import kernels
from mixadapters.kernels import triton as backend
from mixadapters.kernels.problem import PARAMETERS, Problem
from mixadapters.kernels.triton import configs
from mixadapters.kernels.triton import plan as planning

DEVICE = "cpu" if DRY else "cuda"
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
FIRST = 2  # cases whose kernels are waited for
SLOW = ("loop_all_rows", "row_loop", "gathered", "segments")  # left out where others say the same


def compile_ahead(seconds: float) -> ProcessPoolExecutor | None:
    """Begin to compile what the run launches, in its order, on all cores, and wait a while for what comes first.

    The rest goes on beside the run. A process that has touched the GPU could not be forked, so this comes before all
    else; the pool must be kept, and be shut down at the end.
    """
    from check import ARCHITECTURES, compile_launch

    with ProcessPoolExecutor(1, get_context("fork")) as one:
        arch = one.submit(configs.architecture, torch.device(DEVICE)).result()
    if arch not in ARCHITECTURES:
        return None
    todo = to_compile(arch)
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork"))
    began = time.perf_counter()
    results = [(first, pool.submit(compile_launch, made, arch, "")) for first, made in todo]
    done = wait([result for first, result in results if first], timeout=seconds).done
    print(f"{len(done)} kernels compiled in {time.perf_counter() - began:.0f} s, of {len(todo)}", flush=True)
    return pool


def to_compile(arch: str) -> list[tuple[bool, Any]]:
    """Each launch that is compiled by itself, in the order of the run, and whether the first parts need it."""
    from check import launches, specialization

    first = [problem(on_meta(case), **meta(changes)) for _, case, changes in numeric_cases()]
    later = [problem(on_meta(case)) for case in cases()]
    todo: dict[Any, tuple[bool, Any]] = {}
    for number, p in enumerate([*first, *later]):
        for made in launches(p, arch):
            todo.setdefault(specialization(made), (number < len(first) + FIRST, made))
    return list(todo.values())


def meta(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in changes.items()}


def on_meta(case: Case) -> SimpleNamespace:
    """A Setting without data."""

    def make(*shape: int, dtype: torch.dtype = DTYPES[case.dtype]) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, experts = make(case.T, case.d), make(case.E, case.r, case.d)
    mixture = case.task == "mixture"
    return SimpleNamespace(
        case=case, x=rows, base=rows, down=experts, up=experts, bias=make(case.E, case.r),
        scale=make(case.E, dtype=torch.float32), weights=make(case.T, case.k) if mixture else None,
        indices=make(case.T, case.k, dtype=torch.int64), run=case.T // (case.sequences or case.T),
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """In the order of their weight: the clock may stop the run."""
    if DRY:
        for training in (False, True):
            yield Case("prefill", "lora", 32, 4, 8, 32, sequences=2, dtype="fp32", training=training)
            yield Case("mixtures", "mixture", 24, 4, 8, 32, k=2, dtype="fp32", training=training)
        yield Case("decode", "lora", 4, 4, 8, 32, dtype="fp32")
        return
    T, d, bf16 = 8192, 4096, {"dtype": "bf16"}
    for training in (False, True):
        yield Case("figures", "lora", T, 8, 16, d, sequences=8, training=training, **bf16)
    yield from (Case("decode", "lora", B, max(B, 8), 16, d, **bf16) for B in (1, 8, 32, 64))
    for training in (False, True):
        yield Case("figures", "mixture", T, 8, 16, d, k=8, training=training, **bf16)
    for training in (False, True):
        yield from (
            Case("adapters", "lora", T, E, 16, d, sequences=64, training=training, **bf16) for E in (1, 64, 1024)
        )
        yield from (Case("ranks", "lora", T, 8, r, d, sequences=8, training=training, **bf16) for r in (8, 64, 128))
        yield Case("mixtures", "mixture", T, 8, 16, d, k=2, training=training, **bf16)
        yield Case("mixtures", "mixture", T, 16, 64, d, k=2, training=training, **bf16)
        yield Case("rows", "lora", T, 64, 16, d, training=training, **bf16)
        yield Case("small", "lora", 2048, 8, 16, 768, sequences=8, training=training, **bf16)


class Report:
    """Results, written as they come, until the clock stops."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.path, self.end = out / "gpu.json", time.monotonic() + 60 * minutes
        self.content: dict[str, Any] = {
            "about": about(),
            "numerics": [],
            "results": [],
            "questions": [],
            "left_out": [],
        }
        out.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, label: str, work: Callable[[], dict[str, Any]]) -> None:
        """One entry of a part; an exception is one too."""
        if time.monotonic() > self.end:
            self.content["left_out"].append(f"{part}: {label}")
            return
        began = time.monotonic()
        try:
            found = work()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        self.content[part].append({"label": label, **found})
        print(f"{label} ({time.monotonic() - began:.1f} s): {shown(found)}", flush=True)
        self.write()

    def write(self) -> None:
        """Whole or not at all: whoever stops the run may do so in the middle of it."""
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, indent=1))
        beside.replace(self.path)


def shown(found: dict[str, Any]) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items() if k != "case")


def about() -> dict[str, Any]:
    known = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    if DRY:
        return known | {"device": "triton's interpreter"}
    return known | {
        "device": torch.cuda.get_device_name(),
        "driver_of_torch": torch.version.cuda or torch.version.hip,
        "bytes_per_second": bandwidth(),
    }


def bandwidth() -> float:
    """Of a copy of 2 GiB, counting what is read and what is written."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source)) / 1e3)


def milliseconds(run: Callable[[], object], graph: bool = False) -> float:
    """Median over a tenth of a second, the L2 cache cleared before each call; or replayed as a CUDA graph."""
    if DRY:
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    if graph:
        return triton.testing.do_bench_cudagraph(run, rep=50, quantiles=[0.5])
    return triton.testing.do_bench(run, warmup=20, rep=100, quantiles=[0.5])


# ---- numerics -------------------------------------------------------------------------------------------------------


def problem(setting: Setting | SimpleNamespace, **changes: Any) -> Problem:
    """What the operation is given in a case, without autograd."""
    case, mixture = setting.case, setting.weights is not None
    down, up, bias, weights = (
        None if t is None else t.detach() for t in (setting.down, setting.up, setting.bias, setting.weights)
    )
    p = Problem(
        setting.x.detach(), down.flatten(0, 1), up.flatten(0, 1).t(), (case.r,) * case.E,
        b_down=bias.flatten() if mixture else None, weights=weights, scale=None if mixture else setting.scale,
        indices=None if mixture and case.k == case.E else setting.indices, base=setting.base.detach(),
        act="gelu" if mixture else "identity", run=setting.run,
    )  # fmt: skip
    return p._replace(**changes)


def everything(p: Problem, grad: Tensor) -> dict[str, Tensor]:
    y, kept = backend.forward(p, True)
    asked = ("x", *(name for name in PARAMETERS if getattr(p, name) is not None))
    return {"y": y, **backend.backward(p, kept, grad, frozenset(asked))}


def in_fp64(p: Problem, grad: Tensor) -> dict[str, Tensor]:
    fields = ("x", *PARAMETERS, "base")
    leaves = {n: getattr(p, n).double().requires_grad_() for n in fields if getattr(p, n) is not None}
    fields = {n: t for n, t in leaves.items() if n not in ("x", "down", "up", "gate")}
    with kernels.adapter_backend("reference"):
        y = kernels.lowrank(
            leaves["x"], leaves["down"], leaves["up"], p.ranks, w_gate=leaves.get("gate"), indices=p.indices,
            act=p.act, dropout=p.dropout, seed=p.seed, run=p.run, **fields,
        )  # fmt: skip
    asked = [n for n in leaves if n != "base"]
    gradients = torch.autograd.grad(y, [leaves[n] for n in asked], grad.double(), materialize_grads=True)
    return {"y": y.detach(), **dict(zip(asked, gradients, strict=True))}


def check_numerics(case: Case, **changes: Any) -> dict[str, Any]:
    """Relative errors against fp64, and whether repeats agree in every bit."""
    setting = Setting(case, DEVICE)
    p, grad = problem(setting, **changes), setting.grad
    first, expected = everything(p, grad), in_fp64(p, grad)
    errors = {n: ((first[n].double() - e).norm() / e.norm().clamp_min(1e-30)).item() for n, e in expected.items()}
    repeats = 2 if DRY else 100
    same = sum(
        all(torch.equal(again[n], t) for n, t in first.items())
        for again in (everything(p, grad) for _ in range(repeats))
    )
    worst = max(errors, key=errors.__getitem__)
    passed = errors[worst] < TOLERANCE[case.dtype] and same == repeats
    return {"passed": passed, "worst": worst, "errors": errors, "bit_identical": f"{same} of {repeats}"}


def check_invariance(case: Case) -> dict[str, Any]:
    p = problem(Setting(case, DEVICE), batch_invariant=True)
    y = backend.forward(p, False)[0]
    for rows in (1, 3, 17):
        part = p._replace(x=p.x[:rows], base=p.base[:rows], indices=p.indices[:rows], run=1)
        if not torch.equal(backend.forward(part, False)[0], y[:rows]):
            return {"passed": False, "rows": rows}
    return {"passed": True}


def numeric_cases() -> Iterator[tuple[str, Case, dict[str, Any]]]:
    """Every mode of the kernels: a label, the case, and what its problem has besides."""
    small = {"T": 32, "d": 32, "dtype": "fp32"} if DRY else {"T": 512, "d": 1024, "dtype": "bf16"}
    size, seed = 8 if DRY else 16, torch.tensor(7)
    for dtype in ("fp32",) if DRY else ("bf16", "fp32"):
        routed = Case("numerics", "lora", E=4, r=size, sequences=2, **small | {"dtype": dtype})
        for label, case, changes in (
            ("runs", routed, {}),
            ("runs, dropout", routed, {"dropout": 0.1, "seed": seed}),
            ("rows", replace(routed, sequences=None), {}),
            ("sorted", replace(routed, sequences=None, E=4 if DRY else 32), {"batch_invariant": True}),
            ("mixture", replace(routed, task="mixture", k=4, sequences=None), {}),
            ("mixture, top 2", replace(routed, task="mixture", k=2, sequences=None), {}),
            ("mixture, top 2, sorted", replace(routed, task="mixture", k=2, E=16, r=64, sequences=None), {}),
            ("rank 128", replace(routed, r=128), {}),
        ):
            if not (DRY and "sorted" in label and "top" in label):
                yield f"{label}, {dtype}", case, changes


def numerics(report: Report) -> None:
    for label, case, changes in numeric_cases():
        given = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in changes.items()}
        report.add("numerics", label, lambda case=case, given=given: check_numerics(case, **given))
    rows = next(case for label, case, _ in numeric_cases() if label == "rows, fp32")
    report.add("numerics", "batch invariance", lambda: check_invariance(rows))


# ---- times ----------------------------------------------------------------------------------------------------------


class Given(nn.Linear):
    """A frozen layer whose output is known: what is timed is the adapters alone."""

    output: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def peft_mixed(setting: Setting, cast: bool) -> Callable[[], Tensor]:
    """PEFT's LoRA layer in a mixed batch; `cast`: its adapters in fp32, as they are by default."""
    from peft import LoraConfig, get_peft_model

    case = setting.case
    given = Given(case.d, case.d, bias=False, device=DEVICE, dtype=setting.x.dtype)
    model = get_peft_model(
        nn.Sequential(given), LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=["0"]), "0",
        autocast_adapter_dtype=cast,
    )  # fmt: skip
    for e in range(1, case.E):
        model.add_adapter(str(e), LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=["0"]))
    layer = model.base_model.model[0].to(DEVICE).eval()
    with torch.no_grad():
        for e in range(case.E):
            layer.lora_A[str(e)].weight.copy_(setting.down[e])
            layer.lora_B[str(e)].weight.copy_(setting.up[e].t())
    names = [str(e) for e in setting.owners.tolist()]
    x = setting.x.view(-1, setting.run, case.d)

    def run() -> Tensor:
        return layer(x, adapter_names=names).flatten(0, 1)

    given.output = setting.base.view_as(x).clone()
    return run


def moved(case: Case) -> int:
    """Bytes that must cross the memory bus: x and base in, y out, used weights once; in training those of backward."""
    size = 4 if case.dtype == "fp32" else 2
    used = case.E if case.task == "mixture" else min(case.E, case.sequences or case.T)
    weights = 2 * used * case.r * case.d * size
    forward = 3 * case.T * case.d * size + weights
    # Backward: dy and x for the weights, dy again and dx, all gradients of the experts.
    return forward + case.training * (4 * case.T * case.d * size + weights + 2 * case.E * case.r * case.d * size)


def compare(case: Case, roof: float | None) -> dict[str, Any]:
    """Milliseconds of each contender, its share of the roof for ours, and how far results are apart."""
    setting = Setting(case, DEVICE)
    decode = case.group == "decode"
    contenders: dict[str, Any] = {}
    if decode:
        contenders["ours, CUDA graph"] = (setting.ours, setting.leaves)
    contenders |= {name: c for name, c in setting.contenders().items() if name not in SLOW or name == "ours"}
    if case.task == "lora" and not case.training and case.E <= 64:
        for name, cast in (("peft, fp32 weights", True), ("peft, weights as x", False)):
            try:
                contenders[name] = (peft_mixed(setting, cast), [])
            except Exception as error:  # PEFT may be missing, or older
                print(f"  {name}: {type(error).__name__}: {str(error)[:100]}")
    ms: dict[str, float] = {}
    failed: dict[str, str] = {}
    expected = setting.ours().detach().float()
    for name, (run, leaves) in contenders.items():

        def step(run=run, leaves=leaves) -> object:
            if case.training:
                return torch.autograd.grad(run(), leaves, setting.grad, allow_unused=True)
            with torch.inference_mode():
                return run()

        try:
            error = ((run().detach().float() - expected).norm() / expected.norm()).item()
            if error > TOLERANCE[case.dtype]:
                raise ValueError(f"computes something else, relative error {error:.1e}")
            step()
            ms[name] = milliseconds(step, graph="graph" in name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    found: dict[str, Any] = {"case": asdict(case), "ms": ms, "failed": failed, "bytes": moved(case)}
    if roof:
        found["roof_ms"] = 1e3 * found["bytes"] / roof
        found["share_of_roof"] = found["roof_ms"] / ms["ours"]
    return found


# ---- questions that only a GPU answers ------------------------------------------------------------------------------


@contextmanager
def other_tiles(kernel: str, **fields: int) -> Iterator[None]:
    original = configs.tiles

    def tiles(name: str, *args: Any, **kwargs: Any) -> configs.Tiles:
        found = original(name, *args, **kwargs)
        return found._replace(**fields) if name == kernel else found

    with patch.object(configs, "tiles", tiles):
        yield


@contextmanager
def other_parts(kernel: str, number: int) -> Iterator[None]:
    original = configs.parts

    def parts(name: str, *args: Any, **kwargs: Any) -> int:
        return number if name == kernel else original(name, *args, **kwargs)

    with patch.object(configs, "parts", parts):
        yield


def questions(report: Report) -> None:
    T, d = (32, 64) if DRY else (8192, 4096)
    kind = {"dtype": "fp32" if DRY else "bf16"}
    lora = Case("questions", "lora", T, 8, 16, d, sequences=8, **kind)

    def timed(case: Case, backward: bool = False, **changes: Any) -> dict[str, float]:
        setting = Setting(case, DEVICE)
        p, grad = problem(setting, **changes), setting.grad
        if not backward:
            return {"forward_ms": milliseconds(lambda: backend.forward(p, False))}
        _, kept = backend.forward(p, True)
        asked = frozenset(("x", "down", "up"))
        return {"backward_ms": milliseconds(lambda: backend.backward(p, kept, grad, asked))}

    def ask(label: str, context: Any, case: Case, **kwargs: Any) -> None:
        def work() -> dict[str, float]:
            with context:
                return timed(case, **kwargs)

        report.add("questions", label, work)

    for rows in (32, 64, 128):
        ask(f"rows of a tile, shrink: {rows}", other_tiles("shrink", rows=rows), lora)
        ask(f"rows of a tile, expand: {rows}", other_tiles("expand", rows=rows), lora)
    for width in (64, 128):
        ask(f"columns of a step, shrink: {width}", other_tiles("shrink", width=width), lora)
        ask(f"columns of a step, expand: {width}", other_tiles("expand", width=width), lora)
    for number in (1, 2, 4, 8):
        ask(f"column parts of expand: {number}", other_parts("expand", number), lora)
        ask(f"row parts of wgrad: {number}", other_parts("wgrad", number), lora, backward=True)
        ask(f"parts of shrink: {number}", other_parts("shrink", number), lora)
    # From which total rank on do routed rows beat the product over all experts?
    for experts in (8,) if DRY else (8, 12, 16, 32):
        mixture = Case("questions", "mixture", T, experts, 16, d, k=2, **kind)
        ask(f"top 2 of {experts} x r16, windows", patch.object(configs, "WIDEST", 256), mixture)
        ask(f"top 2 of {experts} x r16, routed", patch.object(configs, "WIDEST", 16), mixture)
    # What do addresses from a table of sorted rows cost? The same rows, in the same order, by run and sorted.
    ask("8 runs, by run", patch.object(configs, "FEW_ROWS", 0), lora)
    ask("8 runs, sorted", patch.object(planning, "windows", lambda ranks: [(0, 0)] * 2), lora, run=1)
    report.add("questions", "what python costs", lambda: python_cost(lora))
    report.add("questions", "does L2 keep dy between its two readers", lambda: cached_gradient(lora))


def python_cost(case: Case) -> dict[str, float]:
    """A decoding step's call alone, without waiting for the GPU, and replayed as a graph."""
    setting = Setting(replace(case, T=4 if DRY else 32, sequences=None), DEVICE)
    with torch.inference_mode():
        setting.ours()
        began, number = time.perf_counter(), 1 if DRY else 200
        for _ in range(number):
            setting.ours()
        call = 1e6 * (time.perf_counter() - began) / number
        return {"call_us": call, "graph_us": 1e3 * milliseconds(setting.ours, graph=True)}


def cached_gradient(case: Case) -> dict[str, float]:
    """dx and dup in one backward against each alone: less than the sum is what the cache, or the launches, save."""
    setting = Setting(case, DEVICE)
    p, grad = problem(setting), setting.grad
    _, kept = backend.forward(p, True)
    return {
        "+".join(asked): milliseconds(lambda asked=asked: backend.backward(p, kept, grad, frozenset(asked)))
        for asked in (("x",), ("up",), ("x", "up"))
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = [result for result in results if "ours" in result.get("ms", {})]
    figure, axis = plt.subplots(figsize=(11, 0.35 * len(results) + 2))
    for name in dict.fromkeys(name for result in results for name in (*result["ms"], "roof")):
        times = [result.get("roof_ms") if name == "roof" else result["ms"].get(name) for result in results]
        at = [(t / r["ms"]["ours"], i) for i, (t, r) in enumerate(zip(times, results, strict=True)) if t]
        if at:
            axis.plot(*zip(*at, strict=True), "k|" if name == "roof" else "o", label=name, alpha=0.7, markersize=9)
    axis.axvline(1, color="k", linewidth=0.8)
    axis.set(xscale="log", yticks=range(len(results)), xlabel="time / ours")
    axis.set_yticklabels([result["label"] for result in results], fontsize=7)
    axis.invert_yaxis()
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for gpu.json and gpu.png")
    parser.add_argument("--minutes", type=float, default=7.0, help="no case begins later than this")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases in triton's interpreter")
    arguments = parser.parse_args()
    if not DRY and not torch.cuda.device_count():
        parser.error("no GPU is at hand; --dry-run shows that the script runs")
    pool = None if DRY else compile_ahead(arguments.minutes * 60 / 10)
    report = Report(arguments.out, arguments.minutes)
    print(shown(report.content["about"]))
    numerics(report)
    roof = report.content["about"].get("bytes_per_second")
    with kernels.adapter_backend("triton" if DRY else None):
        for case in cases():
            report.add("results", f"{case.group}: {case.label}", lambda case=case: compare(case, roof))
    questions(report)
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)
    try:
        plot(report.content["results"], arguments.out / "gpu.png")
    except Exception as error:  # the figures are what counts
        print(f"no plot: {type(error).__name__}: {error}")
    parts = ("numerics", "results", "questions")
    errors = [entry["label"] for part in parts for entry in report.content[part] if "error" in entry]
    wrong = [entry["label"] for entry in report.content["numerics"] if not entry.get("passed")]
    report.content["wrong"], report.content["errors"] = wrong, errors
    report.write()
    print(f"wrote {report.path}; wrong: {wrong or 'none'}; errors: {errors or 'none'}; left out: "
          f"{report.content['left_out'] or 'none'}")  # fmt: skip
    return int(bool(wrong or errors))


if __name__ == "__main__":
    sys.exit(main())
