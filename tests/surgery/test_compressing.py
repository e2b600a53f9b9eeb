"""Smaller experts in models: ours and those of a base."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch

import mixadapters
from mixadapters.core.bank import Weights
from mixadapters.surgery.compressed import INDEX, load_compressed, save_compressed
from mixadapters.surgery.compressing import coded_bytes, compress_experts, routed_inputs
from mixadapters.surgery.layers import expert_layers
from mixadapters.surgery.qmoe import encode_matrix


@pytest.fixture
def batches(tiny_inputs):
    return [tiny_inputs("mixtral", batch=6, length=24, seed=seed, padding="right") for seed in range(2)]


@pytest.fixture
def moa(tiny):
    """Experts of rows that are wide enough for codes: 256 between the FFN's linear layers."""
    base = tiny("llama", num_hidden_layers=2, intermediate_size=256)
    config = mixadapters.MoAConfig(num_experts=3, r=4, target_modules=["gate_proj"], init_weights=False)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:  # as training leaves them, and not evenly spread, as linear layers begin
                parameter.normal_(std=0.1)
    return model


def outputs(model, batches) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits[batch["attention_mask"].bool()] for batch in batches])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_of_a_base_become_ternary_and_lie_in_codes_of_the_size_that_was_told(
    tiny, batches, tmp_path, kind: str
) -> None:
    model = tiny(kind, num_hidden_layers=2)
    told = compress_experts(model, batches, codec="packed")
    for layer in expert_layers(model):
        for e in range(len(layer.names)):
            weights = layer.weights(e)
            assert all(encode_matrix(m) is not None for m in (weights.down, weights.gate, weights.up))
    sizes = save_compressed(model, tmp_path / "codes", codec="packed")
    assert sizes.coded == told.nbytes
    assert sizes.uncoded == told.plain_bytes
    assert told.bits_per_weight == 8 * told.nbytes / sum(expert.weights for expert in told.experts)
    assert torch.equal(outputs(load_compressed(tmp_path / "codes").eval(), batches), outputs(model, batches))


def test_an_adapter_of_wide_rows_goes_through_the_codec(moa, tiny, batches, tmp_path) -> None:
    told = compress_experts(moa, batches)
    saved = save_compressed(moa, tmp_path / "codes")
    described = json.loads((tmp_path / "codes" / INDEX).read_text())["files"]["adapter_model.safetensors"]
    assert sum(".experts." in key for key in described) == 2 * 3 * 2
    assert saved.coded == told.nbytes
    base = tiny("llama", num_hidden_layers=2, intermediate_size=256)
    assert torch.equal(outputs(load_compressed(tmp_path / "codes", base).eval(), batches), outputs(moa, batches))


def test_an_adapter_is_compressed_and_the_base_below_it_is_not(tiny, batches) -> None:
    config = mixadapters.MoAConfig(num_experts=2, r=4, target_modules=["q_proj"], init_weights=False)
    model = peft.get_peft_model(tiny("mixtral"), config)
    base = {n: p.clone() for n, p in model.named_parameters() if ".mlp.experts." in n}
    told = compress_experts(model, batches, codec="packed")
    assert len(base) > 0
    assert all("q_proj" in path for path in told.layers)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_gptq_keeps_outputs_better_than_rounding_to_nearest(tiny, batches) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    before = outputs(model, batches)
    errors, told = {}, {}
    for rounding in ("gptq", "nearest"):
        smaller = tiny("mixtral", num_hidden_layers=2)
        told[rounding] = compress_experts(smaller, batches, rounding=rounding, scale="mean", codec="packed").error
        errors[rounding] = float((outputs(smaller, batches) - before).norm())
    assert told["gptq"] < 0.9 * told["nearest"]
    assert errors["gptq"] < errors["nearest"]


def test_later_layers_are_calibrated_with_what_earlier_ones_have_become(tiny, batches) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    second = expert_layers(model)[1]
    before = routed_inputs(model, second, batches, 1000)
    told = compress_experts(model, batches, codec="packed")
    after = routed_inputs(model, second, batches, 1000)
    assert [len(rows) for rows in after] == [expert.rows for expert in told.layers[second.key]]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_only_real_rows_of_an_expert_calibrate_it(tiny, batches) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    layer = expert_layers(model)[0]
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    rows = routed_inputs(model, layer, batches, 1000)
    assert sum(map(len, rows)) == 2 * real  # of two choices each
    assert [len(some) for some in routed_inputs(model, layer, batches, 3)] == [min(3, len(some)) for some in rows]
    changed = [{**b, "input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, 7)} for b in batches]
    again = routed_inputs(model, layer, changed, 1000)
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))


def test_a_dry_run_tells_and_changes_nothing(tiny, batches) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = compress_experts(model, batches, codec="packed", dry_run=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert told.nbytes < 0.2 * told.plain_bytes
    assert json.loads(json.dumps(told.as_dict()))["layers"].keys() == {layer.key for layer in expert_layers(model)}


def test_low_rank_with_all_rows_changes_nothing_and_less_is_smaller_and_errs_more(tiny, batches) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    before = outputs(model, batches)
    whole = compress_experts(model, batches, method="lowrank_sparse", share=0.5, keep=1.0)
    assert torch.allclose(outputs(model, batches), before, atol=1e-4)
    less = compress_experts(model, batches, method="lowrank_sparse", share=0.5, keep=0.1)
    assert less.nbytes < whole.nbytes
    assert less.error > 100 * whole.error


def test_an_expert_that_nothing_reaches_is_rounded_to_nearest(tiny, batches) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    told = compress_experts(model, [{"input_ids": torch.tensor([[7]])}], codec="packed")
    assert {expert.rows for expert in told.experts} == {0, 1}
    assert all(math.isnan(expert.error) == (expert.rows == 0) for expert in told.experts)
    json.dumps(told.as_dict(), allow_nan=False)


def broken(tiny):
    model = tiny("mixtral", num_hidden_layers=2)
    with torch.no_grad():
        expert_layers(model)[1].weights(1).up[0, 0] = torch.nan
    return model


def test_what_cannot_be_compressed_is_refused_before_anything_changes(tiny, moa, batches) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for call, message in (
        (lambda: compress_experts(model, batches), r"would take \d+\.\d\d bits per weight .* pass codec='packed'"),
        (lambda: compress_experts(model, batches, method="zip"), "method='zip' is unknown"),
        (lambda: compress_experts(model, batches, keep=0.1), "option of method='qmoe'='keep' is unknown"),
        (lambda: compress_experts(model, batches, codec="zip"), "codec='zip' is unknown"),
        (lambda: compress_experts(model, iter(batches), codec="packed"), "can be run only once"),
        (lambda: compress_experts(model, [], codec="packed"), "calibration holds no batch"),
        (lambda: compress_experts(model, batches[0], codec="packed"), "a list of batches, at least one, each a dict"),
        (
            lambda: compress_experts(model, batches, codec="packed", samples=0),
            "samples=0 must be an integer, at least 1",
        ),
        (
            lambda: compress_experts(model, batches, method="lowrank_sparse", keep=2),
            "keep=2 must be a number from 0 to 1",
        ),
        (lambda: compress_experts(tiny("llama"), batches), "the model has no routed experts"),
        (lambda: compress_experts(model, batches, codec="packed", damping=-1), "damping=-1 must be a finite number"),
        (lambda: compress_experts(model, [1], codec="packed"), "batch 0 of calibration=1 must be a dict"),
        (lambda: compress_experts("mixtral", batches), "model='mixtral' must be a model"),
        (lambda: compress_experts(broken(tiny), batches, codec="packed"), "expert '1' .* weights that are NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("codec", ["qmoe", "packed"])
def test_matrices_that_codes_would_make_longer_are_told_as_they_lie(codec: str) -> None:
    narrow = Weights(torch.ones(2, 2, dtype=torch.float16), torch.ones(2, 2, dtype=torch.float16))
    form = encode_matrix(narrow.down, codec)
    assert form is not None
    assert form.nbytes > narrow.down.nbytes
    assert coded_bytes(narrow, codec) == narrow.down.nbytes + narrow.up.nbytes


def test_experts_under_lora_are_not_made_smaller_and_those_beside_it_are(tiny, batches) -> None:
    base = tiny("mixtral", num_hidden_layers=1)
    on = peft.LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, on).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"adapters sit on the experts at .*: compress the base model first"):
        compress_experts(model, batches, codec="packed")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    beside = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("mixtral", num_hidden_layers=1), beside).eval()
    assert compress_experts(model, batches, codec="packed").error > 0
