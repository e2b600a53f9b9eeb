"""The command line of surgery, on tiny models in folders: what it writes, and what it refuses before they load."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_bases import VOCAB, moe
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixadapters import MoAConfig
from mixadapters.core import folders, starting
from mixadapters.surgery import __main__ as command
from mixadapters.surgery import load_compressed, loading
from mixadapters.surgery.layers import expert_layers
from mixadapters.surgery.pruning import prune_experts
from mixadapters.surgery.qmoe import encode_matrix
from mixadapters.surgery.texts import LONGEST, read_texts
from mixadapters.surgery.usage import ExpertUsage

ROWS = [{"text": f"w{i} w{i + 1} w{2 * i}", "label": "law" if i % 2 else "code"} for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An MoE base with a tokenizer, an adapter with a mixture on it, and texts."""
    path = tmp_path_factory.mktemp("models")
    model = moe("mixtral")
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(path / "base")
    model.save_pretrained(path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, MoAConfig(num_experts=4, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False)
    )
    adapted.save_pretrained(path / "adapter")
    (path / "texts.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


def run(name: str, folder: Path, *arguments: Any, adapter: bool = False) -> int:
    start = [name, str(folder / "base"), "--data", str(folder / "texts.jsonl")]
    whose = ["--adapter", str(folder / "adapter")] if adapter else []
    return command.main([*start, *whose, *map(str, arguments)])


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize(("adapter", "experts"), [(False, 6), (True, 4)])
def test_report_writes_a_folder(folder, tmp_path, capsys, adapter, experts) -> None:
    assert run("report", folder, "--out", tmp_path / "out", adapter=adapter) == 0
    assert left(tmp_path / "out") == ["load.png", "report.json", "report.md", "usage.safetensors"]
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {len(layer["experts"]) for layer in found["layers"]} == {experts}
    assert {layer["kind"] for layer in found["layers"]} == {"bank" if adapter else "base"}
    assert all(layer["use"]["tokens"] == 24 for layer in found["layers"])  # three words in eight texts
    assert all(layer["duplicates"] == [] for layer in found["layers"])
    assert capsys.readouterr().out.strip() == (tmp_path / "out" / "report.md").read_text().strip()
    assert ExpertUsage.load(tmp_path / "out" / "usage.safetensors").by_label.keys() == {"law", "code"}


def test_report_without_a_folder_prints(folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("report", folder) == 0
    assert capsys.readouterr().out.startswith("| parameters | active |")
    assert left(tmp_path) == []


def test_routes_writes_a_page(folder, tmp_path) -> None:
    page = tmp_path / "routes.html"
    assert run("routes", folder, "--out", page, "--limit", 2, "--length", 2, "--title", "a & b", adapter=True) == 0
    text = page.read_text(encoding="utf-8")
    assert "<h1>a &amp; b</h1>" in text
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found
    data = json.loads(found[1])
    assert data["labels"] == ["code", "law"]
    assert [len(row["tokens"]) for row in data["texts"]] == [2, 2, 2, 2]
    assert {layer["key"].rpartition("/")[2] for layer in data["layers"]} == {"default"}
    assert left(tmp_path) == ["routes.html"]


def test_texts_that_are_left_out_are_said(folder, tmp_path, capsys) -> None:
    run("routes", folder, "--out", tmp_path / "routes.html", "--limit", 1)
    assert "2 texts are read, 6 are left out by --limit 1" in capsys.readouterr().err


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = loading.load_model(str(folder / "base"), None if adapter is None else str(adapter))
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(1, -1)).logits


def test_prune_writes_an_adapter_that_loads(folder, tmp_path, capsys) -> None:
    assert run("prune", folder, "--keep", 2, "--out", tmp_path / "out", adapter=True) == 0
    said = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert said["counts"] == [8, 4]  # of two layers
    assert "pruned 8 experts to 4 by saliency" in capsys.readouterr().out
    model: Any = loading.load_model(str(folder / "base"), str(tmp_path / "out"))
    assert [len(layer.names) for layer in expert_layers(model, "default")] == [2, 2]
    assert not torch.equal(logits(folder, tmp_path / "out"), logits(folder, folder / "adapter"))
    assert run("prune", folder, "--keep", 4, "--out", tmp_path / "whole", adapter=True) == 0
    assert torch.equal(logits(folder, tmp_path / "whole"), logits(folder, folder / "adapter"))


def test_merge_writes_an_adapter_that_loads(folder, tmp_path, capsys) -> None:
    assert run("merge", folder, "--groups", 2, "--out", tmp_path / "out", adapter=True) == 0
    assert json.loads((tmp_path / "out" / "surgery.json").read_text())["counts"] == [8, 4]
    assert "merged 8 experts to 4" in capsys.readouterr().out
    found = logits(folder, tmp_path / "out")
    assert found.isfinite().all()
    assert not torch.equal(found, logits(folder, folder / "adapter"))


@pytest.mark.parametrize("adapter", [False, True])
def test_compress_writes_a_folder_of_codes_that_loads(folder, tmp_path, capsys, adapter) -> None:
    out = tmp_path / "out"
    assert run("compress", folder, "--codec", "packed", "--out", out, adapter=adapter) == 0
    told = json.loads((out / "surgery.json").read_text())
    assert f"{told['nbytes']} bytes for {told['plain_bytes']}" in capsys.readouterr().out
    loaded = load_compressed(out, moe("mixtral") if adapter else None)
    layer = expert_layers(loaded, "default" if adapter else "")[0]
    assert all(encode_matrix(layer.weights(e).down) is not None for e in range(len(layer.names)))
    assert (out / "tokenizer.json").is_file() != adapter


@pytest.mark.parametrize("adapter", [False, True])
def test_a_folder_of_codes_goes_into_other_commands_and_is_expanded(folder, tmp_path, capsys, adapter) -> None:
    codes, plain = tmp_path / "codes", tmp_path / "plain"
    assert run("compress", folder, "--codec", "packed", "--out", codes, adapter=adapter) == 0
    assert command.main(["expand", str(codes), "--out", str(plain)]) == 0
    both = [(folder / "base", path) if adapter else (path, None) for path in (codes, plain)]
    models = [loading.load_model(*(None if part is None else str(part) for part in pair)) for pair in both]
    with torch.no_grad():
        coded, expanded = (model(input_ids=torch.arange(12).view(1, -1)).logits for model in models)
    assert torch.equal(coded, expanded)
    assert models[0].config.name_or_path == str(both[0][0])
    data = ["--data", str(folder / "texts.jsonl"), "--keep", "2", "--out", str(tmp_path / "out")]
    whose = [str(both[0][0]), *(["--adapter", str(codes)] if adapter else [])]
    assert command.main(["prune", *whose, *data]) == 0
    assert not any("ompressed" in file.read_text() for file in plain.glob("*.md"))
    capsys.readouterr()
    for wrong, said in (("plain", "holds no compression.json"), ("nowhere", "there is no such folder")):
        assert command.main(["expand", str(tmp_path / wrong), "--out", str(tmp_path / "new")]) == 1
        assert said in capsys.readouterr().err
    assert command.main(["expand", str(codes), "--out", str(plain)]) == 1
    assert "holds something already" in capsys.readouterr().err


def test_merge_of_doubles_takes_those_that_compute_the_same(folder, tmp_path, capsys) -> None:
    assert run("merge", folder, "--doubles", 0, "--out", tmp_path / "out", adapter=True) == 0
    assert "merged 8 experts to 8" in capsys.readouterr().out
    assert run("merge", folder, "--doubles", 2, "--dry-run", "--out", tmp_path / "new", adapter=True) == 0
    assert re.search("would merge 8 experts to [2-7]", capsys.readouterr().out)


def test_compress_to_products_holds_what_it_says(folder, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    options = ("--method", "lowrank_sparse", "--share", 0.1, "--keep-rows", 0.05, "--out", out)
    assert run("compress", folder, *options, adapter=False) == 0
    said = capsys.readouterr()
    told = json.loads((out / "surgery.json").read_text())
    assert f"{told['nbytes']} bytes for {told['plain_bytes']}" in said.out
    on_disk = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    plain = (folder / "base" / "model.safetensors").stat().st_size
    assert f": {on_disk} bytes of weights for" in said.err
    assert plain - on_disk > 0.8 * (told["plain_bytes"] - told["nbytes"])
    for wrong, complaint in (
        (("--method", "lowrank_sparse", "--codec", "packed"), "--codec is no option of --method lowrank_sparse"),
        (("--keep-rows", 0.5), "--keep-rows is no option of --method qmoe"),
        (("--method", "lowrank_sparse", "--share", 2), "--share=2.0 must be a number from 0 to 1"),
    ):
        assert run("compress", folder, *wrong, "--out", tmp_path / "new") == 1
        assert complaint in capsys.readouterr().err


def test_compress_that_is_tried_or_refused_writes_nothing(folder, tmp_path, capsys) -> None:
    assert run("compress", folder, "--codec", "packed", "--dry-run", "--out", tmp_path / "out") == 0
    assert run("compress", folder, "--out", tmp_path / "out") == 1
    assert "pass codec='packed'" in capsys.readouterr().err
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("prune", ["--keep", 3]), ("prune", ["--keep", 3, "--scope", "global"]), ("merge", ["--groups", 3])],
)
def test_a_base_that_was_cut_is_a_model_again(folder, tmp_path, name, arguments) -> None:
    assert run(name, folder, *arguments, "--out", tmp_path / "base") == 0
    assert {"config.json", "surgery.json", "tokenizer.json"} <= set(left(tmp_path / "base"))
    model: Any = loading.load_model(str(tmp_path / "base"))
    assert sum(len(layer.names) for layer in expert_layers(model)) == 6
    data = ["--data", str(folder / "texts.jsonl")]
    assert command.main(["report", str(tmp_path / "base"), *data]) == 0


def test_prune_for_a_label_goes_by_its_texts_alone(folder, tmp_path, monkeypatch) -> None:
    seen = []

    def keep(model, usage, *args, **options):
        if usage is not None:  # of the texts; before them it is tried without
            seen.append(sum(int(layer.rows) for layer in usage.layers.values()))
        return prune_experts(model, usage, *args, **options)

    monkeypatch.setattr("mixadapters.surgery.pruning.prune_experts", keep)
    for label in ([], ["--label", "law"]):
        assert run("prune", folder, "--keep", 2, "--dry-run", "--out", tmp_path / "out", *label, adapter=True) == 0
    assert seen == [2 * 24, 2 * 12]
    assert left(tmp_path) == []  # a dry run


def test_what_cannot_be_cut_is_refused_before_the_texts_are_run(folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(command.Inputs, "usage", None)
    for name, count, said in (("prune", "--keep", "keep=9"), ("merge", "--groups", "--groups 9")):
        assert run(name, folder, count, 9, "--out", tmp_path / "out", adapter=True) == 1
        assert f"{said}: no layer has more than 4" in capsys.readouterr().err


def test_a_page_that_would_be_too_large_is_refused_before_the_texts_are_run(
    folder, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("mixadapters.surgery.tracing.routes", None)
    for limit, said in (("MOST_TOKENS", 23), ("MOST_CHOICES", 24 * 2 * 2 - 1)):  # of two layers that choose two
        with monkeypatch.context() as less:
            less.setattr(f"mixadapters.surgery.page.{limit}", said)
            assert run("routes", folder, "--out", tmp_path / "page.html") == 1
        assert "24 tokens with 96 choices of experts in all layers are too much" in capsys.readouterr().err


def test_without_a_terminal_long_work_speaks_from_time_to_time(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(command, "SILENCE", -1)
    assert run("report", folder, "--batch", 3) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "batches" in line]
    assert said == [
        f"{what}: {i} of 3 batches" for what in ("usage", "experts that compute the same") for i in range(3)
    ]


def test_an_adapter_of_another_base_is_told(folder, tmp_path, capsys) -> None:
    told = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    for base, said in (("models/other", True), (str(folder / "base"), False)):
        config = json.dumps({**told, "base_model_name_or_path": base})
        (tmp_path / "adapter" / "adapter_config.json").write_text(config)
        args = command._parser("report", "", 2, "").parse_args(
            [str(folder / "base"), "--adapter", str(tmp_path / "adapter"), "--data", str(folder / "texts.jsonl")]
        )
        command.Inputs(args)
        assert ("says that it was trained on 'models/other'" in capsys.readouterr().err) == said


def test_prune_of_an_unknown_label_is_refused(folder, tmp_path, capsys) -> None:
    assert run("prune", folder, "--keep", 2, "--out", tmp_path / "out", "--label", "tax", adapter=True) == 1
    assert "--label 'tax' is no label of" in capsys.readouterr().err
    assert run("prune", folder, "--keep", 9, "--out", tmp_path / "out", adapter=True) == 1
    assert "keep=9" in capsys.readouterr().err
    assert left(tmp_path) == []


@pytest.fixture
def unloaded(monkeypatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded before the arguments were checked")

    monkeypatch.setattr(loading, "load_model", refuse)
    monkeypatch.setattr(loading, "load_tokenizer", refuse)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("routes", ["--out", "full/page.html"], "is there already; name a new file"),
        ("routes", ["--out", "page.png"], "must end in .html"),
        ("routes", ["--out", "nowhere/page.html"], "there is no folder 'nowhere'"),
        ("routes", ["--out", "page.html", "--length", "0"], "--length 0 must be 1 or more"),
        ("routes", ["--out", "page.html", "--batch", "-1"], "--batch -1 must be 1 or more"),
        ("routes", ["--out", "page.html", "--data", "missing.txt"], "'missing.txt' cannot be read"),
        ("routes", ["--out", "page.html", "--data", "texts.csv"], "must end in .txt, .jsonl"),
        ("routes", ["--out", "page.html", "--text-field", "body"], "line 1 has no text in a field 'body'"),
        ("report", ["--out", "full"], "holds something already"),
        ("report", ["--limit", "0"], "--limit 0 must be 1 or more"),
        ("prune", ["--keep", "2", "--out", "full"], "holds something already"),
        ("prune", ["--keep", "0", "--out", "new"], "--keep 0 must be 1 or more"),
        ("prune", ["--factor", "nan", "--out", "new"], "--factor nan must be 1 or more"),
        ("merge", ["--groups", "0", "--out", "new"], "--groups 0 must be 1 or more"),
        ("merge", ["--doubles", "0.1", "--scope", "global", "--out", "new"], "leave out --similarity, --grouping"),
        *(
            ("merge", ["--doubles", given, "--out", "new"], "must be a distance from 0")
            for given in ("nan", "-1", "5")
        ),
        ("prune", ["--keep", "2", "--out", "new", "--label", "lwa"], "--label 'lwa' is no label of"),
    ],
)
def test_arguments_are_refused_before_anything_loads(
    folder, tmp_path, unloaded, monkeypatch, capsys, name, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "page.html").write_text("mine")
    assert run(name, folder, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert left(tmp_path) == ["full"]
    assert (tmp_path / "full" / "page.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "adapter", "message"),
    [
        ("adapter", None, "is an adapter: name its base model first, and the folder by --adapter"),
        ("base", "base", "has no adapter_config.json: it is no saved adapter"),
        ("base", "nowhere", "--adapter '.*nowhere': there is no such folder"),
        ("empty", None, "MODEL '.*empty' cannot be loaded"),
    ],
)
def test_models_that_are_none_are_refused(folder, tmp_path, model, adapter, message) -> None:
    (tmp_path / "empty").mkdir()
    where = {name: str((tmp_path if name == "empty" else folder) / name) for name in (model, adapter) if name}
    with pytest.raises(ValueError, match=message):
        loading.load_model(where[model], where.get(adapter))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("models/bsae", r"MODEL 'models/bsae': there is no such folder\. Did you mean 'base'\?"),
        ("./bsae", r"MODEL './bsae': there is no such folder"),
        ("no/such/folder", r"MODEL 'no/such/folder': there is no such folder\.$"),
        ("bsae", r"MODEL 'bsae': there is no such folder here, and the hub gives none of this name: no network"),
        ("user/bsae", "MODEL 'user/bsae': there is no such folder here, and the hub gives none"),
        ("models/file", "is a file: name the folder"),
    ],
)
def test_a_misspelt_folder_is_told_at_once(tmp_path, monkeypatch, name, said) -> None:
    def ask(self: Any, name: str, timeout: float) -> None:
        asked.append(name)
        raise OSError("no network\nand more")

    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "file").touch()
    with pytest.raises(ValueError, match=said):
        folders.check_saved("MODEL", name, "config.json")
    assert asked == ([name] if name in ("bsae", "user/bsae") else [])
    folders.check_saved("MODEL", "models/base", "config.json")


def test_a_model_is_loaded_as_what_it_was_saved_as(folder) -> None:
    assert type(loading.load_model(str(folder / "base"))).__name__ == "MixtralForCausalLM"
    with pytest.raises(ValueError, match="--device 'nothing'"):
        loading.load_model(str(folder / "base"), device="nothing")


def test_a_model_without_experts_ends_with_an_error(folder, tmp_path, tiny, capsys, monkeypatch) -> None:
    monkeypatch.setattr(loading, "load_model", lambda *args: tiny("llama"))
    assert run("routes", folder, "--out", tmp_path / "page.html") == 1
    assert "the model has no routed experts" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "out"), [("routes", "page.html"), ("report", "out")])
def test_an_interruption_leaves_nothing(folder, tmp_path, monkeypatch, capsys, name, out) -> None:
    monkeypatch.setattr("mixadapters.surgery.usage.ExpertUsage.save", interrupted)
    monkeypatch.setattr("os.replace", interrupted)
    assert run(name, folder, "--out", tmp_path / out) == 130
    assert "interrupted" in capsys.readouterr().err
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["surgery", "prune", "--help"], 0, "example:"),
        (["surgery", "prune", "MODEL", "--data", "missing.txt", "--keep", "2", "--out", "new"], 1, "'missing.txt'"),
        (["surgery", "expand", "missing", "--out", "new"], 1, "there is no such folder"),
        (["tasks", "shots", "sst3"], 1, "sst3"),
        (["tasks", "run", "--help"], 0, "--stage1_steps"),
        (["serving", "--base", "./missing", "--adapters", "."], 2, "--base './missing': there is no such folder"),
        (["serving", "--base", ".", "--adapters", "missing"], 2, "--adapters 'missing': there is no such folder"),
    ],
)
def test_arguments_are_read_before_what_takes_seconds_is_imported(tmp_path, arguments, code, said) -> None:
    """In a process in which nothing slow can be imported at all."""
    for name in ("torch", "transformers", "peft", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('slow')")
    paths = os.pathsep.join([str(tmp_path), str(Path(command.__file__).parents[2])])
    ended = subprocess.run(
        [sys.executable, "-m", f"mixadapters.{arguments[0]}", *arguments[1:]], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    assert ended.returncode == code, ended.stderr
    assert said in ended.stdout + ended.stderr


def test_packages_wait_for_a_command_and_for_nothing_else(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert not starting.waits("mixadapters")
    monkeypatch.setattr("sys.argv", ["-m", "report"])  # so it is while Python looks for the module of `python -m`
    for line in (["python", "-m", "training.run", "report"], ["python", "-mmixadapters_of_mine"], ["python", "-m"]):
        monkeypatch.setattr("sys.orig_argv", line)  # a user's own package that imports this one
        assert not starting.waits("mixadapters")
    monkeypatch.setattr("sys.orig_argv", ["python", "-u", "-m", "mixadapters.surgery", "report"])
    assert starting.waits("mixadapters.surgery")
    monkeypatch.setattr("sys.argv", ["__main__.py"])
    reloaded: list[str] = []
    monkeypatch.setattr("importlib.reload", lambda module: reloaded.append(module.__name__))
    starting.import_what_waits()
    starting.import_what_waits()
    assert reloaded == ["mixadapters.surgery"]


def test_the_end_by_a_signal_takes_away_what_is_half_written(tmp_path) -> None:
    def write() -> None:
        with folders.folder_aside(tmp_path / "out") as aside:
            (aside / "part").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    try:
        starting.end_by_signal()
        with pytest.raises(SystemExit) as ended:
            write()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM
    assert left(tmp_path) == []


def test_an_interruption_is_no_error(monkeypatch) -> None:
    monkeypatch.setitem(command.COMMANDS, "report", interrupted)
    assert command.main(["report"]) == 130


def interrupted(*args: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_commands_are_listed(capsys) -> None:
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().err
    assert all(f"\n  {name} " in text for name in command.COMMANDS)
    assert command.main(["prun"]) == 2
    assert command.main([]) == 2
    for name in command.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            command.main([name, "--help"])
        assert ended.value.code == 0
        assert f"example:\n  python -m mixadapters.surgery {name} " in capsys.readouterr().out


# --- files of texts -----------------------------------------------------------------------------------------------


def test_lines_are_texts(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\n  \ntwo é\nthree".encode("utf-8-sig"))
    found = read_texts(tmp_path / "a.txt", limit=2)
    assert (found.texts, found.labels, found.left_out) == (["one", "two é"], None, 1)


def test_fields_are_texts_and_labels_and_both_may_be_packed(tmp_path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(
            '{"body": "x", "kind": 3}\n\n{"body": "y", "kind": 4}\n{"body": "z", "kind": 3}\n{"body": " ", "kind": 5}'
        )
    found = read_texts(tmp_path / "a.jsonl.gz", 1, "body", "kind")
    assert (found.texts, found.labels, found.left_out) == (["x", "y"], ["3", "4"], 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', r"line 2 has no text in a field 'text'; it has \['text'\]"),
        ("a.jsonl", b'{"text": "x"}\nnothing', "line 2 is no JSON"),
        ("a.jsonl", b"[1]", "line 1 has no text"),
        ("a.jsonl", b"[" * 5000 + b"]" * 5000, "line 1"),
        ("a.jsonl", b'{"text": "x", "label": "a"}\n{"text": "y"}', "line 2: some lines have a field 'label'"),
        ("a.jsonl", b'{"text": "x", "label": ["a"]}', "no word and no number"),
        ("a.jsonl", b'{"text": "x", "label": true}', "is True, no word and no number"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "x", "text": "y"}', r"line 1 is no JSON: a field is named twice"),
        ("a.jsonl", b'{"text": "\\ud83d!"}', "line 1 has text=.* with half of a surrogate pair at character 0"),
        ("a.txt", b"\n\n", "holds no text"),
        ("a.txt", b"ok\n\xff\xfe", "line 2, is no UTF-8"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt", b"x" * (LONGEST + 1), "line 1 is longer than 1,048,576 bytes"),
        ("a.parquet", b"", r"must end in \.txt, \.jsonl"),
    ],
)
def test_files_that_are_not_as_they_should_be_are_refused(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name, 5)


def test_a_packed_file_that_ends_too_early_is_refused(tmp_path) -> None:
    whole = gzip.compress(b"one two three\n" * 1000)
    (tmp_path / "a.txt.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        read_texts(tmp_path / "a.txt.gz", 5)


def test_too_many_labels_are_no_labels(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "x", "label": i}) for i in range(300)))
    with pytest.raises(ValueError, match="more than 256 different labels"):
        read_texts(tmp_path / "a.jsonl", 5)
