"""English sentences out of a Python installation: docstrings, package descriptions, licences, reference topics.

Source files are parsed, never imported; nothing is downloaded.
"""

from __future__ import annotations

import ast
import gc
import importlib.machinery
import importlib.metadata
import inspect
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from mixadapters.tasks.domains import key, unique

OVERLAP = 8  # words in a row that two texts may not share across splits

HEADING = re.compile(r"(\w[^\n]{0,60})\n\s*([-=~^*#])\2{2,}\s*(?:\n|$)")
PROSE_SECTIONS = {"notes", "explanation", "description", "introduction"}
MARKUP = (
    (re.compile(r":[\w:+-]+:`~[\w.]*?(\w+)`"), r"\1"),  # :class:`~package.name`
    (re.compile(r":[\w:+-]+:`!?([^`<]*?)\s*(?:<[^>]*>)?`"), r"\1"),  # :class:`name`
    (re.compile(r"`([^`<]*?)\s*<[^>]*>`_*"), r"\1"),  # `text <link>`_
    (re.compile(r"\[([^\]\[]+)\]\([^)]*\)"), r"\1"),  # [text](link)
    (re.compile(r"\s*\[\[?\w{1,12}\]\]?_"), ""),  # [1]_
    (re.compile(r"``?([^`]*)``?_*"), r"\1"),
    (re.compile(r"\*\*?([^*\s][^*]*)\*\*?"), r"\1"),
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])")
NOT_PROSE = re.compile(
    r"""[=<>{}\\|_@#$^~\[\]*/+`"]|\w\.\w|\(\)|\s[.,;]|[a-z][A-Z]|::|\d{3}|User Guide"""
    r"""|\b(in|by|from|to|of|with|and|or|the|a|see|See|for)[.,]"""  # the object was a citation, now cut
)
WORD = re.compile(r"[('\u2018\u201c]?[A-Za-z][A-Za-z'\u2019-]*[)'\u2019\u201d]?[.,;:!?]?[)]?")


def sentences(text: str, indented: bool = False) -> Iterator[str]:
    """Yield the plain English sentences (5 to 60 words) of a docstring or document.

    Parameter tables, examples, references, code, formulas and lists are left out. With `indented`, each paragraph is
    taken as it stands, however far it is indented; in docstrings an indented block is code or a parameter.
    """
    prose = True
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if indented:
            block = textwrap.dedent(block).strip()
        if heading := HEADING.match(block):
            prose = indented or heading[1].strip().lower() in PROSE_SECTIONS
            block = block[heading.end() :]
        if not prose or block[:1] in " \t>.*-|+:#" or "\n  " in block or re.match(r"[\w ]+::?\s*(\n|$)", block):
            continue
        flat = " ".join(block.split())
        for pattern, replacement in MARKUP:
            flat = pattern.sub(replacement, flat)
        yield from (s for s in SENTENCE_END.split(flat) if is_prose(s))


def is_prose(sentence: str) -> bool:
    """Whether `sentence` is an English sentence of 5 to 60 words, and no fragment of code or formula."""
    words = sentence.split()
    return (
        5 <= len(words) <= 60
        and sentence[0].isupper()
        and sentence[-1] in ".!?"
        and sentence.count("(") == sentence.count(")")
        and not NOT_PROSE.search(sentence)
        and sum(WORD.fullmatch(w) is not None for w in words) >= 0.85 * len(words)
    )


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a source file: the module's, its classes' and functions', methods included."""
    try:
        nodes: list = [ast.parse(path.read_bytes())]
    except (SyntaxError, ValueError):  # written for another version of Python
        return
    while nodes:
        node = nodes.pop()
        if text := ast.get_docstring(node, clean=False):
            yield text
        nodes += [
            n for n in reversed(node.body) if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]


def file_sentences(files: Iterable[Path]) -> dict[Path, list[str]]:
    """Return the sentences of the docstrings of each file, in source order."""
    collecting = gc.isenabled()
    gc.disable()  # syntax trees have no cycles: parsing is 40 % faster
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser warns of doubtful escapes in other people's sources
            return {file: unique(s for d in docstrings(file) for s in sentences(d)) for file in files}
    finally:
        if collecting:
            gc.enable()


def reference_sentences() -> list[str]:
    """Return the sentences of Python's language reference, as far as `help()` carries it."""
    from pydoc_data.topics import topics

    return unique(s for _, topic in sorted(topics.items()) for s in sentences(topic, indented=True))


def source_files(name: str) -> list[Path]:
    """Return the source files of a standard library module or an installed (sub-)package, sorted; [] if absent."""
    top, *rest = name.split(".")
    stdlib = Path(sysconfig.get_path("stdlib"))
    path = next((p for p in (stdlib / top, stdlib / f"{top}.py") if p.exists()), None)
    if path is None:
        spec = importlib.machinery.PathFinder.find_spec(top)  # finds without importing
        if spec is None or not spec.submodule_search_locations:
            return []
        path = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    if path.is_file():
        return [path]
    return [
        p
        for p in sorted(path.rglob("*.py"))
        if not {"test", "tests", "benchmarks"} & set(p.parent.parts[len(path.parts) :])
    ]


def package_prose(packages: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the sentences that ship with `packages` and all that they require, and the versions of all of them.

    Read are descriptions, licences and notices, and the descriptions of bundled data sets.
    """
    texts, versions, queue = [], {}, list(packages)
    for name in queue:  # it grows meanwhile
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if package.metadata["Name"] in versions:
            continue
        versions[package.metadata["Name"]] = package.version
        queue += [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in package.requires or () if "extra ==" not in r]
        texts.append(str(package.metadata.json.get("description", "")))
        for file in sorted(package.files or ()):
            licence = re.search(r"licen[sc]e|copying|notice", file.name, re.IGNORECASE)
            if (licence and file.suffix in ("", ".txt", ".md")) or "/datasets/descr/" in file.as_posix():
                texts.append(Path(str(file.locate())).read_text(encoding="utf-8", errors="replace"))
    return unique(s for text in texts for s in sentences(text, indented=True)), versions


def runs(text: str) -> set[str]:
    """Return all runs of `OVERLAP` words in `text`; of a shorter text, all of it."""
    w = key(text).split()
    return {" ".join(w[i : i + OVERLAP]) for i in range(max(1, len(w) - OVERLAP + 1))}
