"""Folders of codes: nothing is lost, sizes are honest, and a folder that was changed is refused."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from moe_bases import batch, logits, moe
from processes import Process
from safetensors.torch import load_file, save_file

import mixadapters
from mixadapters.surgery import compress_experts, expert_layers
from mixadapters.surgery.compressed import INDEX, compress_folder, expand_compressed, load_compressed, save_compressed
from mixadapters.surgery.lowrank import LowRankSparse
from mixadapters.surgery.qmoe import ternarize


@pytest.fixture(scope="module")
def ternary(tiny):
    """A mixture over experts that are ternary."""
    model = peft.get_peft_model(
        tiny("llama"), mixadapters.MoAConfig(num_experts=2, r=4, target_modules=["down_proj"], init_weights=False)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.copy_(ternarize(parameter, None))
    return model.eval()


@pytest.fixture
def folder(ternary, tmp_path):
    save_compressed(ternary, tmp_path / "codes")
    return tmp_path / "codes"


@pytest.mark.parametrize("codec", ["qmoe", "packed"])
def test_an_adapter_comes_back_to_the_last_bit(ternary, tiny, tiny_inputs, tmp_path, codec: str) -> None:
    sizes = save_compressed(ternary, tmp_path / "codes", codec=codec)
    loaded = load_compressed(tmp_path / "codes", tiny("llama"))
    inputs = tiny_inputs("llama")
    assert torch.equal(loaded(**inputs).logits, ternary(**inputs).logits)
    ternary.save_pretrained(tmp_path / "plain")
    expand_compressed(tmp_path / "codes", tmp_path / "expanded")
    theirs, ours = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "expanded"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert sizes.plain == sum(tensor.nbytes for tensor in theirs.values())
    assert (tmp_path / "plain" / "adapter_config.json").read_bytes() == (
        tmp_path / "expanded" / "adapter_config.json"
    ).read_bytes()


def test_sizes_are_those_of_the_file(ternary, tmp_path) -> None:
    sizes = save_compressed(ternary, tmp_path / "codes")
    written = tmp_path / "codes" / "adapter_model.compressed.safetensors"
    tensors = load_file(written)
    assert sizes.on_disk == written.stat().st_size
    codes = sum(t.nbytes for key, t in tensors.items() if key.endswith((".words", ".ends", ".levels")))
    assert sizes.coded == codes
    assert sizes.plain - sizes.uncoded + sizes.coded == sum(tensor.nbytes for tensor in tensors.values())
    assert sizes.coded < sizes.uncoded


def test_a_base_model_comes_back_in_a_fresh_process(tiny, tiny_inputs, tmp_path) -> None:
    model = tiny("mixtral")
    with torch.no_grad():
        for block in model.model.layers:
            for parameter in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
                parameter.copy_(torch.stack([ternarize(matrix, None) for matrix in parameter]))
    sizes = save_compressed(model, tmp_path / "codes")
    assert sizes.coded < 0.3 * sizes.uncoded
    inputs = tiny_inputs("mixtral")
    save_file({**inputs, "logits": model(**inputs).logits.detach()}, tmp_path / "expected.safetensors")
    Process(
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from mixadapters.surgery.compressed import load_compressed\n"
        "given = load_file(sys.argv[1] + '/expected.safetensors')\n"
        "expected = given.pop('logits')\n"
        "model = load_compressed(sys.argv[1] + '/codes').eval()\n"
        "assert torch.equal(model(**given).logits, expected)\n",
        [str(tmp_path)],
    ).finish()


def test_stock_libraries_find_no_weights_in_codes(folder, tiny) -> None:
    with pytest.raises(ValueError, match=r"holds adapter_config.json but no adapter_model.safetensors"):
        peft.PeftModel.from_pretrained(tiny("llama"), folder)
    assert "load_compressed" in (folder / "README.md").read_text()


def test_folders_that_hold_something_are_left_alone(ternary, folder, tmp_path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for call in (
        lambda: save_compressed(ternary, folder),
        lambda: expand_compressed(folder, folder),
        lambda: compress_folder(tmp_path, folder),
    ):
        with pytest.raises(ValueError, match="holds something already"):
            call()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="lie in codes already"):
        compress_folder(folder, tmp_path / "again")
    with pytest.raises(ValueError, match="holds no weights"):
        compress_folder(tmp_path, tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"codes"}  # nothing half-written is left


def test_what_a_folder_is_for_is_told(folder, ternary, tiny, tmp_path) -> None:
    with pytest.raises(ValueError, match="holds an adapter: pass its base model"):
        load_compressed(folder)
    tiny("mixtral").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=f"holds no {INDEX}"):
        load_compressed(tmp_path / "plain")
    compress_folder(tmp_path / "plain", tmp_path / "base")
    with pytest.raises(ValueError, match="holds a whole model: leave base_model out"):
        load_compressed(tmp_path / "base", tiny("mixtral"))
    with pytest.raises(ValueError, match="adapter_name='law' is unknown"):
        save_compressed(ternary, tmp_path / "law", adapter_name="law")


def edit_first(change):
    """An edit of what the index says of the first tensor."""

    def edit(content: dict) -> None:
        described = content["files"]["adapter_model.safetensors"]
        key = sorted(described)[0]
        described[key] = {**described[key], **change(described[key])}

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=2), "format_version=2, known is 1"),
        (lambda c: c.update(files={}), "must hold names of files"),
        (lambda c: c["files"].update({"../x.safetensors": {}}), "is no name of a file of weights"),
        (lambda c: c["files"].update({"other.safetensors": {}}), "has no other.compressed.safetensors"),
        (lambda c: c["files"]["adapter_model.safetensors"].update(x={}, y=1), "is no shape, dtype and codec"),
        (lambda c: c["files"]["adapter_model.safetensors"].clear(), "not"),
        (edit_first(lambda a: {"shape": [2**40, 2**40]}), "is no shape, dtype and codec"),
        (edit_first(lambda a: {"shape": [a["shape"][0], a["shape"][1] + 1]}), "ternary weights|stand for other"),
        (edit_first(lambda a: {"codec": "packed"}), "has no .*digits"),
        (edit_first(lambda a: {"by_columns": not a["by_columns"]}), "stand for other|do not make up"),
    ],
)
def test_an_index_that_was_changed_is_refused(folder, tiny, edit, message: str) -> None:
    content = json.loads((folder / INDEX).read_text())
    edit(content)
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_compressed(folder, tiny("llama"))


def test_codes_that_were_changed_are_refused(folder, tiny) -> None:
    path = folder / "adapter_model.compressed.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(".levels"))
    save_file({**tensors, key: tensors[key] * 2}, path)
    with pytest.raises(ValueError, match=r"is not what compression\.json was written with"):
        load_compressed(folder, tiny("llama"))
    said = json.loads((folder / INDEX).read_text())
    said.pop("digests")  # as folders of before
    (folder / INDEX).write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"is not what adapter_config\.json was saved with"):
        load_compressed(folder, tiny("llama"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_compressed(folder, tiny("llama"))


def test_gate_and_up_in_one_lie_in_codes_where_each_is_ternary_by_columns(tmp_path) -> None:
    """Where an expert has more hidden units than it reads, and the base saves both as one tensor."""
    sizes = {"intermediate_size": 48}
    model = moe("granitemoe", **sizes)
    told = compress_experts(model, [batch()], codec="packed")
    found = save_compressed(model, tmp_path / "codes", codec="packed")
    assert (found.coded, found.uncoded) == (told.nbytes, told.plain_bytes)
    loaded = load_compressed(tmp_path / "codes")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    said = json.loads((tmp_path / "codes" / INDEX).read_text())
    name, described = next(iter(said["files"].items()))
    key = next(key for key, about in described.items() if "halves" in about)
    for wrong in ({"halves": 1}, {"halves": True, "shape": [6, 96, 32]}):
        odd = {**said, "files": {name: {**described, key: {**described[key], **wrong}}}}
        (tmp_path / "codes" / INDEX).write_text(json.dumps(odd))
        with pytest.raises(ValueError, match="is no shape, dtype and codec"):
            load_compressed(tmp_path / "codes")


@pytest.fixture(params=["adapter", "mixtral", "granitemoe", "aria_text"])
def products(request, tiny):
    """A model whose experts are products of low rank and some rows, what is told of them, and its base, if any."""
    model = moe(request.param if request.param != "adapter" else "mixtral")
    if request.param == "adapter":
        config = mixadapters.MoAConfig(num_experts=2, r=8, expert_type="glu", init_weights=False, target_modules=None)
        model = peft.get_peft_model(tiny("llama"), config).eval()
    told = compress_experts(model, [batch()], method="lowrank_sparse", share=0.2, keep=0.1)
    return model, told, tiny("llama") if request.param == "adapter" else None


def test_products_lie_as_their_factors_of_the_size_that_is_told(products, tmp_path) -> None:
    model, told, base = products
    sizes = save_compressed(model, tmp_path / "codes", factors=told.factors)
    assert (sizes.coded, sizes.uncoded) == (told.nbytes, told.plain_bytes)
    assert sizes.coded < 0.6 * sizes.uncoded
    before = logits(model, batch())
    loaded = load_compressed(tmp_path / "codes", copy.deepcopy(base))
    torch.testing.assert_close(logits(loaded, batch()), before, rtol=1e-5, atol=1e-6)
    assert save_compressed(model, tmp_path / "plain").coded == 0  # nobody says that they are products
    layer = expert_layers(model)[0]
    layer.weights(0).down.add_(1)
    changed = save_compressed(model, tmp_path / "changed", factors=told.factors)
    assert changed.coded < sizes.coded
    again = load_compressed(tmp_path / "changed", base)
    torch.testing.assert_close(logits(again, batch()), logits(model, batch()), rtol=1e-5, atol=1e-6)


def test_an_adapter_of_products_loads_where_they_are_rounded_otherwise(tiny, tmp_path, monkeypatch) -> None:
    """As on another machine: the digest in its config is of what the products were where it was written."""
    config = mixadapters.MoAConfig(num_experts=2, r=8, init_weights=False, target_modules=["down_proj"])
    model = peft.get_peft_model(tiny("llama"), config)
    told = compress_experts(model, [batch()], method="lowrank_sparse", share=0.2, keep=0.1)
    save_compressed(model, tmp_path / "codes", factors=told.factors)
    plain = LowRankSparse.dense
    monkeypatch.setattr(LowRankSparse, "dense", lambda self: plain(self) * (1 + 1e-6))
    loaded = load_compressed(tmp_path / "codes", tiny("llama"))
    torch.testing.assert_close(logits(loaded, batch()), logits(model, batch()), rtol=1e-4, atol=1e-4)


def test_factors_that_were_changed_are_refused(tmp_path) -> None:
    model = moe("mixtral")
    told = compress_experts(model, [batch()], method="lowrank_sparse", share=0.2, keep=0.1)
    save_compressed(model, tmp_path / "codes", factors=told.factors)
    file, index = tmp_path / "codes" / "model.compressed.safetensors", tmp_path / "codes" / INDEX
    tensors, said = load_file(file), json.loads(index.read_text())
    key = next(key.removesuffix(".left") for key in tensors if key.endswith(".left"))
    kept = tensors[f"{key}.kept"]
    save_file({**tensors, f"{key}.kept": kept + 10**6}, file)
    with pytest.raises(ValueError, match=r"is not what compression\.json was written with"):
        load_compressed(tmp_path / "codes")
    said.pop("digests")
    index.write_text(json.dumps(said))
    for changed, complaint in (
        ({}, "it keeps rows that it does not have"),
        ({"kept": kept, "left": tensors[f"{key}.left"][:, :-1].contiguous()}, "do not make up"),
        ({"kept": kept, "left": tensors[f"{key}.left"].double()}, "do not make up"),
        ({"kept": kept.long()}, "do not make up"),
    ):
        odd = {f"{key}.{name}": part for name, part in {"kept": kept + 10**6, **changed}.items()}
        save_file({**tensors, **odd}, file)
        with pytest.raises(ValueError, match=complaint):
            load_compressed(tmp_path / "codes")
    long = {"left": torch.ones(1, 9000, 1), "right": torch.ones(1, 1, 9000), "kept": kept[:1, :0],
            "sparse": torch.ones(1, 0, 9000)}  # fmt: skip
    save_file({**tensors, **{f"{key}.{name}": part for name, part in long.items()}}, file)
    said["files"]["model.safetensors"][key]["shape"] = [9000, 9000]
    index.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="more than 256 times smaller"):
        load_compressed(tmp_path / "codes")
