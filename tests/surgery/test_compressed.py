"""Folders of codes: nothing is lost, sizes are honest, and a folder that was changed is refused."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from processes import Process
from safetensors.torch import load_file, save_file

import mixadapters
from mixadapters.surgery.compressed import INDEX, compress_folder, expand_compressed, load_compressed, save_compressed
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
    with pytest.raises(ValueError, match=r"is not what adapter_config\.json was saved with"):
        load_compressed(folder, tiny("llama"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_compressed(folder, tiny("llama"))
