"""Base models whose experts have been cut, on disk: as transformers saves them where it can load them again.

A config of transformers has one number of experts for all layers. Where layers have as many, the folder is an ordinary
one. Where they do not, or where several of a router's columns go by one expert, a file of ours says what each layer
has, and `load_pruned` reads it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from mixadapters.core.files import not_finite
from mixadapters.core.folders import check_folder, folder_aside
from mixadapters.core.hooks import root_of
from mixadapters.core.json_text import parse_json
from mixadapters.surgery.bases import BASES
from mixadapters.surgery.blocks import BaseExperts, base_layers
from mixadapters.surgery.layouts import EXPERTS_FILE, FORMAT, holds_experts, hook_saving, save_cut
from mixadapters.surgery.view import check_model

LARGEST_FILE = 2**22  # bytes of the file above
OPTIONS = ("dtype", "device_map", "attn_implementation", "experts_implementation", "max_memory", "offload_folder")


def save_pruned(model: nn.Module, folder: str | Path) -> bool:
    """Save a base model whose experts have been cut, with a model card.

    Adapters of it are saved by their own `save_pretrained`.

    Args:
        folder: a new or an empty one.

    Returns:
        Whether stock transformers loads it: all layers have as many experts, each with a column of its router.

    Raises:
        ValueError: the folder holds something, or the model is no MoE base model of the table, or has adapters in it.
    """
    check_model(model)
    root: Any = root_of(model)
    if any("base_layer" in name.split(".") for name, _ in root.named_modules()):
        raise ValueError(
            "the model has adapters in it: save those by save_pretrained, and the base without them (model.unload())"
        )
    if not base_layers(root) or not isinstance(root, PreTrainedModel):
        raise ValueError(f"{type(root).__name__} has no experts of a base model; use its own save_pretrained")
    with folder_aside(folder) as aside:
        return save_cut(root, aside)


def load_pruned(folder: str | Path, **options: Any) -> Any:
    """The model that `save_pruned` has written, in evaluation mode.

    Args:
        folder: on this machine; nothing in it is run, and no other place is looked at.
        options: of `from_pretrained`: dtype, device_map, attn_implementation ...

    Raises:
        ValueError: the folder has not what a pruned model needs, or something that does not fit.
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"load_pruned takes no {unknown}; it takes {list(OPTIONS)}")
    check_folder(folder)
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"folder={str(folder)!r} has no config.json: name a folder that save_pruned has written")
    config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    cls = _class_of(config)
    layouts = _read_layouts(path / EXPERTS_FILE) if (path / EXPERTS_FILE).exists() else None
    made = cls if layouts is None else _shaped(cls, layouts)
    try:
        model, told = made.from_pretrained(
            str(path), config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, **options,
        )  # fmt: skip
    except SafetensorError as error:
        raise ValueError(f"folder={str(folder)!r}: its weights are not whole: {error}") from None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # transformers' own of shapes; its report in the log has the keys
        raise ValueError(f"folder={str(folder)!r} does not hold the weights of its model: {error}") from error
    except OSError as error:
        raise ValueError(
            f"folder={str(folder)!r} has no weights that save_pruned writes (load_compressed reads codes): {error}"
        ) from None
    wrong = {name: sorted(map(str, told[name]))[:3] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
             if told.get(name)}  # fmt: skip
    if wrong:
        raise ValueError(f"folder={str(folder)!r} does not hold the weights of its model: {wrong}")
    if broken := not_finite({name: p for name, p in model.named_parameters() if not p.is_meta}):
        more = f" and {len(broken) - 1} more weights" if broken[1:] else ""
        warnings.warn(
            f"folder={str(folder)!r}: {broken[0]!r}{more} hold "
            "NaN or infinite values: what goes through them will not be finite either. Load an earlier save",
            stacklevel=2,
        )
    if layouts is not None:
        model.__class__ = cls
        for layer in base_layers(model):
            layer.settle_map(layouts[layer.path]["columns"])  # type: ignore[attr-defined]
        hook_saving(model)
    return model.eval()


def _class_of(config: Any) -> type[PreTrainedModel]:
    """The class of transformers that a config names. Raises ValueError for others."""
    named = getattr(config, "architectures", None) or [None]
    cls = getattr(transformers, named[0], None) if isinstance(named[0], str) else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)) or config.model_type not in BASES:
        raise ValueError(
            f"architectures={named} of model_type={config.model_type!r} is no MoE base model that can be pruned; "
            f"those are {', '.join(sorted(BASES))}"
        )
    return cls


def _read_layouts(file: Path) -> dict[str, dict[str, Any]]:
    """What the layers of a folder have. Raises ValueError for a file that is not ours, or speaks nonsense."""
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
        said = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(said, dict) or said.keys() != {"format", "layers"} or said["format"] != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        layers = said["layers"]
        if not isinstance(layers, dict) or not layers:
            raise ValueError("it names no layers")
        for path, layout in layers.items():
            _check_layout(path, layout)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} does not say which experts the layers have: {error}") from None
    return layers


def _check_layout(path: str, layout: Any) -> None:
    whole = isinstance(layout, dict) and layout.keys() == {"experts", "columns"}
    columns = layout["columns"] if whole else None
    if not whole or not isinstance(columns, list) or not all(type(n) is int for n in (layout["experts"], *columns)):
        raise ValueError(f"layers[{path!r}] must be a number of experts, and one for each column of the router")
    if not 1 <= layout["experts"] <= len(columns) or {*columns} - {-1} != set(range(layout["experts"])):
        raise ValueError(f"layers[{path!r}]: columns={columns!r:.80} do not go by {layout['experts']} experts")


def _shaped(cls: Any, layouts: Mapping[str, Mapping[str, Any]]) -> Any:
    """A class of models as `cls`, whose layers have these experts from the start, before weights are read."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        names = [name for name, module in self.named_modules() if holds_experts(module)]
        if sorted(names) != sorted(layouts):
            raise ValueError(
                f"{config._name_or_path}: {EXPERTS_FILE} names the layers {sorted(layouts)[:3]}, and the model has "
                f"{names[:3]}"
            )
        for name in names:
            layer = BaseExperts(self, name, self.get_submodule(name), BASES[config.model_type], config.model_type)
            layer.shrink(layouts[name]["experts"], len(layouts[name]["columns"]))

    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
