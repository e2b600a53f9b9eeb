"""Refuses what a config names and the model does not have. PEFT would pass over it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from mixadapters.core.layer import HookedLayer
from mixadapters.core.registry import nearest
from mixadapters.core.sites import ARCHITECTURES, ROLES, layer_index
from mixadapters.core.walking import outside_adapters, plain_path

# Heads that PEFT adds to modules_to_save by the task, whether or not the model has one of this name.
HEADS = frozenset({"classifier", "score", "qa_outputs"})
TABLED = frozenset(getattr(row, role) for row in ARCHITECTURES.values() for role in ROLES)


def module_names(model: nn.Module) -> list[str]:
    """Paths of the modules of `model` as they are without adapters: a wrapped module and its base are one."""
    own = (name for name, module in outside_adapters(model) if not isinstance(module, HookedLayer))
    return list(dict.fromkeys(map(plain_path, own)))


def refuse_sites(sites: dict[str, str] | None, needed: Iterable[str], model: nn.Module) -> None:
    """Refuse `sites` of a user with an unknown role, or whose modules are not there.

    Args:
        needed: the roles that the config needs.

    Raises:
        ValueError: the role and its pattern.
    """
    names = module_names(model)
    for role, pattern in (sites or {}).items():
        if role not in {*ROLES, *needed}:
            raise ValueError(f"sites={sites}: there is no role {role!r}; roles are {sorted({*ROLES, *needed})}")
        # A config that has been used holds the table's own patterns, of which a model need not have every role.
        if role in needed and pattern not in TABLED and not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(
                f"sites[{role!r}]={pattern!r} matches no module of the model; a pattern matches whole paths, such as "
                f"{_example(names)!r}"
            )


def refuse_targets(targets: Any, model: nn.Module) -> None:
    """Refuse target_modules that are not there. PEFT passes over a suffix as long as another one matches.

    Raises:
        ValueError: which of them.
    """
    names = module_names(model)
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in names):
            raise ValueError(
                f"target_modules={targets!r} matches no module of the model. Target modules not found in the base "
                f"model: a string is a regular expression of whole paths, such as {_example(names)!r}"
            )
        return
    if targets is not None and not targets:
        raise ValueError("target_modules=[] names no module; None leaves it to the method where its adapters sit")
    _refuse_suffixes("target_modules", targets, names)


def refuse_layers(config: Any, model: nn.Module) -> None:
    """Refuse layers, and modules to be saved whole, that are not there.

    Raises:
        ValueError: which of them.
    """
    names = module_names(model)
    chosen = config.layers_to_transform
    if chosen is not None:
        wanted = {chosen} if isinstance(chosen, int) else set(chosen)
        if not wanted:
            raise ValueError("layers_to_transform=[] names no layer; None takes all")
        have = {index for name in names if (index := layer_index(name)) is not None}
        if unknown := sorted(wanted - have):
            raise ValueError(f"layers_to_transform={chosen}: the model has no layers {unknown}; it has {sorted(have)}")
    saved_whole = sorted(config.modules_to_save or ())
    for module in saved_whole:
        if module not in HEADS and not any(name.endswith(module) for name in names):
            raise ValueError(
                f"modules_to_save={saved_whole}: no module of the model is called {module!r}."
                f"{nearest(module, _last_parts(names))}"
            )


def refuse_exceptions(config: Any, model: nn.Module, adapted: list[str]) -> None:
    """Refuse modules to leave out that are not there, and ranks for modules that take no adapter.

    Args:
        adapted: paths of the modules whose adapters have a rank of their own.

    Raises:
        ValueError: which of them.
    """
    names, left_out = module_names(model), config.exclude_modules
    if isinstance(left_out, str):
        if not any(re.fullmatch(left_out, name) for name in names):
            raise ValueError(
                f"exclude_modules={left_out!r} matches no module of the model: a string is a regular expression of "
                f"whole paths, such as {_example(names)!r}"
            )
    else:
        _refuse_suffixes("exclude_modules", left_out, names)
        _refuse_blocks(left_out, names, adapted)
    for pattern in config.rank_pattern:
        if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in adapted):  # as PEFT reads it
            raise ValueError(
                f"rank_pattern={config.rank_pattern}: {pattern!r} matches no module that takes an adapter; those are "
                f"{_some(adapted)}"
            )


def _refuse_blocks(left_out: Any, names: list[str], adapted: list[str]) -> None:
    """Refuse entries that name what holds adapted modules: a list leaves out what it names, and nothing inside."""
    for entry in left_out or ():
        blocks = tuple(f"{name}." for name in names if f".{name}".endswith(f".{entry}"))
        if inside := next((path for path in adapted if path.startswith(blocks)), None):
            raise ValueError(
                f"exclude_modules={sorted(left_out)}: {entry!r} holds {inside!r}, which takes an adapter still: "
                "a list leaves out what it names and nothing inside. Give a pattern of whole paths, "
                f"{f'.*{re.escape(entry)}.*'!r}"
            )


def refuse_tokens(given: Any, model: nn.Module, strict: bool) -> None:
    """Refuse trainable_token_indices that are no rows of their embedding.

    Args:
        strict: whether tables without a token, and tokens that are named twice, are refused too.

    Raises:
        ValueError: which of them.
    """
    if given is None:
        return
    where = f"trainable_token_indices={given}"
    tables = given if isinstance(given, dict) else {None: given}
    if strict and (not tables or not all(tables.values())):
        raise ValueError(f"{where} names no token; leave it None, or name the rows to train")
    for name, tokens in tables.items():
        if strict and len(set(tokens)) < len(tokens):
            raise ValueError(f"{where} names a token twice; name each once")
        for size in _rows_of(name, model):
            if wrong := [token for token in tokens if not 0 <= token < size]:
                raise ValueError(f"{where}: the embedding has rows 0 to {size - 1}, and not {wrong}")


def _rows_of(name: str | None, model: nn.Module) -> list[int]:
    """How many rows the embeddings of this name have; None: the input embeddings, where the model tells them."""
    if name is not None:
        found = [module for path, module in outside_adapters(model) if path == name or path.endswith(f".{name}")]
    else:
        try:
            found = [model.get_input_embeddings()]
        except (AttributeError, NotImplementedError):  # a model without, or transformers that cannot tell
            found = []
    weights = (getattr(getattr(module, "original_module", module), "weight", None) for module in found)
    return [weight.shape[0] for weight in weights if weight is not None]


def _refuse_suffixes(field: str, given: Any, names: list[str]) -> None:
    for suffix in sorted(given or ()):
        if not any(name == suffix or name.endswith(f".{suffix}") for name in names):
            raise ValueError(
                f"{field}={sorted(given)}: no module of the model is called {suffix!r}."
                f"{nearest(suffix, _last_parts(names))}"
            )


def _last_parts(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def _example(names: list[str]) -> str:
    """A path such as people want to match: the deepest of the first."""
    return max(names[:20], key=lambda name: name.count("."), default="")


def _some(paths: list[str]) -> str:
    return f"{paths[:4]} and {len(paths) - 4} others" if len(paths) > 4 else str(paths)


def refuse_task(task: Any, model: nn.Module) -> None:
    """Refuse a task of models that generate where this one does not: PEFT would look for a method that it lacks."""
    name = getattr(task, "value", task)
    if name in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"task_type={name!r} is of models that generate text, and {type(model).__name__} does not: load the base "
            "as one that does, or name its own task, such as 'FEATURE_EXTRACTION'"
        )
