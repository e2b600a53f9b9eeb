"""The demo, whole, on tiny models and tiny text: its own, and a user's."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tqdm import tqdm

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
    files = importlib.import_module("demo_files")
    monkeypatch.setattr(files, "installation", lambda *kinds: {kind: documents(kind) for kind in kinds or WORDS})
    return importlib.import_module("demo")


def test_what_the_demo_needs_beside_the_library_is_named_where_it_is_missing(demo, monkeypatch, tmp_path) -> None:
    text, other, general = (tmp_path / f"{kind}.txt" for kind in ("licences", "code", "general"))
    for file in (text, other, general):
        file.write_text("\n\n".join(documents(file.stem)))
    for name in ("demo_run", "demo_pictures"):  # as where nobody has imported them yet
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"error: the demo needs matplotlib: .*pip install '.\[demo\]'"):
        demo.main(["--domains", f"law={text}", f"code={other}", "--general", str(general), "--base", "some/model"])


@pytest.mark.slow
def test_demo_tells_its_story_and_a_fresh_process_agrees(demo, tmp_path, capsys, monkeypatch) -> None:
    setup, bases, most = importlib.import_module("demo_setup"), weakref.WeakSet(), [0]
    load = setup.load_base

    def counted(name: Any) -> Any:
        bases.add(model := load(name))
        most[0] = max(most[0], len(bases))
        return model

    monkeypatch.setattr(setup, "load_base", counted)
    report = demo.main(["--out", str(tmp_path), *SIZES.split()])
    assert most == [2]  # at a time: a base may be large
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


@pytest.fixture(scope="module")
def users(tmp_path_factory) -> Path:
    """What a user may bring: models, with the tokenizer of one, and files of text."""
    folder = tmp_path_factory.mktemp("users")
    for kind in ("code", "science", "general"):
        (folder / f"{kind}.txt").write_text("\n\n".join(documents(kind)), encoding="utf-8")
    (folder / "science.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents("science")))
    (folder / "lines.txt").write_text("\n".join(documents("licences")), encoding="utf-8")
    (folder / "one.txt").write_text(" ".join(documents("licences")), encoding="utf-8")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "twice.txt").write_text("one document\n\n" * 40)
    (folder / "short.txt").write_text("\n\n".join(map(str, range(30))))
    (folder / "latin.txt").write_bytes("caf\xe9\n\n".encode("latin-1") * 40)
    return folder


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def base(demo, users) -> Any:
    """Saves a model of transformers with a tokenizer of 300 tokens; gives its folder."""
    from demo_text import new_tokenizer

    tokenizer = new_tokenizer((text for kind in WORDS for text in documents(kind)), 300)

    def save(name: str, **options: Any) -> str:
        cls = getattr(transformers, name)
        config = cls.config_class(**{**SHAPE, "vocab_size": 300, "max_position_embeddings": 64, **options})
        torch.manual_seed(0)
        cls(config).save_pretrained(users / name)
        tokenizer.save_pretrained(users / name)
        return str(users / name)

    return save


def given(users: Path, base: str, *domains: str, **more: Any) -> list[str]:
    """Arguments of a user."""
    named = [f"{kind}={users / file}" for kind, file in (domain.split("=") for domain in domains)]
    others = [word for name, file in more.items() for word in (f"--{name}", str(users / file))]
    return ["--base", base, "--domains", *named, *others, *SIZES.split()]


def test_a_users_model_and_text(demo, base, users, tmp_path, monkeypatch, capsys) -> None:
    import demo_run

    monkeypatch.setattr(demo_run.Demo, "fresh_process", lambda self, expected: True)
    bars: list[Any] = []
    monkeypatch.setattr("demo_models.tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adding.png").touch()
    told = given(users, base("LlamaForCausalLM"), "code=code.txt", "science=science.jsonl", general="general.txt")
    report = demo.main([*told, "--out", str(tmp_path / "out")])
    assert [bar.n for bar in bars] == [bars[0].total]  # it ends where it was to end
    assert report["kinds"] == ["code", "science", "general"]
    assert [s["name"] for s in report["systems"]] == [
        "base model", "mixture", "joint adapter", "mixture, without code", "mixture + shared adapter",
        "joint adapter of that size, two readings", "mixture + shared adapter, without code",
    ]  # fmt: skip
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"report.json", "table.md", "text.html"}
    assert not {"base", "adding.png"} & {file.name for file in (tmp_path / "out").iterdir()}
    said = capsys.readouterr().out
    assert "code: trains on 1,000 tokens, is tested on 100 of other documents" in said
    assert re.search(r"[\d,]+ tokens of training in all, fewer by --tokens", said)


def test_a_rate_that_teaches_nothing_is_said_at_once(demo, base, users, tmp_path, monkeypatch, capsys) -> None:
    import demo_story

    class Enough(Exception):
        pass

    def mixture(self: Any, shared: bool) -> None:
        raise Enough

    monkeypatch.setattr(demo_story.Story, "mixture", mixture)
    told = given(users, base("LlamaForCausalLM"), "code=code.txt", "science=science.jsonl", general="general.txt")
    told[told.index("--rate") + 1] = "1e-9"
    told[told.index("--tokens") + 1] = "100000"
    with pytest.raises(Enough):
        demo.main([*told, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.count("er --rate than 1e-09") == 2  # of two domains
    assert re.search(r"code: trains on [\d,]+ tokens \(all that there is\)", said)


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
    ("arguments", "message"),
    [
        (["--domains", "a=code.txt", "b=science.txt"], "--domains needs --base"),
        (["--seeds", "0"], "--seeds 0 must be 1 or more"),
        (["--length", "1"], "--length 1 must be 2 or more"),
        (["--rate", "-1"], "--rate -1.0 must lie between 0 and 1"),
        (["--width", "40"], "--width 40 must be a multiple of 32"),
        (["--out", "code.txt"], "--out .*code.txt is a file"),
        (["--later", "a=code.txt"], "--later a=.* name the --domains too"),
        (["--base", "BASE", "--rank", "0"], "--rank 0 must be 1 or more"),
        (["--base", "BASE", "--domains", "a=code.txt"], "a mixture needs two domains"),
        (["--base", "BASE", "--domains", "a=code.txt", "a=code.txt"], "'a' stands twice"),
        (["--base", "BASE", "--domains", "a=code.txt", "code.txt"], "is no name=FILE"),
        (["--base", "BASE", "--domains", "a=code.txt", "general=code.txt"], "'general' is no name of a domain"),
        (["--base", "BASE", "--domains", "a=code.txt", "b.c=code.txt"], "'b.c' is no name of a domain"),
        (["--base", "BASE", "--domains", "a=code.txt", "b=missing"], "b=missing cannot be read .* No such file"),
        (["--base", "BASE", "--domains", "a=code.txt", "b=."], "b=. cannot be read .* it is a folder"),
        (["--base", "BASE", "--domains", "a=code.txt", "b=latin.txt"], "b=.*latin.txt cannot be read as UTF-8"),
        (["--base", "BASE", "--domains", "a=code.txt", "b=empty.txt"], "has 0 different documents"),
        (["--base", "BASE", "--domains", "a=code.txt", "b=twice.txt"], "has 1 different documents"),
        (["--base", "BASE", "--domains", "a=code.txt", "b=one.txt"], "has 1 different documents .* put blank lines"),
        (["--base", "BASE", "--domains", "a=code.txt", "b=code.txt"], "a and b hold the same text"),
        (["--base", "./BSAE", "--domains", "a=code.txt", "b=lines.txt"], "--base './BSAE': there is no such folder"),
        (["--base", "BASE", "--domains", "a=code.txt", "b=lines.txt"], "has no tokenizer that can be loaded"),
    ],
)
def test_what_cannot_be_run_is_named_before_anything_is_written(
    demo, users, tmp_path, monkeypatch, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BASE").mkdir()
    told = [re.sub(r"\b(\w+\.txt)", lambda file: str(users / file[1]), word) for word in arguments]
    out = [] if "--out" in told else ["--out", "out"]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        demo.main([*told, *out])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("BertForMaskedLM", {}, "is no decoder: what BertLMHeadModel says of a token depends on later ones"),
        ("BertModel", {}, "has no weights of cls.predictions.* BertLMHeadModel foretells with"),
        ("T5ForConditionalGeneration", {}, "cannot be loaded: Unrecognized configuration class .*T5Config[^\n]*$"),
        ("LlamaForCausalLM", {"max_position_embeddings": 8}, "length 20 is too long: --base .* reads 8 tokens"),
        ("GPT2LMHeadModel", {"vocab_size": 100}, "its tokenizer gives token .* and it knows 100"),
    ],
)
def test_a_base_that_does_not_fit_is_named_before_anything_is_written(
    demo, base, users, tmp_path, model, options, message
) -> None:
    told = given(users, base(model, **options), "code=code.txt", "science=science.txt", general="general.txt")
    with pytest.raises(SystemExit, match=f"error: --.*{message}"):
        demo.main([*told, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_text_that_is_too_little_for_a_row_or_a_step_is_named(demo, base, users, tmp_path) -> None:
    llama = base("LlamaForCausalLM")
    for file, batch, message in (
        ("short.txt", "2", "b, test: 12 tokens of text make no row of 20"),
        ("lines.txt", "90", "code has 50 rows of text, fewer than a step of --batch 90 reads"),
    ):
        told = given(users, llama, "code=code.txt", f"b={file}", general="general.txt")
        with pytest.raises(SystemExit, match=message):
            demo.main([*told, "--batch", batch, "--out", str(tmp_path / "out")])


def test_files_are_parted_by_blank_lines_or_by_lines(demo, users) -> None:
    files = importlib.import_module("demo_files")
    names = {"a": "code.txt", "b": "lines.txt", "c": "science.jsonl"}
    found = files.from_files({kind: users / file for kind, file in names.items()})
    assert found == {"a": documents("code"), "b": documents("licences"), "c": documents("science")}


def test_a_file_that_is_too_large_is_refused_and_not_cut(demo, users, monkeypatch) -> None:
    files = importlib.import_module("demo_files")
    monkeypatch.setattr(files, "LARGEST", 100)
    with pytest.raises(ValueError, match="it has more than 100 bytes; give a part of it: head -c 100"):
        files.from_files({"a": users / "code.txt"})
    monkeypatch.setattr(files, "MOST", 30)
    with pytest.raises(ValueError, match="more than 30 documents"):
        files.from_files({"a": users / "science.jsonl"})


def test_test_text_is_of_other_documents(demo) -> None:
    train, test = importlib.import_module("demo_files").parted(["a", "b", "a", *map(str, range(30))])
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


def test_rows_begin_as_texts_of_the_tokenizer_do(demo) -> None:
    from demo_text import new_tokenizer, token_rows
    from tokenizers import processors

    tokenizer = new_tokenizer(["ab ab ab"], 260)
    plain = token_rows(tokenizer, ["ab " * 20], 8, 1000, "a")
    tokenizer.add_special_tokens({"bos_token": "<start>"})
    start = tokenizer.bos_token_id
    assert torch.equal(token_rows(tokenizer, ["ab " * 20], 8, 1000, "a"), plain)  # it has one, and does not use it
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", start)]
    )
    found = token_rows(tokenizer, ["ab " * 20], 8, 1000, "a")
    assert found[:, 0].tolist() == [start] * len(found)
    text, before = found[:, 1:].flatten(), plain.flatten()
    count = min(len(text), len(before))
    assert torch.equal(text[:count], before[:count])


def test_prose_of_an_installation_is_prose(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    text = importlib.import_module("demo_files")
    words = "This is a plain sentence of English words, as the documentation of a function has it."
    source = f'def f(x):\n    """Short.\n\n    {words}\n\n    >>> f(1) {words}\n\n    x[0]=1 y[2]=3 {words}\n    """\n'
    assert next(text._paragraphs(source)) == words
    assert not any(">>>" in paragraph for paragraph in text._paragraphs(source))
    assert text._files(Path("nowhere"), "*.py") == []


def test_a_folder_without_a_demo_is_named(demo, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"--check: --out .*nowhere lacks .*: it holds no demo"):
        demo.main(["--check", "True", "--out", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 800.0])
def test_a_training_that_went_astray_is_no_row_of_a_table(loss: float, demo, monkeypatch) -> None:
    models = importlib.import_module("demo_models")
    monkeypatch.setattr(models, "token_losses", lambda model, rows: torch.tensor([1.0, loss]))
    with pytest.raises(ValueError, match=r"the loss on text of law is .*: training went astray; give a lower --rate"):
        models.perplexities(torch.nn.Identity(), {"law": torch.zeros(1, 2)})
