"""What a saved adapter's model card says beside PEFT's own words: how to load it, and what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, try_to_load_from_cache

from mixadapters.core.fields import default_of
from mixadapters.core.folders import ADAPTER_FILE, written_aside

BEGIN, END = "<!-- mixadapters {} -->", "<!-- /mixadapters {} -->"  # of the adapter's folder, seen from the card
NO_SETTINGS = {  # fields that say nothing about the method
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "sites", "format_version", "digest", "base_digest", "trained_beside",
}  # fmt: skip
SHORT = 80  # characters of a value that is shown
MOST = 32  # entries of a field that are shown
CLASSES = {  # task type -> class that loads the base model
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def complete_card(
    folder: str, config: Any, version: str, auto_mapping: dict[str, str] | None = None, below: str | None = None
) -> None:
    """Complete the card that PEFT has written for the adapter in `folder`; saving again replaces what was said.

    The card lies in the folder, or in the one above where PEFT has put an adapter of another name than "default".
    Where there is none, nothing is written.

    Args:
        config: of the adapter.
        auto_mapping: class and library of the base model, as PEFT saves them where a config has no task type.
        below: folder of the adapter below that of the card, where the card lies in `folder`; "": the same folder.
    """
    path, below = Path(folder, "README.md"), below or ""
    if not path.is_file():
        path, below = Path(folder).resolve().parent / "README.md", Path(folder).resolve().name
    if not path.is_file():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    if card.data.get("library_name") != "peft":  # somebody else's readme
        return
    base = config.base_model_name_or_path or None
    licence = _licence(base)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "mixadapters", config.peft_type.value.lower()})
    if base and not card.data.get("base_model"):
        card.data["base_model"] = base
    if licence and not card.data.get("license"):
        card.data["license"] = licence
    said = [*_how_to_load(config, base, below, auto_mapping or {}), "", *_what_it_is(config, base, licence, version)]
    card.text = _put(card.text, "\n".join(said), below or ".")
    with written_aside(path) as aside:
        card.save(aside)


def _how_to_load(config: Any, base: str | None, below: str, auto_mapping: dict[str, str]) -> list[str]:
    name, library = auto_mapping.get("base_model_class"), auto_mapping.get("parent_library", "")
    if name is None:
        name, library = CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel"), ""
    source = "transformers" if library.split(".")[0] in ("", "transformers") else library
    where = f", revision={json.dumps(config.revision)}" if config.revision else ""
    make = f"{name}.from_pretrained({json.dumps(base)}{where})" if base else "...  # the model that it was trained on"
    options = f", subfolder={json.dumps(below)}, adapter_name={json.dumps(below)}" if below else ""
    return [
        f"## How to load{f' {_code(below)}' if below else ''}",
        "",
        "This adapter is of a type that PEFT learns from the package `mixadapters`. Import it before loading, or PEFT "
        f"ends in `KeyError: '{config.peft_type.value}'`.",
        "",
        "```python",
        "import mixadapters",
        *(_import_line(module, what) for module, what in config.registered_by().items()),
        "from peft import PeftModel",
        *([f"from {source} import {name}"] if base else []),
        "",
        f"base = {make}",
        f'model = PeftModel.from_pretrained(base, "path or hub id of this adapter"{options})',
        "```",
    ]


def _import_line(module: str, what: str) -> str:
    """Of a module that registers what the adapter needs; a script has no name by which others could import it."""
    if module == "__main__" or not all(part.isidentifier() for part in module.split(".")):
        return f"...  # run the code that registers {what}, from the script that trained this adapter"
    return f"import {module}  # registers {what}"


def _what_it_is(config: Any, base: str | None, licence: str | None, version: str) -> list[str]:
    lines = [f"- Type: `{config.peft_type.value}`, saved by mixadapters {version}"]
    if base:
        revision = f", revision {_code(config.revision)}" if config.revision else ""
        lines.append(f"- Base model: {_code(base)}{revision}{f', licence {_code(licence)}' if licence else ''}")
    for stage, patterns in type(config).stages.items():
        lines.append(f"- Stage `{stage}` trains {', '.join(f'`{p}`' for p in patterns)}")
    told = config.in_words()
    for name, entries in ((name, entries) for name, entries in told.items() if entries):
        more = f" and {len(entries) - MOST} more" if len(entries) > MOST else ""
        lines.append(f"- {name.capitalize()}: {', '.join(map(_code, entries[:MOST]))}{more}")
    router = getattr(config, "router", None)
    for what in config.registered_by().values():
        lines.append(f"- Needs {what}, which is none of mixadapters': {_code(json.dumps(router, sort_keys=True))}")
    changed, longer = _changed(config, told)
    if changed:
        lines.append(f"- Settings other than the defaults: {', '.join(changed)}")
    if longer:
        lines.append(f"- Longer ones, in `{ADAPTER_FILE}`: {', '.join(map(_code, longer))}")
    return lines


def _changed(config: Any, told: Collection[str]) -> tuple[list[str], list[str]]:
    """The settings that differ from their defaults, as code, and the names of those that are too long to read.

    told: fields that the card has said already.
    """
    shown, longer = [], []
    hidden = NO_SETTINGS.union(told, () if config.sites is None else ["target_modules"])
    for f in fields(config):
        value = getattr(config, f.name)
        value = sorted(value) if isinstance(value, set) else value
        said = f.name in hidden or f.metadata.get("order")  # an order is that of the entries
        if said or value == default_of(config, f.name):
            continue
        if len(str(value)) < SHORT:
            shown.append(_code(f"{f.name}={value!r}"))
        else:
            longer.append(f.name)
    return shown, longer


def _code(text: str) -> str:
    """Text as code in a line of Markdown, whatever it holds: no heading, link or tag comes of it."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _put(text: str, said: str, below: str) -> str:
    """`said` in place of what stood there from an earlier save, else below the title."""
    begin, end = BEGIN.format(quote(below)), END.format(quote(below))
    said = f"{begin}\n{said}\n{end}"
    if begin in text and end in text:
        before, _, rest = text.partition(begin)
        return before + said + rest.partition(end)[2]
    lines = text.splitlines()
    title = next((i for i, line in enumerate(lines) if line.startswith("# ")), -1)
    return "\n".join([*lines[: title + 1], "", said, *lines[title + 1 :]])


def _licence(base: str | None) -> str | None:
    """The licence that the base model's own card names, if that card is on this machine."""
    if not base:
        return None
    path: Any = Path(base, "README.md")
    if not path.is_file():
        try:
            path = try_to_load_from_cache(base, "README.md")
        except ValueError:  # a path that is no hub id
            return None
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    licence = ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    return licence if isinstance(licence, str) else None
