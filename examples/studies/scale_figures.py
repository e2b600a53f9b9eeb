"""What adapters of a large base weigh, and what a training step sends: the tables of docs/scale.md.

    python examples/studies/scale_figures.py  # seconds: nothing is loaded, the model lies on the meta device

The base has the sizes of Llama 3 8B in bfloat16; adapters train in float32. Bytes are those of the formulas of
`mixadapters.sharding`, for collectives that go round a ring.
"""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mixadapters import MoAConfig
from mixadapters.sharding import ddp_bytes_per_step, experts_bytes_per_step, fsdp2_bytes_per_step, padded_bytes
from mixadapters.surgery import report

TOKENS = 8192  # of a micro-batch of one process
MOMENTS = 12  # bytes beside a trained float32 parameter: its gradient and AdamW's two moments


def tables() -> str:
    """Memory by kind of adapter, and bytes by engine for 8 and 256 processes."""
    memory = ["| experts per layer | experts | of one expert | trained, with moments | share of the base |"]
    memory.append("|---|---|---|---|---|")
    sent = ["| experts per layer | engine | a process sends, of 8 | of 256 |", "|---|---|---|---|"]
    for experts, rank in ((8, 16), (64, 16)):
        with torch.device("meta"):
            sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
            heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
            base = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16)
        frozen = sum(p.numel() * p.element_size() for p in base.parameters())
        model = get_peft_model(
            base, MoAConfig(num_experts=experts, r=rank, target_modules=["down_proj"]), low_cpu_mem_usage=True
        )
        found = report(model)
        held = sum(4 * layer.parameters for layer in found.layers)
        trains = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(4 * p.numel() for p in trains)
        name = f"{experts} of rank {rank}"
        memory.append(
            f"| {name} | {_size(held)} | {_size(held / experts)} | {_size(gradients + MOMENTS // 4 * gradients)} "
            f"| {held / frozen:.1%} |"
        )
        for engine, traffic in _engines(model, frozen, gradients, trains).items():
            sent.append(f"| {name} | {engine} | {_size(traffic[8])} | {_size(traffic[256])} |")
    return "\n".join([*memory, "", *sent])


def _engines(model, frozen: int, gradients: int, trains: list) -> dict[str, dict[int, float]]:
    layers = model.base_model.model.model.layers
    found: dict[str, dict[int, float]] = {"DDP": {}, "FSDP2": {}, "experts over processes": {}}
    for processes in (8, 256):
        blocks = [padded_bytes(layer.parameters(), processes) for layer in layers]
        rest = padded_bytes(model.parameters(), processes) - sum(blocks)
        found["DDP"][processes] = ddp_bytes_per_step(gradients).sent(processes)
        traffic = fsdp2_bytes_per_step(blocks, padded_bytes(trains, processes), rest)
        found["FSDP2"][processes] = traffic.sent(processes)
        one = experts_bytes_per_step(TOKENS, 14336, 4096, 2)
        found["experts over processes"][processes] = len(layers) * one.sent(processes)
    return found


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


if __name__ == "__main__":
    print(tables())
