"""PEFT's and transformers' verbs, for adapters of our types: what they are given is looked at first.

They have no seam for that: PEFT injects an adapter before it looks at its weights, goes by the config in memory where
an adapter of the name is there, and transformers asks no tuner at all. A causal PeftModel looks for aLoRA among
`adapter_names` before its tuner sees them. Types other than ours pass as they are.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import peft.peft_model
import peft.utils.save_and_load
from peft import LoraModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME
from transformers.integrations import PeftAdapterMixin

from mixadapters.core.card import complete_card
from mixadapters.core.config import MixtureConfig
from mixadapters.core.context import ForwardContext
from mixadapters.core.files import FileWeights, SavedAdapter, being_loaded, loading, read_adapter, read_config
from mixadapters.core.injection import refuse_taken
from mixadapters.core.layer import AdapterHost
from mixadapters.core.model import MixtureModel
from mixadapters.core.rows import RowNames
from mixadapters.tuners.registration import config_class

MARK = "_mixadapters_verb"  # on a function that has been replaced


def watch_verbs() -> None:
    """Have the verbs of PEFT and transformers look at the files first. Callable any number of times."""
    from_pretrained = PeftModel.__dict__["from_pretrained"].__func__
    if hasattr(from_pretrained, MARK):
        return

    @functools.wraps(from_pretrained)
    def peft_from_pretrained(cls: type, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        with loading(_saved(model_id, model, kwargs)):
            loaded = from_pretrained(cls, model, model_id, *args, **kwargs)
        _warn_of_others(model_id, loaded)
        return loaded

    peft_load_adapter = PeftModel.load_adapter

    @functools.wraps(peft_load_adapter)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        saved = _saved(model_id, self.get_base_model(), kwargs)
        config = self.peft_config.get(adapter_name)
        if saved is not None and saved.other is not None and config is not None:
            raise ValueError(saved.other)
        with loading(saved):
            return peft_load_adapter(self, model_id, adapter_name, *args, **kwargs)

    write_card = PeftModel.create_or_update_model_card

    @functools.wraps(write_card)
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        from mixadapters import __version__

        write_card(self, output_dir)
        for name, config in self.peft_config.items():
            if isinstance(config, MixtureConfig):
                kind = self._get_base_model_class() if config.task_type is None else None
                mapping = kind and {"base_model_class": kind.__name__, "parent_library": kind.__module__}
                complete_card(output_dir, config, __version__, mapping, "" if name == "default" else name)

    for name in ("get_alora_offsets_for_forward", "get_alora_offsets_for_generate"):
        setattr(peft.peft_model, name, _with_read_names(getattr(peft.peft_model, name)))
    setattr(peft_from_pretrained, MARK, True)
    PeftModel.from_pretrained = classmethod(peft_from_pretrained)
    PeftModel.load_adapter = load_adapter
    PeftModel.create_or_update_model_card = create_or_update_model_card
    _watch_weights()
    _watch_tuners()
    _watch_lora()
    _watch_transformers()


def _watch_weights() -> None:
    load_weights = peft.load_peft_weights

    @functools.wraps(load_weights)
    def load_peft_weights(model_id: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        saved = _saved(model_id, None, kwargs)
        weights = load_weights(model_id, *args, **kwargs)
        return weights if saved is None else FileWeights(weights, saved)

    state_dict_of = peft.get_peft_model_state_dict

    @functools.wraps(state_dict_of)
    def get_peft_model_state_dict(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        weights = state_dict_of(model, *args, **kwargs)
        given = inspect.signature(state_dict_of).bind(model, *args, **kwargs).arguments
        name = given.get("adapter_name", "default")
        config = getattr(model, "peft_config", {}).get(name)
        if not isinstance(config, MixtureConfig):
            return weights
        shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
        return FileWeights(weights, SavedAdapter(f"the weights of an adapter {name!r}", config.to_dict(), shapes))

    for module in (peft, peft.utils, peft.utils.save_and_load, peft.peft_model):
        module.load_peft_weights = load_peft_weights
        module.get_peft_model_state_dict = get_peft_model_state_dict


def _watch_tuners() -> None:
    begin = BaseTuner.__init__

    @functools.wraps(begin)
    def begin_tuner(self: Any, model: Any, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own types would take the name of one of ours, which then nobody saves."""
        refuse_taken(model, adapter_name, AdapterHost)
        begin(self, model, peft_config, adapter_name, *args, **kwargs)

    BaseTuner.__init__ = begin_tuner


def _watch_lora() -> None:
    lora_hooks = LoraModel._enable_peft_forward_hooks

    @functools.wraps(lora_hooks)
    def enable_peft_forward_hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = ForwardContext.find(self.model)
        if kwargs.get("adapter_names") is not None and context is not None and context.hosted:
            raise ValueError(
                f"adapter_names of a LoRA model does not reach the adapters {sorted(context.hosted)} of other types "
                "in it: inject the LoRA first (inject_adapter_in_model), and make the PeftModel of the other type, "
                "whose adapter_names reach both"
            )
        return lora_hooks(self, *args, **kwargs)

    LoraModel._enable_peft_forward_hooks = enable_peft_forward_hooks


def _watch_transformers() -> None:
    mixin_load_adapter = PeftAdapterMixin.load_adapter

    @functools.wraps(mixin_load_adapter)
    def transformers_load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        saved = None if peft_model_id is None else _saved(peft_model_id, self, kwargs | _hub_options(kwargs))
        with loading(saved):
            return mixin_load_adapter(self, peft_model_id, *args, **kwargs)

    mixin_add_adapter = PeftAdapterMixin.add_adapter

    @functools.wraps(mixin_add_adapter)
    def transformers_add_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        marked = self._hf_peft_config_loaded
        try:
            mixin_add_adapter(self, *args, **kwargs)
        except Exception:  # transformers says that the model has adapters before it looks at what it is given
            self._hf_peft_config_loaded = marked
            raise

    PeftAdapterMixin.add_adapter = transformers_add_adapter
    PeftAdapterMixin.load_adapter = transformers_load_adapter


def _with_read_names(look_up: Any) -> Any:
    """PEFT's look-up of aLoRA, with `adapter_names` read before it: arrays are taken, what is no names is refused."""

    @functools.wraps(look_up)
    def with_read_names(model: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None and isinstance(model.base_model, MixtureModel):
            kwargs["adapter_names"] = list(RowNames.read(kwargs["adapter_names"]))
        return look_up(model, *args, **kwargs)

    return with_read_names


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What transformers passes on in other arguments."""
    inner = getattr(kwargs.get("load_config"), "download_kwargs", None) or {}
    return {**inner, **(kwargs.get("adapter_kwargs") or {})}


def _warn_of_others(model_id: Any, loaded: PeftModel) -> None:
    """Say what PEFT passes over: adapters of our types in folders inside, which acted beside the one that it loads."""
    if not os.path.isdir(model_id):
        return
    for path in sorted(Path(model_id).glob(f"*/{CONFIG_NAME}")):
        try:
            config, name = read_config(path), path.parent.name
        except ValueError:  # it is not what was to be loaded
            continue
        beside = config.get("trained_beside") if config_class(config.get("peft_type")) is not None else None
        if isinstance(beside, dict) and "default" in beside and name not in loaded.peft_config:
            warnings.warn(
                f"{path.parent} holds the {config['peft_type']} adapter {name!r}, which acted beside this one and is "
                "not loaded. To have both, put it into the base model first (inject_adapter_in_model)",
                stacklevel=3,
            )


def _saved(model_id: Any, model: Any, kwargs: dict[str, Any]) -> SavedAdapter | None:
    """The files, if they are those of one of our types. Warns where their weights are not finite: they are loaded, as
    an expert that no token is given to does no harm, and who looks for the reason needs them."""
    found = being_loaded()
    if found is not None and found.model_id == str(model_id):  # a verb that calls another
        return found
    saved = read_adapter(model_id, lambda kind: config_class(kind) is not None, **kwargs)
    if saved is None:
        return None
    if saved.not_finite:
        first, more = saved.not_finite[0], len(saved.not_finite) - 1
        warnings.warn(
            f"{saved.model_id}: {first!r}{f' and {more} more weights' if more else ''} hold NaN or infinite values: "
            "what goes through them will not be finite either. Load an earlier save",
            stacklevel=4,
        )
    renames = kwargs.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", None)
    return replace(saved, mapped=bool(renames))
