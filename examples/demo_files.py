"""Text of several kinds out of a Python installation, or out of a user's files. Nothing is downloaded or run.

Only the standard library is imported here: what is wrong with a file is said before anything that takes time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path

ENOUGH = 900_000  # characters of a kind of text; more of them are not read
LONGEST = 12_000  # characters of a document of an installation
LARGEST = 2**27  # bytes of a user's file
MOST = 1_000_000  # documents of a .jsonl
FEWEST = 20  # documents of a user's file
TEST_SHARE = 0.12  # of the documents
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
TESTS = {"test", "tests", "testing", "idlelib", "lib2to3", "encodings", "site-packages"}
LEGAL = re.compile(r"licen[sc]e|copying|notice", re.IGNORECASE)

OWN = ("code", "science", "licences", "readmes")  # domains of an installation; "headers" (of C++) come later

RESERVED = ("general", "frozen", "base")  # words of the table and of the gate

Documents = dict[str, list[str]]  # kind of text -> its documents


def installation(*kinds: str) -> Documents:
    """What every installation of this library carries: all kinds, or these.

    "general" is what the small base model learns from.
    """
    readers: dict[str, Callable[[], Iterable[str]]] = {
        "general": _general,
        "code": lambda: _bounded(_read(_order(_files(_stdlib(), "*.py")))),
        "science": lambda: _prose(_order(_sources("sympy", "networkx", "sklearn", "scipy"))),
        "licences": _licences,
        "readmes": _readmes,
        "headers": lambda: _bounded(_read(_order(_files(_package("torch") / "include", "*.h")))),
    }
    return {kind: shuffled(readers[kind]()) for kind in kinds or readers}


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
        raise ValueError(
            f"--domains {domains[0]}: a mixture needs two domains or more; examples/train_adapter.py trains one alone"
        )
    named = [pair.partition("=")[0] for pair in domains]
    if general is not None:
        files["general"] = Path(general)
    documents = from_files(files)
    for first, second in combinations(documents, 2):
        if documents[first] == documents[second]:
            raise ValueError(f"{first} and {second} hold the same text; each needs its own")
    if general is None:
        documents |= installation("general")
    return named, later.partition("=")[0] if later else None, documents


def from_files(files: dict[str, Path]) -> Documents:
    """The documents of a user's files, each once.

    Raises:
        ValueError: a file that cannot be read as text, or has fewer than 20 different documents.
    """
    found = {}
    for kind, path in files.items():
        documents, how = _json_documents(path) if ".jsonl" in path.suffixes else _plain_documents(kind, path)
        found[kind] = list(dict.fromkeys(documents))
        if len(found[kind]) < FEWEST:
            raise ValueError(
                f"{kind}={path} has {len(found[kind])} different documents ({how}); {FEWEST} are needed: put blank "
                "lines between them"
            )
    return found


def _plain_documents(kind: str, path: Path) -> tuple[list[str], str]:
    """Documents, and what parts them: blank lines, or where those are too few ends of lines."""
    try:
        if path.is_dir():
            raise ValueError("it is a folder; put its documents into one file, with blank lines between them")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes; give a part of it: head -c {LARGEST}")
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{kind}={path} cannot be read as UTF-8 text: {error}") from error
    parts = _kept(re.split(r"\n\s*\n", text))
    lines = _kept(text.splitlines())
    if len(parts) < FEWEST <= len(lines):
        return lines, "one a line"
    return parts, "parted by blank lines"


def _kept(parts: list[str]) -> list[str]:
    return [part.strip() for part in parts if part.strip()]


def _json_documents(path: Path) -> tuple[list[str], str]:
    from mixadapters.surgery.texts import read_texts

    found = read_texts(path, MOST, label_field="")
    if found.left_out:
        raise ValueError(f"{path} has more than {MOST:,} documents; give a part of it")
    return found.texts, "the field 'text' of its lines"


def shuffled(texts: Iterable[str]) -> list[str]:
    """In a random order, always the same one."""
    found = list(texts)
    random.Random(1).shuffle(found)
    return found


def parted(documents: list[str]) -> tuple[list[str], list[str]]:
    """(train, test), by document. A document that stands twice is taken once."""
    unique = list(dict.fromkeys(documents))
    count = max(1, round(TEST_SHARE * len(unique)))
    return unique[count:], unique[:count]


# --- what an installation carries ---------------------------------------------------------------------------------


def _general() -> Iterator[str]:
    return _prose(_order(_files(_stdlib(), "*.py") + _sources("torch", "transformers", "pandas")), 3 * ENOUGH)


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _sources(*packages: str) -> list[Path]:
    return [file for name in packages for file in _files(_package(name), "*.py")]


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported; one that is not there has no files."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else Path(name)


def _files(folder: Path, pattern: str) -> list[Path]:
    return [p for p in sorted(folder.rglob(pattern)) if not TESTS & set(p.relative_to(folder).parts)]


def _order(files: list[Path]) -> list[Path]:
    """In a random order, always the same one."""
    return random.Random(0).sample(files, len(files))


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
