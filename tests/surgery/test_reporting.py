"""What a report counts, against counts by hand."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from moe_bases import RANK, VOCAB, WIDTH, batch, moe
from peft import LoraConfig, get_peft_model

from mixadapters import MixDAConfig, MoAConfig
from mixadapters.surgery.layers import expert_layers
from mixadapters.surgery.reporting import report
from mixadapters.surgery.usage import ExpertUsage, LayerUsage, record_usage

EXPERTS = 6


@pytest.fixture(scope="module")
def base():
    return moe("mixtral")


@pytest.fixture(scope="module")
def usage(base):
    with torch.no_grad(), record_usage(base) as usage:
        base(**batch())
    return usage


def test_parameters_and_flops_are_those_of_a_hand_count(base) -> None:
    found = report(base)
    expert = 3 * RANK * WIDTH  # gate, up and down
    assert len(found.layers) == 2
    for layer in found.layers:
        assert (layer.experts, layer.active, layer.width) == (tuple("012345"), 2.0, WIDTH)
        assert (layer.parameters, layer.active_parameters) == (EXPERTS * expert, 2 * expert)
        assert layer.flops == 2 * (2 * expert + EXPERTS * WIDTH)  # and the router
        assert layer.nbytes == 4 * EXPERTS * expert
        assert layer.use is None
        assert layer.duplicates is None
    total = sum(p.numel() for p in base.parameters())
    assert found.parameters == total
    assert found.nbytes == 4 * total
    assert found.active_parameters == total - 2 * 4 * expert
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert found.flops == 2 * (found.active_parameters - (0 if tied else VOCAB * WIDTH))


def test_a_table_of_embeddings_counts_where_it_makes_the_output_too() -> None:
    for tied in (False, True):
        model = moe("mixtral", tie_word_embeddings=tied)
        found = report(model)
        assert found.flops == 2 * (found.active_parameters - (0 if tied else VOCAB * WIDTH))


def test_no_more_experts_are_active_at_a_layer_than_it_has(tiny, tiny_inputs, tmp_path) -> None:
    for name, targets in {"a": ["q_proj"], "b": ["q_proj"], "c": ["q_proj", "down_proj"]}.items():
        lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(tiny("llama"), lora).save_pretrained(tmp_path / name)
    experts = {name: str(tmp_path / name) for name in "abc"}
    config = MoAConfig(experts=experts, router="top_k", router_scope="model", task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), config).eval()
    assert {len(layer.experts): layer.active for layer in report(model).layers} == {3: 2.0, 1: 1.0}
    with torch.no_grad(), record_usage(model) as usage:
        model(**tiny_inputs("llama"))
    found = report(model, usage)
    recorded = {key: float(of.tokens.sum() / of.rows) for key, of in usage.layers.items()}
    assert {layer.key: layer.active for layer in found.layers} == recorded
    assert {layer.active for layer in found.layers if len(layer.experts) == 3} == {2.0}
    assert found.active_parameters < found.parameters


def test_adapters_are_counted_beside_the_base(tiny) -> None:
    config = MoAConfig(num_experts=3, num_experts_per_tok=1, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), config)
    found = report(model)
    (width, out) = (32, 32)
    assert [layer.kind for layer in found.layers] == ["bank"] * 4
    assert {layer.parameters for layer in found.layers} == {3 * 2 * (width + out)}
    assert {layer.active_parameters for layer in found.layers} == {2 * (width + out)}
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_the_router_is_counted_whole_and_where_it_decides(tiny) -> None:
    """Also the arm of the frozen layer; columns whose experts have been merged; not where another layer's decides."""
    config = MixDAConfig(domains=["law", "code"], r=4, init_weights=False)
    for layer in report(get_peft_model(tiny("llama"), config)).layers:
        assert layer.flops == 2 * (2 * 4 * (layer.width + 32) + 3 * layer.width)
    shared = MoAConfig(num_experts=4, r=2, target_modules=["q_proj", "v_proj"], router_scope="block")
    found = report(get_peft_model(tiny("llama"), shared))
    routers = [layer.flops - 2 * layer.active_parameters for layer in found.layers]
    assert sorted(routers)[: len(routers) // 2] == [0.0] * (len(routers) // 2)
    assert sorted(routers)[len(routers) // 2] > 0
    model = moe("mixtral")
    before = report(model).layers[0]
    for layer in expert_layers(model):
        layer.assign([0, 0, 0, 3, 4, 5])
    after = report(model).layers[0]
    assert (len(after.experts), after.flops) == (4, before.flops)


def test_a_token_passes_by_the_experts_that_a_report_is_not_of(tiny) -> None:
    config = MoAConfig(num_experts=4, r=4, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(tiny("mixtral"), config)
    whole, ours, base = (report(model, adapter=adapter) for adapter in (None, "default", ""))
    assert ours.active_parameters == base.active_parameters == whole.active_parameters < whole.parameters
    assert len(ours.layers) + len(base.layers) == len(whole.layers)


def test_where_the_number_of_experts_varies_the_record_says_it(tiny) -> None:
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=["law", "code"])).eval()
    assert {layer.active for layer in report(model).layers} == {2.0}
    with torch.no_grad(), record_usage(model) as usage:
        model(input_ids=torch.tensor([[5, 6, 7]]), domain_ids=torch.tensor([0]))
    assert {layer.active for layer in report(model, usage).layers} == {1.0}


def test_use_is_that_of_the_record(base, usage) -> None:
    for layer in report(base, usage).layers:
        recorded = usage.layers[layer.key]
        use = layer.use
        assert use is not None
        assert use.tokens == int(recorded.rows)
        tokens = recorded.tokens.tolist()
        assert list(use.load.values()) == pytest.approx([t / sum(tokens) for t in tokens])
        assert use.max_over_mean == pytest.approx(max(tokens) / (sum(tokens) / EXPERTS))
        assert sum(use.mass.values()) == pytest.approx(1)
        assert 1 <= use.worth <= EXPERTS
        assert use.entropy == pytest.approx(recorded.mean_entropy)


def planted(key: str, tokens: list[int]) -> ExpertUsage:
    made = LayerUsage.empty(key, "", list("012345"))
    made.tokens += torch.tensor(tokens)
    made.mass += torch.tensor(tokens).double()
    made.rows += sum(tokens) // 2
    return ExpertUsage({key: made})


def test_dead_and_busy_experts_are_named(base) -> None:
    first = report(base).layers[0].key
    found = report(base, planted(first, [600, 400, 0, 0, 1, 0]))  # type: ignore[arg-type]
    use = found.layers[0].use
    assert use is not None
    assert use.dead == ("2", "3", "4", "5")
    assert use.worth == pytest.approx(1.97, abs=0.02)
    assert found.layers[1].use is None  # nothing was recorded there
    assert f"{first}: 2, 3, 4, 5 get next to nothing: prune them, or balance the router" in found.advice
    busy = report(base, planted(first, [950, 10, 10, 10, 10, 10]))  # type: ignore[arg-type]
    assert busy.advice == [f"{first}: 0 takes 5.7 times its fair share"]
    assert report(base, planted(first, [5] * 6)).advice == []  # type: ignore[arg-type]
    few = report(base, planted(first, [600, 400, 3, 3, 1, 3])).layers[0].use  # type: ignore[arg-type]
    assert few is not None
    assert few.dead == ("4",)  # a hundredth of the mean load is 1.7


def test_experts_that_compute_the_same_are_named(base) -> None:
    first = report(base).layers[0].key
    cells = SimpleNamespace(layers={first: SimpleNamespace(duplicates=(("0", "3"), ("1", "5")), needed_k=4)})
    found = report(base, overspecification=cells)  # type: ignore[arg-type]
    assert found.layers[0].duplicates == (("0", "3"), ("1", "5"))
    assert found.layers[1].duplicates is None
    assert found.advice == [
        f"{first}: experts that compute the same (0 = 3; 1 = 5), and 4 places would hold them all: merge or prune them"
    ]
    cells.layers[first].needed_k = 2  # as many as a token uses
    found = report(base, overspecification=cells)  # type: ignore[arg-type]
    assert found.advice == [f"{first}: experts that compute the same (0 = 3; 1 = 5): merge or prune them"]


def test_a_record_of_other_experts_is_refused(base) -> None:
    first = report(base).layers[0].key
    made = LayerUsage.empty(first, "", ["0", "1"])
    with pytest.raises(ValueError, match=r"and it has .* now: record anew"):
        report(base, ExpertUsage({first: made}))


@pytest.mark.parametrize("part", ["mass", "saliency", "entropy", "logits"])
def test_a_record_of_a_broken_model_is_refused(base, usage, part: str) -> None:
    """Its numbers would stand in tables, and in files that are no JSON."""
    broken = copy.deepcopy(usage)
    getattr(next(iter(broken.layers.values())), part).fill_(float("nan"))
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        report(base, broken)


def test_a_model_without_experts_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="no routed experts"):
        report(tiny("llama"))


def test_it_is_told_as_data_as_a_table_and_as_a_picture(base, usage, tmp_path) -> None:
    found = report(base, usage)
    data = json.loads(json.dumps(found.as_dict()))
    assert data["layers"][0]["use"]["load"].keys() == set("012345")
    rows = [line for line in found.markdown().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows[2:3] + rows[:2]}) == 1
    assert len({line.count("|") for line in rows[3:]}) == 1
    assert len(rows) == 3 + 2 + 2
    found.plot(tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no router has been used"):
        report(base).plot(tmp_path / "none.png")
