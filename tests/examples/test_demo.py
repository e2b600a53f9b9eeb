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
SIZES += " --rank 2 --batch 16 --rate 1e-2"


def documents(kind: str, count: int = 40) -> list[str]:
    draw = random.Random(kind)
    return [" ".join(draw.choices(WORDS[kind].split(), k=30)) + f" {i}" for i in range(count)]


@pytest.fixture
def demo(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    text = importlib.import_module("demo_text")
    monkeypatch.setattr(text, "installation", lambda: {kind: documents(kind) for kind in WORDS})
    return importlib.import_module("demo")


@pytest.mark.slow
def test_demo_tells_its_story_and_a_fresh_process_agrees(demo, tmp_path, capsys) -> None:
    report = demo.main(["--out", str(tmp_path), *SIZES.split()])
    assert report["equal_in_a_fresh_process"] is True
    assert json.loads((tmp_path / "report.json").read_text())["systems"] == report["systems"]
    systems = {system["name"]: system for system in report["systems"]}
    shared, twice = "mixture + shared adapter", "joint adapter of that size, two readings"
    assert list(systems) == [
        "base model", "mixture", "joint adapter", "mixture + headers", "joint adapter, gone on with headers alone",
        "joint adapter, trained anew on everything", "mixture, without code", shared, twice, f"{shared} + headers",
        f"{shared}, without code",
    ]  # fmt: skip
    for one, other in (("mixture", "joint adapter"), (shared, twice)):
        assert systems[one]["parameters"] == systems[other]["parameters"]
        assert systems[one]["tokens"] == systems[other]["tokens"]
    assert systems[shared]["tokens"] == 2 * systems["mixture"]["tokens"]
    assert systems[shared]["domains"] < systems["mixture"]["domains"]  # it has learned
    first, added = (systems[name]["perplexity"] for name in (shared, f"{shared} + headers"))
    assert added["headers"] < first["headers"]
    assert added["science"] == pytest.approx(first["science"], rel=0.02)
    base, mixed = (systems[name]["perplexity"] for name in ("base model", "mixture + headers"))
    assert all(mixed[kind] < base[kind] for kind in WORDS if kind != "general")
    without = systems["mixture, without code"]["perplexity"]
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
    assert "\\u003c" in page
    assert "<b>x" not in page
    assert not any(word in page for word in ("src=", 'href="h', "url(", "//fonts"))


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
    assert [s["name"] for s in report["systems"]] == [
        "base model", "mixture", "joint adapter", "mixture, without code", "mixture + shared adapter",
        "joint adapter of that size, two readings", "mixture + shared adapter, without code",
    ]  # fmt: skip
    assert not (tmp_path / "out" / "base").exists()


def test_the_verdict_names_whoever_is_ahead(demo) -> None:
    text = importlib.import_module("demo_table")

    def system(name: str, *seeds: tuple[float, float]) -> dict[str, Any]:
        return {"name": name, "seeds": [dict(zip(("code", "general"), found, strict=True)) for found in seeds]}

    report = {
        "kinds": ["code", "general"], "domains": ["code"], "later": None,
        "systems": [system(text.MIXTURE, (11, 20)), system(text.JOINT, (10, 40)),
                    system(text.SHARED, *[(10, 20)] * 3), system(text.TWICE, (12, 20), (9, 20), (11, 20))],
    }  # fmt: skip
    found = text.verdict(report)
    assert "On the domains the joint adapter is ahead: 11.0 (mixture), 10.0 (joint), 10.0 %." in found
    assert "With general text the mixture is ahead" in found
    assert "shared adapter: on the domains the mixture is ahead: 10.0 (mixture), 10.6 (joint), 5.9 %; " in found
    assert "paired by seed +6.7 ± 15.3 %, ahead in 2 of 3." in found  # by +20, -10 and +10 %


def test_seeds_are_paired_and_averaged(demo) -> None:
    text = importlib.import_module("demo_table")
    runs = [
        [{"name": "mixture", "parameters": 3, "tokens": 5, "perplexity": {"a": a, "b": 2.0, "general": 4.0}}]
        for a in (2.0, 8.0)
    ]
    (found,) = text.over_seeds(runs, ["a", "b"])
    assert found["perplexity"] == pytest.approx({"a": 4.0, "b": 2.0, "general": 4.0})
    assert found["domains"] == pytest.approx(8**0.5)
    assert [one["a"] for one in found["seeds"]] == [2.0, 8.0]
    table = text.table(
        {"kinds": ["a", "b", "general"], "domains": ["a", "b"], "systems": [found], "own_adapter": {"a": 1.0}}
    )
    assert "| mixture | 4.0 | 2.0 | 4.0 | 2.8 ± 1.4 | 3.2 ± 1.0 | 3 | 5 |" in table


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--domains", "a=FILE", "b=FILE"], "--domains needs --base"),
        (["--seeds", "0"], "--seeds 0 must be 1 or more"),
        (["--later", "a=FILE"], "--later a=.* name the --domains too"),
        (["--base", "BASE", "--domains", "a=FILE"], "a mixture needs two domains"),
        (["--base", "BASE", "--domains", "a=FILE", "a=FILE"], "'a' stands twice"),
        (["--base", "BASE", "--domains", "a=FILE", "FILE"], "is no name=FILE"),
        (["--base", "BASE", "--domains", "a=FILE", "general=FILE"], "'general' is no name of a domain"),
        (["--base", "BASE", "--domains", "a=FILE", "b.c=FILE"], "'b.c' is no name of a domain"),
        (["--base", "BASE", "--domains", "a=FILE", "b=missing"], "b=missing cannot be read"),
        (["--base", "BASE", "--domains", "a=FILE", "b=EMPTY"], "has 0 different documents"),
        (["--base", "BASE", "--domains", "a=FILE", "b=TWICE"], "has 1 different documents"),
        (["--base", "BASE", "--rank", "0"], "--rank 0 must be 1 or more"),
        (["--base", "BASE", "--domains", "a=FILE", "b=FILE"], "a and b hold the same text"),
        (["--base", "BASE", "--domains", "a=FILE", "b=OTHER"], "has no tokenizer that can be loaded"),
    ],
)
def test_what_cannot_be_run_is_named_before_anything_is_trained(demo, tmp_path, given, message) -> None:
    (tmp_path / "EMPTY").write_text("\n\n")
    (tmp_path / "FILE").write_text("\n\n".join(documents("code")))
    (tmp_path / "OTHER").write_text("\n\n".join(documents("science")))
    (tmp_path / "BASE").mkdir()
    (tmp_path / "TWICE").write_text("one document\n\n" * 40)
    for name in ("FILE", "EMPTY", "OTHER", "TWICE", "BASE"):
        given = [word.replace(name, str(tmp_path / name)) for word in given]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        demo.main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_base_without_weights_is_named_before_anything_is_written(demo, tmp_path) -> None:
    text = importlib.import_module("demo_text")
    text.new_tokenizer(documents("code"), 300).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    files = []
    for kind in ("code", "science", "general"):
        (tmp_path / kind).write_text("\n\n".join(documents(kind)))
        files.append(f"{kind}={tmp_path / kind}")
    given = ["--base", str(tmp_path / "base"), "--domains", *files[:2], "--general", str(tmp_path / "general")]
    with pytest.raises(SystemExit, match=r"error: --base .* cannot be loaded"):
        demo.main([*given, "--out", str(tmp_path / "out"), *SIZES.split()])
    assert not (tmp_path / "out").exists()


def test_files_need_documents(demo, tmp_path) -> None:
    text = importlib.import_module("demo_text")
    (tmp_path / "short").write_text("one\n\ntwo")
    with pytest.raises(ValueError, match=r"has 2 different documents .* 20 are needed"):
        text.from_files({"a": tmp_path / "short"})


def test_test_text_is_of_other_documents(demo) -> None:
    train, test = importlib.import_module("demo_text").parted(["a", "b", "a", *map(str, range(30))])
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted({"a", "b", *map(str, range(30))})


def test_rows_are_whole_and_bounded(demo) -> None:
    from demo_text import new_tokenizer, token_rows

    tokenizer = new_tokenizer(["ab ab ab"], 260)
    rows = token_rows(tokenizer, ["ab " * 500] * 9, 8, 100, "a")
    assert rows.dtype == torch.int64
    assert rows.shape[1] == 8
    assert 8 <= rows.numel() <= 100
    with pytest.raises(ValueError, match="a: 2 tokens of text make no row of 8"):
        token_rows(tokenizer, ["a"], 8, 100, "a")


def test_prose_of_an_installation_is_prose(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    text = importlib.import_module("demo_text")
    words = "This is a plain sentence of English words, as the documentation of a function has it."
    source = f'def f(x):\n    """Short.\n\n    {words}\n\n    >>> f(1) {words}\n\n    x[0]=1 y[2]=3 {words}\n    """\n'
    assert next(text._paragraphs(source)) == words
    assert not any(">>>" in paragraph for paragraph in text._paragraphs(source))
    assert text._files(Path("nowhere"), "*.py") == []
