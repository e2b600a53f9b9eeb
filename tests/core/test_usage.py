from __future__ import annotations

import sys
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
from mixadapters.core.usage import Usage, UsageRecorder
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


def test_variation_is_that_of_the_experts_alone() -> None:
    usage = recorded(([[0.3, 0.1, 0.6], [0.3, 0.1, 0.6]], None), arms=("a", "b", "frozen"))
    assert usage.summaries()[KEY]["cv"] == pytest.approx(0.1 / 0.2)
    even = recorded(([[0.2, 0.2, 0.6]], None), arms=("a", "b", "frozen"))
    assert even.summaries()[KEY]["cv"] == pytest.approx(0, abs=1e-6)
    assert recorded(([[0.0, 1.0]], None), arms=("a", "frozen")).summaries()[KEY]["cv"] == 0


def test_arms_that_come_and_go_share_one_count() -> None:
    usage = recorded(([[1.0, 0.0]], None))
    usage(KEY, Routing(probs=torch.tensor([[0.0, 1.0, 0.0]]), arms=("a", "b", "c")), None)
    assert usage.summaries()[KEY] == pytest.approx(
        {"weight/a": 0.5, "weight/b": 0.5, "weight/c": 0, "entropy": 0, "dead": 1, "cv": 0.5**0.5}
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
    assert set(usage.report()) == {f"gate/mean/{name}" for name in ("weight/a", "weight/b", "entropy", "dead", "cv")}
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


# --- of routers that choose --------------------------------------------------------------------------------------


def choosing(*batches: tuple[list[list[int]], list[bool] | None], arms: tuple[str, ...]) -> dict[str, float]:
    """The summary of a router whose rows choose these arms, by number."""
    usage = UsageRecorder()
    for rows, mask in batches:
        selected = torch.tensor([[a in row for a in range(len(arms))] for row in rows])
        routing = Routing(probs=torch.full(selected.shape, 1 / len(arms)), arms=arms, selected=selected)
        usage(KEY, routing, None if mask is None else torch.tensor(mask))
    return usage.summaries()[KEY]


def test_what_a_router_chooses_is_counted_by_hand() -> None:
    arms = ("a", "b", "c", "null0", "frozen")
    found = choosing(([[0, 1], [0, 3], [0, 4]], None), ([[1, 0], [2, 2]], [True, False]), arms=arms)
    assert {k: v for k, v in found.items() if not k.startswith(("weight", "entropy", "cv"))} == pytest.approx(
        {
            "load/a": 4 / 8, "load/b": 2 / 8, "load/c": 0, "load/null0": 1 / 8, "load/frozen": 1 / 8,
            "max_over_mean": 4 / 2, "active": 6 / 4, "null": 2 / 8, "dead": 1,
        }
    )  # fmt: skip


def test_an_expert_is_dead_by_its_share_of_the_mean_load() -> None:
    """Not of all: of 128 experts in balance each has less than 1 % of the choices."""
    arms = tuple(f"e{i}" for i in range(128))
    assert choosing(([[i] for i in range(128)], None), arms=arms)["dead"] == 0
    assert choosing(([[i] for i in range(127)], None), arms=arms)["dead"] == 1
    rows = [[0], [1]] * 200
    assert choosing(([*rows, [2]], None), arms=("a", "b", "c"))["dead"] == 1  # 1 where the mean is 134
    assert choosing((rows + [[2]] * 2, None), arms=("a", "b", "c"))["dead"] == 0


def test_rows_that_choose_nothing_make_no_shares() -> None:
    found = choosing(([[], []], None), arms=("a", "b"))
    assert (found["active"], found["null"], found["max_over_mean"], found["dead"]) == (0, 0, 0, 2)


def test_routers_that_do_not_choose_have_no_load() -> None:
    assert set(recorded(([[1.0, 0.0]], None)).summaries()[KEY]) == {"weight/a", "weight/b", "entropy", "dead", "cv"}


CHOOSING: dict[str, tuple[Any, dict[str, float]]] = {
    "top_k": ({"kind": "top_k", "k": 2}, {"active": 2, "null": 0}),
    "top_p": ({"kind": "top_p", "p": 1e-6}, {"active": 1, "null": 0}),
    "null": ({"kind": "null", "k": 6, "null_arms": 2}, {"active": 4, "null": 1 / 3, "max_over_mean": 1}),
    "tree": ({"kind": "tree", "gamma": 1e-6, "k": 2}, {"null": 0}),
    "dense_to_sparse": ({"kind": "dense_to_sparse", "threshold": 0.0}, {"active": 4, "null": 0}),
    "expert_choice": ({"kind": "expert_choice", "capacity_factor": 4.0}, {"active": 4, "max_over_mean": 1}),
    "cosine": ({"kind": "cosine", "k": 3}, {"active": 3, "null": 0}),
    "phatgoose": ({"kind": "phatgoose", "k": 2}, {"active": 0}),
    "hash": ("hash", {"active": 1, "null": 0}),
    "recurrent": ({"kind": "recurrent", "width": 4, "base": {"kind": "top_k", "k": 3}}, {"active": 3, "null": 0}),
    "modality": ("modality", {"active": 2 / 3, "null": 1 / 3}),
    "task": ("task", {"active": 1, "load/b": 1, "dead": 3, "max_over_mean": 4, "null": 0}),
    "own": (lambda: TopK(4, list("abcd")), {"active": 1, "load/a": 1}),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CHOOSING)
def test_every_router_that_chooses_says_what(name: str, training: bool) -> None:
    """In training in the usage that the callbacks report, in evaluation in that of who asks."""
    spec, expected = CHOOSING[name]
    torch.manual_seed(0)
    mixture = mixture_of(spec() if callable(spec) else build_router(spec, 4, list("abcd"))).train(training)
    context, usage = ForwardContext(), UsageRecorder()
    if not training:
        context.observers.append(usage)
    values = {"modality_ids": torch.tensor([[0, 1, -1], [0, 0, 0]]), "expert_ids": torch.tensor([1, 1])}
    stream = Stream(2, 3, torch.tensor([[True, True, True], [False, False, False]]))
    stream.input_ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    context.enter(Record(training, training, open=True, streams={"": stream}, values=values))
    mixture(torch.randn(2, 3, 4), torch.randn(2, 3, 4), context)
    found = (context.usage if training else usage).summaries()[KEY]
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    loads = [value for key, value in found.items() if key.startswith("load/")]
    assert sum(loads) == pytest.approx(1 if found["active"] or found["null"] else 0)


# --- a picture ---------------------------------------------------------------------------------------------------


def test_a_picture_shows_the_load_by_layer(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    from matplotlib import image, pyplot

    usage, figures = UsageRecorder(), pyplot.get_fignums()
    for layer in range(3):
        selected = torch.tensor([[True, False, layer == 0]] * 4)
        key = KEY._replace(layer=layer, path=f"layers.{layer}.mlp")
        usage(key, Routing(probs=torch.full((4, 3), 1 / 3), arms=("a", "b", "frozen"), selected=selected), None)
    usage.plot(tmp_path / "load.png")
    drawn = image.imread(tmp_path / "load.png")
    assert drawn.shape[0] > 200
    assert len(set(map(tuple, drawn[:, :, :3].reshape(-1, 3).tolist()))) > 10  # no blank page
    assert pyplot.get_fignums() == figures  # nothing of the user's is touched
    other = recorded(([[0.5, 0.5]], None))
    other.plot(str(tmp_path / "weight.png"))
    assert (tmp_path / "weight.png").read_bytes() != (tmp_path / "load.png").read_bytes()


def test_a_picture_of_nothing_and_without_matplotlib_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no router has been used since the recording began"):
        UsageRecorder().plot(tmp_path / "load.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        recorded(([[0.5, 0.5]], None)).plot(tmp_path / "load.png")
    assert not list(tmp_path.iterdir())


def test_choices_of_several_processes_are_summed() -> None:
    whole, chosen = Usage(("a", "b")), torch.tensor([[True, False], [True, True]])
    for _ in range(3):
        one = Usage(("a", "b"))
        one.add(torch.full((2, 2), 0.5), None, chosen)
        whole.join(one.on_cpu())
    assert whole.chosen is not None
    assert whole.chosen.tolist() == [6, 3]
    assert float(whole.count) == 6
