"""What serving costs: 64 requests over 16 adapters, against one adapter, and against PEFT's `generate`.

    python examples/studies/serving.py            # all tables, on one thread
    python examples/studies/serving.py --part many --adapters 1000

Random models and adapters: times do not depend on what they say. Each table is of one run on one machine, so that its
ratios mean something; times of shared machines do not.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from mixadapters import BottleneckConfig, MoAConfig
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
    """Seconds until all requests, which come at once, are done."""
    start = time.perf_counter()
    requests = [server.submit(prompt, names[i % len(names)], max_new_tokens=NEW) for i, prompt in enumerate(asked)]
    for request in requests:
        request.result()
    return time.perf_counter() - start


def throughput(folder: Path, rounds: int) -> None:
    """64 requests over 16 LoRA adapters, and over 16 of three types."""
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
        start = time.perf_counter()
        for i, prompt in enumerate(asked):
            peft.set_adapter(names[i % 16])
            ids = torch.tensor([prompt])
            peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return time.perf_counter() - start

    @torch.no_grad()
    def in_one_batch() -> float:
        longest = max(map(len, asked))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in asked])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked])
        start = time.perf_counter()
        rows = [names[i % 16] for i in range(64)]
        peft.generate(input_ids=ids, attention_mask=mask, generation_config=settings, adapter_names=rows)
        return time.perf_counter() - start

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
        for _ in range(rounds):  # in turn: what else the machine does is shared by all
            for name, way in ways.items():
                seconds.setdefault(name, []).append(way())
    first = statistics.median(seconds["16 LoRA adapters, served"])
    print("| 64 requests of 8 new tokens | requests/s | tokens/s | over 16 LoRA, served |\n|---|---|---|---|")
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
        server.adapters._enlist(f"n{i}")


def many(folder: Path, adapters: int, rounds: int) -> None:
    """Loading one more adapter where there are few, and where there are many: CPU time, in turn."""
    size = {"width": 32, "layers": 2}
    save(BottleneckConfig(r=8, task_type="CAUSAL_LM"), folder / "n0", 0, **size)
    servers = {count: AdapterServer(base(**size), cache_tokens=1024) for count in (10, adapters)}
    for count, server in servers.items():
        server.load("n0", folder / "n0")
        fill(server, count)
    costs: dict[int, list[float]] = {count: [] for count in servers}
    for _ in range(rounds):
        for count, server in servers.items():
            gc.collect()
            start = time.process_time()
            server.load("x", folder / "n0")
            costs[count].append(time.process_time() - start)
            server.unload("x")
    few = statistics.median(costs[10])
    print("| adapters in the model | loading one more | over that at 10 |\n|---|---|---|")
    for count, found in costs.items():
        print(
            f"| {count} | {1e3 * statistics.median(found):.1f} ms | {statistics.median(found) / few:.2f} |", flush=True
        )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(folder: Path, adapters: int, rounds: int) -> None:
    """Many adapters of which 16 lie in the model: the others in host memory, or in files."""
    size, config = {"width": 64, "layers": 2}, BottleneckConfig(r=64, task_type="CAUSAL_LM")
    save(config, folder / "n", 0, **size)
    print("| adapters | the others lie | memory of each | in files | first token, in the model | away |")
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
                request = server.submit([5, 6, 7], name, max_new_tokens=1)
                request.result()
                return request.first_token or 0.0

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


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", choices=["throughput", "first", "many", "memory", "soak"], help="one table; default: all"
    )
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=2000, help="of the soak")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    parts: dict[str, Callable[[Path], None]] = {
        "throughput": lambda folder: throughput(folder, options.rounds),
        "first": lambda folder: first_token(folder, options.rounds),
        "many": lambda folder: many(folder, options.adapters, 3 * options.rounds),
        "memory": lambda folder: memory(folder, options.adapters, 3 * options.rounds),
        "soak": lambda folder: soak(folder, options.requests),
    }
    for name, part in parts.items():
        if options.part in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                part(Path(folder))


if __name__ == "__main__":
    main()
