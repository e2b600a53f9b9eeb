"""Names of adapters, domains, modalities and experts: what they may be, as a part of a key, and which there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast

from torch import nn

from mixadapters.core.registry import nearest

# Parts of keys that PEFT and torch's wrappers put in, and look for.
RESERVED = frozenset({
    "__base__", "base_model", "base_layer", "original_module", "modules_to_save", "token_adapter",
    "trainable_tokens_delta", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
})  # fmt: skip
LONGEST = 200  # bytes: a name is a folder's too, of which file systems take 255
TAKEN = frozenset(dir(nn.ModuleDict()))


Verb = TypeVar("Verb", bound=Callable[..., Any])


class Unnamed(str):
    """What a verb takes for `adapter_name` where it is not given: the active adapter. "default" where none is."""


UNNAMED = Unnamed("default")


def of_active(verb: Verb) -> Verb:
    """A verb of a tuner, with an argument `adapter_name`, that means the active adapter where that is not given."""
    place = list(signature(verb).parameters).index("adapter_name")

    @wraps(verb)
    def named(tuner: Any, *args: Any, **given: Any) -> Any:
        if len(args) >= place:
            args = (*args[: place - 1], tuner.named(args[place - 1]), *args[place:])
        else:
            given["adapter_name"] = tuner.named(given.get("adapter_name", UNNAMED))
        return verb(tuner, *args, **given)

    return cast(Verb, named)


def check_name(what: str, name: Any, prefix: str) -> None:
    """Refuse a name that cannot be one part of a key, or that others give a meaning to.

    Args:
        what: of the message, such as "adapter_name" or "domains".
        prefix: of the method's keys.

    Raises:
        ValueError: what is wrong with it.
    """
    reason = None
    if not isinstance(name, str) or not name:
        reason = "use a string that is not empty"
    elif len(name.encode(errors="replace")) > LONGEST:
        reason = f"it has over {LONGEST} bytes, and is the name of a folder too; use a shorter one"
    elif set(name) & set("./\\") or not name.isprintable() or name != name.strip():
        reason = "a name is one part of a key and of a path: no dots, slashes, line breaks or blanks at its ends"
    elif name in RESERVED:
        reason = "PEFT gives it a meaning of its own"
    elif name in TAKEN:
        reason = "it is an attribute of nn.ModuleDict, which holds modules by name"
    elif name.startswith(prefix):
        reason = f"what begins with {prefix!r} is taken for the method's own"
    if reason is not None:
        shown = repr(name)[:100]
        raise ValueError(f"{what}: {shown} is no name for this: {reason}")


def check_known(noun: str, name: Any, have: Iterable[str]) -> None:
    """Raises ValueError: there is none of this name. noun: what the names are of, such as "expert"."""
    have = list(have)
    if name not in have:
        raise ValueError(f"unknown {noun} {name!r}; have {have}.{nearest(str(name), have)}")


def check_free(noun: str, name: Any, have: Iterable[str]) -> None:
    """Raises ValueError: there is one of this name. noun: as in `check_known`."""
    have = list(have)
    if not isinstance(name, str):
        raise ValueError(f"{noun} {name!r:.80} must be a name, a string")
    if name in have:
        raise ValueError(f"{noun} {name!r} exists already; have {have}")


def check_apart(adapter_name: str, others: Iterable[str], base: set[str], keys: dict[str, set[str]]) -> None:
    """Refuse an adapter's name that is a part of another adapter's keys: PEFT would drop those when it saves.

    Args:
        others: names of the model's other adapters.
        base: the parts of the base model's keys, which begin those of every adapter.
        keys: adapter -> the parts of its keys behind its name.

    Raises:
        ValueError: which name is a part of which keys.
    """
    remedy = "PEFT takes such weights for another adapter's when it saves. Choose another adapter_name"
    if adapter_name in base:
        raise ValueError(f"adapter_name={adapter_name!r} is a part of the base model's keys: {remedy}")
    for other in others:
        if adapter_name in keys.get(other, ()):
            raise ValueError(
                f"adapter_name={adapter_name!r} is a part of the keys of adapter {other!r}, the name of an expert, a "
                f"domain or a part of its method: {remedy}"
            )
        if other in keys.get(adapter_name, ()):
            raise ValueError(
                f"adapter {adapter_name!r} has a domain, an expert or a part called {other!r}, as another adapter of "
                f"this model: {remedy}, or rename the domain"
            )
