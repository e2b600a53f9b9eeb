"""Run PEFT's own test suite with the types of this library.

    python tests/peft_suite/run.py [--files decoder,config] [-n 4] [--sdist FILE] [--cache DIR] [pytest options]

PEFT ships its tests in its source distribution, not in its wheel. The first run downloads the source distribution of
the installed version into the cache (about 1 MB); everything after that, and everything with `--sdist`, is offline:
the models are random and tiny, made by `tiny_models.py`. No file of PEFT is edited: `plugin.py` puts the types of
`spec.py` in place of PEFT's own while the tests are collected.

Needs, besides the library: pytest, pytest-xdist, diffusers, scipy, pyyaml (PEFT's test files import them).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_CACHE = HERE.parents[1] / ".cache" / "peft_suite"
# Those of PEFT's test files whose tests run over configs; the last one is ours, see extra_mixed.py.
FILES = {
    "custom": "test_custom_models.py",
    "decoder": "test_decoder_models.py",
    "encoder_decoder": "test_encoder_decoder_models.py",
    "features": "test_feature_extraction_models.py",
    "sequence": "test_seq_classifier.py",
    "token": "test_token_classification_qa.py",
    "config": "test_config.py",
    "mixed": "test_extra_mixed.py",
}
NEEDED = {"pytest": "pytest", "xdist": "pytest-xdist", "diffusers": "diffusers", "scipy": "scipy", "yaml": "pyyaml"}


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest for pytest."""
    parser = argparse.ArgumentParser(description="Run PEFT's own test suite with the types of this library.")
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution; nothing is downloaded then")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("PEFT_SUITE_CACHE", DEFAULT_CACHE)),
        help="folder for the source distribution and the models (default: %(default)s, or $PEFT_SUITE_CACHE)",
    )
    parser.add_argument("--files", default=",".join(FILES), help="which of: %(default)s")
    parser.add_argument("--spec", default="spec", help="module that says what to run (default: %(default)s)")
    parser.add_argument("-n", "--workers", type=int, default=min(4, available_cores()), help="processes")
    options, rest = parser.parse_known_args(arguments)
    unknown = [name for name in options.files.split(",") if name not in FILES]
    if unknown:
        parser.error(f"--files: unknown {', '.join(unknown)}; choose from {', '.join(FILES)}")
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.error(f"PEFT's test files need packages that are not installed: pip install {' '.join(missing)}")
    package = importlib.util.find_spec("mixadapters")
    if package is None or Path(package.origin or "").resolve().parents[1] != HERE.parents[1]:
        found = "is not installed" if package is None else f"is that of {package.origin}"
        parser.error(f"mixadapters {found}, but this suite is that of {HERE.parents[1]}: pip install -e .")
    return options, rest


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_sdist(cache: Path, version: str) -> Path:
    """PEFT's source distribution in the cache, downloaded if it is not there yet."""
    sdist = cache / f"peft-{version}.tar.gz"
    if not sdist.exists():
        # Only PEFT itself as source: its build requirements may come as wheels.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        status = subprocess.call([*command, f"peft=={version}", "--dest", str(cache)])
        if status or not sdist.exists():
            sys.exit(
                f"no source distribution of peft {version} could be downloaded: get it by hand, pass --sdist FILE"
            )
    return sdist


def prepare_tests(sdist: Path | None, version: str, cache: Path) -> Path:
    """PEFT's tests as a package `tests` in the cache, with our extra file beside them."""
    root = cache / f"peft-{version}"
    tests = root / "tests"
    if not tests.exists():
        sdist = sdist or find_sdist(cache, version)
        partial = root / "tests.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with tarfile.open(sdist) as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                if member.isfile() and folder == f"peft-{version}/tests":
                    (partial / file).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
        if not (partial / "testing_common.py").exists():
            sys.exit(f"{sdist} holds no tests of peft {version} (peft-{version}/tests/testing_common.py)")
        # The source distribution leaves this file out, though the test files use relative imports.
        (partial / "__init__.py").touch()
        partial.rename(tests)
    shutil.copyfile(HERE / "extra_mixed.py", tests / FILES["mixed"])
    return tests


def make_models(cache: Path, environment: dict[str, str]) -> Path:
    """The tiny models, made anew when their script or transformers changes."""
    script = HERE / "tiny_models.py"
    stamp = script.read_bytes() + importlib.metadata.version("transformers").encode()
    models = cache / f"models-{hashlib.sha256(stamp).hexdigest()[:12]}"
    if not models.exists():
        partial = models.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.check_call([sys.executable, "-W", "ignore", str(script), str(partial)], env=environment)
        partial.rename(models)
    return models


def main() -> int:
    options, rest = parse_arguments()
    version = importlib.metadata.version("peft")
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    tests = prepare_tests(options.sdist, version, cache)
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PEFT_SUITE_SPEC": options.spec,
        # A run of everything also has to reach the spec's number of passed tests.
        "PEFT_SUITE_COMPLETE": str(int(not rest and options.files.split(",") == list(FILES))),
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    models = make_models(cache, environment)
    settings = ["-p", "plugin", "-c", str(HERE / "pytest.ini"), "--rootdir", str(tests.parent)]
    processes = ["-n", str(options.workers)] if options.workers > 1 else []
    files = [str(tests / FILES[name]) for name in options.files.split(",")]
    command = [sys.executable, "-m", "pytest", *settings, *processes, *files, *rest]
    # The tests name hub ids; from this folder each of them is the path of a local model.
    return subprocess.call(command, env=environment, cwd=models)


if __name__ == "__main__":
    sys.exit(main())
