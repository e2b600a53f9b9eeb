"""The fields that all methods share. Configs are data that survives JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME

from mixadapters.core.card import complete_card
from mixadapters.core.fields import check_fields
from mixadapters.core.files import SavedAdapter
from mixadapters.core.folders import written_aside
from mixadapters.core.registry import nearest

FORMAT_VERSION = 1  # of saved configs and weights; raised when old files can no longer be read as they are


@dataclass
class MixtureConfig(PeftConfig):
    """What a config of any method may say. `target_modules=None` takes the sites of the method by architecture."""

    # Facts of a method, not fields.
    stages: ClassVar[dict[str, tuple[str, ...]]] = {}  # name -> patterns of the parameters that train together
    needs: ClassVar[frozenset[str]] = frozenset()  # batch columns without which the method does nothing
    _used: ClassVar[Any] = None  # which adapter an object describes, set by the model

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Suffixes, or one regular expression, of modules to adapt. None: the method's own sites.",
            "pattern": True,
            "free": True,
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, likewise.", "pattern": True, "free": True}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt. None: all.", "least": 0, "free": True}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Name of the list of layers, if not the first that is numbered.",
            "pattern": True,
            "free": True,
        },
    )
    modules_to_save: list[str] | set[str] | None = field(
        default=None,
        metadata={
            "help": "Modules trained and saved whole, such as a classification head.",
            "pattern": True,
            "free": True,
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Module name or regular expression -> rank, where not `r`.", "least": 1, "pattern": True,
            "free": True,
        },
    )  # fmt: skip
    init_weights: bool = field(
        default=True, metadata={"help": "Start as the base model. False: at random, for tests.", "free": True}
    )
    sites: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Role -> regular expression of its modules, for architectures not in the table.",
            "patterns": True,
            "free": True,
        },
    )
    hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of adapted blocks, where neither block nor model config tells.",
            "least": 1,
            "free": True,
        },
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Not supported: adapters sit on modules. Wrap the whole MoE block instead."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Embedding rows trained beside the adapter, as in PEFT.", "least": 0}
    )
    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "Format of the saved files.", "least": 1, "free": True}
    )
    digest: str | None = field(
        default=None,
        metadata={"help": "Of the weights that are saved with this config; filled in, and checked.", "free": True},
    )
    base_digest: str | None = field(
        default=None,
        metadata={"help": "Of some weights of the base model; filled in, and another one is warned of.", "free": True},
    )
    trained_beside: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Adapters of other types in the same model, name -> type; filled in, and asked for.",
            "free": True,
        },
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> MixtureConfig:
        # PEFT would drop unknown keys of a saved config with a warning. A file without a type is for PEFT to refuse.
        known = {f.name for f in fields(cls)}
        if not kwargs or kwargs.keys() & known:
            refuse_unknown(cls, kwargs)
        else:
            name = next(iter(kwargs))
            said = f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}"  # what PEFT looks for
            raise TypeError(f"{said}.{nearest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version} is newer than this mixadapters reads ({FORMAT_VERSION}); "
                "upgrade mixadapters"
            )
        if self.target_parameters:
            raise ValueError(
                f"target_parameters={self.target_parameters} is not supported: target the module that holds them"
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None and self.sites is None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} has no effect on target_modules given as a string; "
                "write the layers into the expression, or give a list"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform")

    def trained_in(self, stage: str) -> tuple[str, ...]:
        """Patterns of the parameters that train in a stage of `stages`."""
        return type(self).stages[stage]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_used"}  # not in copies

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does; and where PEFT has written a model card before, complete it with how to load the adapter."""
        from mixadapters import __version__  # not known yet while this module is imported

        self._note_others()
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory={save_directory!r} is a file; name a folder")
        auto_mapping = kwargs.get("auto_mapping_dict")
        content = self.to_dict() | ({} if auto_mapping is None else {"auto_mapping": auto_mapping})
        os.makedirs(save_directory, exist_ok=True)
        with written_aside(Path(save_directory) / CONFIG_NAME) as aside:
            aside.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        complete_card(save_directory, self, __version__, auto_mapping)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, of values that JSON takes: sets are sorted lists."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    def registered_by(self) -> dict[str, str]:
        """What a process must import before it loads this adapter: module -> what that registers. Said in the card."""
        return {}

    def in_words(self) -> dict[str, list[str]]:
        """Fields that the model card tells in the method's own words: field -> its entries, [] where others say it."""
        return {}

    def _note_others(self) -> None:
        """Note adapters of other types that act in the model of this one: without them it would not do the same."""
        user, name, _ = self._used or (lambda: None, "", {})
        model: Any = user()
        configs = getattr(model, "peft_config", {})
        if configs.get(name) is self:
            layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            acting = {active for layer in layers for active in layer.active_adapters}
            kinds = {n: c.peft_type.value for n, c in configs.items() if n in acting}
            self.trained_beside = {n: k for n, k in kinds.items() if k != self.peft_type.value} or None

    def refuse_other(self, saved: SavedAdapter, adapter_name: str) -> None:
        """Refuse files of an adapter that this config does not describe: their weights would mean something else.

        Fields whose metadata say `free` may differ: what is only for training, and what keys and shapes tell. So may
        the keys that the metadata of a field name as `free_keys`, and a `told` field where one of both is None:
        earlier files do not say it.

        Raises:
            ValueError: the first field that differs, and its two values.
        """
        said = {key: value for key, value in saved.config.items() if key != "auto_mapping"}
        theirs = PeftConfig.from_peft_type(**said)
        where = f"{saved.model_id}: the saved adapter is not adapter {adapter_name!r} of this model"
        if type(theirs) is not type(self):
            raise ValueError(f"{where}: it is a {type(theirs).__name__}. Load it under another adapter_name")
        in_file, here = theirs.compared(self), self.compared(theirs)
        for f in fields(self):
            if f.name not in PeftConfig.__dataclass_fields__ and not f.metadata.get("free"):
                free = f.metadata.get("free_keys", ())
                if f.metadata.get("told") and None in (in_file[f.name], here[f.name]):
                    continue
                if without_keys(in_file[f.name], free) != without_keys(here[f.name], free):
                    raise ValueError(
                        f"{where}: {f.name}={in_file[f.name]!r} in the file, {here[f.name]!r} here. Load it under "
                        "another adapter_name, or into a model made with the file's config"
                    )

    def compared(self, other: Any) -> dict[str, Any]:
        """Its fields as they are compared with those of `other`, of which one is a file's."""
        return self.to_dict()


def without_keys(value: Any, keys: Collection[str]) -> Any:
    """A dict without these keys; any other value as it is."""
    return {k: v for k, v in value.items() if k not in keys} if isinstance(value, dict) else value


def refuse_unknown(cls: type, given: dict[str, Any]) -> None:
    """Raise ValueError if a key of `given` is not a field of the dataclass `cls`."""
    known = {f.name for f in fields(cls)}
    for name in given:
        if name not in known:
            raise ValueError(
                f"{cls.__name__} has no field {name!r}.{nearest(name, known)} A config saved by a newer mixadapters "
                "needs that version"
            )


def refuse_no_scale(scale: Any) -> None:
    """Raise ValueError for a factor of 0 on what adapters add: nothing would be added, and nothing train."""
    if scale == 0:
        raise ValueError(f"scale={scale} takes away what the adapter adds, and it would not train; leave it 1")
