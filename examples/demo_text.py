"""Text of several kinds out of a Python installation, or out of a user's files. Nothing is downloaded or run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END = "<end>"
ENOUGH = 900_000  # characters of a kind of text; more of them are not read
LONGEST = 12_000  # characters of a document
TEST_SHARE = 0.12  # of the documents
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
TESTS = {"test", "tests", "testing", "idlelib", "lib2to3", "encodings", "site-packages"}
LEGAL = re.compile(r"licen[sc]e|copying|notice", re.IGNORECASE)

OWN = ("code", "science", "licences", "readmes")  # domains of an installation; "headers" (of C++) come later

RESERVED = ("general", "frozen", "base")  # words of the table and of the gate

Documents = dict[str, list[str]]  # kind of text -> its documents


def installation() -> Documents:
    """What every installation of this library carries. "general" is what the small base model learns from."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    headers = _package("torch") / "include"
    science = [file for name in ("sympy", "networkx", "sklearn", "scipy") for file in _files(_package(name), "*.py")]
    software = [file for name in ("torch", "transformers", "pandas") for file in _files(_package(name), "*.py")]
    return {
        "general": _shuffled(_prose(_order(_files(stdlib, "*.py") + software), 3 * ENOUGH)),
        "code": _shuffled(_bounded(_read(_order(_files(stdlib, "*.py"))))),
        "science": _shuffled(_prose(_order(science))),
        "licences": _shuffled(_licences()),
        "readmes": _shuffled(_readmes()),
        "headers": _shuffled(_bounded(_read(_order(_files(headers, "*.h"))))),
    }


def read_text(domains: list[str], general: str | None, later: str | None) -> tuple[list[str], str | None, Documents]:
    """(first domains, the later one, documents by kind) of name=FILE arguments; without any, of the installation.

    Raises:
        ValueError: an argument that is no name=FILE, a name that stands twice, one domain alone; as `from_files`.
    """
    if not domains:
        if given := [f"--{name} {value}" for name, value in (("general", general), ("later", later)) if value]:
            raise ValueError(f"{' and '.join(given)}: is for text of your own; name the --domains too")
        return list(OWN), "headers", installation()
    files: dict[str, Path] = {}
    for pair in [*domains, *([later] if later else [])]:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise ValueError(f"{pair!r} is no name=FILE, such as law=law.txt")
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in (*files, *RESERVED):
            taken = (
                "stands twice" if name in files else "is no name of a domain: letters, digits and _, and not one of"
            )
            raise ValueError(f"{pair!r}: {name!r} {taken}" + ("" if name in files else f" {RESERVED}"))
        files[name] = Path(path)
    if len(domains) < 2:
        raise ValueError(f"--domains {domains[0]}: a mixture needs two domains or more")
    named = [pair.partition("=")[0] for pair in domains]
    if general is not None:
        files["general"] = Path(general)
    documents = from_files(files)
    for first, second in combinations(documents, 2):
        if documents[first] == documents[second]:
            raise ValueError(f"{first} and {second} hold the same text; each needs its own")
    if general is None:
        documents["general"] = installation()["general"]
    return named, later.partition("=")[0] if later else None, documents


def from_files(files: dict[str, Path]) -> Documents:
    """A user's text: documents are parted by blank lines.

    Raises:
        ValueError: a file that is not there, is no UTF-8, or has fewer than 20 different documents.
    """
    found = {}
    for kind, path in files.items():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{kind}={path} cannot be read as UTF-8 text: {error}") from error
        parts = (part.strip() for part in re.split(r"\n\s*\n", text))
        found[kind] = list(dict.fromkeys(part for part in parts if part))
        if len(found[kind]) < 20:
            raise ValueError(
                f"{kind}={path} has {len(found[kind])} different documents (parted by blank lines); 20 are needed"
            )
    return found


def parted(documents: list[str]) -> tuple[list[str], list[str]]:
    """(train, test), by document. A document that stands twice is taken once."""
    unique = list(dict.fromkeys(documents))
    count = max(1, round(TEST_SHARE * len(unique)))
    return unique[count:], unique[:count]


def new_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens, learned from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def token_rows(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], length: int, tokens: int, kind: str
) -> Tensor:
    """(n, length) token ids: the documents one after the other, up to about `tokens`; no document gives over a tenth.

    Raises:
        ValueError: there is not one full row.
    """
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"][: max(length, tokens // 10)]
        ids.append(tokenizer.eos_token_id or 0)
        if len(ids) >= tokens:
            break
    rows = min(len(ids), tokens) // length
    if not rows:
        raise ValueError(
            f"{kind}: {len(ids)} tokens of text make no row of {length}; give more text, or a smaller --length"
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)


# --- what an installation carries ---------------------------------------------------------------------------------


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported; one that is not there has no files."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else Path(name)


def _files(folder: Path, pattern: str) -> list[Path]:
    return [p for p in sorted(folder.rglob(pattern)) if not TESTS & set(p.relative_to(folder).parts)]


def _order(files: list[Path]) -> list[Path]:
    """In a random order, always the same one."""
    return random.Random(0).sample(files, len(files))


def _shuffled(texts: Iterable[str]) -> list[str]:
    found = list(texts)
    random.Random(1).shuffle(found)
    return found


def _read(files: Iterable[Path]) -> Iterator[str]:
    return (file.read_text(encoding="utf-8", errors="ignore") for file in files)


def _bounded(texts: Iterable[str], enough: int = ENOUGH) -> Iterator[str]:
    """Texts of some length, as many as hold `enough` characters."""
    left = enough
    for text in texts:
        if len(text) > 200 and left > 0:
            left -= len(text[:LONGEST])
            yield text[:LONGEST]


def _prose(files: Iterable[Path], enough: int = ENOUGH) -> Iterator[str]:
    """The paragraphs of plain English in the docstrings of each file."""
    return _bounded(("\n".join(_paragraphs(text)) for text in _read(files)), enough)


def _paragraphs(source: str) -> Iterator[str]:
    for docstring in DOCSTRING.findall(source):
        for block in re.split(r"\n\s*\n", docstring):
            flat = " ".join(block.split())
            words = flat.split()
            plain = sum(word.strip(".,;:()'\"`").isalpha() for word in words)
            if len(words) >= 12 and plain >= 0.8 * len(words) and ">>>" not in flat:
                yield flat


def _readmes() -> Iterator[str]:
    """The descriptions of the installed packages."""
    found = (str(d.metadata.json.get("description", "")) for d in importlib.metadata.distributions())
    return _bounded(sorted(found))


def _licences() -> Iterator[str]:
    """Licences and notices of the installed packages, each paragraph once."""
    files = {
        file.locate() for d in importlib.metadata.distributions() for file in d.files or () if LEGAL.search(file.name)
    }
    seen: set[str] = set()
    texts = []
    for text in _read(sorted(Path(str(f)) for f in files if Path(str(f)).is_file() and Path(str(f)).suffix != ".py")):
        blocks = {" ".join(block.split()): block.strip("\n") for block in re.split(r"\n\s*\n", text)}
        texts.append("\n\n".join(block for flat, block in blocks.items() if flat not in seen))
        seen |= blocks.keys()
    return _bounded(texts)
