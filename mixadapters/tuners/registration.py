"""The only code that touches PEFT's tables of types. PEFT has no public way to add one from outside."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from mixadapters.core.config import MixtureConfig
from mixadapters.core.names import check_name


def peft_type(name: str) -> PeftType:
    """The member `name` of PEFT's enum of types; added if it is not there. Callable any number of times."""
    found = PeftType._member_map_.get(name)
    if found is not None:
        return found
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # from Python 3.12 on, attribute access does not look at the tables
    return member


def config_class(kind: Any) -> type[MixtureConfig] | None:
    """The config of a PEFT type, as files name it, if it is one of ours."""
    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    return found if found is not None and issubclass(found, MixtureConfig) else None


class Prefix(str):
    """The prefix of a type's keys. PEFT asks it whether a new adapter's name is in it, before anything else."""

    __slots__ = ()

    def __contains__(self, name: Any) -> bool:
        check_name("adapter_name", name, self)
        return super().__contains__(name)


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Make `name` a PEFT type with the prefix `<name>_`. Idempotent, and safe when a module is reloaded.

    Raises:
        RuntimeError: another class has the name, or another type the prefix.
    """
    member, prefix = peft_type(name.upper()), f"{name}_"
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is config_cls:
        return
    if known is not None:
        if (known.__module__, known.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
            raise RuntimeError(f"PEFT type {name!r} is already {known.__module__}.{known.__qualname__}")
        for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            table.pop(member, None)
    if taken := [t for t, p in PEFT_TYPE_TO_PREFIX_MAPPING.items() if p == prefix and t != member]:
        raise RuntimeError(f"prefix {prefix!r} is already used by {taken}")
    model_cls.prefix = prefix  # type: ignore[attr-defined]
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=Prefix(prefix))
