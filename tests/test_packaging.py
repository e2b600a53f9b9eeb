"""What is installed, what it requires, and what importing it loads."""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from processes import Process

ROOT = Path(__file__).resolve().parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
PACKAGE_DIR = {
    name.strip(): folder.strip()
    for name, folder in (line.split("=") for line in SETUP["options"]["package_dir"].split("\n") if line.strip())
}
PACKAGES = SETUP["options"]["packages"].split()
# In front of code: as if no checkout were installed.
NOT_INSTALLED = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
"""
SHIPPED = (".py", ".yaml", ".json", ".html", ".css", ".js")
HEAVY = (
    "triton", "datasets", "evaluate", "diffusers", "matplotlib", "trl", "sklearn", "pandas", "transformers.trainer",
    "transformers.training_args",
)  # fmt: skip


def on_the_path(folder: Path) -> str:
    """In front of code: as PYTHONPATH does it."""
    return f"import sys; sys.path.insert(0, {str(folder)!r})\n"


def packages_in_folders() -> set[str]:
    found = set()
    for package, folder in PACKAGE_DIR.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(ROOT / folder).parts)))
    return found


def test_packages_are_those_in_the_folders() -> None:
    assert sorted(PACKAGES) == sorted(packages_in_folders())


def test_every_python_file_is_in_a_package() -> None:
    folders = {path.parent for folder in PACKAGE_DIR.values() for path in (ROOT / folder).rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_the_folder_kernels_is_no_package() -> None:
    # Transformers imports a package named `kernels`, Hugging Face's, when it finds one.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_constraints_pin_exactly_and_requirements_do_not() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r'[a-z0-9-]+==[0-9.]+(; python_version >= "3\.\d+")?', pin) for pin in pins), pins
    for requirement in SETUP["options"]["install_requires"].split("\n"):
        assert not re.search(r"==|<|~=|!=", requirement.split(";")[0]), requirement


IMPORTS = f"""
import json, sys, time
start = time.process_time()
import peft
middle, before = time.process_time(), set(sys.modules)
import mixadapters
share = (time.process_time() - middle) / (middle - start)
added = set(sys.modules) - before
print(json.dumps({{"share": share, "heavy": [name for name in {HEAVY} if name in added]}}))
"""


def test_importing_costs_little_over_peft_and_loads_nothing_heavy(tmp_path: Path) -> None:
    # Of the processor's time, since the machine may be busy; the best of a few.
    shares = []
    for _ in range(4):
        command = [sys.executable, "-c", IMPORTS]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        # transformers and peft may load some of these themselves, depending on what is installed.
        assert found["heavy"] == []
        shares.append(found["share"])
        if shares[-1] <= 0.05:
            return
    pytest.fail(f"import mixadapters takes {min(shares):.1%} of what import peft takes, at most 5 % are allowed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves a build folder beside its sources, and reuses one."""
    pytest.importorskip("setuptools")
    pytest.importorskip("wheel")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("mixadapters", "kernels", "tasks"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*command, "--wheel-dir", out, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_has_one_top_level_name_and_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"mixadapters"}
    expected = {"mixadapters/py.typed"}
    for package, folder in PACKAGE_DIR.items():
        for path in (f for f in (ROOT / folder).rglob("*") if f.suffix in SHIPPED):
            expected.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}")
    assert set(names) == expected


def test_metadata_leaves_the_ranges_open_and_triton_an_extra(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Requires-Python"] == ">=3.10"
    requirements = metadata.get_all("Requires-Dist")
    plain = [requirement for requirement in requirements if "extra ==" not in requirement]
    assert {"torch>=2.11", "transformers>=5.19", "peft>=0.21"} <= set(plain)
    assert not [requirement for requirement in plain if re.search(r"[<~]|==", requirement)]
    # An ordinary CPU install, and with it `make demo`, takes no triton.
    (triton,) = [requirement for requirement in requirements if requirement.startswith("triton")]
    assert 'sys_platform == "linux"' in triton
    assert 'extra == "kernels"' in triton


def test_wheel_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"""
{on_the_path(tmp_path / "site")}
{NOT_INSTALLED}
import mixadapters, mixadapters.kernels, mixadapters.tasks
print(mixadapters.__file__, mixadapters.kernels.__file__, mixadapters.tasks.__file__, sep="\\n")
"""
    files = [Path(line) for line in Process(code, cwd=tmp_path).finish().splitlines()]
    assert [file.is_relative_to(tmp_path / "site") for file in files] == [True] * 3, files


WHERE = """
import mixadapters, mixadapters.kernels.triton, mixadapters.tasks
for module in (mixadapters, mixadapters.kernels, mixadapters.kernels.triton, mixadapters.tasks):
    print(module.__file__)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Another checkout than the one that is installed."""
    for folder in ("mixadapters", "kernels", "tasks"):
        shutil.copytree(ROOT / folder, tmp_path / "other" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "other"


@pytest.mark.parametrize("installed", [True, False], ids=["beside an installed one", "without an installed one"])
def test_a_checkout_on_the_path_takes_all_of_its_packages_from_itself(checkout, tmp_path, installed) -> None:
    code = on_the_path(checkout) + ("" if installed else NOT_INSTALLED) + WHERE
    files = [Path(line) for line in Process(code, cwd=tmp_path).finish().splitlines()]
    assert len(files) == 4
    assert all(file.is_relative_to(checkout) for file in files), files


@pytest.mark.parametrize("missing", ["kernels", "tasks"])
def test_a_part_of_a_checkout_says_what_is_missing_and_what_to_do(checkout, tmp_path, missing) -> None:
    shutil.rmtree(checkout / missing)
    with pytest.raises(RuntimeError) as failed:
        Process(on_the_path(checkout) + "import mixadapters", cwd=tmp_path).finish()
    error = str(failed.value).splitlines()[-1]
    assert error.startswith(
        f"ImportError: mixadapters is imported from {checkout / 'mixadapters'}, a part of a checkout"
    )
    assert str(checkout / missing) in error
    assert "pip install -e ." in error


def test_version_is_the_installed_one() -> None:
    import mixadapters

    assert distribution("mixadapters").version == mixadapters.__version__


@pytest.mark.parametrize("installed", [True, False])
def test_tests_refuse_the_package_of_another_tree(tmp_path: Path, installed: bool) -> None:
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    code = ("" if installed else NOT_INSTALLED) + f"import pytest; pytest.main([{str(tmp_path / 'tests')!r}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    found = f"is that of {ROOT / 'mixadapters' / '__init__.py'}" if installed else "is not installed"
    assert f"mixadapters {found}, but these tests are those of {tmp_path}: pip install -e" in done.stderr


def test_tests_do_not_see_the_checkout() -> None:
    assert ROOT not in {Path(entry or os.curdir).resolve() for entry in sys.path}


@pytest.mark.parametrize("folder", ["tests", "tests/kernels/interpreted"])
def test_settings_of_tests_import_nothing_that_takes_seconds(folder: str) -> None:
    """The process that hands tests to workers reads them before it starts these."""
    if importlib.util.find_spec("triton") is None and "interpreted" in folder:
        pytest.skip("nothing is interpreted without triton")
    code = f"""
import runpy, sys
runpy.run_path({str(ROOT / folder / "conftest.py")!r})
print({{"torch", "transformers", "triton"}} & set(sys.modules))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
