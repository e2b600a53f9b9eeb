"""What MkDocs cannot do by itself: pages that lie outside of docs/, links to them, and GitHub's anchors."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from reference import API, PAGES, ROOT, exports, reference

LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
# What a browser fetches by itself. Links that a reader follows may lead anywhere.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\bsrc=["']?(?:https?:)?//|<link[^>]*\bhref=["']?(?:https?:)?//"""
)


def on_config(config: Any) -> Any:
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "wide.css", content=".md-grid { max-width: 80rem; }\n"))
    files.append(File.generated(config, "api/index.md", content=exports()))
    for name, (title, modules) in API.items():
        files.append(File.generated(config, f"api/{name}.md", content=reference(title, modules)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with the site's links, and fences that Python-Markdown reads."""
    uri = page.file.src_uri
    source = next((file for file, of in PAGES.items() if of == uri), f"docs/{uri}")

    def moved(found: re.Match[str]) -> str:
        path, mark, anchor = found[2].partition("#")
        if not path or "://" in path:
            return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        target = PAGES.get(file, file.removeprefix("docs/"))
        return found[1] + posixpath.relpath(target, posixpath.dirname(uri) or ".") + mark + anchor + found[3]

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(moved, prose) for prose in parts[::2]]
    parts[1::2] = [re.sub(r"^```(\w+) .*", r"```\1", fence) for fence in parts[1::2]]
    return "".join(parts)


def on_post_build(config: Any) -> None:
    """Refuse a site whose pages make a browser fetch something of another server."""
    for file in Path(config.site_dir).rglob("*.html"):
        if found := FETCHED.search(file.read_text(encoding="utf-8")):
            raise PluginError(f"{file.name} fetches from another server: {found[0]!r}")


def slug(title: str, separator: str = "-") -> str:
    """The anchor that GitHub gives to a heading, so that links work in both places."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", separator)
