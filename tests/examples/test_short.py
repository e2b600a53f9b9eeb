"""The short examples, one after the other on a tiny model; each stays short."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHORT = ("train_adapter", "mix_adapters", "change_domains", "generate")
TEXTS = {
    "law": "court shall hereby",
    "code": "def return class",
    "tax": "income rate duty",
    "general": "river wind stone",
}


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"short_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch) -> Path:
    words = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *" ".join(TEXTS.values()).split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "base")
    tiny("llama").save_pretrained(tmp_path / "base")
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(f"{text}\n\n" * 6, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_model_becomes_a_mixture_whose_domains_come_and_go(folder, capsys) -> None:
    for name in ("law", "code", "tax"):
        example("train_adapter").main("base", f"{name}.txt", name)
    example("mix_adapters").main("base", "mixture", "general.txt", "law=law=law.txt", "code=code=code.txt")
    assert "tokens counted: {'law': 18, 'code': 18, 'frozen': 18}" in capsys.readouterr().out
    example("change_domains").main("base", "mixture", "add", "tax", "tax", "tax.txt")
    example("generate").main("base", "mixture", "income rate duty income rate duty")
    weights = {line.split()[1]: float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[-4:]}
    assert weights.keys() == {"law", "code", "tax", "frozen"}
    assert max(weights, key=weights.get) == "tax"
    example("change_domains").main("base", "mixture", "remove", "law")
    example("generate").main("base", "mixture", "income rate duty")
    assert " law" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("train_adapter", "base law.txt"), ("generate", "base mixture two words"),
        ("mix_adapters", "base mixture general.txt"), ("mix_adapters", "base mixture general.txt law=law.txt"),
        ("change_domains", "base mixture drop law"), ("change_domains", "base mixture add tax tax"),
    ],
)  # fmt: skip
def test_without_the_right_arguments_they_say_what_they_take(name, given, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", [name, *given.split()])
    with pytest.raises(SystemExit, match=f"python examples/{name}.py"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", [*SHORT, "moa_gather", "moa_arrow", "moa_new_experts", "moa_router"])
def test_short_examples_are_short(name) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 40
