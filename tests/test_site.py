"""The documentation site leads to every page and shows every public name; `make docs` checks the rest."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "site"
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
CONFIG = yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", SITE / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_of(nav: Any) -> Iterator[str]:
    """The pages that a nav of MkDocs names."""
    if isinstance(nav, str):
        yield nav
    for entry in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from pages_of(entry)


def test_the_nav_has_every_page_once(reference) -> None:
    written = [path.name for path in (ROOT / "docs").glob("*.md")]
    of_code = ["api/index.md", *(f"api/{name}.md" for name in reference.API)]
    assert sorted(pages_of(CONFIG["nav"])) == sorted([*written, *reference.PAGES.values(), *of_code])


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_lead_to_what_the_site_has(reference, page) -> None:
    prose = re.sub(r"^```.*?^```$", "", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    files = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link} - {""}
    places = {Path(os.path.normpath(f"docs/{file}")).as_posix() for file in files}
    assert not {place for place in places if place not in reference.PAGES and not place.startswith("docs/")}


def test_pages_that_lie_elsewhere_exist_and_hide_none_of_the_folder(reference) -> None:
    for source, page in reference.PAGES.items():
        assert (ROOT / source).is_file()
        assert not (ROOT / "docs" / page).exists()


def test_the_api_shows_every_name_that_a_package_exports(reference) -> None:
    shown = {name for _, modules in reference.API.values() for name in reference.names_of(modules)}
    packages = SETUP["options"]["packages"].split()
    public = [name for name in packages if name.count(".") < 2 or name.startswith("mixadapters.tuners.")]
    exported = {
        f"{reference.origin(package, name)}.{name}" for package in public for name in reference.public_names(package)
    }
    assert len(exported) > 50
    assert not exported - shown


def test_names_are_traced_to_where_they_are_defined(reference) -> None:
    import mixadapters

    for name in reference.public_names("mixadapters"):
        home = reference.origin("mixadapters", name)
        assert getattr(importlib.import_module(home), name) is getattr(mixadapters, name)
        assert getattr(getattr(mixadapters, name), "__module__", home) in (home, "mixadapters.core.registry")


def test_nothing_is_fetched_while_a_page_is_read() -> None:
    assert CONFIG["theme"]["font"] is False
    assert not {"extra_javascript", "google_analytics"} & CONFIG.keys()
    assert "social" not in str(CONFIG["plugins"])


@pytest.mark.skipif(sys.platform == "win32", reason="make wants a POSIX shell")
def test_make_docs_is_strict_and_no_part_of_make_test() -> None:
    def recipe(target: str) -> str:
        command = ["make", "--dry-run", "--always-make", "-C", str(ROOT), target]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "mkdocs build --strict" in recipe("docs")
    assert "mkdocs" not in recipe("test")
