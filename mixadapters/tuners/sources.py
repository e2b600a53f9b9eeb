"""Trained adapters that become experts of a mixture: folders and hub ids, read strictly."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any

import peft
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from mixadapters.core.base_digest import warn_of_other_base
from mixadapters.core.config import MixtureConfig
from mixadapters.core.fields import check_number, default_of, fits
from mixadapters.core.files import digest_of, read_adapter, read_config
from mixadapters.core.folders import check_misspelt, folder_aside, new_folder
from mixadapters.core.names import check_free, check_name
from mixadapters.core.registry import nearest


def read_folder(
    where: str, spec: dict[str, Any], remedies: Mapping[str, str] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """Config and weights, in host memory, of the adapter that spec["source"] names.

    Args:
        where: names the field at the beginning of messages.
        remedies: types of other libraries, and what helps.

    Raises:
        ValueError: there is none, it is not whole, or of a type that PEFT does not know.
    """
    source, revision = spec["source"], spec.get("revision")
    try:
        check_misspelt(str(source))  # the hub would be asked ten times
        found = read_adapter(source, lambda kind: True, revision=revision)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as an adapter folder or hub id: {error}") from error
    kind = None if found is None else found.config.get("peft_type")
    if isinstance(kind, str) and kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        remedy = (remedies or {}).get(kind, "import what registers it, or save it as LoRA")
        raise ValueError(f"{where} is a {kind} adapter, a type that PEFT does not know: {remedy}")
    try:
        if found is not None and found.other is not None:
            raise ValueError(found.other)
        if found is not None and isinstance(kind, str):
            _refuse_newer(PEFT_TYPE_TO_CONFIG_MAPPING[kind], found.config)
        saved = PeftConfig.from_pretrained(source, revision=revision)
        return saved, dict(load_peft_weights(source, device="cpu", revision=revision))
    except (ValueError, OSError, KeyError, TypeError) as error:  # of PEFT, for what is no adapter of its types
        inside = sorted(file.parent.name for file in Path(str(source)).glob(f"*/{CONFIG_NAME}"))
        remedy = f". It holds {inside[:5]}, which are adapter folders: name one of these" if inside else ""
        raise ValueError(f"{where} cannot be read as an adapter folder or hub id: {error}{remedy}") from error


def _refuse_newer(cls: type[PeftConfig], config: Mapping[str, Any]) -> None:
    """Refuse fields that this PEFT does not know, of which it would warn: what is adapted may be more than it reads.

    Those that are turned off do nothing. Our own configs refuse theirs themselves, and name what was meant.
    """
    if issubclass(cls, MixtureConfig):
        return
    known = {field.name for field in fields(cls)}
    for name, value in config.items():
        if name not in known and value not in (None, False, "", [], {}):
            raise ValueError(
                f"its {CONFIG_NAME} has {name}={value!r:.80}, which {cls.__name__} of PEFT {peft.__version__} does "
                f"not know (it was saved by {config.get('peft_version', 'another version')!s:.40}): upgrade PEFT, or "
                "take the field out of the file if it changes nothing of what the adapter computes"
            )


def check_new_folder(verb: str, folder: Any) -> None:
    """Refuse what is no path of a folder to write to, or holds something, such as what was gathered."""
    if not isinstance(folder, (str, os.PathLike)) or Path(folder).is_file():
        raise ValueError(f"{verb}: folder={folder!r} is no folder; give the path of a new one")
    try:
        new_folder(Path(folder))
    except ValueError as error:
        raise ValueError(f"{verb}: {error}") from None


def write_adapter(folder: str | os.PathLike[str], config: PeftConfig, weights: Mapping[str, Tensor]) -> None:
    """Write an adapter as PEFT saves one, for `PeftModel.from_pretrained`, into a folder that is new or empty.

    weights: by the keys of a file.

    Raises:
        ValueError: the folder holds something already.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    if isinstance(config, MixtureConfig):
        config.digest = digest_of(tensors, config.peft_type.value, config.modules_to_save)
    with folder_aside(Path(folder)) as aside:
        save_file(tensors, aside / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(aside))


def check_base_model(model: nn.Module, saved: Any, spec: dict[str, Any], where: str) -> None:
    """Refuse an adapter of another base model, by the names that both give; and warn of other weights, where its
    config knows those that it was trained on: PEFT's own do not."""
    if spec.get("check_base_model", True):
        refuse_other_base(model, saved.base_model_name_or_path, where, "{'source': ..., 'check_base_model': False}")
        warn_of_other_base(model, getattr(saved, "base_digest", None), where)


def refuse_other_base(model: nn.Module, theirs: str | None, where: str, remedy: str) -> None:
    """Raises ValueError: the name of an adapter's base model is not that of the model. `remedy`: how to say it is."""
    if not isinstance(theirs, (str, type(None))):  # of a file
        raise ValueError(f"{where}: base_model_name_or_path={theirs!r:.200} must be a string")
    ours = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    same = theirs == ours or (theirs and ours and _same_folder(theirs, ours))
    if theirs and ours and not same:
        raise ValueError(
            f"{where} was trained on {theirs!r}, this model is {ours!r}; if they are the same, say so by {remedy}"
        )


def _same_folder(a: str, b: str) -> bool:
    """Whether two names are one folder, such as a relative path and an absolute one."""
    return os.path.isdir(a) and os.path.isdir(b) and os.path.samefile(a, b)


def same_module(a: str, b: str) -> bool:
    """Whether two paths name the same module of a backbone, with or without a head around it."""
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def key_of(by_path: Mapping[str, Any], path: str) -> str | None:
    """How entries by module call the module `path`; None where it has none."""
    return path if path in by_path else next((other for other in by_path if same_module(other, path)), None)


def rank_of(by_path: Mapping[str, int], path: str) -> int:
    """The rank at a module, 0 where there is none."""
    key = key_of(by_path, path)
    return 0 if key is None else by_path[key]


def expert_options(spec: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Arguments of `AdapterBank.add` that the entry of an expert holds for a module; {} where it holds none."""
    scales = spec.get("scales", {})
    key = key_of(scales, path)
    return {} if key is None else {"scale": scales[key], "up_bias": key in spec.get("biases", ())}


def warn_of_unused(
    config: Any, entries: Mapping[str, dict[str, Any]], names: Sequence[str], noun: str, verb: str
) -> None:
    """Say which of the fields `names`, by which new experts are made, do nothing now, where all are gathered.

    noun, verb: what an entry is called, and the method that adds a new one.
    """
    said = [f"{n}={value!r}" for n in names if (value := getattr(config, n)) != default_of(config, n)]
    if said and entries and all("source" in spec for spec in entries.values()):
        warnings.warn(
            f"{', '.join(said)}: gathered {noun}s keep the ranks and factors that they were trained with, so this is "
            f"for those alone that {verb} makes later; leave it out if there will be none",
            stacklevel=2,
        )


def sources_to_origins(entries: Mapping[str, dict[str, Any]]) -> None:
    """For a file: a source that has been gathered is its entry's `origin`, which loading does not read."""
    for spec in entries.values():
        if "source" in spec and "ranks" in spec:
            spec["origin"] = spec.pop("source")
        if "origin" in spec:
            spec["origin"] = public_origin(spec["origin"])


def entries_in_words(entries: Mapping[str, dict[str, Any]]) -> list[str]:
    """Named experts for a model card: each with the folder or hub id that it came from, and the factor on it."""
    found = []
    for name, spec in entries.items():
        origin = spec.get("origin", spec.get("source"))
        revision = f" at {spec['revision']}" if spec.get("revision") else ""
        factor = f", scale {spec['scale']}" if "scale" in spec else ""
        found.append(name if origin is None else f"{name} from {public_origin(origin)}{revision}{factor}")
    return found


def places_of(paths: Iterable[str], modules: Iterable[str]) -> dict[str, list[str]]:
    """path -> the modules that it names, with or without a head around the backbone."""
    by_end: dict[str, list[str]] = {}
    for module in modules:
        by_end.setdefault(module.rpartition(".")[2], []).append(module)
    return {path: [m for m in by_end.get(path.rpartition(".")[2], ()) if same_module(m, path)] for path in paths}


def public_origin(origin: str) -> str:
    """Where an expert came from, for others: a hub id as it is, of a local path the last part."""
    local = os.path.exists(origin) or "\\" in origin or origin.count("/") != 1 or origin.startswith((".", "/", "~"))
    return PurePath(origin.replace("\\", "/")).name if local else origin


def refuse_unsaveable(what: str, value: Any) -> None:
    """Refuse what JSON cannot hold when the config is made, not when a trained adapter is saved."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{what}={value!r} of type {type(value).__name__} cannot be saved in a config; use a number, a string, a "
            "list or a dict of these"
        ) from None


@dataclass(frozen=True)
class Entries:
    """A config's field of named experts: new ones, or trained ones by source."""

    field: str
    noun: str  # of one of them, with its article
    prefix: str  # of the method's keys
    arms: str  # a regular expression of the names that arms have
    kinds: dict[str, Any]  # entry -> its type
    given: tuple[str, ...]  # entries that a user writes; the others are filled in

    def check(self, given: Any, from_file: bool) -> dict[str, dict[str, Any]]:
        """Any accepted form -> {name: {entry: value}}, empty for new ones.

        Raises:
            ValueError: the field, the name, the value and what it takes.
        """
        field = self.field
        if isinstance(given, str):
            raise ValueError(f"{field}={given!r} must be a list of names or a dict of sources; write [{given!r}]")
        if isinstance(given, (list, tuple)):
            for name in given:
                check_name(field, name, self.prefix)
            if len(set(given)) != len(given):
                raise ValueError(f"{field}={list(given)} names {self.noun} twice")
            given = dict.fromkeys(given)
        if not isinstance(given, dict):
            raise ValueError(f"{field}={given!r} must be a list of names or a dict of sources")
        return {name: self._checked(name, entry, from_file) for name, entry in given.items()}

    def look_for_folders(self, given: Any, from_file: bool) -> None:
        """Warn where a list of names, which are new ones, has one that is the folder of a trained adapter.

        Raises:
            ValueError: it has one that can be no name, but a folder or a hub id.
        """
        if from_file or not isinstance(given, (list, tuple)):
            return
        for name in given:
            if not isinstance(name, str):
                continue
            if "/" in name or "\\" in name:
                short = PurePath(name.replace("\\", "/")).name
                raise ValueError(
                    f"{self.field}: {name!r} is a folder or a hub id, and a list names new ones: write {{{short!r}: "
                    f"{name!r}}} to read it"
                )
            if os.path.isfile(os.path.join(name, CONFIG_NAME)) and not self._is_own(name):
                warnings.warn(
                    f"{self.field}: a list names new ones, so the trained adapter in the folder {name!r} here is not "
                    f"read: write {{{name!r}: {name!r}}} to read it, or {{{name!r}: None}} for {self.noun} of its "
                    "name that is new, without this warning",
                    stacklevel=4,
                )

    def _is_own(self, folder: str) -> bool:
        """Whether a folder holds a mixture of this method, which is no source: what a run before this has saved."""
        return str(read_config(os.path.join(folder, CONFIG_NAME)).get("peft_type", "")).lower() + "_" == self.prefix

    def _checked(self, name: Any, given: Any, from_file: bool) -> dict[str, Any]:
        check_name(self.field, name, self.prefix)
        where = f"{self.field}[{name!r}]"
        if re.fullmatch(self.arms, name):
            raise ValueError(f"{self.field}: {name!r} is the name of an arm; choose another")
        if isinstance(given, (str, os.PathLike)):
            given = {"source": given}
        if not isinstance(given, (dict, type(None))):
            raise ValueError(f"{where}={given!r} must be a folder or hub id, or a dict of {list(self.given)}")
        spec = dict(given or {})
        for key, value in spec.items():
            if key not in self.kinds:
                known = list(self.given)
                raise ValueError(f"{where} has no entry {key!r}; known are {known}.{nearest(key, known)}")
            if key == "source" and isinstance(value, os.PathLike):
                spec[key] = value = str(value)
            if key == "revision" and value is None:
                continue
            if key == "scale" and value == 0:
                raise ValueError(f"{where}: scale={value!r} would leave nothing of the expert; leave the expert out")
            kind = self.kinds[key]
            if not fits(value, kind) or (key == "ranks" and min(value.values(), default=1) < 1):
                raise ValueError(f"{where}: {key}={value!r:.200} must be {_words(key, kind)}")
        if from_file and "source" in spec:
            raise ValueError(
                f"{where}: the saved config names a source, {spec['source']!r}, which is not followed: a file could "
                f"have any folder or repository read. Make the mixture in Python, {self.field}={{name: source}}, or "
                "take the entry out of adapter_config.json"
            )
        alone = sorted(spec.keys() & set(self.given))
        if not spec.keys() & {"source", "origin"} and alone:
            raise ValueError(f"{where}={spec} has no source: {alone} alone says nothing")
        return spec


def _words(key: str, kind: Any) -> str:
    words = {str: "a string", bool: "True or False", float: "a finite number"}
    return "a dict of modules to positive ranks" if key == "ranks" else words.get(kind, "a dict or list of modules")


def check_new(
    noun: str,
    name: Any,
    have: Sequence[str],
    adapters: Container[str],
    *,
    share: Any = 0.5,
    r: Any = None,
    source: Any = None,
    like: Any = None,
) -> None:
    """Refuse what a verb that adds an expert cannot take.

    Args:
        noun: what is added. have: the names that there are. adapters: those of the model's other adapters.
        share: of the weight that it starts with. r: its rank, for new ones. like: the one that it is a copy of.

    Raises:
        ValueError: the argument, its value and the remedy.
    """
    check_free(noun, name, have)
    if name in adapters:
        raise ValueError(
            f"{noun} {name!r} has the name of another adapter of this model: PEFT would drop its weights when it "
            "saves. Choose another name"
        )
    check_number("share", share, above=0, below=1)
    if like is not None and like not in have:
        raise ValueError(f"like={like!r}: unknown {noun}; have {list(have)}.{nearest(like, have)}")
    if like is not None and (r is not None or source is not None):
        other = f"r={r!r}" if source is None else f"source={source!r}"
        raise ValueError(
            f"like={like!r} and {other}: a copy has the ranks and weights of that {noun}; give one of both"
        )
    if r is not None and source is not None:
        raise ValueError(f"r={r!r}: a source brings its own rank; leave r out")
    if r is not None and (not isinstance(r, int) or isinstance(r, bool) or r < 1):
        raise ValueError(f"`r` should be a positive integer value but the value passed is {r!r}")
