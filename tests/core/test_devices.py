"""Models whose layers lie on several devices give what they give on one: routings, masks and losses go along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from placing import FIRST, SECOND, put, two_devices

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig, MoSAConfig
from mixadapters.core.context import ForwardContext

MOA = {"target_modules": ["q_proj", "down_proj"], "r": 4, "init_weights": False}
NEW = {"r": 4, "init_weights": False}
LOSSES = {"balance_coef": 0.1, "entropy_coef": 0.1, "z_coef": 0.1, "importance_coef": 0.1}
CONFIGS: dict[str, Any] = {
    "bottleneck": lambda: BottleneckConfig(**NEW),
    "moa": lambda: MoAConfig(num_experts=3, num_experts_per_tok=2, router_aux_loss_coef=0.1, **MOA),
    "moa, capacity": lambda: MoAConfig(
        num_experts=3, router={"kind": "top_k", "k": 1, "capacity_factor": 1.0, "bias_update_rate": 0.1}, **MOA
    ),
    "moa, one router": lambda: MoAConfig(num_experts=3, router_scope="model", **MOA),
    "moa, recurrent": lambda: MoAConfig(num_experts=3, router={"kind": "recurrent"}, **MOA),
    "mixda": lambda: MixDAConfig(domains=["a", "b"], router={"kind": "softmax", **LOSSES}, **NEW),
    "mixda, prefix": lambda: MixDAConfig(domains=["a", "b"], gate_granularity="causal_prefix", **NEW),
    "mixda, request": lambda: MixDAConfig(domains=["a", "b"], gate_granularity="request", **NEW),
    "mosa": lambda: MoSAConfig(**NEW),
}
FIELDS: dict[str, Any] = {
    "bottleneck": {"adapter_names": ["default", "__base__"]},
    "moa, capacity": {"adapter_names": ["__base__", "default"]},
    "mixda": {"domain_ids": [0, 1]},
    "moa": {"num_items_in_batch": torch.tensor(9)},
}


def seen(model: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """What a step and a generation give, on the CPU."""
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids).masked_fill(torch.tensor([[True], [False]]) & (torch.arange(6) < 2), 0)
    labels = ids.masked_fill(torch.arange(6) < 4, -100)
    batch = {"input_ids": ids, "attention_mask": mask} | {
        name: torch.tensor(value) if name == "domain_ids" else value for name, value in fields.items()
    }
    batch, labels = put(batch, FIRST), put(labels, FIRST)
    context = ForwardContext.of(model)
    torch.manual_seed(0)
    loss = model.train()(**batch, labels=labels).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    logged = {name: float(total) for name, (total, _) in context.loss_log.items()}
    batch.pop("num_items_in_batch", None)
    with model.eval().base_model.record_usage() as usage:
        written = model.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False)
    return {"loss": loss.detach(), "written": written, **logged, **usage.report(), **found}


CASES = [*((kind, {}) for kind in CONFIGS), *FIELDS.items()]


@pytest.mark.parametrize(("kind", "given"), CASES, ids=[f"{kind}, {' '.join(given)}" for kind, given in CASES])
def test_layers_on_another_device_change_nothing(tiny, kind: str, given: dict[str, Any]) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        return get_peft_model(tiny("llama"), CONFIGS[kind]())

    wanted = seen(made(), given)
    model = made()
    base = model.get_base_model()
    with two_devices(base, *base.model.layers[1:], base.model.norm, base.lm_head):
        found = seen(model, given)
        assert found["loss"].device == SECOND
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_tensors_of_two_devices_do_not_meet() -> None:
    one, other = put(torch.ones(2), FIRST), put(torch.ones(2), SECOND)
    with two_devices(torch.nn.Linear(2, 2)):
        assert (one.to(other.device) + other).device == SECOND
        with pytest.raises(RuntimeError, match=r"tensors on \['cpu:0', 'cpu:1'\]"):
            one + other
