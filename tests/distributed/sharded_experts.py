"""Run in each of two processes by test_sharded_experts.py: what experts over processes do, beside one process."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import counting
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig
from mixadapters.sharding import (
    ExpertSharding,
    ExpertShardingCallback,
    SameBatchesMixin,
    Traffic,
    ddp_bytes_per_step,
    experts_bytes_per_step,
    fsdp2_bytes_per_step,
    padded_bytes,
    shard_experts,
)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(5, 64, (4, 8), generator=torch.Generator().manual_seed(1))
LORA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "init_weights": False, "router_init_range": 0.5}
GATED = {"expert_type": "bottleneck", "adapter_kwargs": {}, "r": 4, "init_weights": False}
CONFIGS: dict[str, Callable[[], Any]] = {
    "moa": lambda: MoAConfig(num_experts=5, num_experts_per_tok=2, **LORA),
    "moa, dense": lambda: MoAConfig(num_experts=3, router={"kind": "softmax"}, **LORA),
    "moa, by block, dropout": lambda: MoAConfig(num_experts=3, router_scope="block", lora_dropout=0.3, **LORA),
    "moa, shared and residual": lambda: MoAConfig(num_experts=3, n_shared_experts=1, residual=True, **LORA),
    "moa, bottlenecks": lambda: MoAConfig(
        num_experts=3, expert_type="bottleneck", r=4, init_weights=False, router_init_range=0.5
    ),
    "moa, fewer experts than processes have room for": lambda: MoAConfig(num_experts=2, num_experts_per_tok=1, **LORA),
    "mixda": lambda: MixDAConfig(domains=["a", "b", "c"], r=4, init_weights=False),
    "mixda, with norms": lambda: MixDAConfig(
        domains=["a", "b"], r=4, init_weights=False, adapter_layer_norm=True, gate_granularity="causal_prefix"
    ),
}


def made(config: Any) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES))
    return get_peft_model(base, config).train()


def forward(model: nn.Module, **more: Any) -> Tensor:
    torch.manual_seed(7)  # of dropout
    return model(input_ids=IDS, labels=IDS, **more).loss


def gradients(model: nn.Module, **more: Any) -> dict[str, Tensor]:
    """By name; of what lies elsewhere nothing."""
    loss = forward(model, **more)
    loss.backward()
    return {"loss": loss.detach()} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.numel()
    }  # fmt: skip


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    missing = [name for name in wanted if name not in found and ".experts." not in name]
    assert not missing, missing
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def held(sharding: ExpertSharding) -> set[str]:
    return {f"{path}.{name}" for path, bank in sharding.banks.items() for name in bank.own}


def gradients_are_those_of_one_process() -> dict[str, Any]:
    found = {}
    for name, config in CONFIGS.items():
        wanted = gradients(made(config()))
        model = made(config())
        if name == "moa, shared and residual":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sharding = shard_experts(model, copies=1)
        got = gradients(model)
        equal(got, wanted)
        model.zero_grad()
        sharding.reshard()  # by load, the busiest expert of each layer in both processes
        again = gradients(model)
        equal(again, wanted)
        copied = sum(len(bank.copied) for bank in sharding.banks.values())
        empty = sum(not p.numel() for p in model.parameters())
        found[name] = {"names": sorted(got), "all": sorted(wanted), "copied": copied, "empty": empty}
    return found


def numbers_choose_where_nothing_else_trains() -> dict[str, Any]:
    """No router, and tokens that need no gradient: one process has nothing that trains."""
    numbers = torch.tensor([0, 1, 0, 0])
    wanted_model = made(CONFIGS["moa"]())
    model = made(CONFIGS["moa"]())
    for each in (wanted_model, model):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(".experts.expert0." in name and ".1." in name)
    wanted = gradients(wanted_model, expert_ids=numbers)
    shard_experts(model)
    got = gradients(model, expert_ids=numbers)
    equal(got, wanted)
    return {"names": sorted(got)}


def trained(model: nn.Module, sharding: ExpertSharding | None, optimizer: Any, steps: int = 6) -> None:
    for _ in range(steps):
        forward(model).backward()
        if sharding is None:
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        else:
            sharding.clip_grad_norm(0.3)
        optimizer.step()
        optimizer.zero_grad()
        if sharding is not None:
            sharding.after_step(optimizer)


def training_with_dealing_is_that_of_one_process(folder: Path) -> dict[str, Any]:
    def adam(model: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4, weight_decay=0.1)

    config = MoAConfig(num_experts=5, num_experts_per_tok=1, router_aux_loss_coef=0.1, **LORA)
    alone, model = made(copy.deepcopy(config)), made(copy.deepcopy(config))
    plain = adam(alone)
    trained(alone, None, plain)
    sharding = shard_experts(model, every=2, copies=1)
    optimizer = adam(model)
    before = held(sharding)
    trained(model, sharding, optimizer)
    moved = sorted(held(sharding) - before)
    kept = sum(v.numel() for state in optimizer.state.values() for v in state.values())
    whole = sum(v.numel() for state in plain.state.values() for v in state.values())
    sharding.save_pretrained(folder / "sharded")
    with sharding.whole(optimizer):
        parameters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        moments = optimizer.state_dict()["state"]
        for place, state in plain.state_dict()["state"].items():
            equal(moments[place], state)
    wanted = {n: p.detach() for n, p in alone.named_parameters() if p.requires_grad}
    equal(parameters, wanted)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES)), str(folder / "sharded"))
    here = {n: p.detach() for n, p in loaded.named_parameters()}
    assert all(torch.equal(here[n], p) for n, p in parameters.items())
    forward(model).backward()  # it goes on after it was whole
    optimizer.step()
    sharding.close(optimizer)
    assert all(p.numel() for p in model.parameters())
    model.state_dict()
    return {"moved": moved, "kept": kept, "whole": whole}


def trainer_deals_as_it_trains(folder: Path) -> dict[str, Any]:
    """Trainer with experts that stay, that move, and with none that are spread."""
    ids = torch.randint(5, 64, (8, 6), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def run(name: str, callbacks: list[Any], resume: str | None = None) -> tuple[dict[str, Tensor], list[float]]:
        model = made(MoAConfig(num_experts=5, num_experts_per_tok=1, router_aux_loss_coef=0.1, **LORA))
        arguments = TrainingArguments(
            str(folder / name), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, optim="adamw_torch", weight_decay=0.1, max_grad_norm=0.0 if callbacks else 0.3,
            save_steps=2, eval_strategy="steps", eval_steps=1, use_cpu=True, ddp_backend="gloo", report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        trainer = ExpertTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, losses

    callback = ExpertShardingCallback(every=1, max_grad_norm=0.3)
    watched = Watched(callback)
    plain, losses = run("plain", [])
    still, same = run("still", [ExpertShardingCallback(every=0, max_grad_norm=0.3)])
    moving, moved = run("moving", [callback, watched])
    on, _ = run("still", [ExpertShardingCallback(max_grad_norm=0.3)], str(folder / "still/checkpoint-2"))
    assert callback.sharding is None
    for found in (still, moving):
        equal(found, plain)
    torch.testing.assert_close([same, moved], [losses, losses])
    assert all(torch.equal(on[name], value) for name, value in still.items())
    last = folder / "moving/checkpoint-4"
    saved = load_file(last / "adapter_model.safetensors")
    assert all(torch.equal(saved[name.replace(".default.", ".")], value) for name, value in moving.items())
    moments = torch.load(last / "optimizer.pt", weights_only=True)["state"].values()
    assert sorted(state["exp_avg"].shape for state in moments) == sorted(value.shape for value in plain.values())
    return {"held": watched.held, "parameters": sorted(still)}


class ExpertTrainer(SameBatchesMixin, Trainer):
    pass


class Watched(TrainerCallback):
    """Which parameters of experts lie here in each step; all, and what the optimizer keeps, must outlast each deal."""

    def __init__(self, callback: ExpertShardingCallback) -> None:
        self.callback = callback
        self.held: list[list[str]] = []
        self.before: list[Tensor] = []

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        assert self.callback.sharding is not None
        self.held.append([name for name, p in model.named_parameters() if ".bank.experts." in name and p.numel()])
        with self.callback.sharding.whole(optimizer.optimizer):
            self.before = self.everything(model, optimizer)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        after = self.everything(model, optimizer)  # the experts are whole: an evaluation comes
        assert len(after) > len(list(model.parameters()))
        assert all(torch.equal(one, other) for one, other in zip(self.before, after, strict=True))

    def everything(self, model: Any, optimizer: Any) -> list[Tensor]:
        found = list(model.parameters())
        kept = [value for p in found for value in optimizer.optimizer.state.get(p, {}).values()]
        return [value.detach().clone() for value in (*found, *kept)]


def load_is_dealt_evenly() -> dict[str, Any]:
    """Rows by Zipf's law on 16 experts; and tasks of uneven size, each with its own expert."""
    experts = 16
    model = made(MoAConfig(num_experts=experts, num_experts_per_tok=1, target_modules=["down_proj"], r=2))
    sharding = shard_experts(model, copies=2)
    rows = torch.cat([torch.full((round(96 / (rank + 1)),), 2 * rank % experts + rank // 8) for rank in range(16)])
    ids = rows.new_ones(1, len(rows)) * 7
    found: dict[str, Any] = {}
    for step in range(3):
        with model.base_model.pin_routes({"ffn/*": rows}), torch.no_grad():
            model(input_ids=ids)
        found[f"zipf {step}"] = max(sharding.max_over_mean().values())
        if step < 2:
            sharding.reshard()
    tasks = [f"task{i}" for i in range(6)]
    model = made(MoAConfig(experts={t: {} for t in tasks}, router={"kind": "task"}, target_modules=["down_proj"], r=2))
    sharding = shard_experts(model, copies=1)
    sizes = [30, 6, 20, 4, 10, 2]  # the even ones lie in one process at first
    numbers = torch.cat([torch.full((size,), task) for task, size in enumerate(sizes)])
    for step in range(2):
        with torch.no_grad():
            model(input_ids=torch.full((len(numbers), 3), 7), expert_ids=numbers)
        found[f"tasks {step}"] = max(sharding.max_over_mean().values())
        sharding.reshard()
    return found


def bytes_are_those_of_the_formulas() -> dict[str, Any]:
    def step(model: nn.Module) -> dict[str, int]:
        counting.counted()
        for _ in range(2):
            forward(model).backward()
        return counting.counted()

    found: dict[str, Any] = {}
    rows = IDS.numel()
    for name, copies in (("experts", 0), ("experts with copies", 1)):
        model = made(CONFIGS["moa"]())
        model.enable_input_require_grads()
        sharding = shard_experts(model, copies=copies)
        forward(model).backward()  # looks at the tokens once
        if copies:
            sharding.reshard()
            forward(model)
        formula = sum(
            experts_bytes_per_step(
                rows, bank.in_features, bank.out_features, bank.slots, 4,
                sum(4 * shape.numel() for expert in bank.copied for shape in bank.shapes[expert]), 2,
            ).all_reduce
            for bank in sharding.banks.values()
        )  # fmt: skip
        found[name] = {"counted": step(model), "formula": {"all_reduce": formula}}
    plain = made(CONFIGS["moa"]())
    trainable = sum(4 * p.numel() for p in plain.parameters() if p.requires_grad)
    parallel = DistributedDataParallel(plain)
    for _ in range(2):  # after the first step it lays out its buckets anew
        forward(parallel).backward()
    counting.counted()
    with parallel.no_sync():
        forward(parallel).backward()
    forward(parallel).backward()
    buffers = sum(b.numel() * b.element_size() for b in plain.buffers())
    found["DDP"] = {"counted": counting.counted(), "formula": of_use(ddp_bytes_per_step(trainable, buffers))}
    sharded = made(CONFIGS["moa"]())
    layers = list(sharded.base_model.model.model.layers)
    blocks = [padded_bytes(layer.parameters(), 2) for layer in layers]
    everything = padded_bytes(sharded.parameters(), 2)
    trains = padded_bytes((p for p in sharded.parameters() if p.requires_grad), 2)
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(sharded, mesh=mesh)
    forward(sharded).backward()
    formula = fsdp2_bytes_per_step(blocks, trains, everything - sum(blocks), 2)
    found["FSDP2"] = {"counted": step(sharded), "formula": of_use(formula)}
    return found


def of_use(traffic: Traffic) -> dict[str, int]:
    return {name: size for name, size in traffic._asdict().items() if size}


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def what_cannot_be_is_refused(rank: int) -> dict[str, str]:
    found: dict[str, str] = {}
    model = made(CONFIGS["moa"]())
    found["wrapped"] = message(lambda: shard_experts(DistributedDataParallel(model)))
    found["type"] = message(lambda: shard_experts(made(BottleneckConfig(r=4))))
    found["number"] = message(lambda: shard_experts(model, copies=-1))
    other = made(CONFIGS["moa"]())
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "experts" in n).add_(rank)
    found["values"] = message(lambda: shard_experts(other))
    taken = made(CONFIGS["moa"]())
    fully_shard(taken, mesh=init_device_mesh("cpu", (2,)))
    found["engine"] = message(lambda: shard_experts(taken))
    shard_experts(model)
    found["twice"] = message(lambda: shard_experts(model))
    found["tokens"] = message(lambda: model(input_ids=IDS[rank : rank + 1]))
    found["state_dict"] = message(model.state_dict)
    mixed = made(CONFIGS["moa"]())
    mixed.add_adapter("other", CONFIGS["moa"]())
    shard_experts(mixed)
    found["mixed"] = message(lambda: mixed(input_ids=IDS, adapter_names=["default", "other"] * 2))
    under = made(CONFIGS["moa"]())
    shard_experts(under)
    for layer in under.base_model.model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    found["FSDP2 afterwards"] = message(lambda: forward(under))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    counting.register()
    dist.init_process_group("counting")
    rank = dist.get_rank()
    found: dict[str, Any] = {
        "gradients": gradients_are_those_of_one_process(),
        "numbers": numbers_choose_where_nothing_else_trains(),
        "training": training_with_dealing_is_that_of_one_process(folder),
        "trainer": trainer_deals_as_it_trains(folder),
        "load": load_is_dealt_evenly(),
        "bytes": bytes_are_those_of_the_formulas(),
        "refused": what_cannot_be_is_refused(rank),
    }
    torch.save(found, folder / str(rank))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
