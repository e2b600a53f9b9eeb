"""The demo, whole, on tiny models and tiny text: its own, and a user's."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
WORDS = {
    "general": "river stone wind", "code": "<b>x</b> def & return", "science": "cell gene acid",
    "licences": "shall hereby grant", "readmes": "install badge star", "headers": "include inline const",
}  # fmt: skip
SIZES = "--tokens 1000 --test_tokens 200 --base_tokens 1200 --length 20 --vocabulary 300 --width 32 --layers 1"
SIZES += " --rank 2 --batch 8"


def documents(kind: str, count: int = 40) -> list[str]:
    draw = random.Random(kind)
    return [" ".join(draw.choices(WORDS[kind].split(), k=30)) + f" {i}" for i in range(count)]


@pytest.fixture
def demo(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module("demo")
    monkeypatch.setattr(module, "installation", lambda: {kind: documents(kind) for kind in WORDS})
    return module


@pytest.mark.slow
def test_demo_tells_its_story_and_a_fresh_process_agrees(demo, tmp_path, capsys) -> None:
    report = demo.main(["--out", str(tmp_path), *SIZES.split()])
    assert report["equal_in_a_fresh_process"] is True
    assert json.loads((tmp_path / "report.json").read_text())["systems"] == report["systems"]
    systems = {system["name"]: system for system in report["systems"]}
    assert list(systems) == [
        "base model", "mixture", "joint adapter", "mixture + headers", "joint adapter, gone on with headers alone",
        "joint adapter, trained anew on everything", "mixture without code",
    ]  # fmt: skip
    assert systems["mixture"]["parameters"] == systems["joint adapter"]["parameters"]
    assert systems["mixture"]["tokens"] == systems["joint adapter"]["tokens"]
    base, mixed = (systems[name]["perplexity"] for name in ("base model", "mixture + headers"))
    assert all(mixed[kind] < base[kind] for kind in WORDS if kind != "general")
    without = systems["mixture without code"]["perplexity"]
    assert abs(without["code"] / base["code"] - 1) < abs(mixed["code"] / base["code"] - 1)
    assert without["science"] == pytest.approx(mixed["science"], rel=0.02)
    assert all(report["routing"][kind][kind] > 0.5 for kind in WORDS if kind != "general")
    printed = capsys.readouterr().out
    assert "| mixture + headers |" in printed
    assert "A fresh process found the same perplexities" in printed
    assert "train_runtime" not in printed
    for picture in ("routing.png", "perplexity.png", "adding.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    page = (tmp_path / "text.html").read_text(encoding="utf-8")
    assert "&lt;" in page
    assert "<b>x" not in page
    assert not any(word in page for word in ("<script", "src=", "href=", "url("))


def test_a_users_model_and_text(demo, tmp_path, monkeypatch) -> None:
    from demo_models import new_base
    from demo_text import new_tokenizer

    tokenizer = new_tokenizer((text for kind in WORDS for text in documents(kind)), 300)
    tokenizer.save_pretrained(tmp_path / "base")
    new_base(len(tokenizer), 32, 1, 20).save_pretrained(tmp_path / "base")
    for kind in ("code", "science", "general"):
        (tmp_path / kind).write_text("\n\n".join(documents(kind)), encoding="utf-8")
    monkeypatch.setattr(demo.Demo, "fresh_process", lambda self, expected: True)
    report = demo.main(
        ["--base", str(tmp_path / "base"), "--domains", f"code={tmp_path / 'code'}", f"science={tmp_path / 'science'}",
         "--general", str(tmp_path / "general"), "--out", str(tmp_path / "out"), *SIZES.split()]
    )  # fmt: skip
    assert report["kinds"] == ["code", "science", "general"]
    assert [s["name"] for s in report["systems"]] == ["base model", "mixture", "joint adapter", "mixture without code"]
    assert not (tmp_path / "out" / "base").exists()


def test_the_verdict_names_whoever_is_ahead(demo) -> None:
    def system(name: str, *found: float) -> dict[str, Any]:
        perplexity = dict(zip(("code", "general"), found, strict=True))
        return {"name": name, "perplexity": perplexity, "domains": found[0], "all": 1.0}

    report = {"kinds": ["code", "general"], "later": None}
    text = demo.verdict({**report, "systems": [system("mixture", 11, 20), system("joint adapter", 10, 40)]})
    assert "On the domains the joint adapter is ahead: 11.0 (mixture), 10.0 (joint), 10.0 %." in text
    assert "With general text the mixture is ahead" in text


def test_domains_need_a_base_and_files_that_can_be_read(demo, tmp_path) -> None:
    with pytest.raises(SystemExit, match="--domains needs --base"):
        demo.main(["--domains", "a=b", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"a=.*missing cannot be read as UTF-8 text"):
        demo.from_files({"a": tmp_path / "missing"})
    (tmp_path / "short").write_text("one\n\ntwo")
    with pytest.raises(ValueError, match=r"has 2 documents .* 20 are needed"):
        demo.from_files({"a": tmp_path / "short"})


def test_test_text_is_of_other_documents(demo) -> None:
    train, test = demo.parted(["a", "b", "a", *map(str, range(30))])
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted({"a", "b", *map(str, range(30))})


def test_rows_are_whole_and_bounded(demo) -> None:
    from demo_text import new_tokenizer, token_rows

    tokenizer = new_tokenizer(["ab ab ab"], 260)
    rows = token_rows(tokenizer, ["ab " * 500] * 9, 8, 100)
    assert rows.dtype == torch.int64
    assert rows.shape[1] == 8
    assert 8 <= rows.numel() <= 100
    with pytest.raises(ValueError, match="make no row of 8"):
        token_rows(tokenizer, ["a"], 8, 100)


def test_prose_of_an_installation_is_prose(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    text = importlib.import_module("demo_text")
    words = "This is a plain sentence of English words, as the documentation of a function has it."
    source = f'def f(x):\n    """Short.\n\n    {words}\n\n    >>> f(1) {words}\n\n    x[0]=1 y[2]=3 {words}\n    """\n'
    assert next(text._paragraphs(source)) == words
    assert not any(">>>" in paragraph for paragraph in text._paragraphs(source))
    assert text._files(Path("nowhere"), "*.py") == []
