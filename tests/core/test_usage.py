from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from mixadapters import BottleneckConfig, MixDAConfig, PILLConfig
from mixadapters.core.bank import AdapterBank
from mixadapters.core.context import ForwardContext
from mixadapters.core.mixture import Mixture
from mixadapters.core.record import Record
from mixadapters.core.routes import HardRoutes
from mixadapters.core.routing import Routing, RoutingKey
from mixadapters.core.streams import Stream
from mixadapters.core.usage import UsageRecorder
from mixadapters.routers import Router, build_router

KEY = RoutingKey("default", "ffn", 3, "layers.3.mlp")


def recorded(
    *batches: tuple[list[list[float]], list[bool] | None], arms: tuple[str, ...] = ("a", "b")
) -> UsageRecorder:
    usage = UsageRecorder()
    for probs, mask in batches:
        usage(KEY, Routing(probs=torch.tensor(probs), arms=arms), None if mask is None else torch.tensor(mask))
    return usage


def test_usage_is_the_mean_over_all_rows_since_the_last_reset() -> None:
    usage = recorded(([[1.0, 0.0], [0.5, 0.5]], None), ([[0.0, 1.0], [0.9, 0.1]], [True, False]))
    summary = usage.summaries()[KEY]
    assert summary["weight/a"] == summary["weight/b"] == pytest.approx(1.5 / 3)
    assert summary["entropy"] == pytest.approx(log(2) / 3, rel=1e-4)
    assert summary["dead"] == 0
    assert usage.count(KEY) == 3
    usage.reset()
    assert usage.count(KEY) == 0
    assert usage.summaries() == {}


def test_arms_below_the_share_are_dead() -> None:
    usage = recorded(([[0.985, 0.009, 0.006]], None), arms=("a", "b", "c"))
    assert usage.summaries()[KEY]["dead"] == 2
    assert usage.summaries(dead_below=0.007)[KEY]["dead"] == 1


def test_arms_that_come_and_go_share_one_count() -> None:
    usage = recorded(([[1.0, 0.0]], None))
    usage(KEY, Routing(probs=torch.tensor([[0.0, 1.0, 0.0]]), arms=("a", "b", "c")), None)
    assert usage.summaries()[KEY] == pytest.approx(
        {"weight/a": 0.5, "weight/b": 0.5, "weight/c": 0, "entropy": 0, "dead": 1}
    )


def test_rows_that_are_all_padding_report_nothing() -> None:
    assert recorded(([[1.0, 0.0]], [False])).summaries() == {}


def test_usage_has_no_history_and_counts_in_full_precision() -> None:
    usage = UsageRecorder()
    probs = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    for _ in range(303):  # a count in half precision would stop at 256
        usage(KEY, Routing(probs=probs, arms=("a", "b")), None)
    assert usage.count(KEY) == 303
    assert not next(iter(usage.seen.values())).weight.requires_grad


def test_report_is_a_mean_over_routers_and_each_by_its_module() -> None:
    usage = recorded(([[1.0, 0.0]], None))
    usage(KEY._replace(layer=4, path="layers.4.mlp"), Routing(probs=torch.tensor([[0.5, 0.5]]), arms=("a", "b")), None)
    assert usage.report()["gate/mean/weight/a"] == 0.75
    assert set(usage.report()) == {f"gate/mean/{name}" for name in ("weight/a", "weight/b", "entropy", "dead")}
    assert usage.report(per_layer=True)["gate/layers.4.mlp/weight/b"] == 0.5
    usage(KEY._replace(adapter="other"), Routing(probs=torch.tensor([[0.0, 1.0]]), arms=("a", "b")), None)
    report = usage.report(per_layer=True)
    assert (report["gate/layers.3.mlp/default/weight/a"], report["gate/layers.3.mlp/other/weight/a"]) == (1, 0)


# --- of any router -----------------------------------------------------------------------------------------------


class TopK(Router):
    """Two experts with weights, and no distribution."""

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        rows = tokens.reshape(-1, self.in_features)
        indices = torch.stack([torch.zeros(len(rows)), torch.full((len(rows),), -1)], 1).long()
        return Routing(indices, torch.full((len(rows), 2), 0.25))


ROUTED = {
    "softmax": (lambda: build_router("softmax", 4, ["a", "b"]), {"a": 1 / 3, "b": 1 / 3, "frozen": 1 / 3}),
    "constant": (lambda: build_router({"kind": "constant", "weights": [0.5, 2.0]}, 4, ["a", "b"]), {"a": 0.5, "b": 2}),
    "modality": (lambda: build_router("modality", 4, ["a", "b"]), {"a": 1 / 3, "b": 1 / 3, "frozen": 1 / 3}),
    "own": (lambda: TopK(4, ["a", "b"]), {"a": 0.25, "b": 0, "frozen": 0}),
    "single": (lambda: build_router("single", 4, ["a"]), {"a": 1}),
}


def mixture_of(router: Router, **options: Any) -> Mixture:
    bank = AdapterBank(4, 4)
    for name in router.experts:
        bank.add(name, 2)
    mixture = Mixture(router, bank, **options)
    mixture.key = KEY
    return mixture


def evaluated(mixture: Mixture, **values: Tensor) -> UsageRecorder:
    context, usage = ForwardContext(), UsageRecorder()
    context.observers.append(usage)
    values = {"modality_ids": torch.tensor([[0, 1, -1], [0, 0, 0]]), **values}
    mask = torch.tensor([[True, True, True], [False, False, False]])
    context.enter(Record(open=True, streams={"": Stream(2, 3, mask)}, values=values))
    mixture(torch.randn(2, 3, 4), torch.randn(2, 3, 4), context)
    return usage


@pytest.mark.parametrize("name", ROUTED)
def test_every_router_has_a_usage_in_evaluation(name) -> None:
    make, expected = ROUTED[name]
    usage = evaluated(mixture_of(make()))
    assert usage.count(KEY) == 3
    found = usage.summaries()[KEY]
    assert {k.removeprefix("weight/"): v for k, v in found.items() if "weight/" in k} == pytest.approx(expected)


def test_hard_routes_are_counted_by_who_asks() -> None:
    mixture = mixture_of(build_router("softmax", 4, ["a", "b"]), hard_routes=HardRoutes("domain_ids", [0, 1]))
    usage = evaluated(mixture, domain_ids=torch.tensor([1, 0]))
    assert usage.summaries()[KEY]["weight/b"] == 1


def trained(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, float]:
    with model.base_model.record_usage() as usage:
        model.eval()(**inputs)
    before = usage.report()
    model(**inputs)
    assert usage.report() == before  # nothing is recorded after the block
    return before


def test_usage_of_a_model_is_recorded_inside_the_block(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    inputs["modality_ids"] = torch.ones_like(inputs["input_ids"])
    config = PILLConfig(modalities=["text", "image"], r=2, gate=False, token_ids={"image": [90]})
    report = trained(get_peft_model(tiny("llama"), config), inputs)
    assert report["gate/mean/weight/image"] > 0.5
    single = trained(get_peft_model(tiny("llama"), BottleneckConfig(r=2)), tiny_inputs("llama"))
    assert single["gate/mean/weight/adapter"] == 1


def test_routers_with_nothing_to_decide_stay_out_of_the_means(tiny, tiny_inputs) -> None:
    """A task adapter's single router beside a uniform gate over two domains and the frozen layer."""
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=["law", "code"], r=2))
    with model.base_model.record_usage() as usage:
        model.eval()(**tiny_inputs("llama"))
    report = usage.report(per_layer=True)
    entropies = [value for name, value in report.items() if name.endswith("/entropy")]
    assert len(entropies) > 1
    assert entropies == pytest.approx([log(3)] * len(entropies))
    assert not any(name.endswith("weight/adapter") for name in report)
