"""What a routed mixture of LoRA costs, against one LoRA of the rank that a token uses, and a loop over experts.

    python kernels/bench/mixtures.py --width 512

A Llama of four layers with random weights, all its linear layers adapted: 8 experts of rank 8 under top-2, with a
router for each layer, block or model; one LoRA of rank 16; experts run one by one on the rows that chose them; and
the mathematics of a router for each layer as the fewest calls of torch that one would write by hand, which is what a
library can at best come to.
Each round runs every contender once; ratios are medians over rounds, of the CPU time of this thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from mixadapters import MoAConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS, RANK, CHOSEN, VOCABULARY = 8, 8, 2, 2000


class Loop(nn.Module):
    """A linear layer with experts of LoRA, each run on the rows that chose it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.router = base, nn.Linear(base.in_features, EXPERTS, bias=False)
        self.down = nn.ParameterList(torch.randn(RANK, base.in_features) * 0.02 for _ in range(EXPERTS))
        self.up = nn.ParameterList(torch.randn(base.out_features, RANK) * 0.02 for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows).softmax(-1).topk(CHOSEN)
        total = rows.new_zeros(len(rows), self.base.out_features)
        for expert, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            mine, slot = (chosen == expert).nonzero(as_tuple=True)
            if len(mine):
                total = total.index_add(0, mine, (rows[mine] @ down.T @ up.T) * weights[mine, slot, None])
        return self.base(x) + total.view(*x.shape[:-1], -1)


class ByHand(nn.Module):
    """A linear layer with experts of LoRA under the routing of MoA's top-k, and nothing but its products."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.router = base, nn.Linear(base.in_features, EXPERTS)
        self.down = nn.Parameter(torch.randn(EXPERTS * RANK, base.in_features) * 0.02)
        self.up = nn.Parameter(torch.randn(EXPERTS * RANK, base.out_features) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        y, rows = self.base(x), x.reshape(-1, x.shape[-1])
        scores = self.router(F.rms_norm(rows, rows.shape[-1:])).softmax(-1)
        weights, chosen = scores.topk(CHOSEN)
        table = torch.zeros_like(scores).scatter(1, chosen, weights)
        hidden = torch.mm(rows, self.down.t()).view(-1, EXPERTS, RANK) * table.unsqueeze(2)
        return torch.addmm(y.view(-1, y.shape[-1]), hidden.flatten(1), self.up).view_as(y)


def contenders(width: int) -> dict[str, nn.Module]:
    def base() -> LlamaForCausalLM:
        torch.manual_seed(0)
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 11 // 4, **heads)
        )

    models: dict[str, nn.Module] = {
        "LoRA": get_peft_model(base(), LoraConfig(r=RANK * CHOSEN, target_modules=TARGETS))
    }
    for scope in ("module", "block", "model"):
        config = MoAConfig(num_experts=EXPERTS, r=RANK, target_modules=TARGETS, router_scope=scope)
        models[f"MoA, {scope}"] = get_peft_model(base(), config)
    for name, kind in (("loop", Loop), ("by hand", ByHand)):
        models[name] = base().requires_grad_(False)
        for path in [path for path, _ in models[name].named_modules() if path.rpartition(".")[2] in TARGETS]:
            models[name].set_submodule(path, kind(models[name].get_submodule(path)))
    for model in models.values():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (".up." in name or "lora_B" in name):
                nn.init.normal_(parameter, std=0.02)
    return models


def measure(models: dict[str, nn.Module], run: Callable[[nn.Module], None], rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in models}
    for one in range(rounds + 1):
        for name, model in models.items():
            began = time.thread_time()
            run(model)
            if one:  # the first warms up
                times[name].append(time.thread_time() - began)
    for name, took in times.items():
        ratio = statistics.median(a / b for a, b in zip(took, times["LoRA"], strict=True))
        print(f"  {name:12} {ratio:5.2f} of LoRA   {1e3 * statistics.median(took):7.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    models = contenders(given.width)
    ids = torch.randint(0, VOCABULARY, (8, 64))

    def step(model: nn.Module) -> None:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    def generate(model: nn.Module) -> None:
        prompts = ids[:4, :16]
        model.eval().generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=24, min_new_tokens=24,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip

    print("training step, 8 x 64 tokens")
    measure(models, step, given.rounds)
    print("generate with cache, 4 rows, 24 tokens")
    measure(models, generate, given.rounds)


if __name__ == "__main__":
    main()
