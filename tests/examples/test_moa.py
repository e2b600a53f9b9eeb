"""The short examples of MoA, as scripts on a tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

from mixadapters import ROUTERS

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "law", "of", "code", "is", "a", "chat", "about", "courts", "and", "tests", "first", "try", "defendant"]


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch) -> Path:
    """A base model with a tokenizer, two LoRA folders, and some text."""
    base = tmp_path / "base"
    tiny("llama").save_pretrained(base)
    words = Tokenizer(
        models.WordLevel({word: 5 + i for i, word in enumerate(WORDS)} | {"<unk>": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(base)
    for name, target in (("law", "q_proj"), ("code", "up_proj")):
        lora = LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
        get_peft_model(tiny("llama"), lora).save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS[i % 5 :]) for i in range(20)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name: str, *arguments: str) -> None:
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before


EXPERTS = ("--expert", "law=law", "--expert", "code=code")


def test_gathered_experts_are_routed_trained_and_saved(folder, tiny) -> None:
    run("moa_gather", "base", "text.txt", *EXPERTS, "--steps", "2", "--out", "out")
    model = PeftModel.from_pretrained(tiny("llama"), folder / "out")
    assert list(model.peft_config["default"].experts) == ["law", "code"]


def test_arrow_generates_and_tells_how_it_routed(folder, capsys) -> None:
    run("moa_arrow", "base", "the defendant", *EXPERTS)
    assert "gate/mean/weight/law" in capsys.readouterr().out


def test_new_experts_train_and_one_leaves_as_stock_lora(folder, tiny) -> None:
    run("moa_new_experts", "base", "text.txt", "--steps", "2", "--out", "out")
    assert PeftModel.from_pretrained(tiny("llama"), folder / "out" / "expert0").peft_config["default"].r == 8


def test_own_router_routes(folder, capsys) -> None:
    with ROUTERS.temporarily():
        run("moa_router", "base")
    assert "gate/mean/weight/code" in capsys.readouterr().out
