"""What a saved adapter holds, and what may be loaded: every key has its place, or is refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from mixadapters.core.base_digest import base_digest, warn_of_other_base
from mixadapters.core.context import ForwardContext
from mixadapters.core.engines import is_dtensor, is_partitioned, overwrite
from mixadapters.core.files import PREFIX, TOKENS, FileWeights, digest_of, orders_of, weights_of
from mixadapters.core.hooks import root_of
from mixadapters.core.layer import AdapterHost
from mixadapters.core.processes import rank
from mixadapters.core.walking import WRAPPERS, outside_adapters

logger = logging.getLogger(__name__)


class SavedForm(BaseTuner):
    """The keys of a saved adapter, in both directions."""

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name follows `<prefix>adapters`, however deep the parameter lies. Keys of heads have none any more.

        Embeddings that are saved modules too come with the name behind that of PEFT's wrapper, those of which tokens
        train with the name at the end.
        """
        for holder in (f"{cls.prefix}adapters", "modules_to_save"):
            before, found, after = key.partition(f".{holder}.{adapter_name}.")
            if found:
                return f"{before}.{holder}.{after}"
        return key.removesuffix(f".{adapter_name}") if key.endswith(f"{TOKENS}.{adapter_name}") else key

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        """PEFT's selection; what is incomplete is not saved, and the config gets the digest of what is.

        Raises:
            ValueError: weights of the adapter are not among those selected, or hold nothing here.
        """
        if not state_dict and rank():  # what is sharded is gathered by the first process, which saves it
            return {}
        complete(state_dict, model)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        have = {WRAPPERS.sub("", key) for key in found}
        if missing := sorted(key for key in own_keys(model, cls.prefix, adapter_name) if key not in have):
            raise ValueError(
                f"adapter {adapter_name!r} cannot be saved: {len(missing)} of its weights are missing, such as "
                f"{missing[0]!r}. Either the state_dict that was given lacks them, or their key holds the name of "
                f"another adapter ({unwanted_adapter_names}), for whose they are taken"
            )
        if empty := [key for key, tensor in found.items() if tensor.is_meta]:
            raise ValueError(
                f"adapter {adapter_name!r} cannot be saved: {empty[0]!r} is on the meta device and holds nothing; "
                "load its weights first, without offloading"
            )
        saved = {cls._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in found.items()}
        unwrapped = {WRAPPERS.sub("", key): tensor for key, tensor in state_dict.items()}
        for name, module in outside_adapters(model):
            if isinstance(module, AuxiliaryTrainingWrapper):
                place = WRAPPERS.sub("", f"{name}.")
                inside = {k.removeprefix(place): v for k, v in unwrapped.items() if k.startswith(place)}
                heads = module.adapter_state_dict(adapter_name, inside)
                saved |= {f"{place}{key}": tensor for key, tensor in heads.items()}
        _look_at_shards(model, adapter_name, saved)
        plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in saved.values())  # none is sharded
        kind = config.peft_type.value
        digest = digest_of(saved, kind, config.modules_to_save) if plain else None
        orders = (f"{name}={of_it}" for name, of_it in orders_of(kind, vars(config)).items())
        config.digest = None if digest is None else " ".join([digest, *orders])
        config.base_digest = base_digest(root_of(model))
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's mapping; weights that are missing, left over or of another shape are an error, not a warning.

        Beside its own an adapter may bring what PEFT saves with it: its heads and trained tokens, and the embeddings.
        """
        saved = state_dict.saved if isinstance(state_dict, FileWeights) else None
        if saved is not None:
            config.refuse_other(saved, adapter_name)
            if not saved.mapped:
                warn_of_other_base(root_of(model), saved.config.get("base_digest"), f"adapter {adapter_name!r}")
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        bare = not any(isinstance(module, BaseTuner) for module in model.modules())
        if len(remapped) < len(state_dict):
            _refuse_twice(cls, adapter_name, state_dict)
        given = {key.removeprefix(PREFIX) if bare else key: tensor for key, tensor in remapped.items()}
        own_here = own_state(model, cls.prefix, adapter_name)
        own = {WRAPPERS.sub("", key) for key in own_here}
        heads = head_keys(model, adapter_name)
        if saved is not None:
            _refuse_overwritten(adapter_name, saved.shapes, heads)
        embeddings = embedding_keys(model)
        check_keys(adapter_name, given, own, heads | embeddings | _token_twins(given))
        here = own_here | outside_state(model, given.keys() - own_here.keys())
        check_shapes(adapter_name, given, {key: tuple(here[key].shape) for key in given if key in here})
        check_kinds(adapter_name, given, here)
        if saved is not None and saved.other is not None:
            raise ValueError(saved.other)
        if replaced := sorted((embeddings - heads) & given.keys() & here.keys()):
            logger.warning(
                "the file of adapter %r brings embeddings, which replace those of the base model: %s",
                adapter_name, replaced,
            )  # fmt: skip
        # Embeddings that are a saved module too come twice; the other copy has been mapped.
        return {key: tensor for key, tensor in remapped.items() if (key.removeprefix(PREFIX) if bare else key) in here}


def _look_at_shards(model: nn.Module, adapter_name: str, saved: dict[str, Tensor]) -> None:
    """Weights that an engine has shared out are no file: refuse what is empty here, and say what no file can take.

    All processes may call `save_pretrained` with what accelerate has gathered, which is nothing but in the first. That
    one writes.

    Raises:
        ValueError: a weight has no entries in the first process.
    """
    remedy = (
        "In all processes weights = accelerator.get_state_dict(model); in the first "
        "save_pretrained(folder, state_dict=weights)"
    )
    empty = [key for key, tensor in saved.items() if not tensor.numel()]
    if empty and rank() == 0 and any(map(is_partitioned, model.parameters())):
        raise ValueError(
            f"adapter {adapter_name!r} cannot be saved: {empty[0]!r} is shared out over processes (DeepSpeed ZeRO-3) "
            f"and has no entries in this one. {remedy}"
        )
    if parts := [key for key, tensor in saved.items() if is_dtensor(tensor)]:
        warnings.warn(
            f"{parts[0]!r} of adapter {adapter_name!r} is shared out over processes (FSDP2), and no file takes it as "
            f"it is. {remedy}",
            stacklevel=2,
        )


def complete(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Put in what ZeRO-3 leaves out of the weights that it gathers for a save: all that the stage has frozen."""
    context = ForwardContext.find(model)
    kept = {} if context is None else context.engine.kept
    prefix = PREFIX if any(isinstance(module, BaseTuner) for module in model.modules()) else ""
    for name, tensor in kept.items():
        state_dict.setdefault(f"{prefix}{name}", tensor)


def restore_frozen(model: nn.Module, adapter_name: str, folder: Path) -> None:
    """Give the frozen weights of an adapter what its folder holds: engines that shard a model resume without them.

    All processes call it.

    Raises:
        ValueError: the folder lacks one.
    """
    file = next((f for f in (folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME) if f.is_file()), None)
    if file is None:
        return
    with weights_of(file) as weights:
        for path, host in model.named_modules():
            if not isinstance(host, AdapterHost) or adapter_name not in host.adapters:
                continue
            for name, parameter in host.adapters[adapter_name].named_parameters():
                key = f"{WRAPPERS.sub('', path)}.{host.prefix}adapters.{name}"
                if not parameter.requires_grad:
                    if key not in weights:
                        raise ValueError(f"{file} holds no {key!r}, with which the run was to go on")
                    overwrite(parameter, weights[key])


def _token_twins(given: dict[str, Tensor]) -> set[str]:
    """Keys of trained tokens that the file has under the name of a tied table too: the other one is loaded."""
    tokens = {key: tensor for key, tensor in given.items() if TOKENS in key}
    return {
        key
        for key, tensor in tokens.items()
        if key.endswith(TOKENS) and any(o != key and torch.equal(t, tensor) for o, t in tokens.items())
    }


def _refuse_twice(cls: type[SavedForm], adapter_name: str, given: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for key in given:
        plain = cls._remove_adapter_name_from_key(key.removeprefix(PREFIX), adapter_name)
        if plain in seen:
            raise ValueError(
                f"adapter {adapter_name!r}: {seen[plain]!r} and {key!r} are two keys of one weight, so one would be "
                "lost: take out one of them"
            )
        seen[plain] = key


def _refuse_overwritten(adapter_name: str, given: Iterable[str], heads: set[str]) -> None:
    """Refuse keys of a file that have the form which keys of heads have in the model: PEFT writes over these."""
    inside = {key.removeprefix(PREFIX) for key in heads}
    if stray := sorted(key for key in given if key.removeprefix(PREFIX) in inside):
        raise ValueError(
            f"adapter {adapter_name!r}: {stray[0]!r} is no key of a file: heads and tokens are saved without the "
            "adapter's name, and this one would be lost. Take it out"
        )


def own_hosts(model: nn.Module, prefix: str, adapter_name: str) -> Iterator[tuple[str, AdapterHost]]:
    """The layers that hold an adapter, with their paths."""
    for path, module in outside_adapters(model):
        if isinstance(module, AdapterHost) and module.prefix == prefix and adapter_name in module.adapters:
            yield path, module


def own_state(model: nn.Module, prefix: str, adapter_name: str) -> dict[str, Tensor]:
    """An adapter's own weights by their keys in the model."""
    return {
        f"{path}.{prefix}adapters.{adapter_name}.{key}": tensor
        for path, host in own_hosts(model, prefix, adapter_name)
        for key, tensor in host.adapters[adapter_name].state_dict().items()
    }


def own_keys(model: nn.Module, prefix: str, adapter_name: str) -> list[str]:
    """Keys of an adapter's own weights in the model, without what wrappers put into them."""
    return [WRAPPERS.sub("", key) for key in own_state(model, prefix, adapter_name)]


def outside_state(model: nn.Module, keys: Collection[str]) -> dict[str, Tensor]:
    """Those of the keys under which the model has weights outside adapters, heads included -> the weights."""
    found: dict[str, Tensor] = {}
    for path, module in outside_adapters(model):
        whole = isinstance(module, AuxiliaryTrainingWrapper)  # trained tokens lie in a layer of PEFT's own inside
        tensors = module.state_dict() if whole else {**module._parameters, **module._buffers}
        before = f"{path}." if path else ""
        found |= {key: t for name, t in tensors.items() if t is not None and (key := before + name) in keys}
    return found


def head_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """Keys in the model of an adapter's saved modules and trained tokens."""
    found: set[str] = set()
    for name, module in outside_adapters(model):
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            found.update(f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())
    return found


def embedding_keys(model: nn.Module) -> set[str]:
    """Keys under which PEFT saves the embeddings of a model, at both ends."""
    found: set[str] = set()
    for end in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, end)()
        except (AttributeError, NotImplementedError):
            continue
        for name in (name for name, part in outside_adapters(model) if module is not None and part is module):
            for inside in ("", "base_layer.", "original_module.", "modules_to_save.", "token_adapter.base_layer."):
                found |= {f"{name}.{inside}{part}" for part in ("weight", "bias")}
    return found


def head_shapes(model: nn.Module, config: Any) -> dict[str, tuple[int, ...]]:
    """Keys in a file of the modules that a config has saved whole -> their shapes. PEFT goes by the end of a name."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in outside_adapters(model):
        if any(name.endswith(head) for head in config.modules_to_save or ()):
            state = getattr(module, "original_module", module).state_dict()
            found |= {f"{name}.{key}": tuple(tensor.shape) for key, tensor in state.items()}
    return found


def token_keys(config: Any, given: Iterable[str]) -> set[str]:
    """Those of the given keys that are embedding rows which the config trains."""
    if config.trainable_token_indices is None:
        return set()
    return {key for key in given if key.endswith(TOKENS)}


def check_keys(adapter_name: str, given: Iterable[str], own: set[str], beside: set[str]) -> None:
    """Refuse files that lack a weight of the adapter, or bring one that has no place."""
    given = set(given)
    if missing := sorted(own - given):
        raise ValueError(
            f"the file holds {len(own) - len(missing)} of {len(own)} weights of adapter {adapter_name!r}: "
            f"{missing[0]!r} is missing. Was it saved from another base model or with another config?"
        )
    if extra := sorted(given - own - beside):
        raise ValueError(
            f"the file holds {len(extra)} weights that adapter {adapter_name!r} has no place for, such as "
            f"{extra[0]!r}. Was it saved from another base model or with another config?"
        )


def check_shapes(adapter_name: str, given: Any, wanted: dict[str, tuple[int, ...]]) -> None:
    """Refuse weights of other shapes than those of the model. given: key -> tensor or shape."""
    for key, shape in wanted.items():
        found = tuple(getattr(given[key], "shape", given[key]))
        if found != shape and 0 not in shape:  # a shard elsewhere has no entries here
            raise ValueError(
                f"adapter {adapter_name!r}: {key!r} is {found} in the file and {shape} in this model. Load it under "
                "another adapter_name, with its own config, or onto the model that it was trained on"
            )


def check_kinds(adapter_name: str, given: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    """Refuse numbers that are not real where the model's are, and would be cut to fit."""
    for key in given.keys() & here.keys():
        if here[key].is_floating_point() and not given[key].is_floating_point():
            raise other_kind(adapter_name, key, str(given[key].dtype))


def other_kind(adapter_name: str, key: str, dtype: str) -> ValueError:
    return ValueError(
        f"adapter {adapter_name!r}: {key!r} is of {dtype} in the file, where the model has real numbers: it holds no "
        "weights of this adapter"
    )
