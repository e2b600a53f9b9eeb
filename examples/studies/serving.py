"""What serving costs: 64 requests over 16 adapters, against one adapter, and against PEFT's `generate`.

    python examples/studies/serving.py            # all tables, on one thread
    python examples/studies/serving.py --part many --adapters 1000
    python examples/studies/serving.py --part schedules --schedules 20    # whether each gets what it gets alone

Random models and adapters: times do not depend on what they say. Each table is of one run on one machine, so that its
ratios mean something; times of shared machines do not.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from mixadapters import BottleneckConfig, MoAConfig
from mixadapters.core.starting import whole
from mixadapters.serving import AdapterServer

VOCAB, NEW = 256, 8
LORA = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
MIXED: list[Any] = [
    LORA,
    BottleneckConfig(r=8, task_type="CAUSAL_LM"),
    MoAConfig(num_experts=4, r=8, target_modules=["down_proj"], task_type="CAUSAL_LM"),
]


def base(width: int = 128, layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def save(config: Any, folder: Path, seed: int, **size: int) -> Path:
    model = get_peft_model(base(**size), config)
    torch.manual_seed(seed)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def prompts(count: int, least: int, most: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(least, most))] for _ in range(count)]


def median(measure: Callable[[], float], times: int) -> float:
    return statistics.median(measure() for _ in range(times))


def served(server: AdapterServer, asked: list[list[int]], names: list[str]) -> float:
    """CPU seconds until all requests, which come at once, are done; the server is at work all that time."""
    start = time.process_time()
    requests = [server.submit(prompt, names[i % len(names)], max_new_tokens=NEW) for i, prompt in enumerate(asked)]
    for request in requests:
        request.result()
    return time.process_time() - start


def throughput(folder: Path, rounds: int) -> None:
    """64 requests over 16 LoRA adapters, and over 16 of three types: CPU time, in turn."""
    asked = prompts(64, 4, 32)
    settings = GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    names = [f"n{i}" for i in range(16)]
    for i, name in enumerate(names):
        save(LORA, folder / name, i)
        save(MIXED[i % 3], folder / f"mixed_{name}", i)
    peft = PeftModel.from_pretrained(base(), folder / "n0", adapter_name="n0")
    for name in names[1:]:
        peft.load_adapter(folder / name, adapter_name=name)
    peft.eval()
    lora, mixed = (AdapterServer(base(), cache_tokens=16384, max_batch_tokens=256) for _ in range(2))
    for name in names:
        lora.load(name, folder / name)
        mixed.load(name, folder / f"mixed_{name}")

    @torch.no_grad()
    def one_by_one() -> float:
        start = time.process_time()
        for i, prompt in enumerate(asked):
            peft.set_adapter(names[i % 16])
            ids = torch.tensor([prompt])
            peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return time.process_time() - start

    @torch.no_grad()
    def in_one_batch() -> float:
        longest = max(map(len, asked))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in asked])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked])
        start = time.process_time()
        rows = [names[i % 16] for i in range(64)]
        peft.generate(input_ids=ids, attention_mask=mask, generation_config=settings, adapter_names=rows)
        return time.process_time() - start

    seconds: dict[str, list[float]] = {}
    with lora, mixed:
        ways = {
            "16 LoRA adapters, served": lambda: served(lora, asked, names),
            "1 LoRA adapter, served": lambda: served(lora, asked, names[:1]),
            "16 adapters of three types, served": lambda: served(mixed, asked, names),
            "PEFT's generate, one by one": one_by_one,
            "PEFT's generate, one mixed batch": in_one_batch,
        }
        for way in ways.values():
            way()
        for _ in range(rounds):
            for name, way in ways.items():
                seconds.setdefault(name, []).append(way())
    first = statistics.median(seconds["16 LoRA adapters, served"])
    print(
        "| 64 requests of 8 new tokens | requests / CPU s | tokens / CPU s | over 16 LoRA, served |\n|---|---|---|---|"
    )
    for name, found in seconds.items():
        took = statistics.median(found)
        print(f"| {name} | {64 / took:.1f} | {64 * NEW / took:.0f} | {first / took:.2f} |", flush=True)


def first_token(folder: Path, rounds: int) -> None:
    """A short request behind ten long prompts, by the order in which a server reads prompts."""
    save(LORA, folder / "law", 0)
    long = prompts(10, 512, 512)
    print("| tokens of a step | prompts are read | first token of a short request | of the last long one | all done |")
    print("|---|---|---|---|---|", flush=True)
    for tokens in (64, 256):
        found: dict[str, list[tuple[float, ...]]] = {"fifo": [], "fair": [], "alone": []}
        sizes: Any = {"cache_tokens": 16384, "max_batch_tokens": tokens, "share_prefixes": False}
        servers = {name: AdapterServer(base(), scheduler=name, **sizes) for name in ("fifo", "fair")}
        for server in servers.values():
            server.load("law", folder / "law")
        with servers["fifo"], servers["fair"]:
            for _ in range(rounds + 1):  # in turn: what else the machine does is shared by all
                for name, server in servers.items():
                    found[name].append(behind(server, long))
                found["alone"].append(behind(servers["fair"], []))
        for name, times in found.items():
            short, last, done = (statistics.median(column) for column in zip(*times[1:], strict=True))
            print(f"| {tokens} | {name} | {short:.3f} s | {last:.2f} s | {done:.2f} s |", flush=True)


def behind(server: AdapterServer, long: list[list[int]]) -> tuple[float, float, float]:
    """Seconds to the first token of a short request behind long ones, to the last first token, and until all end."""
    start = time.monotonic()
    requests = [server.submit(prompt, "law", max_new_tokens=4) for prompt in long]
    short = server.submit([5, 6, 7], "law", max_new_tokens=1)
    requests.append(short)
    for request in requests:
        request.result()
    return short.first_token or 0.0, max(request.first_token or 0.0 for request in requests), time.monotonic() - start


def fill(server: AdapterServer, count: int) -> None:
    """Copies of the only adapter, up to `count`, past all verbs: a thousand loads would take the minutes."""
    parts = server.adapters.residents.parts_of("n0")
    for i in range(1, count):
        for host, adapter in parts:
            host.adapters[f"n{i}"] = copy.deepcopy(adapter)
        server.model.peft_config[f"n{i}"] = server.model.peft_config["n0"]
        server.adapters._enlist_resident(f"n{i}")


def many(folder: Path, adapters: int, rounds: int) -> None:
    """Loading one more adapter where there are few, and where there are many: CPU time, in turn."""
    size = {"width": 32, "layers": 2}
    save(BottleneckConfig(r=8, task_type="CAUSAL_LM"), folder / "n0", 0, **size)
    servers = {count: AdapterServer(base(**size), cache_tokens=1024) for count in (10, adapters)}
    for count, server in servers.items():
        server.load("n0", folder / "n0")
        fill(server, count)
    costs: dict[tuple[int, bool], list[float]] = {}
    for _ in range(rounds):
        for count, server in servers.items():
            for known in (True, False):
                forms = dict(server.adapters._forms)
                if not known:
                    server.adapters._forms.clear()
                gc.collect()
                costs.setdefault((count, known), []).append(cpu_seconds(partial(server.load, "x", folder / "n0")))
                server.unload("x")
                server.adapters._forms.update(forms)
    few = {known: statistics.median(costs[10, known]) for known in (True, False)}
    print("| adapters in the model | the first of a form | over that at 10 | a next one | over that at 10 |")
    print("|---|---|---|---|---|")
    for count in servers:
        cells = []
        for known in (False, True):
            found = statistics.median(costs[count, known])
            cells.append(f"{1e3 * found:.2f} ms | {found / few[known]:.2f}")
        print(f"| {count} | {' | '.join(cells)} |", flush=True)


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def read(folder: Path) -> None:
    """What no load can do without: the config parsed, the file of weights opened, and every tensor read."""
    json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        for key in weights.keys():  # noqa: SIM118
            weights.get_tensor(key)


def loads(folder: Path, adapters: int) -> None:
    """Loading many adapters of one form, over reading their files: CPU time, in turn."""
    size = {"width": 32, "layers": 2}
    print("| adapters | each read | each loaded | all loaded, over all read | the first of its form |")
    print("|---|---|---|---|---|", flush=True)
    for config in MIXED:
        kind = config.peft_type.value
        server, first = AdapterServer(base(**size), cache_tokens=1024), save(config, folder / kind, 0, **size)
        copies = [Path(shutil.copytree(first, folder / f"{kind}{i}")) for i in range(adapters)]
        began, reads, loaded = cpu_seconds(partial(server.load, "first", first)), [], []
        for i, copied in enumerate(copies):
            reads.append(cpu_seconds(partial(read, copied)))
            loaded.append(cpu_seconds(partial(server.load, f"n{i}", copied)))
        print(
            f"| {adapters} {kind} | {1e3 * statistics.median(reads):.2f} ms | {1e3 * statistics.median(loaded):.2f} "
            f"ms | {sum(loaded) / sum(reads):.2f} | {1e3 * began:.1f} ms |", flush=True,
        )  # fmt: skip


OWNERS = {f"{os.sep}mixadapters{os.sep}": "ours", f"{os.sep}peft{os.sep}": "PEFT's"}


class Shares:
    """CPU time by whose code runs: ours, or PEFT's. What either calls elsewhere counts as the caller's."""

    def __init__(self) -> None:
        self.seconds = {"ours": 0.0, "PEFT's": 0.0}
        self._stack = ["PEFT's"]  # the verb is PEFT's
        self._last = 0.0

    def __enter__(self) -> Shares:
        self._last = time.process_time()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)

    def _event(self, frame: Any, event: str, _: Any) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._last
        if event == "call":
            file = frame.f_code.co_filename
            self._stack.append(next((who for part, who in OWNERS.items() if part in file), self._stack[-1]))
        elif event == "return" and len(self._stack) > 1:
            self._stack.pop()
        self._last = time.process_time()

    @property
    def ours(self) -> float:
        return self.seconds["ours"] / sum(self.seconds.values())


def verbs(folder: Path, rounds: int) -> None:
    """PEFT's verbs on a model with many adapters of ours, and of PEFT's LoRA: CPU time, in turn."""
    size = {"width": 32, "layers": 2}
    configs: dict[str, Any] = {"BOTTLENECK": MIXED[1], "LORA": LORA}
    models: dict[str, Any] = {}
    for kind, config in configs.items():
        models[kind] = PeftModel.from_pretrained(base(**size), save(config, folder / kind, 0, **size), "n0")
    print("| verb | adapters | BOTTLENECK | of it our code | LORA |\n|---|---|---|---|---|", flush=True)
    for count in (10, 100, 300):
        for kind, model in models.items():
            for i in range(len(model.peft_config), count):
                model.add_adapter(f"n{i}", copy.deepcopy(configs[kind]))
        seconds: dict[tuple[str, str], list[float]] = {}
        shares: dict[str, float] = {}
        for turn in range(rounds + 1):
            for kind, model in models.items():
                calls: dict[str, Callable[[], object]] = {
                    "add_adapter": partial(model.add_adapter, "added", copy.deepcopy(configs[kind])),
                    "load_adapter": partial(model.load_adapter, folder / kind, "loaded"),
                    "set_adapter": partial(model.set_adapter, "loaded"),
                    "delete_adapter": partial(model.delete_adapter, "added"),
                }
                for verb, call in calls.items():
                    if turn < rounds:
                        seconds.setdefault((verb, kind), []).append(cpu_seconds(call))
                    else:  # a turn of its own: watching costs
                        with Shares() as watched:
                            call()
                        shares |= {verb: watched.ours} if kind == "BOTTLENECK" else {}
                model.set_adapter("n0")
                model.delete_adapter("loaded")
        for verb, ours in shares.items():
            ms = {kind: f"{1e3 * statistics.median(seconds[verb, kind]):.1f} ms" for kind in models}
            print(f"| `{verb}` | {count} | {ms['BOTTLENECK']} | {100 * ours:.0f} % | {ms['LORA']} |", flush=True)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(folder: Path, adapters: int, rounds: int) -> None:
    """Many adapters of which 16 lie in the model: the others in host memory, or in files. Of requests the CPU time."""
    size, config = {"width": 64, "layers": 2}, BottleneckConfig(r=64, task_type="CAUSAL_LM")
    save(config, folder / "n", 0, **size)
    print("| adapters | the others lie | memory of each | in files | a request, adapter in the model | away |")
    print("|---|---|---|---|---|---|", flush=True)
    for where in ("in files", "in host memory"):
        (folder / where).mkdir()
        files = {"offload_folder": folder / where} if where == "in files" else {}
        server = AdapterServer(base(**size), cache_tokens=1024, max_resident=16, share_prefixes=False, **files)
        for i in range(20):  # what is made once
            server.load(f"warm{i}", folder / "n")
        gc.collect()
        before = resident_bytes()
        for i in range(adapters):
            server.load(f"n{i}", folder / "n")
        gc.collect()
        each = (resident_bytes() - before) / adapters / 2**10
        filed = server.adapters.residents.filed_bytes / (adapters + 4) / 2**10
        with server:

            def first(name: str, server: AdapterServer = server) -> float:
                return cpu_seconds(lambda: server.submit([5, 6, 7], name, max_new_tokens=1).result())

            first(f"n{adapters - 1}")
            near = statistics.median(first(f"n{adapters - 1}") for _ in range(rounds))
            away = statistics.median(first(f"n{i}") for i in range(rounds))
        print(
            f"| {adapters} | {where} | {each:.0f} KiB | {filed:.0f} KiB | {1e3 * near:.1f} ms | {1e3 * away:.1f} ms |",
            flush=True,
        )


def soak(folder: Path, count: int, clients: int = 8) -> None:
    """Clients that ask one request after the other, over 16 adapters of three types of which 8 lie in the model."""
    server = AdapterServer(base(64, 2), cache_tokens=4096, max_batch_tokens=128, max_resident=8)
    names = [f"n{i}" for i in range(16)]
    for i, name in enumerate(names):
        server.load(name, save(MIXED[i % 3], folder / name, i, width=64, layers=2))
    seconds: list[float] = []

    def client(number: int, share: int) -> None:
        rng = random.Random(number)
        for _ in range(share):
            prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(2, 60))]
            request = server.submit(prompt, rng.choice(names), max_new_tokens=rng.randint(1, 8))
            if rng.random() < 0.05:
                request.cancel()
                continue
            request.result()
            seconds.append(time.monotonic() - request.created)

    def wave(requests: int) -> int:
        threads = [threading.Thread(target=client, args=(n, requests // clients)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        return resident_bytes()

    with server:
        warm = wave(count // 4)
        seconds.clear()
        start = time.perf_counter()
        memory = [wave(count // 4) for _ in range(4)]
        took = time.perf_counter() - start
    ordered = sorted(seconds)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))]
    hits = server.adapters.hits / (server.adapters.hits + server.adapters.misses)
    print("| requests | clients | requests/s | p50 | p99 | hit rate | memory by quarters, over that after warm-up |")
    print("|---|---|---|---|---|---|---|")
    shares = ", ".join(f"{now / warm:.3f}" for now in memory)
    print(
        f"| {count} | {clients} | {len(seconds) / took:.1f} | {p50:.2f} s | {p99:.2f} s | {hits:.2f} | {shares} |",
        flush=True,
    )


def schedules(folder: Path, count: int, requests: int = 64) -> None:
    """Requests over 16 adapters of three types and the base, of random lengths and arrivals, some given up.

    What each gets is compared with what PEFT's `generate` makes of the same prompt alone, with the same folder.
    """
    size = {"width": 64, "layers": 2}
    names = ["__base__", *(f"n{i}" for i in range(16))]
    for i, name in enumerate(names[1:]):
        save(MIXED[i % 3], folder / name, i, **size)
    pefts = [PeftModel.from_pretrained(base(**size), folder / f"n{kind}", f"n{kind}").eval() for kind in range(3)]
    for i in range(3, 16):
        pefts[i % 3].load_adapter(folder / f"n{i}", f"n{i}")

    @torch.no_grad()
    def alone(prompt: list[int], name: str, tokens: int) -> list[int]:
        settings = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        ids = torch.tensor([prompt])
        peft = pefts[0 if name == names[0] else int(name[1:]) % 3]
        if name != names[0]:
            peft.set_adapter(name)
        with peft.disable_adapter() if name == names[0] else nullcontext():
            output = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return output[0, len(prompt) :].tolist()

    print(
        "| schedule | adapters in the model | given up | equal to alone | equal to the base |\n|---|---|---|---|---|"
    )
    equal = 0
    for seed in range(count):
        rng, resident = random.Random(seed), (None, 8, 4)[seed % 3]
        asked = [([rng.randrange(3, VOCAB) for _ in range(rng.choice((1, 3, 8, 21, 60)))], rng.choice(names),
                  rng.randint(1, 12)) for _ in range(requests)]  # fmt: skip
        server = AdapterServer(base(**size), cache_tokens=2048, max_batch_tokens=64, max_resident=resident)
        for name in rng.sample(names[1:], 16):
            server.load(name, folder / name)
        with server:
            found, given_up = [], 0
            for prompt, name, tokens in asked:
                found.append(server.submit(prompt, name, max_new_tokens=tokens))
                if rng.random() < 0.2:
                    given_up += 1
                    company = server.submit(prompt[::-1], rng.choice(names), max_new_tokens=40)
                    threading.Timer(rng.random() / 20, company.cancel).start()
                time.sleep(rng.choice((0.0, 0.0, rng.random() / 100)))
            tokens = [request.result(120).tokens for request in found]
        same = sum(got == alone(*one) for got, one in zip(tokens, asked, strict=True))
        as_base = sum(got == alone(p, names[0], n) for got, (p, _, n) in zip(tokens, asked, strict=True))
        equal += same
        print(f"| {seed} | {resident or 16} | {given_up} | {same}/{requests} | {as_base} |", flush=True)
    print(f"| all | | | {equal}/{count * requests} | |", flush=True)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", help="one table; default: all",
        choices=["throughput", "first", "many", "loads", "verbs", "memory", "schedules", "soak"],
    )  # fmt: skip
    parser.add_argument("--adapters", type=whole(1), default=1000)
    parser.add_argument("--requests", type=whole(1), default=2000, help="of the soak")
    parser.add_argument("--schedules", type=whole(1), default=20)
    parser.add_argument("--rounds", type=whole(1), default=5)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    parts: dict[str, Callable[[Path], None]] = {
        "throughput": lambda folder: throughput(folder, options.rounds),
        "first": lambda folder: first_token(folder, options.rounds),
        "many": lambda folder: many(folder, options.adapters, 3 * options.rounds),
        "loads": lambda folder: loads(folder, options.adapters),
        "verbs": lambda folder: verbs(folder, options.rounds),
        "memory": lambda folder: memory(folder, options.adapters, 3 * options.rounds),
        "schedules": lambda folder: schedules(folder, options.schedules),
        "soak": lambda folder: soak(folder, options.requests),
    }
    for name, part in parts.items():
        if options.part in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                part(Path(folder))


if __name__ == "__main__":
    main()
